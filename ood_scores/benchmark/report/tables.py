"""Tables of the reports: numbers as they are shown, the best of each column, and ties with the best."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ood_scores.benchmark.results import NotRun, Results, interval_columns
from ood_scores.benchmark.unit_files import Scored
from ood_scores.evaluation.metrics import METRICS, Metric, number
from ood_scores.evaluation.uncertainty import mean_auroc_covariance, tied_with_best
from ood_scores.scorers.registry import why_experimental

if TYPE_CHECKING:
    import pandas as pd

ByScorer = Mapping[str, Mapping[str, NDArray[np.float64]]]

OVERALL = "overall"
MEAN = "mean"
Z_95 = 1.959964


@dataclass(frozen=True)
class Column:
    """An OoD set (its ``group`` is ``near`` or ``far``), or the unweighted mean over ``sets`` (``mean``)."""

    name: str
    group: str
    sets: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A number as it is shown, for one checkpoint or several.

    Attributes:
        value: Value for one checkpoint or mean over several; NaN if unknown.
        sd: Standard deviation over several checkpoints; NaN for one checkpoint.
        low, high: 95% interval for one checkpoint, or range over several; NaN if unknown.
        best: Whether it is shown with the same digits as the best of its column.
        tied: Whether it is an AUROC that is not significantly below the best of its column (DeLong's paired tests,
            Holm's correction, 5%).
        percent: Whether the number is a percentage.
    """

    value: float
    sd: float = nan
    low: float = nan
    high: float = nan
    best: bool = False
    tied: bool = False
    percent: bool = True

    @property
    def text(self) -> str:
        return number(self.value, self.percent)

    @property
    def spread(self) -> str:
        """The standard deviation as text; empty for one checkpoint."""
        return "" if isnan(self.sd) else f" ± {number(self.sd, self.percent, None if self.percent else 2)}"

    @property
    def range(self) -> str:
        """The interval or the range over checkpoints in words; empty if unknown."""
        if isnan(self.low):
            return ""
        between = f"{number(self.low, self.percent)} to {number(self.high, self.percent)}"
        return f"95% interval {between}" if isnan(self.sd) else f"range over checkpoints: {between}"

    @property
    def interval(self) -> str:
        """The ends of the interval or of the range over checkpoints; empty if unknown."""
        return "" if isnan(self.low) else f"{number(self.low, self.percent)}–{number(self.high, self.percent)}"

    def __str__(self) -> str:
        return self.text + self.spread


@dataclass(frozen=True)
class Row:
    """A scorer with its cells by metric, in the order of the table's columns, and its costs.

    ``experimental`` tells why the scores may not be those of the paper; None if they are.
    """

    scorer: str
    cells: Mapping[str, tuple[Cell, ...]]
    parameters: str
    fit_seconds: float
    score_microseconds: float
    experimental: str | None


@dataclass(frozen=True)
class ScoreTable:
    """The scorers of a model in a part, in order of their mean AUROC.

    Attributes:
        part, model: Names in the spec.
        checkpoints: Number of checkpoints of the model.
        accuracy: Accuracy on the ID test set.
        n_id: Number of ID rows.
        columns: means first.
        rows: one for each scorer.
        n_ood: rows of each OoD set.
    """

    part: str
    model: str
    checkpoints: int
    accuracy: Cell
    n_id: int
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    n_ood: Mapping[str, int]

    @property
    def known(self) -> str:
        """The ID accuracy in words."""
        rows = f"on {self.n_id:,} images"
        return (
            f"ID accuracy unknown ({rows} without labels)"
            if isnan(self.accuracy.value)
            else f"ID accuracy {self.accuracy}% {rows}"
        )

    @property
    def tied(self) -> list[str]:
        """Scorers whose mean AUROC is not significantly below that of the first."""
        return [row.scorer for row in self.rows[1:] if row.cells["auroc"][0].tied]


def shown_metrics(results: Results) -> list[Metric]:
    """Return the metrics of a run, those of its summary tables first."""
    headline = results.headline
    return sorted(results.metrics, key=lambda metric: metric not in headline)


def compact_metrics(results: Results) -> tuple[list[Metric], list[Metric]]:
    """Return the metrics of every cell of a compact table, and those shown for its first column only."""
    return results.headline[:2], results.headline[2:]


