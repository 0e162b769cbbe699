"""Confidence intervals of metrics, and tests of whether scorers differ by more than chance.

Higher scores mean more in-distribution. Rows are assumed to be independent draws, separately for ID and OoD; the model
is taken as given. The variance of AUROC has a closed form (DeLong), which is used for its interval, for paired tests of
scorers on the same rows, and for the ties of a table. Other metrics use the bootstrap.

Sources: DeLong, DeLong & Clarke-Pearson 1988, Comparing the areas under two or more correlated ROC curves; Sun & Xu
2014, Fast implementation of DeLong's algorithm (midranks); Pepe 2003, The statistical evaluation of medical tests
(interval on the logit scale); Holm 1979, A simple sequentially rejective multiple test procedure; Efron & Tibshirani
1993, An introduction to the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtr, ndtri

from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch
from ood_scores.evaluation.calibration_error import ClassifiedRows
from ood_scores.evaluation.metrics import METRICS
from ood_scores.evaluation.threshold_counts import Correct, RocCounts, Scores, checked_scores, roc_counts

ScoreTable: TypeAlias = "torch.Tensor | NDArray[Any] | Sequence[Scores]"

ROUNDING = 1e-12
"""Lower bound on the variance of a difference, as a share of the variances that it is computed from."""


@dataclass(frozen=True)
class Interval:
    """Confidence interval of a metric.

    Attributes:
        value: Metric on the given rows.
        low, high: Ends of the interval.
        standard_error: Standard deviation of the metric over draws of the rows; infinite if unknown.
    """

    value: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class BootstrapInterval(Interval):
    """Percentile interval with the replicates that it was computed from.

    Attributes:
        replicates: Metric on each resample in the order of the draws, float64 ``[R]``.
    """

    replicates: NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Comparison of the AUROC of two scorers on the same rows.

    Attributes:
        difference: AUROC of the first scorer minus AUROC of the second.
        low, high: Ends of the confidence interval of the difference.
        standard_error: Standard deviation of the difference over draws of the rows; infinite if unknown.
        z: Difference divided by its standard error.
        p_value: Two-sided p-value under the hypothesis that both scorers have the same AUROC.
    """

    difference: float
    low: float
    high: float
    standard_error: float
    z: float
    p_value: float


def auroc_interval(id_scores: Scores, ood_scores: Scores, level: float = 0.95) -> Interval:
    """AUROC with DeLong's standard error and an interval on the logit scale, in O(n log n) time.

    The ends are ``expit(logit A ± z se / (A (1 - A)))``, so they stay within (0, 1) without clipping. Exceptions:

    - A = 1 has no logit, and its standard error is 0. The low end is then ``((1 - level) / 2)^(1 / min(N, M))``, which
      is valid for any distribution: the rows of the two sides form min(N, M) independent pairs, and all pairs are in
      order with a probability of at most ``A^min(N, M)``. A = 0 is the mirror image.
    - If a side has a single row, its spread is unknown: the standard error is infinite, and the interval is [0, 1]
      unless A is 0 or 1.
    - If all scores are equal, A and both ends are 0.5.

    Args:
        id_scores: Scores of ID rows, ``[N]``, as for ``roc_counts``.
        ood_scores: Scores of OoD rows, ``[M]``, as for ``roc_counts``.
        level: Confidence level, in (0, 1).

    Raises:
        BadInput: if ``level`` is outside (0, 1), or as for ``roc_counts``.
        NotFinite, EmptyInput, ShapeMismatch: as for ``roc_counts``.
    """
    quantile = _quantile(level)
    placed = _placements(checked_scores(id_scores, "ID"), checked_scores(ood_scores, "OoD"))
    area = placed.auroc
    error = _standard_error(placed.on_id, placed.on_ood)
    if area in (0, 1):
        reach = (1 - level) / 2
        bound = float(reach ** (1 / min(len(placed.on_id), len(placed.on_ood))))
        return Interval(area, bound, 1.0, error) if area == 1 else Interval(area, 0.0, 1 - bound, error)
    half = quantile * error / (area * (1 - area))
    return Interval(area, float(expit(logit(area) - half)), float(expit(logit(area) + half)), error)


