"""Comparison of two runs of a benchmark, with tests of which changes are more than chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import hypot, isnan, nan
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtr, ndtri

from ood_scores.benchmark.results import KEY, Results
from ood_scores.benchmark.unit_files import Scored
from ood_scores.evaluation.metrics import Metric
from ood_scores.evaluation.uncertainty import compare_auroc

if TYPE_CHECKING:
    import pandas as pd

DATA = ("id_sha256", "ood_sha256")
WIDTH = 2 * float(ndtri(0.975))
"""Width of a 95% interval in standard errors."""


def compare_runs(a: Results, b: Results) -> pd.DataFrame:
    """Compare two runs row by row.

    The AUROC difference is tested with DeLong's paired test if both runs scored the same rows (same SHA-256 of both
    sets and same row numbers). Otherwise the test is a z-test of two independent AUROCs, whose standard errors are the
    widths of their 95% intervals divided by 3.92. Other metrics are not tested.

    Returns:
        One row for each part, model, checkpoint, scorer and OoD set of either run, in the order of ``a``, followed by
        the rows of ``b`` alone. Columns: these five; ``found``: ``both``, ``a`` or ``b``; for each headline metric
        (``auroc``, …), as shares, ``…_a``, ``…_b`` and ``…_difference`` (b minus a); for the AUROC difference, the
        two-sided ``p_value``, ``p_holm`` (with Holm's correction for all rows) and ``paired`` (whether the test is
        paired). Differences and p-values are NaN for rows of one run only.
    """
    left, right = a.table.set_index(list(KEY)), b.table.set_index(list(KEY))
    keys = left.index.append(right.index[~right.index.isin(left.index)])
    frame = keys.to_frame(index=False)
    frame["found"] = np.select([~keys.isin(right.index), ~keys.isin(left.index)], ["a", "b"], "both")
    left, right = left.reindex(keys), right.reindex(keys)
    for metric in shared_headline(a, b):
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


def shared_headline(a: Results, b: Results) -> list[Metric]:
    """Return the metrics of the summary tables of both runs, in the order of ``METRICS``."""
    return [metric for metric in a.headline if metric in b.headline]


def comparison_columns(metric: Metric) -> tuple[str, str, str]:
    """Names of the columns of a metric: values in both runs, and their difference."""
    return f"{metric.name}_a", f"{metric.name}_b", f"{metric.name}_difference"


def holm(p_values: np.ndarray) -> np.ndarray:
    """Correct p-values ``[n]`` for multiple tests; NaN stays NaN and does not count. Source: Holm 1979."""
    corrected = np.full(len(p_values), nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested])]
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.maximum.accumulate(steps).clip(max=1)
    return corrected


def _same_rows(a: Results, b: Results) -> Callable[..., tuple[Scored, Scored] | None]:
    """Return a function that finds the scores of both runs for a part, model, checkpoint and OoD set.

    The function returns None if the runs scored different rows.
    """
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
    """Return the p-value, and whether the test is paired."""
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