def titles(metrics: Iterable[Metric], separator: str) -> str:
    return separator.join(metric.title for metric in metrics)


def part_tables(results: Results) -> dict[str, list[ScoreTable]]:
    """Return one table for each model by the title of the part; parts without results come last."""
    found = [*results.table["part"], *results.comparison["part"], *(missing.part for missing in results.not_run)]
    pairs = results.table[["part", "model"]].drop_duplicates()
    return {
        part: [_score_table(results, part, model) for model in pairs["model"][pairs["part"] == part]]
        for part in dict.fromkeys(found)
    }


def not_run(results: Results, part: str) -> list[NotRun]:
    return [missing for missing in results.not_run if missing.part == part]


def notes(results: Results, part: str) -> str:
    """Return the notes of a part in the spec."""
    tables = [*results.spec.get("parts", ()), results.spec]
    return next((table.get("notes", "").strip() for table in tables if table.get("title") == part), "")


def measure_table(results: Results, part: str) -> tuple[list[str], dict[str, list[Cell]]]:
    """Return the models, and one cell per model for each measure but the accuracy, which is shown with the scores."""
    frame = results.measures[(results.measures["part"] == part) & (results.measures["measure"] != "accuracy")]
    models = [str(model) for model in dict.fromkeys(frame["model"])]
    rows = {}
    for measure, of in frame.groupby("measure", sort=False):
        values = {model: spread(rows["value"].astype(float), percent=False) for model, rows in of.groupby("model")}
        rows[str(measure)] = [values.get(model, Cell(nan)) for model in models]
    return models, rows


def versions(results: Results) -> str:
    """Return the versions of the libraries in one line."""
    found = results.environment.get("versions", "")
    return (
        ", ".join(f"{name} {version}" for name, version in found.items()) if isinstance(found, Mapping) else str(found)
    )


def _score_table(results: Results, part: str, model: str) -> ScoreTable:
    frame = results.table[(results.table["part"] == part) & (results.table["model"] == model)]
    scored = [unit for unit in results.scored if (unit.part, unit.model) == (part, model)]
    columns = _columns(frame)
    order = _best_first(frame, columns[0])
    scores = [_in_memory(unit) for unit in scored]
    by_sets = {sets: errors_and_ties(scores, order, sets) for sets in dict.fromkeys(column.sets for column in columns)}
    tests = [by_sets[column.sets] for column in columns]
    cells = {
        metric.name: [_cells(frame, metric, column, order, test) for column, test in zip(columns, tests, strict=True)]
        for metric in results.metrics
    }
    by_scorer = frame.groupby("scorer", sort=False)
    cost = by_scorer[["fit_seconds", "score_microseconds"]].mean().loc[order]
    parameters = [str(text) for text in by_scorer["parameters"].first().loc[order]]
    return ScoreTable(
        part=part,
        model=model,
        checkpoints=frame["checkpoint"].nunique(),
        accuracy=spread(100 * frame.groupby("checkpoint")["id_accuracy"].first()),
        n_id=int(frame["n_id"].iloc[0]),
        n_ood={str(name): int(rows) for name, rows in frame.groupby("ood", sort=False)["n_ood"].first().items()},
        columns=columns,
        rows=tuple(
            Row(
                scorer=scorer,
                cells={metric: tuple(column[i] for column in made) for metric, made in cells.items()},
                parameters=parameters[i],
                fit_seconds=float(cost["fit_seconds"].iloc[i]),
                score_microseconds=float(cost["score_microseconds"].iloc[i]),
                experimental=why_experimental(json.loads(parameters[i])),
            )
            for i, scorer in enumerate(order)
        ),
    )


def _columns(frame: pd.DataFrame) -> tuple[Column, ...]:
    """Return columns for the means over all, near and far OoD sets, without repetitions, and for each OoD set."""
    groups = {str(name): str(group) for name, group in zip(frame["ood"], frame["group"], strict=True)}
    members = {group: tuple(name for name in groups if groups[name] == group) for group in ("near", "far")}
    means = {OVERALL: tuple(groups), **(members if all(members.values()) else {})}
    of_several = [Column(name, MEAN, sets) for name, sets in means.items() if len(sets) > 1]
    return (*of_several, *(Column(name, group, (name,)) for name, group in groups.items()))