def compare_auroc(scores_a: tuple[Scores, Scores], scores_b: tuple[Scores, Scores], level: float = 0.95) -> Comparison:
    """Test whether two scorers differ in AUROC on the same rows: DeLong's paired test, in O(n log n) time.

    The interval is the difference ± z standard errors, clipped to [-1, 1]. For scorers that rank all pairs of rows
    alike, the difference, the standard error and z are 0 and the p-value is 1. If a side has a single row, the standard
    error is infinite and the p-value is 1.

    Args:
        scores_a: Scores of the first scorer: ID rows ``[N]`` and OoD rows ``[M]``, as for ``roc_counts``.
        scores_b: Scores of the second scorer for the same rows in the same order.
        level: Confidence level of the interval, in (0, 1).

    Raises:
        ShapeMismatch: if the scorers have different numbers of rows, or as for ``roc_counts``.
        BadInput: if ``level`` is outside (0, 1), or as for ``roc_counts``.
        NotFinite, EmptyInput: as for ``roc_counts``.
    """
    quantile = _quantile(level)
    id_a, id_b = _rows([scores_a[0], scores_b[0]], "ID")
    ood_a, ood_b = _rows([scores_a[1], scores_b[1]], "OoD")
    a, b = _placements(id_a, ood_a), _placements(id_b, ood_b)
    difference = a.auroc - b.auroc
    error = _standard_error(a.on_id - b.on_id, a.on_ood - b.on_ood)
    z = float(_in_errors(difference, error))
    low, high = max(difference - quantile * error, -1.0), min(difference + quantile * error, 1.0)
    return Comparison(difference, low, high, error, z, float(2 * ndtr(-abs(z))))


def auroc_covariance(id_scores: ScoreTable, ood_scores: ScoreTable) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROC of each scorer and DeLong's covariance between scorers: ``mean_auroc_covariance`` for one OoD set."""
    return mean_auroc_covariance(id_scores, [ood_scores])


