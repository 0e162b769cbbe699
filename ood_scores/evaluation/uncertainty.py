"""How far a metric would move on other rows, and which scorers differ by more than chance.

Higher score = more in-distribution. The rows are taken as drawn independently, ID and OoD apart; the model is taken as
given. AUROC has a variance in closed form (DeLong), from which come intervals, paired tests of scorers on the same rows
and the ties of a table; the other metrics have the bootstrap.

Sources: DeLong, DeLong & Clarke-Pearson 1988, Comparing the areas under two or more correlated ROC curves; Sun & Xu
2014, Fast implementation of DeLong's algorithm (midranks); Pepe 2003, The statistical evaluation of medical tests
(interval on the logit scale); Holm 1979, A simple sequentially rejective multiple test procedure; Efron & Tibshirani
1993, An introduction to the bootstrap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtr, ndtri

from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch
from ood_scores.evaluation.metrics import METRICS, RocCounts, Scores, checked_scores, roc_counts

ScoreTable: TypeAlias = "torch.Tensor | NDArray[Any] | Sequence[Scores]"

ROUNDING = 1e-12
"""The variance of a difference is taken to be at least this share of the variances that it is computed from."""


@dataclass(frozen=True)
class Interval:
    """A figure and the range that holds its true value with the probability asked for, the level.

    Attributes:
        value: the figure on the given rows.
        low, high: the ends of the range.
        standard_error: standard deviation of the figure over draws of the rows; infinite where it is not known.
    """

    value: float
    low: float
    high: float
    standard_error: float


@dataclass(frozen=True, eq=False)
class BootstrapInterval(Interval):
    """An interval with what it was read from.

    Attributes:
        replicates: float64 [R], the metric on each resample, in the order drawn.
    """

    replicates: NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Two scorers on the same rows.

    Attributes:
        difference: AUROC of the first less that of the second.
        low, high: its interval.
        standard_error: its standard deviation over draws of the rows; infinite where it is not known.
        z: the difference in standard errors.
        p_value: chance of a difference at least as large, either way, between scorers with the same true AUROC.
    """

    difference: float
    low: float
    high: float
    standard_error: float
    z: float
    p_value: float


def auroc_interval(id_scores: Scores, ood_scores: Scores, level: float = 0.95) -> Interval:
    """AUROC with DeLong's standard error and an interval on the logit scale, in O(n log n) time.

    Args:
        id_scores: [N] scores, as in `roc_counts`.
        ood_scores: [M] scores, as in `roc_counts`.
        level: probability, in (0, 1), with which the interval holds the true AUROC.

    The ends are expit(logit A ± z se / (A (1 - A))), so they stay within (0, 1) and need no clipping. The exceptions:

    - A = 1 (and A = 0 mirrored) has no logit, and a standard error of 0. The low end is then
      ((1 - level) / 2)^(1 / min(N, M)), valid for any distribution: rows of the two sides can be paired in
      min(N, M) independent pairs, and all are in order with a probability of at most A^min(N, M).
    - A single row on a side says nothing about the spread of that side: the standard error is infinite, and the
      interval is [0, 1] unless A is 0 or 1.
    - If all scores are equal, A is 0.5 and so are both ends.

    Raises:
        BadInput: a level outside (0, 1). Besides, what `roc_counts` raises.
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
    """Whether two scorers differ in AUROC, on the same rows: DeLong's paired test, in O(n log n) time.

    Args:
        scores_a: the first scorer's scores of the ID rows [N] and the OoD rows [M], as in `roc_counts`.
        scores_b: the second scorer's, of the same rows in the same order.
        level: probability, in (0, 1), with which the interval holds the true difference.

    The interval is the difference ± z standard errors, clipped to [-1, 1]. Scorers that rank all pairs of rows alike
    have a difference, standard error and z of 0 and a p-value of 1. With a single row on a side the standard error is
    infinite and the p-value 1.

    Raises:
        ShapeMismatch: the scorers have different numbers of rows.
        BadInput: a level outside (0, 1). Besides, what `roc_counts` raises.
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
    """AUROC of each scorer and DeLong's covariance between them: `mean_auroc_covariance` with one OoD set."""
    return mean_auroc_covariance(id_scores, [ood_scores])


