"""Tables of published numbers and ours in a terminal."""

import io
from itertools import product

from rich.console import Console

from ood_scores.benchmark.report.comparison import Compared, ComparisonRow, ComparisonTable
from ood_scores.cli.tables import only_model, published_table

SETS = ("svhn", "lsun_crop", "places365", "textures", "mean")
METRICS = ("FPR95 (ID positive)", "AUROC")


def table(*models: str) -> ComparisonTable:
    measured, missing = Compared("66.09", "54.32", "", "-11.77"), Compared("37.73", "not run", "", "")
    rows = [
        ComparisonRow(model, scorer, metric, (measured, missing, None, measured, measured), "")
        for model, scorer, metric in product(models, ("Mahalanobis", "GradNorm"), METRICS)
    ]
    return ComparisonTable("part", "source", SETS, tuple(rows))


def printed(shown: ComparisonTable, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(published_table(shown))
    return stream.getvalue()


def test_a_narrow_terminal_cuts_neither_names_nor_numbers() -> None:
    text = printed(table("ResNet-20"), 80)
    assert max(map(len, text.splitlines())) <= 80
    words = ("Mahalanobis", "GradNorm", *SETS, "positive)", "54.32 /", "66.09", "– / 37.73")
    assert [word for word in words if word not in text] == []


def test_the_model_is_a_column_only_if_there_are_several() -> None:
    assert only_model(table("ResNet-20")) == ["ResNet-20"]
    assert "ResNet-20" not in printed(table("ResNet-20"), 200)
    assert only_model(table("A", "B")) == []
    several = printed(table("ResNet-20", "DenseNet-100"), 200)
    assert several.count("DenseNet-100") == 4
    assert "54.32 / 66.09" in several