def mean_auroc_covariance(
    id_scores: ScoreTable, ood_sets: Sequence[ScoreTable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean AUROC of each scorer over K OoD sets, and the covariance between scorers.

    The contribution of a row to the mean is DeLong's placement value. For ID rows, which all sets share, it is averaged
    over the sets; for OoD rows it is independent between sets. Takes O(S K n log n) time and the memory of a few tables
    of the size of ``id_scores`` in float64.

    Args:
        id_scores: Scores of S scorers on the same N ID rows, ``[S, N]``: a tensor, an array, or a sequence of vectors.
        ood_sets: One table ``[S, M_k]`` for each OoD set, with the same scorers in the same order.

    Returns:
        Mean AUROCs, float64 ``[S]``, and their covariance, float64 ``[S, S]``. Variances are infinite if a side has a
        single row, since its spread is unknown.

    Raises:
        EmptyInput: if there is no scorer or no OoD set, or as for ``roc_counts``.
        ShapeMismatch: if tables have different numbers of scorers, or scorers have different numbers of rows.
        NotFinite, BadInput: as for ``roc_counts``.
    """
    inside = _rows(id_scores, "ID")
    sets = len(ood_sets)
    if sets == 0:
        raise EmptyInput("there is no OoD set: pass at least one table of scores, [S, M].")
    areas = np.zeros(len(inside))
    on_id = np.zeros((len(inside), len(inside[0])))
    covariance = np.zeros((len(inside), len(inside)))
    for ood_scores in ood_sets:
        outside = _rows(ood_scores, "OoD")
        if len(outside) != len(inside):
            raise ShapeMismatch(
                f"there are {len(inside)} scorers on the ID rows and {len(outside)} on the OoD rows: pass the same."
            )
        on_ood = np.empty((len(outside), len(outside[0])))
        for scorer, (here, there) in enumerate(zip(inside, outside, strict=True)):
            placed = _placements(here, there)
            areas[scorer] += placed.auroc
            on_id[scorer] += placed.on_id
            on_ood[scorer] = placed.on_ood
        covariance += _covariance_of_mean(on_ood)
    covariance += _covariance_of_mean(on_id)
    return areas / sets, covariance / sets**2


def tied_with_best(aurocs: ArrayLike, covariance: ArrayLike, level: float = 0.05) -> NDArray[np.bool_]:
    """Find the scorers that are not significantly worse than the one with the highest AUROC.

    Each scorer is compared with the best by a two-sided test, with Holm's correction for S - 1 comparisons. The tests
    are two-sided because the best scorer was found on the same rows: of two equally good scorers, one is called worse
    with probability ``level``. Scorers with the same AUROC as the best are always tied, and all scorers are tied if
    variances are infinite.

    Args:
        aurocs: AUROCs or mean AUROCs, ``[S]``.
        covariance: Covariance of the AUROCs, ``[S, S]``, from ``auroc_covariance`` or ``mean_auroc_covariance``.
        level: Significance level, in (0, 1).

    Returns:
        Whether each scorer is tied with the best, bool ``[S]``; True for the best itself.

    Raises:
        EmptyInput: if there is no scorer.
        ShapeMismatch: if ``covariance`` is not ``[S, S]``.
        NotFinite: if a value is NaN.
        BadInput: if ``level`` is outside (0, 1).
    """
    _check_level(level)
    areas, between = np.asarray(aurocs, np.float64), np.asarray(covariance, np.float64)
    if areas.size == 0:
        raise EmptyInput("there is no scorer to compare: pass at least one AUROC.")
    if areas.ndim != 1 or between.shape != 2 * areas.shape:
        raise ShapeMismatch(
            f"AUROCs have shape {list(areas.shape)} and covariance {list(between.shape)}: pass [S] and [S, S]."
        )
    if np.isnan(areas).any() or np.isnan(between).any():
        raise NotFinite("the AUROCs or their covariance contain NaN: pass them as auroc_covariance returns them.")
    best = int(np.argmax(areas))
    both = np.diag(between) + between[best, best]
    shared = np.where(np.isinf(both), 0, between[best])  # infinite variances stay infinite
    z = _in_errors(areas[best] - areas, np.sqrt(np.maximum(both - 2 * shared, ROUNDING * both)))
    p_values = 2 * ndtr(-z)
    order = np.argsort(p_values)
    left = np.maximum(np.arange(len(areas))[::-1], 1)  # the best, with p = 1, comes last and is not compared
    worse = np.empty(len(areas), dtype=bool)
    worse[order] = np.logical_and.accumulate(p_values[order] <= level / left)
    return ~worse


def interval(
    metric: str,
    id_scores: Scores,
    ood_scores: Scores,
    correct: Correct | None = None,
    classified: ClassifiedRows | None = None,
) -> Interval:
    """95% interval of a metric, by DeLong's method or the bootstrap as its row of ``METRICS`` says."""
    if METRICS[metric].interval == "DeLong":
        return auroc_interval(id_scores, ood_scores)
    return bootstrap(id_scores, ood_scores, metric, correct=correct, classified=classified)


def bootstrap(
    id_scores: Scores,
    ood_scores: Scores,
    metric: str = "auroc",
    *,
    correct: Correct | None = None,
    classified: ClassifiedRows | None = None,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> BootstrapInterval:
    """Percentile interval of a metric over resamples of the rows, drawn separately for ID and OoD.

    The standard error is the standard deviation of the replicates. Rows are sorted once; a resample is then a count for
    each row, in O(N + M). For FPR95 no rows are drawn (see ``resampled_fpr``): the replicates have the same
    distribution, including ties, and take O(R log n).

    Args:
        id_scores: Scores of ID rows, ``[N]``, as for ``roc_counts``.
        ood_scores: Scores of OoD rows, ``[M]``, as for ``roc_counts``.
        metric: Name of a metric in ``METRICS``, which is computed with default options.
        correct: Whether each ID row is classified correctly, bool ``[N]``. A metric that needs it is NaN without it.
        classified: The ID rows for a metric of the classifier, which is NaN without them.
        replicates: Number of resamples R, at least 2.
        seed: Seed of the resamples; the same seed produces the same replicates.
        level: Confidence level, in (0, 1).

    Raises:
        UnknownName: if there is no such metric.
        BadInput: if ``replicates`` is less than 2 or ``level`` is outside (0, 1), or as for ``roc_counts``.
        NotFinite, EmptyInput, ShapeMismatch: as for ``roc_counts``.
    """
    _check_level(level)
    measured = METRICS[metric]
    if replicates < 2:
        raise BadInput(f"replicates must be at least 2, got {replicates}: pass 1000.")
    counts = measured.counts(roc_counts(id_scores, ood_scores, correct))
    rng = np.random.default_rng(seed)
    given = classified if measured.of_classifier else counts
    if given is None or (measured.needs_correct and counts.correct is None):
        return BootstrapInterval(nan, nan, nan, nan, np.full(replicates, nan))
    if measured.resampled:
        values = measured.resampled(counts, replicates, rng)
    else:
        drawn = given.resamples if isinstance(given, ClassifiedRows) else partial(_resamples, given)
        values = np.fromiter(map(measured.formula, drawn(replicates, rng)), np.float64, replicates)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return BootstrapInterval(measured.formula(given), float(low), float(high), float(values.std(ddof=1)), values)


@dataclass(frozen=True)
class _Placements:
    """DeLong's placement values: the share of OoD rows below each ID row, and of ID rows above each OoD row.

    Ties count one half. The mean over either side is the AUROC.
    """

    auroc: float
    on_id: NDArray[np.float64]
    on_ood: NDArray[np.float64]


def _placements(id_scores: NDArray[np.float64], ood_scores: NDArray[np.float64]) -> _Placements:
    id_order, ood_order = np.argsort(id_scores), np.argsort(ood_scores)
    id_sorted, ood_sorted = id_scores[id_order], ood_scores[ood_order]
    n, m = len(id_sorted), len(ood_sorted)
    outranked_twice = _midrank_twice(ood_sorted, id_sorted)
    on_id, on_ood = np.empty(n), np.empty(m)
    on_id[id_order] = outranked_twice / (2 * m)
    on_ood[ood_order] = (2 * n - _midrank_twice(id_sorted, ood_sorted)) / (2 * n)
    return _Placements(int(outranked_twice.sum()) / (2 * n * m), on_id, on_ood)


def _midrank_twice(others: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Twice the number of ``others`` below each score, where equal ones count one half; both arrays are sorted."""
    return np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")


def _standard_error(on_id: NDArray[np.float64], on_ood: NDArray[np.float64]) -> float:
    return float(np.sqrt(_covariance_of_mean(on_id[None]) + _covariance_of_mean(on_ood[None])).item())


def _covariance_of_mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    scorers, n = rows.shape
    if n == 1:
        return np.diag(np.full(scorers, np.inf))
    centered = rows - rows.mean(axis=1, keepdims=True)
    return centered @ centered.T / (n * (n - 1))


def _in_errors(difference: ArrayLike, error: ArrayLike) -> NDArray[np.float64]:
    """The difference divided by its standard error; 0 for no difference, even if the error is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(difference, 0), 0.0, np.divide(difference, error))


def _rows(scores: ScoreTable, side: str) -> list[NDArray[np.float64]]:
    rows = [checked_scores(row, side) for row in scores]
    if not rows:
        raise EmptyInput(f"there is no scorer in the {side} scores: pass a table [S, N].")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ShapeMismatch(f"scorers have {lengths[0]} and {lengths[1]} {side} scores: pass scores of the same rows.")
    return rows


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadInput(f"level must be in (0, 1), got {level}: pass a number such as 0.95.")


def _quantile(level: float) -> float:
    _check_level(level)
    return float(ndtri((1 + level) / 2))


def _resamples(counts: RocCounts, replicates: int, rng: np.random.Generator) -> Iterator[RocCounts]:
    """Counts of each resample, without thresholds that have no row in it."""
    indices = np.arange(len(counts.thresholds))
    at_threshold = np.diff(counts.positives, prepend=0)
    positive_rows = np.repeat(indices, at_threshold)
    negative_rows = np.repeat(indices, np.diff(counts.negatives, prepend=0))
    correct = None if counts.correct is None else _first_of_each(np.diff(counts.correct, prepend=0), at_threshold)

    def drawn(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows[rng.integers(len(rows), size=len(rows))]

    def counted(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(rows, minlength=len(indices))

    for _ in range(replicates):
        chosen = drawn(np.arange(len(positive_rows)))
        positives, negatives = counted(positive_rows[chosen]), counted(drawn(negative_rows))
        kept = np.flatnonzero(positives + negatives)
        right = None
        if correct is not None:
            right = np.cumsum(counted(positive_rows[chosen[correct[chosen]]])[kept])
        yield RocCounts(counts.thresholds[kept], np.cumsum(positives[kept]), np.cumsum(negatives[kept]), right)


def _first_of_each(chosen: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark the first ``chosen[t]`` of the ``rows[t]`` rows of each threshold t."""
    place = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
    marked: NDArray[np.bool_] = place < np.repeat(chosen, rows)
    return marked
