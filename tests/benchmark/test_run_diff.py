"""Tests of the comparison of two benchmark runs."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from made_results import make_results, table_rows
from scipy.stats import norm
from typer.testing import CliRunner

import ood_scores.benchmark
from ood_scores.benchmark.results import KEY, Results, table_columns
from ood_scores.benchmark.run_diff import compare_runs, holm
from ood_scores.benchmark.unit_files import Scored
from ood_scores.cli import app
from ood_scores.evaluation.uncertainty import compare_auroc

MODEL = "DenseNet-100 (k=12)"


@pytest.fixture(scope="module")
def before() -> Results:
    return make_results(Path("before"), 200, 150)


@pytest.fixture(scope="module")
def after(before: Results) -> Results:
    """A run in which energy is worse, gradnorm slightly different, knn missing and new_one added."""
    return rescored(before, changed)


def changed(unit: Scored) -> Scored:
    rng = np.random.default_rng(1)
    scores = {name: dict(sets) for name, sets in unit.scores.items() if name != "knn"}
    scores["new_one"] = scores["energy"]
    for name, noise in (("energy", 100.0), ("gradnorm", 0.05)):
        scores[name] = {of: v + noise * torch.from_numpy(rng.standard_normal(len(v))) for of, v in scores[name].items()}
    return dataclasses.replace(unit, scores=scores)


def rescored(results: Results, change: object) -> Results:
    units = tuple(change(unit) for unit in results.scored)  # type: ignore[operator]
    table = pd.DataFrame([row for unit in units for row in table_rows(unit)], columns=list(table_columns()))
    return dataclasses.replace(results, table=table, scored=units, folder=Path("after"))


def rows_of(frame: pd.DataFrame, scorer: str) -> pd.DataFrame:
    return frame[(frame["scorer"] == scorer) & (frame["model"] == MODEL)]


def test_compare_runs_has_the_rows_of_both_runs_in_order(before: Results, after: Results) -> None:
    frame = compare_runs(before, after)
    keys = [tuple(key) for key in frame[list(KEY)].to_numpy()]
    assert keys[: len(before.table)] == [tuple(key) for key in before.table[list(KEY)].to_numpy()]
    assert set(keys[len(before.table) :]) == {tuple(k) for k in after.table[list(KEY)].to_numpy() if k[3] == "new_one"}
    assert set(frame["scorer"][frame["found"] == "a"]) == {"knn"}
    assert set(frame["scorer"][frame["found"] == "b"]) == {"new_one"}
    assert frame.loc[frame["found"] != "both", ["auroc_difference", "p_value", "p_holm"]].isna().all(axis=None)


def test_compare_runs_subtracts_a_from_b(before: Results, after: Results) -> None:
    frame = compare_runs(before, after)
    both = frame[frame["found"] == "both"]
    for run, name in ((before, "a"), (after, "b")):
        wanted = run.table.set_index(list(KEY)).loc[pd.MultiIndex.from_frame(both[list(KEY)])]
        for metric in ("auroc", "fpr95_id", "fpr95_ood"):
            assert both[f"{metric}_{name}"].tolist() == wanted[metric].tolist()
            assert both[f"{metric}_difference"].tolist() == (both[f"{metric}_b"] - both[f"{metric}_a"]).tolist()


def test_compare_runs_uses_the_paired_test_for_the_same_rows(before: Results, after: Results) -> None:
    frame = compare_runs(before, after)
    units = [next(unit for unit in run.scored if unit.model == MODEL) for run in (before, after)]
    for scorer in ("energy", "gradnorm", "msp"):
        for _, row in rows_of(frame, scorer).iterrows():
            scores = [(unit.scores[scorer]["id"], unit.scores[scorer][row["ood"]]) for unit in units]
            assert row["paired"]
            assert row["p_value"] == compare_auroc(scores[0], scores[1]).p_value
    assert (rows_of(frame, "msp")["p_value"] == 1).all()
    assert (rows_of(frame, "energy")["p_holm"] < 1e-3).any()
    assert (rows_of(frame, "gradnorm")["p_holm"] == 1).all()


@pytest.mark.parametrize("reason", ["data", "rows", "scores"])
def test_compare_runs_uses_the_unpaired_test_for_different_rows(before: Results, after: Results, reason: str) -> None:
    other = after
    if reason == "data":
        other = dataclasses.replace(after, table=after.table.assign(id_sha256="other"))
    if reason == "rows":
        moved = [dataclasses.replace(u, rows={k: v + (k == "id") for k, v in u.rows.items()}) for u in after.scored]
        other = dataclasses.replace(after, scored=tuple(moved))
    if reason == "scores":
        other = dataclasses.replace(after, scored=())
    frame = compare_runs(before, other)
    assert not frame["paired"].any()
    row = rows_of(frame, "energy").iloc[0]
    errors = []
    for run in (before, other):
        found = run.table[(run.table[list(KEY)] == row[list(KEY)]).all(axis=1)].iloc[0]
        errors.append((found["auroc_high"] - found["auroc_low"]) / (2 * norm.ppf(0.975)))
    z = (row["auroc_b"] - row["auroc_a"]) / np.hypot(*errors)
    assert row["p_value"] == pytest.approx(2 * norm.sf(abs(z)))
    assert (rows_of(frame, "msp")["p_value"] == 1).all()


def test_holm_correction() -> None:
    """The smallest of three p-values is multiplied by three, the next by two; none may fall below the previous one."""
    corrected = holm(np.array([0.04, np.nan, 0.01, 0.015]))
    np.testing.assert_allclose(corrected, [0.04, np.nan, 0.03, 0.03])
    assert holm(np.array([0.6, 0.7])).tolist() == [1, 1]
    assert len(holm(np.array([]))) == 0


def test_compare_command(before: Results, after: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"before": before, "after": after}
    monkeypatch.setattr(ood_scores.benchmark, "load_results", lambda folder: runs[str(folder)], raising=False)
    out = tmp_path / "changes.csv"
    called = CliRunner().invoke(app, ["compare", "before", "after", "--out", str(out)], env={"COLUMNS": "160"})
    assert called.exit_code == 0, called.output
    frame = compare_runs(before, after)
    pd.testing.assert_frame_equal(pd.read_csv(out), frame, check_dtype=False)
    both = frame[frame["found"] == "both"]
    differ = (both[[f"{metric}_difference" for metric in ("auroc", "fpr95_id", "fpr95_ood")]] != 0).any(axis=1).sum()
    real = (both["p_holm"] < 0.05).sum()
    assert f"{len(both)} rows in both: {differ} differ, {real} of them by more than chance" in called.output
    largest = both.iloc[int(both["auroc_difference"].abs().argmax())]
    first = next(line for line in called.output.splitlines() if " energy " in line)
    assert f"{100 * largest['auroc_a']:.1f}" in first
    assert f"{100 * largest['auroc_difference']:+.2f}" in first
    sets = "cifar100_test, tinyimagenet_resize, textures, scenes, mnist"
    lines = " ".join(called.output.split())
    assert f"{MODEL}: knn on {sets}" in lines
    assert f"{MODEL}: new_one on {sets}" in lines