def mean_auroc_covariance(
    id_scores: ScoreTable, ood_sets: Sequence[ScoreTable]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean AUROC of each scorer over K OoD sets, and the covariance between scorers.

    Args:
        id_scores: [S, N], the scores of S scorers on the same N ID rows: a tensor, an array, or a sequence of vectors.
        ood_sets: K tables [S, M_k], of the same scorers in the same order on the rows of each OoD set.

    Returns:
        The AUROCs [S], float64, and their covariance [S, S], float64. A row's share in the mean is DeLong's placement
        value: averaged over the sets for ID rows, which all sets share; independent between sets for OoD rows. A single
        row on a side says nothing about its spread: variances are then infinite.

    Time is O(S K n log n), memory that of a few tables of the size of ``id_scores`` in float64.

    Raises:
        EmptyInput: no scorer or no OoD set.
        ShapeMismatch: tables of different numbers of scorers, or scorers with different numbers of rows.
        Besides, what `roc_counts` raises.
    """
    inside = _rows(id_scores, "ID")
    sets = len(ood_sets)
    if sets == 0:
        raise EmptyInput("there is no OoD set; give at least one table of scores, [S, M]")
    areas = np.zeros(len(inside))
    on_id = np.zeros((len(inside), len(inside[0])))
    covariance = np.zeros((len(inside), len(inside)))
    for ood_scores in ood_sets:
        outside = _rows(ood_scores, "OoD")
        if len(outside) != len(inside):
            raise ShapeMismatch(f"there are {len(inside)} scorers on the ID rows and {len(outside)} on the OoD rows")
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
    """Which scorers are not significantly worse than the one with the highest AUROC.

    Args:
        aurocs: [S] AUROCs, or means of them.
        covariance: [S, S], between them, as `auroc_covariance` and `mean_auroc_covariance` give it.
        level: of the test, in (0, 1).

    Returns:
        bool [S], true for the best itself. The others are compared with it by two-sided tests with Holm's correction
        for S - 1 comparisons. Two-sided because the best was found on the same rows: with two scorers that are equally
        good, one is called worse with probability ``level``. A scorer with the same AUROC is always tied, and so is
        every scorer if variances are infinite.

    Raises:
        EmptyInput: no scorer.
        ShapeMismatch: a covariance that is not [S, S].
        NotFinite: NaN.
        BadInput: a level outside (0, 1).
    """
    _check_level(level)
    areas, between = np.asarray(aurocs, np.float64), np.asarray(covariance, np.float64)
    if areas.size == 0:
        raise EmptyInput("there is no scorer to compare")
    if areas.ndim != 1 or between.shape != 2 * areas.shape:
        raise ShapeMismatch(
            f"AUROCs of shape {list(areas.shape)} and a covariance of shape {list(between.shape)}; give [S] and [S, S]"
        )
    if np.isnan(areas).any() or np.isnan(between).any():
        raise NotFinite("the AUROCs or their covariance hold NaN; give them as `auroc_covariance` returns them")
    best = int(np.argmax(areas))
    both = np.diag(between) + between[best, best]
    shared = np.where(np.isinf(both), 0, between[best])  # so that what is infinite stays so
    z = _in_errors(areas[best] - areas, np.sqrt(np.maximum(both - 2 * shared, ROUNDING * both)))
    p_values = 2 * ndtr(-z)
    order = np.argsort(p_values)
    left = np.maximum(np.arange(len(areas))[::-1], 1)  # the best comes last, with p = 1, and is no comparison
    worse = np.empty(len(areas), dtype=bool)
    worse[order] = np.logical_and.accumulate(p_values[order] <= level / left)
    return ~worse


def interval(metric: str, id_scores: Scores, ood_scores: Scores) -> Interval:
    """95% interval of a metric by the method that ``METRICS`` names: DeLong's or the bootstrap."""
    if METRICS[metric].interval == "DeLong":
        return auroc_interval(id_scores, ood_scores)
    return bootstrap(id_scores, ood_scores, metric)


def bootstrap(
    id_scores: Scores,
    ood_scores: Scores,
    metric: str = "auroc",
    *,
    replicates: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> BootstrapInterval:
    """Percentile interval of a metric over resamples of the rows, ID and OoD apart.

    Args:
        id_scores: [N] scores, as in `roc_counts`.
        ood_scores: [M] scores, as in `roc_counts`.
        metric: name of a row of ``METRICS``, with the default options of its formula.
        replicates: number of resamples, R, at least 2.
        seed: of the resamples; the same seed gives the same replicates.
        level: share of the replicates, in (0, 1), that the interval holds.

    The standard error is the standard deviation of the replicates. The rows are sorted once; a resample is then a count
    for each row, in O(N + M). For FPR95 no rows are drawn (see ``resampled_fpr``): the values have the same
    distribution, ties included, in O(R log n).

    Raises:
        UnknownName: another metric.
        BadInput: fewer than 2 replicates, or a level outside (0, 1). Besides, what `roc_counts` raises.
    """
    _check_level(level)
    measured = METRICS[metric]
    if replicates < 2:
        raise BadInput(f"{replicates} replicates have no spread; give at least 2, better 1000")
    counts = measured.counts(roc_counts(id_scores, ood_scores))
    rng = np.random.default_rng(seed)
    if measured.resampled:
        values = measured.resampled(counts, replicates, rng)
    else:
        values = np.fromiter(map(measured.formula, _resamples(counts, replicates, rng)), np.float64, replicates)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return BootstrapInterval(measured.formula(counts), float(low), float(high), float(values.std(ddof=1)), values)


@dataclass(frozen=True)
class _Placements:
    """DeLong's placement values: of an ID row the share of OoD rows below it, of an OoD row the share of ID rows above.

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
    """Twice how many of the others lie below each score, those equal to it counting one half; both are sorted."""
    return np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")


def _standard_error(on_id: NDArray[np.float64], on_ood: NDArray[np.float64]) -> float:
    return float(np.sqrt(_covariance_of_mean(on_id[None]) + _covariance_of_mean(on_ood[None])).item())


def _covariance_of_mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    scorers, n = rows.shape
    if n == 1:
        return np.diag(np.full(scorers, np.inf))
    centred = rows - rows.mean(axis=1, keepdims=True)
    return centred @ centred.T / (n * (n - 1))


def _in_errors(difference: ArrayLike, error: ArrayLike) -> NDArray[np.float64]:
    """The difference in standard errors; no difference is 0 even where there is no error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(difference, 0), 0.0, np.divide(difference, error))


def _rows(scores: ScoreTable, side: str) -> list[NDArray[np.float64]]:
    rows = [checked_scores(row, side) for row in scores]
    if not rows:
        raise EmptyInput(f"there is no scorer in the {side} scores; give a table [S, N]")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ShapeMismatch(f"{side} scores of {lengths[0]} and of {lengths[1]} rows; give every scorer the same rows")
    return rows


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise BadInput(f"a level of {level} is no probability; give a number between 0 and 1, such as 0.95")


def _quantile(level: float) -> float:
    _check_level(level)
    return float(ndtri((1 + level) / 2))


def _resamples(counts: RocCounts, replicates: int, rng: np.random.Generator) -> Iterator[RocCounts]:
    """The counts of each resample; thresholds that it drew no row of are left out."""
    indices = np.arange(len(counts.thresholds))
    positive_rows = np.repeat(indices, np.diff(counts.positives, prepend=0))
    negative_rows = np.repeat(indices, np.diff(counts.negatives, prepend=0))

    def drawn(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(rows[rng.integers(len(rows), size=len(rows))], minlength=len(indices))

    for _ in range(replicates):
        positives, negatives = drawn(positive_rows), drawn(negative_rows)
        kept = np.flatnonzero(positives + negatives)
        yield RocCounts(counts.thresholds[kept], np.cumsum(positives[kept]), np.cumsum(negatives[kept]))
