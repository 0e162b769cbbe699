"""What changed between two runs of a benchmark, and which changes are more than chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import hypot, isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtr, ndtri

from ood_scores.benchmark.results import KEY, Results
from ood_scores.benchmark.unit_files import Scored
from ood_scores.evaluation.metrics import Metric, headline_metrics
from ood_scores.evaluation.uncertainty import compare_auroc

if TYPE_CHECKING:
    import pandas as pd

DATA = ("id_sha256", "ood_sha256")
WIDTH = 2 * float(ndtri(0.975))
"""Of a 95% interval, in standard errors."""


def compare_runs(a: Results, b: Results) -> pd.DataFrame:
    """Two runs, row by row.

    Returns:
        One row for each part, model, checkpoint, scorer and OoD set of either run, in the order of ``a``, what only
        ``b`` has last: these five; ``found``: ``both``, ``a`` or ``b``; and, as shares, for each headline metric
        (``auroc``, …) the columns ``…_a``, ``…_b`` and ``…_difference`` (b less a; NaN where only one run has the
        row). Of the AUROC difference: ``p_value``, ``p_holm`` (with Holm's correction for all rows of the frame), and
        ``paired``: whether both runs scored the same rows (same SHA-256 of both sets and same rows), so that DeLong's
        paired test applies. Otherwise it is a z-test of two independent AUROCs, whose standard errors are the widths
        of their 95% intervals divided by 3.92. The other metrics have no test.

    The two-sided p-values are NaN where only one run has the row.
    """
    left, right = a.table.set_index(list(KEY)), b.table.set_index(list(KEY))
    keys = left.index.append(right.index[~right.index.isin(left.index)])
    frame = keys.to_frame(index=False)
    frame["found"] = np.select([~keys.isin(right.index), ~keys.isin(left.index)], ["a", "b"], "both")
    left, right = left.reindex(keys), right.reindex(keys)
    for metric in headline_metrics():
        before, after = (run[metric.name].to_numpy(float) for run in (left, right))
        for column, values in zip(comparison_columns(metric), (before, after, after - before), strict=True):
            frame[column] = values
    same_rows = _same_rows(a, b)
    tests = [
        _test(key, before, after, same_rows)
        for key, (_, before), (_, after) in zip(keys, left.iterrows(), right.iterrows(), strict=True)
    ]
    frame["p_value"] = [p_value for p_value, _ in tests]
    frame["p_holm"] = holm(frame["p_value"].to_numpy())
    frame["paired"] = [paired for _, paired in tests]
    return frame


def comparison_columns(metric: Metric) -> tuple[str, str, str]:
    """The columns for a metric: its values in both runs, and their difference."""
    return f"{metric.name}_a", f"{metric.name}_b", f"{metric.name}_difference"


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values [n] corrected for their number; NaN stays NaN and is not counted. Source: Holm 1979."""
    corrected = np.full(len(p_values), nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested])]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(steps).clip(max=1)
    return corrected


def _same_rows(a: Results, b: Results) -> Callable[..., tuple[Scored, Scored] | None]:
    """What gives the scores of both runs for a part, model, checkpoint and OoD set, if they are of the same rows."""
    units = [{(unit.part, unit.model, unit.checkpoint): unit for unit in run.scored} for run in (a, b)]

    @cache
    def find(part: str, model: str, checkpoint: int, ood: str) -> tuple[Scored, Scored] | None:
        first, second = (of.get((part, model, checkpoint)) for of in units)
        if first is None or second is None:
            return None
        return (first, second) if all(first.rows[of].equal(second.rows[of]) for of in ("id", ood)) else None

    return find


def _test(
    key: tuple[Any, ...], before: pd.Series, after: pd.Series, same_rows: Callable[..., tuple[Scored, Scored] | None]
) -> tuple[float, bool]:
    """The p-value and whether the test is paired."""
    difference = abs(after["auroc"] - before["auroc"])
    if isnan(difference):
        return nan, False
    *unit, scorer, ood = key
    same_data = all(isinstance(before[name], str) and before[name] == after[name] for name in DATA)
    both = same_rows(*unit, ood) if same_data else None
    if difference == 0:
        return 1.0, both is not None
    if both:
        scores_a, scores_b = ((of.scores[scorer]["id"], of.scores[scorer][ood]) for of in both)
        return compare_auroc(scores_a, scores_b).p_value, True
    error = hypot(*((of["auroc_high"] - of["auroc_low"]) / WIDTH for of in (before, after)))
    return (float(2 * ndtr(-difference / error)) if error else 0.0), False
