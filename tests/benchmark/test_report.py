"""Tests of benchmark reports: numbers, ties, escaping and self-contained pages."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from made_results import GROUPS, MODELS, PART, SCORERS, make_results, table_rows
from PIL import Image

from ood_scores.benchmark.report import figures, html, latex, markdown, write_report
from ood_scores.benchmark.report.figures import histogram_path, roc_path
from ood_scores.benchmark.report.html import _brief
from ood_scores.benchmark.report.tables import ScoreTable, errors_and_ties, part_tables, shown_metrics
from ood_scores.benchmark.results import Results, table_columns
from ood_scores.benchmark.unit_files import Scored
from ood_scores.data.images import ImageArrays, ImageDataset
from ood_scores.detector.conformal import p_values
from ood_scores.evaluation.metrics import auroc, table_metrics
from ood_scores.evaluation.uncertainty import mean_auroc_covariance
from ood_scores.scorers.registry import why_experimental

SEVERAL, SINGLE = "ResNet-20", "DenseNet-100 (k=12)"
EVIL = "<script>alert('ash_s')</script>|`"
SETS = {
    "overall": list(GROUPS),
    "near": ["cifar100_test", "tinyimagenet_resize"],
    "far": ["textures", "scenes", "mnist"],
}
SETS |= {name: [name] for name in GROUPS}
VOID = ("meta", "input", "br", "img")


class Page(HTMLParser):
    """Parser of elements and table cells that checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.tables: list[tuple[str, list[list[tuple[dict[str, Any], str]]]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append((dict(attrs).get("class") or "", []))
        if tag == "tr":
            self.tables[-1][1].append([])
        if tag in ("td", "th"):
            self.tables[-1][1][-1].append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            attrs, text = self.tables[-1][1][-1][-1]
            self.tables[-1][1][-1][-1] = attrs, text + data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return make_results(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def parts(results: Results) -> dict[str, list[ScoreTable]]:
    return part_tables(results)


@pytest.fixture(scope="module")
def page(results: Results, parts: dict[str, list[ScoreTable]]) -> str:
    return html.page(results, parts, lambda part, name: None)


def expected(results: Results, model: str, column: str, metric: str) -> pd.DataFrame:
    """Percentages with scorers as rows and checkpoints as columns."""
    frame = results.table[(results.table["model"] == model) & results.table["ood"].isin(SETS[column])]
    return 100 * frame.groupby(["scorer", "checkpoint"])[metric].mean().unstack()


# ---- numbers


def test_cells_are_means_over_sets_and_checkpoints(results: Results, parts: dict[str, list[ScoreTable]]) -> None:
    assert [table.model for table in parts[PART]] == list(MODELS)
    for table in parts[PART]:
        assert [column.name for column in table.columns] == list(SETS)
        for metric in table_metrics():
            for i, column in enumerate(SETS):
                by_scorer = expected(results, table.model, column, metric.name)
                for row in table.rows:
                    cell, values = row.cells[metric.name][i], by_scorer.loc[row.scorer]
                    assert cell.value == pytest.approx(values.mean(), abs=1e-10)
                    if table.model == SEVERAL:
                        assert cell.sd == pytest.approx(values.std(), abs=1e-10)
                        assert (cell.low, cell.high) == pytest.approx((values.min(), values.max()), abs=1e-10)
                    else:
                        assert np.isnan(cell.sd)


def test_intervals_of_cells(results: Results, parts: dict[str, list[ScoreTable]]) -> None:
    table = next(table for table in parts[PART] if table.model == SINGLE)
    unit = next(unit for unit in results.scored if unit.model == SINGLE)
    rows = results.table.query("model == @SINGLE and scorer == 'energy' and ood == 'mnist'")
    cells = next(row.cells for row in table.rows if row.scorer == "energy")
    names = [column.name for column in table.columns]
    for metric in ("auroc", "fpr95_id", "fpr95_ood"):
        cell = cells[metric][names.index("mnist")]
        assert cell.low == pytest.approx(100 * rows[f"{metric}_low"].item())
        assert cell.high == pytest.approx(100 * rows[f"{metric}_high"].item())
    scores = unit.scores["energy"]
    mean, variance = mean_auroc_covariance(scores["id"][None], [scores[name][None] for name in SETS["near"]])
    half = 1.959964 * np.sqrt(variance.item())
    near = cells["auroc"][names.index("near")]
    assert (near.low, near.high) == pytest.approx((100 * (mean.item() - half), 100 * (mean.item() + half)))
    assert np.isnan(cells["fpr95_id"][0].low)


def test_markdown_shows_the_numbers_of_the_table(results: Results, parts: dict[str, list[ScoreTable]]) -> None:
    text = markdown.report(results, parts)
    section = text.split(f"### {markdown.escape(SINGLE)}")[1].split("###")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    rows = [row for row in rows if "ash_s" not in row[0]]
    names = [name.strip(" `") for name, *_ in rows]
    overall = expected(results, SINGLE, "overall", "auroc")[0].drop(index=EVIL)
    assert set(names) == set(overall.index)
    assert overall[names].is_monotonic_decreasing
    for i, column in enumerate(SETS):
        for metric, place, best in (("auroc", 0, "max"), ("fpr95_id", 1, "min")):
            values = expected(results, SINGLE, column, metric)[0]
            for scorer, (_, *cells) in zip(names, rows, strict=True):
                shown = cells[i].split("/")[place]
                assert shown.strip(" *†\u00a0") == f"{values[scorer]:.1f}"
                assert ("**" in shown) == (f"{values[scorer]:.1f}" == f"{values.agg(best):.1f}")
    table = next(table for table in parts[PART] if table.model == SINGLE)
    intervals = {row.scorer: row.cells["auroc"][0] for row in table.rows}
    ends = [f"{intervals[name].low:.1f}–{intervals[name].high:.1f}" for name in names]
    assert [row[len(SETS) + 1].strip() for row in rows] == ends
    severals = text.split(f"### {markdown.escape(SEVERAL)}")[1].split("###")[0]
    assert ", AUROC 95%" in section
    assert ", AUROC 95%" not in severals
    rejected = expected(results, SINGLE, "overall", "fpr95_ood")[0]
    assert [row[-1].strip(" *") for row in rows] == [f"{rejected[name]:.1f}" for name in names]
    assert "ID accuracy 94.5% on 300 images." in section
    assert f"{expected(results, SEVERAL, 'mnist', 'auroc').loc['knn'].mean():.1f} ± " in text


def test_latex_shows_the_numbers_of_the_table(results: Results, parts: dict[str, list[ScoreTable]]) -> None:
    section = latex.tables(results, parts).split(r"\begin{table}")[2]
    assert section.count(r"\begin") == 1 == section.count(r"\toprule")
    rows = dict(
        line.removesuffix(r" \\").split(" & ", 1) for line in section.splitlines() if line.startswith("weighted")
    )
    cells = rows[r"weighted\_energy"].split(" & ")
    plain = [re.sub(r"\\textbf|\$\^\\dagger\$|[{}]", "", cell) for cell in cells]
    for column, cell in zip(SETS, plain, strict=False):
        both = [expected(results, SINGLE, column, metric)[0] for metric in ("auroc", "fpr95_id")]
        assert cell == r"\,/\,".join(f"{values['weighted_energy']:.1f}" for values in both)
    assert len(cells) == len(SETS) + 1
    assert r"\multicolumn{3}{c}{mean} & \multicolumn{2}{c}{near} & \multicolumn{3}{c}{far}" in section


def test_html_shows_the_numbers_of_the_table(results: Results, page: str) -> None:
    tables = [rows for classes, rows in Page(page).tables if classes == "scores"]
    assert len(tables) == 1 + len(MODELS)
    wanted = [(metric.name, column) for metric in shown_metrics(results) for column in SETS]
    for model, (_, *rows) in zip(MODELS, tables[1:], strict=True):
        assert len(rows) == len(SCORERS)
        for i, (metric, column) in enumerate(wanted, start=1):
            values = expected(results, model, column, metric).mean(axis=1)
            for row in rows:
                attrs, text = row[i]
                assert metric in attrs["class"].split()
                assert float(attrs["data-v"]) == pytest.approx(values[row[0][1]], abs=6e-5)
                shown = text.split(" ±")[0]
                assert re.fullmatch(r"\d+\.\d", shown)
                assert float(shown) == pytest.approx(values[row[0][1]], abs=0.05 + 1e-9)  # a tie rounds either way
        for (_, scorer), *cells in rows:
            own = results.table[(results.table["model"] == model) & (results.table["scorer"] == scorer)]
            costs = [100 * own["id_accuracy"].mean(), own["fit_seconds"].mean(), own["score_microseconds"].mean()]
            assert [float(attrs["data-v"]) for attrs, _ in cells[len(wanted) :]] == pytest.approx(costs)


def test_experimental_scorers_are_found_by_their_classes() -> None:
    reason = why_experimental({"name": "core"})
    assert reason == "written after the abstract and summaries of the paper, whose formulas were not available"
    inside = {"name": "react", "base": {"name": "ash_s", "base": {"name": "core"}}}
    assert why_experimental(inside) == why_experimental({"name": "fusion", "scorers": ["energy", "core"]}) == reason
    assert why_experimental({"name": "fusion", "scorers": ["energy", "knn"], "method": "min", "k": 3}) is None


def test_experimental_scorers_are_marked(results: Results) -> None:
    """Their labels are not their names."""
    made = {"fdbd": {"name": "react", "base": "core"}, "vra": {"name": "knn", "k": 3}}
    frame = results.table.query("scorer in ('fdbd', 'vra', 'cadref')").copy()
    frame["parameters"] = [
        json.dumps(made.get(label, {"name": label, "confidence": "energy"})) for label in frame["scorer"]
    ]
    of_them = dataclasses.replace(results, table=frame)
    marked = part_tables(of_them)
    text = markdown.report(of_them, marked)
    assert "| `fdbd` (experimental) |" in text
    assert "| `vra` |" in text
    assert "| `cadref` |" in text
    page = html.page(of_them, marked, lambda part, name: None)
    reason = "written after the abstract and summaries of the paper, whose formulas were not available"
    assert page.count(f'fdbd <small class="muted" title="{reason}">experimental</small></th>') == 1 + len(MODELS)
    assert ">vra</th>" in page
    tex = latex.tables(of_them, marked)
    assert r"fdbd$^*$ &" in tex
    assert "\nvra &" in tex
    assert r"5\,\%). $^*$: experimental, the scores may not be those of the paper." in tex
    assert "experimental" not in latex.tables(results, part_tables(results))


def test_html_shows_models_side_by_side(results: Results, page: str) -> None:
    heads, *rows = next(rows for classes, rows in Page(page).tables if classes == "scores")
    assert [text for _, text in heads[1:5]] == [
        "meanover the models",
        "ResNet-20ID accuracy 91.8 ± 0.1",
        "DenseNet-100 (k=12)ID accuracy 94.5",
        "ViT-B/16 <ünïcode>ID accuracy 74.4",
    ]
    of_models = [expected(results, model, "overall", "auroc").mean(axis=1) for model in MODELS]
    means = []
    for (_, scorer), *cells in rows:
        values = [of[scorer] for of in of_models]
        assert [float(attrs["data-v"]) for attrs, _ in cells[:4]] == pytest.approx([np.mean(values), *values], abs=6e-5)
        means.append(np.mean(values))
    assert means == sorted(means, reverse=True)


def test_reports_compare_published_numbers(results: Results, page: str) -> None:
    _, *rows = next(rows for classes, rows in Page(page).tables if classes == "comparison")
    by_name = {tuple(text for _, text in row[:3]): [text for _, text in row[3:]] for row in rows}
    ours = expected(results, SINGLE, "textures", "auroc")[0]["msp"]
    assert by_name["msp", SINGLE, "AUROC"][0] == f"{ours:.2f} 90.15 {ours - 90.15:+.2f}"
    assert by_name["–", SINGLE, "ID accuracy"] == ["", "", "", "94.54 95.00 -0.46"]
    missing = by_name["energy", "BiT-S R101x1BiT-S R101x1: its checkpoint is not here", "AUROC"]
    assert missing[:3] == ["not run 90.15"] * 3
    text = markdown.report(results, part_tables(results))
    assert f"| {ours:.2f} / 90.15 / {ours - 90.15:+.2f} |" in text
    assert "| not run / 90.15 |" in text
    assert "- **svhn**: there is no data/svhn. To get it: `ood-scores data get svhn`" in text


# ---- ties


def constructed(checkpoints: int) -> Results:
    """Results of two scorers that differ by chance only, a copy of the first, and a clearly worse one."""
    units = []
    for checkpoint in range(checkpoints):
        rng = np.random.default_rng(checkpoint)
        seen = {"id": rng.standard_normal(600) + 2} | {name: rng.standard_normal(500) for name in GROUPS}
        good, like, worse = (
            {name: values + noise * rng.standard_normal(len(values)) for name, values in seen.items()}
            for noise in (0.2, 0.2, 1)
        )
        scores = {"good": good, "like": like, "same": good, "worse": worse}
        unit = made_unit(checkpoint)
        as_tensors = {label: {of: torch.tensor(v) for of, v in sets.items()} for label, sets in scores.items()}
        units.append(dataclasses.replace(unit, scores=as_tensors))
    table = pd.DataFrame([row for unit in units for row in table_rows(unit)], columns=list(table_columns()))
    return dataclasses.replace(bare(), table=table, scored=tuple(units))


def made_unit(checkpoint: int) -> Scored:
    return Scored(PART, SEVERAL, checkpoint, {}, {}, {}, {}, {}, {})


def bare(folder: Path = Path("unused")) -> Results:
    """Results with empty tables."""
    empty = pd.DataFrame
    return Results(
        name="bare",
        title="Bare",
        folder=folder,
        spec={},
        table=empty(columns=list(table_columns())),
        comparison=empty(columns=["part", "model", "scorer", "ood", "metric", "published", "ours", "sd", "source"]),
        measures=empty(columns=["part", "model", "checkpoint", "measure", "value"]),
        not_run=(),
        scored=(),
        searched=empty(),
    )


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_ties_are_not_significantly_below_the_best(checkpoints: int) -> None:
    (table,) = part_tables(constructed(checkpoints))[PART]
    assert [row.scorer for row in table.rows if row.scorer != "like"] == ["good", "same", "worse"]
    for row in table.rows:
        assert [cell.tied for cell in row.cells["auroc"]] == [row.scorer != "worse"] * len(SETS)
        assert not any(cell.tied for metric in table_metrics()[1:] for cell in row.cells[metric.name])
    assert set(table.tied) == {"good", "same", "like"} - {table.rows[0].scorer}


def test_the_standard_error_of_a_mean_over_checkpoints() -> None:
    """The contribution of a row is the mean of its contributions, so copies of a checkpoint add nothing."""
    rng = np.random.default_rng(2)
    units = [{"one": {"id": rng.normal(1, 1, 60), "far": rng.normal(0, 1, 50)}} for _ in range(3)]
    above = np.mean([unit["one"]["id"][:, None] > unit["one"]["far"] for unit in units], axis=0)
    variance = above.mean(axis=1).var(ddof=1) / 60 + above.mean(axis=0).var(ddof=1) / 50
    error, tied = errors_and_ties(units, ["one"], ("far",))["one"]
    assert error == pytest.approx(100 * variance**0.5)
    assert tied
    alone, copied = errors_and_ties(units[:1], ["one"], ("far",)), errors_and_ties(units[:1] * 3, ["one"], ("far",))
    assert copied["one"][0] == pytest.approx(alone["one"][0])


def test_ties_are_marked_in_every_report(results: Results, parts: dict[str, list[ScoreTable]], page: str) -> None:
    table = next(table for table in parts[PART] if table.model == SINGLE)
    assert 0 < len(table.tied) < len(table.rows) - 1
    text = markdown.report(results, parts).split(f"### {markdown.escape(SINGLE)}")[1].split("###")[0]
    daggers = [line for line in text.splitlines() if line.startswith("| `") and "†" in line.split("|")[2]]
    cells = {row.scorer: row.cells["auroc"][0] for row in table.rows}
    assert [line.split("`")[1] for line in daggers] == [name for name in table.tied if not cells[name].best]
    in_latex = latex.tables(results, parts).split(r"\begin{table}")[2].count(r"$^\dagger$")
    everywhere = [cell for row in table.rows for cell in row.cells["auroc"]]
    assert in_latex == sum(cell.tied and not cell.best for cell in everywhere)
    rows = [rows for classes, rows in Page(page).tables if classes == "scores"][2][1:]
    on_page = {row[0][1]: ["tied" in attrs["class"].split() for attrs, _ in row[1 : len(SETS) + 1]] for row in rows}
    assert on_page == {row.scorer: [cell.tied for cell in row.cells["auroc"]] for row in table.rows}


# ---- pages


def test_html_is_well_formed_and_self_contained(page: str) -> None:
    read = Page(page)
    ids = read.ids()
    assert len(ids) == len(set(ids))
    for tag, attrs in read.elements:
        if tag == "a" and attrs["href"].startswith("https://"):  # a link in the notes
            continue
        assert "srcset" not in attrs
        assert not {name for name in attrs if name.startswith("on")}
        assert attrs.get("src", "data:").startswith("data:")
        for name in ("href", "aria-controls"):
            assert attrs.get(name, f"#{ids[0]}").removeprefix("#") in ids
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in read.elements}
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_html_notes_are_markdown_without_images(page: str) -> None:
    (notes,) = re.findall(r'<div class="notes">(.*?)</div>', page, re.DOTALL)
    assert "<p>Rows &amp; columns &lt;made&gt; up.</p>" in notes
    assert "<li><em>first</em></li>" in notes
    assert "<img" not in notes


def test_names_are_escaped_in_reports(results: Results, parts: dict[str, list[ScoreTable]], page: str) -> None:
    read = Page(page)
    assert [tag for tag, _ in read.elements].count("script") == 1
    scores = next(rows for classes, rows in read.tables if classes == "scores")
    assert EVIL in [row[0][1] for row in scores]
    lines = [line for line in markdown.report(results, parts).splitlines() if "ash_s" in line]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert columns <= {len(SETS) + 3, len(SETS) + 4}  # of one checkpoint, with an interval
    assert all(r"`` <script>alert('ash_s')</script>\|` ``" in line for line in lines)
    text = latex.tables(results, parts)
    assert r"\textless{}script\textgreater{}alert(\textquotesingle{}ash\_s\textquotesingle{})" in text
    assert r"ODIN T=1000 \& $\varepsilon$=0.004" in text
    assert r"100\% real\_data" in text
    assert latex.escape("\\{a}~^#$") == r"\textbackslash{}\{a\}\textasciitilde{}\textasciicircum{}\#\$"


def test_report_of_scores_only(results: Results, tmp_path: Path) -> None:
    little = dataclasses.replace(bare(tmp_path / "new"), table=results.table.query("model == @SINGLE"))
    paths = write_report(little)
    assert paths == [tmp_path / "new" / name for name in ("report.md", "tables.tex", "report.html")]
    text = paths[2].read_text(encoding="utf-8")
    read = Page(text)
    assert [classes for classes, _ in read.tables].count("scores") == 1
    assert not any(
        "tied" in attrs.get("class", "").split() for _, rows in read.tables for row in rows for attrs, _ in row
    )
    assert "svg" not in [tag for tag, _ in read.elements]


def test_costs_have_no_exponent() -> None:
    texts = [_brief(cost) for cost in (0.0, 1.3e-05, 0.0015, 2.34, 12345.6, float("nan"))]
    assert texts == ["0", "<0.001", "0.0015", "2.3", "12,346", "–"]


def test_report_of_models_that_were_not_run(results: Results, tmp_path: Path) -> None:
    """The report lists models that were not run with their published numbers."""
    nothing = dataclasses.replace(bare(tmp_path), not_run=results.not_run)
    nothing = dataclasses.replace(nothing, comparison=results.comparison.query("model != @SINGLE"))
    for path in write_report(nothing)[::2]:
        text = path.read_text(encoding="utf-8")
        assert "its checkpoint is not here" in text
        assert "https://example.org/BiT-S-R101x1.npz" in text
        assert "90.15" in text


def test_means_of_a_single_set_have_no_column(results: Results) -> None:
    def columns(*sets: str) -> list[str]:
        table = results.table[results.table["ood"].isin(sets) & (results.table["model"] == SINGLE)]
        (made,) = part_tables(dataclasses.replace(bare(), table=table))[PART]
        return [column.name for column in made.columns]

    assert columns("mnist") == ["mnist"]
    assert columns("mnist", "textures") == ["overall", "textures", "mnist"]
    assert columns("cifar100_test", "textures", "mnist") == ["overall", "far", "cifar100_test", "textures", "mnist"]


def test_a_scorer_without_one_set_comes_last(results: Results) -> None:
    """Its mean over the sets is unknown."""
    lost = results.table.query("not (scorer == 'vra' and ood == 'mnist')").query("model == @SINGLE")
    (table,) = part_tables(dataclasses.replace(bare(), table=lost))[PART]
    cells = table.rows[-1].cells["auroc"]
    assert table.rows[-1].scorer == "vra"
    assert [str(cell) for cell in cells[:1]] == ["–"]
    assert cells[1].value == pytest.approx(expected(results, SINGLE, "near", "auroc")[0]["vra"])


# ---- figures


def colors(count: int) -> np.ndarray:
    """One color for each row."""
    return np.stack([np.arange(count) % 256, 255 - np.arange(count) % 256, np.arange(count) // 2 % 256], axis=1)


def test_hardest_images_have_the_highest_ood_and_the_lowest_id_scores(results: Results) -> None:
    unit = next(unit for unit in results.scored if unit.model == SINGLE)

    def images(name: str) -> ImageDataset | None:
        pixels = np.broadcast_to(colors(300)[:, None, None], (300, 160, 120, 3)).astype(np.uint8)
        return None if name == "mnist" else ImageArrays(pixels)

    found = figures.hardest(unit, "knn", images)
    scores = {name: values.numpy() for name, values in unit.scores["knn"].items()}
    pooled = sorted(((value, name, row) for name in GROUPS for row, value in enumerate(scores[name])), reverse=True)
    assert [(sample.set, sample.row) for sample in found.ood] == [(name, row) for _, name, row in pooled[:8]]
    lowest = np.argsort(scores["id"])[:8]
    assert [(sample.set, sample.row) for sample in found.id] == [("cifar10_test", row) for row in lowest]
    for sample in found.id:
        predicted = unit.predictions["id"][sample.row].item()
        assert (sample.label, sample.prediction) == (str(sample.row % 10), str(predicted))
        assert sample.name == f"id/<b>{sample.row}.png"
        assert float(sample.score) == pytest.approx(scores["id"][sample.row], rel=1e-3)
        image = Image.open(io.BytesIO(base64.b64decode(sample.image.split(",")[1])))
        assert image.size == (72, 96)
        assert np.abs(np.asarray(image.convert("RGB")) - colors(300)[sample.row]).max() < 12
    others = figures.hardest(unit, "knn", images, ["knn", "energy"])
    for sample, (_, name, row) in zip(others.ood, pooled, strict=False):
        for scorer, p in sample.p_values:
            assert p == p_values(unit.scores[scorer]["id"], unit.scores[scorer][name][[row]])[0]
    assert [scorer for scorer, _ in others.id[0].p_values] == ["knn", "energy"]
    assert [dict(sample.p_values)["knn"] for sample in others.id] == [(1 + rank) / 300 for rank in range(8)]
    in_mnist = {name: values for name, values in unit.scores["knn"].items() if name in ("id", "mnist")}
    alone = figures.hardest(dataclasses.replace(unit, scores={"knn": in_mnist}), "knn", images)
    assert [sample.image for sample in alone.ood] == [""] * 8
    nameless = {name: np.full(len(ids), "") for name, ids in unit.ids.items()}
    found = figures.hardest(dataclasses.replace(unit, ids=nameless), "knn", images)
    assert [sample.name for sample in found.id] == [f"row {sample.row}" for sample in found.id]


def test_pictures_have_the_names_of_their_files(results: Results, page: str) -> None:
    unit = results.scored[0]
    lowest = int(np.argsort(unit.scores[part_tables(results)[unit.part][0].rows[0].scorer]["id"].numpy())[0])
    assert f"id/&lt;b&gt;{lowest}.png</span>" in page
    assert "<b>0.png" not in page


def test_collapse_bars_are_drawn_for_several_models(results: Results, page: str) -> None:
    bars = [attrs["style"] for _, attrs in Page(page).elements if attrs.get("class") == "bar"]
    assert len(bars) == 7 * len(MODELS)
    assert bars[:3] == ["--share:0.464", "--share:0.714", "--share:1.000"]  # 0.325, 0.5 and 0.7
    alone = results.measures[results.measures["model"] == SINGLE]
    single = dataclasses.replace(bare(), table=results.table.query("model == @SINGLE"), measures=alone)
    tables = Page(html.page(single, part_tables(single), lambda part, name: None)).tables
    (rows,) = [rows for _, rows in tables if rows[0][0][1] == "measure"]
    assert [[text for _, text in row] for row in rows[:2]] == [
        ["measure", SINGLE],
        ["NC1: variability within classes", "0.5"],
    ]


def test_roc_path_is_the_curve_with_few_points() -> None:
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.standard_normal(4000) + 1, rng.standard_normal(3000)
    start, steps = roc_path(id_scores, ood_scores).split("l")
    assert start == "M0 200"
    numbers = np.array(steps.split(), dtype=int).reshape(-1, 2)
    points = np.cumsum(np.concatenate([[[0, 200]], numbers]), axis=0)
    assert points[-1].tolist() == [200, 0]
    assert len(points) <= 200
    heights = 200 - points[:, 1]
    area = np.diff(points[:, 0]) @ (heights[1:] + heights[:-1]) / (2 * 200**2)
    assert area == pytest.approx(auroc(id_scores, ood_scores), abs=0.003)


def test_histogram_path_has_a_bar_for_each_bin() -> None:
    assert histogram_path(np.array([0.0, 1.0, 0.25])) == "M0 100V100h1V0h1V75h1V100z"


def test_html_limits_the_number_of_figures(results: Results, parts: dict[str, list[ScoreTable]], page: str) -> None:
    def cards(text: str) -> int:
        return sum(attrs.get("class") == "card" for _, attrs in Page(text).elements)

    assert cards(page) == len(MODELS) * len(SCORERS)
    few = html.page(results, parts, lambda part, name: None, most_figures=len(MODELS) * len(SCORERS) - 1)
    assert cards(few) == len(MODELS) * html.SHOWN
