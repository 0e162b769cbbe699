"""A new row of METRICS reaches every table, file, report and comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_benchmark import part, spec
from typer.testing import CliRunner

from ood_scores import FeatureSet, evaluate
from ood_scores.benchmark import Results, load_results, run
from ood_scores.benchmark.report import write_report
from ood_scores.benchmark.results import save
from ood_scores.benchmark.run_diff import compare_runs
from ood_scores.benchmark.spec import Published, ScorerTable, Search
from ood_scores.cli import app
from ood_scores.evaluation.metrics import METRICS, Metric, compare, fpr_at_tpr_id
from ood_scores.evaluation.roc_metrics import fpr_of
from ood_scores.evaluation.threshold_counts import RocCounts
from ood_scores.evaluation.uncertainty import bootstrap, interval

pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_report"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the network has not learned some classes
]


def gap(counts: RocCounts) -> float:
    """Largest distance between the distributions (Kolmogorov-Smirnov)."""
    return float(np.abs(counts.positives / counts.n_positive - counts.negatives / counts.n_negative).max())


NEW = (
    Metric(
        "fpr80_id",
        "FPR80",
        partial(fpr_of, tpr=0.8),
        "share of OoD accepted",
        positive="ID",
        higher_is_better=False,
        headline=True,
        options=("rule",),
    ),
    Metric("gap", "gap", gap, "largest distance between the distributions", percent=False),
)


@pytest.fixture(scope="module", autouse=True)
def new_metrics() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for metric in NEW:
            patch.setitem(METRICS, metric.name, metric)
        yield


@pytest.fixture(scope="module")
def results(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    small = part(
        scorers=(ScorerTable("msp", "msp"), ScorerTable("knn", "knn")),
        metrics=("oscr", "autc", "nll", "ece"),
        measures=("calibration",),
        search=Search("val_id", ("val_ood",), "fpr80_id", {"knn": {"k": (1, 9)}}),
        published=tuple(
            Published("Net", "msp", "dark", metric, value, "A paper")
            for metric, value in (("fpr80_id", 50.0), ("gap", 0.5))
        ),
    )
    return run(spec(small), out=tmp_path_factory.mktemp("run"), data=data, jobs=1, progress=False)


def test_compare_and_evaluate_have_the_new_metric() -> None:
    id_scores, ood_scores = np.arange(10.0), np.arange(8.0) - 3.5
    found = compare(id_scores, ood_scores, rule="nearest")
    assert found.fpr80_id == fpr_at_tpr_id(id_scores, ood_scores, 0.8, rule="nearest")
    assert found["gap"] == pytest.approx(0.6)  # at the threshold 4: 6 of 10 and 0 of 8
    feats = FeatureSet(torch.randn(12, 5), torch.randn(12, 3))
    frame = evaluate(["msp"], id=feats, ood={"same": feats})
    assert frame.columns.tolist()[-4:] == ["fpr80_id", "gap", "n_id", "n_ood"]
    assert frame["gap"].item() == 0


def test_the_bootstrap_resamples_the_new_metric() -> None:
    rng = np.random.default_rng(0)
    id_scores, ood_scores = rng.normal(1, 1, 60), rng.normal(0, 1, 50)
    found = bootstrap(id_scores, ood_scores, "gap", replicates=50)
    assert found.value == METRICS["gap"](id_scores, ood_scores)
    assert found.low < found.value < found.high


def test_results_hold_the_new_metric_and_its_interval(results: Results) -> None:
    (row,) = results.table.query("scorer == 'msp' and ood == 'dark'").to_dict("records")
    (unit,) = results.scored
    scores = unit.scores["msp"]["id"], unit.scores["msp"]["dark"]
    expected = interval("fpr80_id", *scores)
    assert (row["fpr80_id"], row["fpr80_id_low"], row["fpr80_id_high"]) == (expected.value, expected.low, expected.high)
    assert row["gap"] == METRICS["gap"](*scores)
    assert "gap_low" not in results.table


def test_metrics_on_request_reach_results_and_reports(results: Results, tmp_path: Path) -> None:
    (row,) = results.table.query("scorer == 'msp' and ood == 'dark'").to_dict("records")
    (unit,) = results.scored
    scores, correct = unit.scores["msp"], unit.labels["id"] == unit.predictions["id"]
    expected = interval("oscr", scores["id"], scores["dark"], correct)
    assert (row["oscr"], row["oscr_low"], row["oscr_high"]) == (expected.value, expected.low, expected.high)
    assert "augrc" not in results.table
    measures = results.measures.set_index("measure")["value"]
    rated = {name: results.table[[name, f"{name}_low", f"{name}_high"]].drop_duplicates() for name in ("nll", "ece")}
    for name, rows in rated.items():
        value, low, high = rows.to_numpy().squeeze()  # one for all scorers and sets
        assert value == measures[name]
        assert low < value < high
    assert [metric.name for metric in results.headline] == [
        "auroc",
        "fpr95_id",
        "fpr95_ood",
        "oscr",
        "autc",
        "nll",
        "ece",
        "fpr80_id",
    ]
    texts = {path.name: path.read_text() for path in write_report(dataclasses.replace(results, folder=tmp_path))}
    assert "overall, OSCR" in texts["report.md"]
    assert "- OSCR: probability that an ID image is classified correctly" in texts["report.md"]
    assert '<option value="oscr">OSCR</option>' in texts["report.html"]
    assert "AUGRC" not in texts["report.html"]


def test_saved_results_hold_the_new_metric(results: Results) -> None:
    pd.testing.assert_frame_equal(load_results(results.folder).table, results.table)
    assert pd.read_csv(results.folder / "results.csv")["gap"].tolist() == results.table["gap"].tolist()


def test_results_saved_before_the_metric_existed_open(results: Results, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for metric in NEW:
            patch.delitem(METRICS, metric.name)
        old = dataclasses.replace(load_results(results.folder), folder=tmp_path)
        assert "gap" not in old.table
        save(old, [])
    reopened = load_results(tmp_path).table
    assert reopened["gap"].isna().all()
    assert reopened["auroc"].tolist() == results.table["auroc"].tolist()


def test_the_new_metric_chooses_parameters(results: Results) -> None:
    tried = results.searched
    assert set(tried["metric"]) == {"fpr80_id"}
    assert tried["value"][tried["chosen"]].item() == tried["value"].min()


def test_published_numbers_of_the_new_metric_are_in_its_unit(results: Results) -> None:
    ours = results.table.query("scorer == 'msp' and ood == 'dark'")
    compared = results.comparison.set_index("metric")["ours"]
    assert compared["fpr80_id"] == pytest.approx(100 * ours["fpr80_id"].item())
    assert compared["gap"] == pytest.approx(ours["gap"].item())


def test_reports_show_the_new_metric(results: Results, tmp_path: Path) -> None:
    texts = {path.name: path.read_text() for path in write_report(dataclasses.replace(results, folder=tmp_path))}
    (row,) = results.table.query("scorer == 'msp' and ood == 'dark'").to_dict("records")
    assert "overall, FPR80 (ID positive)" in texts["report.md"]
    assert f"| Net | msp | gap | {row['gap']:.3g} / 0.5 /" in texts["report.md"]
    assert "overall, FPR80 (ID positive)" in texts["tables.tex"]
    assert '<option value="gap">gap</option>' in texts["report.html"]
    assert (
        "<dd>largest distance between the distributions, not in percent; higher is better.</dd>" in texts["report.html"]
    )
    assert f'data-v="{row["gap"]:.4f}">{row["gap"]:.3g}</td>' in texts["report.html"]
    assert f'data-v="{100 * row["fpr80_id"]:.4f}"' in texts["report.html"]


def test_comparing_runs_compares_the_new_metric(results: Results) -> None:
    changed = results.table.assign(fpr80_id=results.table["fpr80_id"] + 0.125)
    frame = compare_runs(results, dataclasses.replace(results, table=changed))
    assert frame["fpr80_id_difference"].to_numpy() == pytest.approx(0.125)
    shown = CliRunner().invoke(app, ["compare", str(results.folder), str(results.folder)])
    assert "0 differ" in shown.output


def test_the_terminal_shows_the_new_metric(tmp_path: Path) -> None:
    FeatureSet(torch.randn(12, 5), torch.randn(12, 3)).save(tmp_path / "some.h5")
    paths = ["--id", str(tmp_path / "some.h5"), "--ood", f"other={tmp_path / 'some.h5'}", "--scorer", "msp"]
    shown = CliRunner().invoke(app, ["evaluate", *paths], env={"COLUMNS": "160"}).output
    assert "FPR80" in shown
    assert "FPR80 (ID positive): share of OoD accepted; lower is better." in " ".join(shown.split())
