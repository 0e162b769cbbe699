"""The benchmark specs of this repository: they load, the names in them exist, and published numbers are right."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import ood_scores
from ood_scores.benchmark import Spec, load_spec
from ood_scores.benchmark.spec import Part, Published
from ood_scores.data.catalog import CATALOG
from ood_scores.data.dataset_spec import parse
from ood_scores.data.kinds.base import DATASET_KINDS
from ood_scores.data.sources import remedy
from ood_scores.toml_tables import tomllib
from ood_scores.training import Recipe, load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SUITES = sorted((BENCHMARKS / "suites").glob("*.toml"))
PAPERS = sorted((BENCHMARKS / "papers").glob("*.toml"))
EPOCH = re.compile(r"runs/(\w+)_seed\d+/epoch_(\d+)\.safetensors")


@cache
def spec(name: str) -> Spec:
    return load_spec(BENCHMARKS / f"{name}.toml")


@cache
def recipe(name: str) -> Recipe:
    return load_recipe(BENCHMARKS / "recipes" / f"{name}.toml")


every_file = pytest.mark.parametrize("name", [f"{path.parent.name}/{path.stem}" for path in (*SUITES, *PAPERS)])
every_paper = pytest.mark.parametrize("name", [f"papers/{path.stem}" for path in PAPERS])


def test_suites_and_papers_exist() -> None:
    openood = {"cifar10", "cifar100", "imagenet200", "imagenet"}
    others = {"gradnorm_imagenet", "gradnorm_cifar", "scood_cifar10_lt", "scood_cifar100_lt", "imagenet_lt", "haas"}
    shifts = {"openmibood", "ssb", "mnist_osr", "imagenet_shifts", "cifar_c"}
    assert {path.stem for path in SUITES} == openood | others | shifts | {"real", "imagenet_real", "shortened"}
    rna = {"rna_cifar10_lt", "rna_cifar100_lt", "rna_imagenet_lt"}
    assert {path.stem for path in PAPERS} == {"gradnorm", "gradnorm_cifar", "haas2022", "haas2024"} | rna


def test_every_base_spec_is_extended() -> None:
    text = "".join(path.read_text() for path in (*SUITES, *PAPERS))
    for base in (BENCHMARKS / "suites" / "base").glob("*.toml"):
        assert f'base/{base.name}"' in text


@every_file
def test_names_in_shipped_specs_exist(name: str) -> None:
    for part in spec(name).parts:
        assert {part.id, *part.ood, *part.covariate, *filter(None, [part.fit])} <= part.sets.keys()
        for text in part.sets.values():
            assert parse(text).kind in DATASET_KINDS
        for table in part.scorer_tables:
            assert table.create().name == table.name


@every_file
def test_sets_of_shipped_specs_are_known_datasets(name: str) -> None:
    """All but those that need no files, and those of the folder ``OOD_SCORES_DATA``."""
    downloaded = {parse(known.spec).target for known in CATALOG if known.spec.endswith("download=true")}
    for text in {text for part in spec(name).parts for text in part.sets.values()}:
        kind, target, options = parse(text)
        if kind not in ("noise", "digits") and "$OOD_SCORES_DATA" not in text:
            assert remedy(text) or (target in downloaded and options["download"] == "true"), text


@every_file
def test_kept_checkpoints_are_kept_by_their_recipe(name: str) -> None:
    for model in (model for part in spec(name).parts for model in part.models):
        files = (model.checkpoint,) if isinstance(model.checkpoint, str) else model.checkpoint or ()
        for made, epoch in [match.groups() for match in map(EPOCH.fullmatch, files) if match]:
            assert int(epoch) % recipe(made).checkpoint_every == 0


@every_paper
def test_paper_specs_have_all_published_numbers(name: str) -> None:
    """Every number of a table is read, and their count is the product of the axes."""
    with open(BENCHMARKS / f"{name}.toml", "rb") as file:
        parts = tomllib.load(file)["part"]
    for raw, part in zip(parts, spec(name).parts, strict=True):
        promised = [
            len(table["values"]) * len(table.get("ood", [None])) * len(table["metrics"])
            for table in raw.get("published", [])
        ]
        dashes = str(raw.get("published", "")).count("'-'")
        assert len(part.published) == sum(promised) - dashes
        assert all(re.search(r"\d{4}, Tables? \d", number.source) for number in part.published)


def of(part: Part, **wanted: str | None) -> list[float]:
    return [n.value for n in part.published if all(getattr(n, key) == value for key, value in wanted.items())]


def means(part: Part) -> Iterator[tuple[Published, float]]:
    """Return the published means over datasets, and the means of the published values."""
    for number in part.published:
        if number.ood == "mean" and not number.metric.endswith("_sd"):
            same = {"model": number.model, "scorer": number.scorer, "metric": number.metric, "source": number.source}
            singles = [of(part, ood=ood, **same) for ood in part.ood]
            if all(singles):
                yield number, sum(values[0] for values in singles) / len(singles)


@pytest.mark.parametrize(
    ("name", "count"), [("gradnorm", 80), ("gradnorm_cifar", 20), ("rna_cifar10_lt", 21), ("rna_cifar100_lt", 21)]
)
def test_published_means_match_the_published_datasets(name: str, count: int) -> None:
    """A mistyped figure would change the mean, unless rounding hides it."""
    found = [pair for part in spec(f"papers/{name}").parts for pair in means(part)]
    assert len(found) == count
    assert [number.value for number, _ in found] == pytest.approx([mean for _, mean in found], abs=0.009)


@pytest.mark.parametrize(
    ("name", "start", "model", "scorer", "ood", "metric", "value"),
    [
        ("gradnorm", "Table 1: ImageNet", "BiT-M R101x1 (paper: BiT-S)", "GradNorm", "sun", "fpr95_id", 46.48),
        (
            "gradnorm",
            "Table 1: Mahalanobis",
            "BiT-M R101x1 (paper: BiT-S)",
            "Mahalanobis",
            "textures",
            "fpr95_id",
            52.23,
        ),
        ("gradnorm", "Table 2", "BiT-M R101x1 (paper: BiT-S)", "Block 4", "mean", "auroc", 85.11),
        ("gradnorm", "Table 3", "DenseNet-121", "GradNorm", "inaturalist", "fpr95_id", 23.87),
        ("gradnorm", "Table 4", "BiT-M R152x2 (paper: BiT-S)", "GradNorm", "mean", "auroc", 81.33),
        ("gradnorm", "Table 5", "BiT-M R101x1 (paper: BiT-S)", "U·V", "inaturalist", "fpr95_id", 50.05),
        ("gradnorm", "Table 7", "BiT-M R101x1 (paper: BiT-S)", "L0.8", "textures", "auroc", 92.07),
        ("gradnorm", "Table 7", "BiT-M R101x1 (paper: BiT-S)", "L∞", "mean", "fpr95_id", 83.56),
        ("gradnorm", "Table 8", "BiT-M R101x1 (paper: BiT-S)", "T=0.0625", "places", "auroc", 72.84),
        ("gradnorm", "Table 8", "BiT-M R101x1 (paper: BiT-S)", "T=2", "sun", "auroc", 91.67),
        ("gradnorm_cifar", "Table 6: CIFAR-100,", "ResNet-20", "GradNorm", "lsun_crop", "fpr95_id", 1.12),
        ("haas2022", "Tables 1, 4", "ResNet-18 L2 60", "GMM", "svhn", "auroc", 93.8),
        ("haas2022", "Tables 1, 4", "ResNet-50 No L2 350", None, None, "accuracy", 93.9),
        ("haas2022", "Table 4 (b)", "ResNet-50 No L2 350", "softmax", "svhn", "auroc", 96.4),
        ("haas2022", "Table 5", "ResNet-50 L2 100", "GMM on logits", "tinyimagenet", "auroc", 86.8),
        ("haas2022", "Tables 2 and 3", "no SN, leaky, L2", "GMM", "svhn", "auroc", 94.4),
        ("haas2022", "Tables 2 and 3", "SN, leaky, no L2", None, None, "nc1", 2.690),
        ("haas2024", "Table 1", "LogitNorm+ ResNet-18", "MSP", "cifar100_test", "auroc", 91.0),
        ("haas2024", "Table 2", "VGG-16 L2", "SM", "svhn", "fpr95_id", 36.4),
        ("haas2024", "Table 4", "CCT-7/3×1 L2", "Norm", "svhn", "fpr95_id", 62.9),
        ("haas2024", "Table 5", "ResNet-18 no L2", "Norm", "svhn", "auroc", 50.5),
        ("haas2024", "Table 6", "ResNet-50 L2", None, None, "accuracy", 49.1),
        ("haas2024", "Table 7", "ResNet-50 L2 150", "Norm", "tinyimagenet", "fpr95_id", 66.6),
        ("haas2024", "Table 8", "ResNet-18 no L2 60", "Norm", "svhn", "fpr95_id", 92.9),
        ("rna_cifar10_lt", "Tables 2, 4", "RNA", "RN", "mean", "fpr95_ood", 29.18),
        ("rna_cifar10_lt", "Tables 2, 4", "BEL", "Energy", "svhn", "aupr_out", 98.66),
        ("rna_cifar10_lt", "Tables 2, 4", "BEL-FT", None, None, "accuracy_few", 80.26),
        ("rna_cifar10_lt", "Table 1", "LA+OE", "MSP", "svhn", "fpr95_ood", 17.92),
        ("rna_cifar10_lt", "Table 3", "RNA, both", "RN", "mean", "auroc", 84.03),
        ("rna_cifar10_lt", "Table 5", "PASCL, ratio 1000", "MSP", "mean", "auroc", 86.62),
        ("rna_cifar10_lt", "Table 12", "RNA, 300 OoD images", None, None, "accuracy", 45.82),
        ("rna_cifar10_lt", "Table 13", "RNA, 128:512", "RN", "mean", "fpr95_ood", 27.64),
        ("rna_cifar10_lt", "Table 14", "RNA, ImageNet-RC", "RN", "mean", "fpr95_ood", 23.61),
        ("rna_cifar10_lt", "Table 17", "EnergyOE, CE then LA", "Energy", "mean", "auroc", 85.10),
        ("rna_cifar100_lt", "Tables 2, 4", "RNA", None, None, "ece", 17.67),
        ("rna_cifar100_lt", "Table 5", "RNA, ratio 100", "RN", "mean", "auroc", 74.33),
        ("rna_cifar100_lt", "Table 11", "RNA", "RN", "far", "auroc", 80.19),
        ("rna_imagenet_lt", "Tables 2, 4", "OE", "RN", "imagenet1k_ood", "auroc", 77.99),
        ("rna_imagenet_lt", "Table 17", "RNA, LA then LA", "RN", "imagenet1k_ood", "auroc", 72.20),
    ],
)
def test_cells_of_the_paper_specs(
    name: str, start: str, model: str, scorer: str | None, ood: str | None, metric: str, value: float
) -> None:
    (printed, *_) = (
        found
        for part in spec(f"papers/{name}").parts
        if part.title.startswith(start)
        for found in of(part, model=model, scorer=scorer, ood=ood, metric=metric)
    )
    assert printed == value


def test_positive_class_of_the_paper_specs() -> None:
    """The positive class of FPR95 is ID in GradNorm and Haas, and OoD in RNA, where it is also that of AUPR."""
    used = {
        path.stem: {n.metric for part in spec(f"papers/{path.stem}").parts for n in part.published} for path in PAPERS
    }
    for name, metrics in used.items():
        assert ("fpr95_ood" in metrics) == name.startswith("rna")
        assert ("aupr_out" in metrics) == name.startswith("rna")
    for name in ("scood_cifar10_lt", "scood_cifar100_lt"):
        assert all(part.relabel for part in spec(f"suites/{name}").parts)


def test_gradnorm_suite_squashes_images_to_480_pixels() -> None:
    for part in spec("papers/gradnorm").parts:
        chosen = part.preprocessing
        assert (chosen.input_size, chosen.crop_mode, chosen.crop_pct) == ((480, 480), "squash", 1.0)
    assert spec("suites/gradnorm_imagenet").parts[0].preprocessing.mean == (0.5, 0.5, 0.5)


def test_openood_suites_have_near_far_and_full_spectrum() -> None:
    for name, near, far in (("imagenet", 2, 3), ("imagenet200", 2, 3), ("cifar10", 2, 4)):
        plain, full = spec(f"suites/{name}").parts
        assert (len(plain.near), len(plain.far), plain.covariate) == (near, far, ())
        assert (full.near, full.far) == (plain.near, plain.far)
        assert full.covariate
        assert plain.search is not None
        assert not {plain.search.id, *plain.search.ood} & {plain.id, *plain.ood, *full.covariate}


def test_real_suite() -> None:
    parts = {part.title: part for part in spec("suites/real").parts}
    first, probed, hundred = (
        parts[title] for title in ("CIFAR-10", "CIFAR-10: scores that run the model again", "CIFAR-100")
    )
    assert first.scorers == hundred.scorers == "all"
    assert (first.fit, hundred.fit, hundred.id) == ("cifar10_train", "cifar100_first_half", "cifar100_second_half")
    assert [model.title for model in first.models] == ["ResNet-20", "DenseNet-100"]
    assert [tuple(members) for members in first.ensembles.values()] == [("ResNet-20", "DenseNet-100")]
    assert of(first, scorer="energy", ood="textures", metric="fpr95_id") == [
        54.83,
        56.12,
    ]  # the reference, and the paper of DICE
    assert of(first, scorer="msp", ood="cifar100_test", metric="auroc") == [88.438]
    names = {table.name for table in probed.scorer_tables}
    again = {"odin", "rankfeat", "gram", "gradnorm_params", "gradient_classifier", "mahalanobis_layers"}
    assert again <= names <= set(ood_scores.list_scorers())


@pytest.mark.skipif("OOD_SCORES_DATA" not in os.environ, reason="OOD_SCORES_DATA names no folder of real images")
def test_real_suite_finds_its_files() -> None:
    for part in spec("suites/real").parts:
        for text in part.sets.values():
            assert Path(os.path.expandvars(parse(text).target) + ".json").is_file()
        for model in part.models:
            assert Path(os.path.expandvars(str(model.checkpoint))).is_file()


def test_specs_in_the_readme_load(tmp_path: Path) -> None:
    text = (BENCHMARKS / "README.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```toml\n")[1:]]
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.toml"
        path.write_text(block.replace("suites/real.toml", str(BENCHMARKS / "suites" / "real.toml")))
        assert load_spec(path).parts