def _best_first(frame: pd.DataFrame, column: Column) -> list[str]:
    mean = _by_checkpoint(frame, METRICS["auroc"], column).mean(axis=1, skipna=False)
    return [str(name) for name in mean.sort_values(ascending=False, kind="stable", na_position="last").index]


def _by_checkpoint(frame: pd.DataFrame, metric: Metric, column: Column) -> pd.DataFrame:
    """Return scaled values with scorers as rows and checkpoints as columns; NaN if an OoD set is missing."""
    of = frame[frame["ood"].isin(column.sets)].groupby(["scorer", "checkpoint"], sort=False)[metric.name]
    return metric.scale * of.mean().where(of.size() == len(column.sets)).unstack()


def _in_memory(unit: Scored) -> ByScorer:
    return {name: {of: np.asarray(values) for of, values in sets.items()} for name, sets in unit.scores.items()}


def errors_and_ties(
    units: Sequence[ByScorer], scorers: Sequence[str], sets: tuple[str, ...]
) -> dict[str, tuple[float, bool]]:
    """Return the standard error of the mean AUROC in percent, and whether it is tied with the best, by scorer.

    The scores of all checkpoints enter one covariance because they belong to the same rows. The mean over checkpoints
    is tested, with the checkpoints taken as given. Scorers without scores for a set or checkpoint are left out.
    """
    wanted = ("id", *sets)
    there = [name for name in scorers if all(name in unit and unit[name].keys() >= set(wanted) for unit in units)]
    if not (units and there):
        return {}
    stacked = [np.stack([unit[name][of] for unit in units for name in there]) for of in wanted]
    aurocs, covariance = mean_auroc_covariance(stacked[0], stacked[1:])
    shape = (len(units), len(there))
    mean = aurocs.reshape(shape).mean(axis=0)
    of_mean = covariance.reshape(shape * 2).mean(axis=(0, 2))
    errors = 100 * np.sqrt(of_mean.diagonal())
    return dict(zip(there, zip(errors.tolist(), tied_with_best(mean, of_mean).tolist(), strict=True), strict=True))


def _cells(
    frame: pd.DataFrame, metric: Metric, column: Column, order: list[str], tests: Mapping[str, tuple[float, bool]]
) -> list[Cell]:
    """Return the cells of a metric and column in the order of the rows."""
    values = _by_checkpoint(frame, metric, column).reindex(order).to_numpy(float)
    cells = mark_best(metric, [spread(of_scorer, metric.percent) for of_scorer in values])
    if metric.interval == "DeLong":
        found = [tests.get(scorer, (nan, False)) for scorer in order]
        cells = [
            replace(cell, tied=tied, low=max(cell.value - Z_95 * error, 0), high=min(cell.value + Z_95 * error, 100))
            if isnan(cell.sd)
            else replace(cell, tied=tied)
            for cell, (error, tied) in zip(cells, found, strict=True)
        ]
    ends = list(interval_columns(metric))
    if ends and len(column.sets) == 1 and frame["checkpoint"].nunique() == 1:
        of_set = frame[frame["ood"] == column.name].set_index("scorer")[ends].reindex(order).to_numpy(float)
        intervals = (metric.scale * of_set).tolist()
        cells = [replace(cell, low=low, high=high) for cell, (low, high) in zip(cells, intervals, strict=True)]
    return cells


def mark_best(metric: Metric, cells: Sequence[Cell]) -> list[Cell]:
    """Mark the best cell of a column, and those that are shown with the same digits."""
    known = [cell for cell in cells if not isnan(cell.value)]
    if not known:
        return list(cells)
    best = (max if metric.higher_is_better else min)(known, key=lambda cell: cell.value)
    return [replace(cell, best=not isnan(cell.value) and cell.text == best.text) for cell in cells]


def spread(values: ArrayLike, percent: bool = True) -> Cell:
    """Return the mean over checkpoints, with standard deviation and range if there are several."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return Cell(float(array[0]), percent=percent)
    ends = float(array.min()), float(array.max())
    return Cell(float(array.mean()), float(array.std(ddof=1)), *ends, percent=percent)
