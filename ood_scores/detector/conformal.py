"""Thresholds and p-values that are valid for any score and any data: split conformal prediction on score vectors.

A higher score means more in-distribution (ID). The calibration scores are those of ID rows on which neither the scorer
was fitted nor the model trained. All statements are valid at finite n, whatever the distribution of the scores, if
calibration rows and new ID rows are exchangeable, as independent draws from one distribution are.

Sources: Vovk, Gammerman & Shafer 2005, Algorithmic learning in a random world (p-values, Mondrian categories); Lei et
al. 2018, Distribution-free predictive inference for regression (the split); Vovk 2012, Conditional validity of
inductive conformal predictors (``delta``); Bates et al. 2023, Testing for outliers with conformal p-values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betainc

from ood_scores.errors import BadInput, BadLabels, ShapeMismatch
from ood_scores.evaluation.threshold_counts import Scores, checked_scores
from ood_scores.user_warnings import warn_user

ROUNDING = 1e-12
"""Relative amount by which p-values may exceed Benjamini and Hochberg's bounds, since both are rounded."""


@dataclass(frozen=True)
class Threshold:
    """A threshold: a row is kept as ID if its score is at least ``value``.

    Attributes:
        value: the ``rank``-th smallest calibration score; -inf, which keeps every row, for rank 0.
        keep: the requested share of ID rows.
        n: the number of calibration rows.
        rank: the rank of ``value`` among the calibration scores; the smallest score has rank 1.
        delta: the share of calibration sets for which less than ``keep`` may be kept; None if ``keep`` is an average
            over calibration sets.
    """

    value: float
    keep: float
    n: int
    rank: int
    delta: float | None = None

    @property
    def level(self) -> float:
        """The share of ID rows kept on average over calibration sets: exact without ties, a lower bound with ties."""
        return 1 - self.rank / (self.n + 1)

    @property
    def guarantee(self) -> str:
        """The guarantee, in words, for new rows that are exchangeable with the calibration rows."""
        on_average = f"at least {self.level:.2%} of ID rows are kept on average over calibration sets of {self.n} rows"
        if self.delta is None:
            return on_average
        return f"{on_average}, and at least {self.keep:.2%} with {1 - self.delta:.2%} of them"


def threshold(scores: Scores, keep: float = 0.95, *, delta: float | None = None) -> Threshold:
    """Return the highest threshold that provably keeps the share ``keep`` of ID rows.

    Without ``delta``, its value is the floor((n + 1)(1 - keep))-th smallest score. A new ID row is equally likely to
    have any of the n + 1 ranks, so that it is below that score with a probability of at most rank / (n + 1):
    P(kept) >= keep, over the draw of both the calibration rows and the new row (Lei et al. 2018). The share kept by one
    calibration set is higher or lower: without ties its distribution is Beta(n + 1 - rank, rank).

    With ``delta``, that share is at least ``keep`` for all but a share ``delta`` of calibration sets: the rank is the
    largest with P(Beta(n + 1 - rank, rank) < keep) <= delta (Vovk 2012, Proposition 2a). This needs independent rows.

    With ties, more rows are kept. If even rank 1 is too high, the value is -inf, with a warning that names the number
    of rows needed: ceil(1 / (1 - keep)) - 1 without ``delta``, ceil(log delta / log keep) with it.

    Args:
        scores: the calibration scores ``[n]``: a tensor on any device, an array, or a list of numbers; infinite values
            are allowed.
        keep: the share to keep, in (0, 1); taken as the decimal number that it prints as, so that 0.95 of 20 rows is
            exactly 19.
        delta: None, or the share of calibration sets for which less may be kept, in (0, 1).

    Raises:
        NotFinite: if a score is NaN.
        EmptyInput: if there are no scores.
        ShapeMismatch: if the scores are not one-dimensional.
        BadInput: if the scores are not real numbers, or ``keep`` or ``delta`` is not in (0, 1).
    """
    check_shares(keep=keep, delta=delta)
    found = threshold_of(checked_scores(scores, "calibration"), keep, delta)
    if found.rank == 0:
        warn_user(
            f"{found.n} calibration rows are too few to keep {keep:g}{_surely(delta)}, so that no row can be rejected "
            f"(the threshold is -inf): at least {_rows_needed(keep, delta)} are needed.",
        )
    return found


def class_thresholds(
    scores: Scores, predictions: Any, classes: int, keep: float = 0.95, *, delta: float | None = None
) -> tuple[Threshold, ...]:
    """Return a threshold per predicted class, so that ``keep`` is guaranteed among the rows of each class (Mondrian).

    A class with too few rows has the threshold -inf: its guarantee is valid, but no row predicted as this class can be
    rejected. A warning names the number of such classes and of the rows that each needs. They do not use the threshold
    of other classes, which would guarantee nothing for them.

    Args:
        scores: the calibration scores ``[n]``, as in ``threshold``.
        predictions: the model's predicted classes ``[n]``, integers in 0 .. classes - 1. Labels cannot be used instead,
            since a new row has none.
        classes: the number of classes.
        keep, delta: the same as in ``threshold``, for each class separately.

    Raises:
        ShapeMismatch: if there is not one prediction per score.
        BadLabels: if the predictions are not class indices. Other errors are those of ``threshold``.
    """
    check_shares(keep=keep, delta=delta)
    rows = checked_scores(scores, "calibration")
    of_class = _class_indices(predictions, classes, len(rows))
    found = tuple(threshold_of(rows[of_class == index], keep, delta) for index in range(classes))
    too_few = [index for index, each in enumerate(found) if each.rank == 0]
    if too_few:
        named = ", ".join(map(str, too_few[:5])) + (", …" if len(too_few) > 5 else "")
        warn_user(
            f"{len(too_few)} of {classes} classes ({named}) are predicted for too few calibration rows to keep "
            f"{keep:g}{_surely(delta)}, so that no row predicted as one of them can be rejected (its threshold is "
            f"-inf): each needs at least {_rows_needed(keep, delta)} rows.",
        )
    return found


def p_values(calibration: Scores, scores: Scores) -> NDArray[np.float64]:
    """Return conformal p-values: the share of calibration rows with at most the same score. A small value means OoD.

    Args:
        calibration: the calibration scores ``[n]``, as in ``threshold``; linear time if they are in ascending order.
        scores: the scores ``[m]`` of the rows to test.

    Returns:
        float64 ``[m]``, (1 + #{calibration <= score}) / (n + 1), between 1 / (n + 1) and 1. For an ID row, P(p <= u)
        <= u for every u, over the draw of the calibration rows and the row (Vovk et al. 2005). p <= rank / (n + 1) is
        equivalent to score < ``threshold(calibration, keep).value``.

    Raises:
        BadInput: the errors of ``threshold`` for scores.
    """
    ordered = np.sort(checked_scores(calibration, "calibration"), kind="stable")
    places = np.searchsorted(ordered, checked_scores(scores, "new"), side="right")
    return (1 + places) / (len(ordered) + 1)


def benjamini_hochberg(p: Scores, rate: float) -> NDArray[np.bool_]:
    """Return which rows of a batch to declare OoD, so that on average a share of at most ``rate`` of them is ID.

    Conformal p-values that share a calibration set are dependent, but positively (PRDS), so that the rate is guaranteed
    for independent rows without ties (Bates et al. 2023); it is even ``rate`` times the share of ID rows in the batch.
    The smallest p-value is 1 / (n + 1): a single OoD row among m is found only if n + 1 >= m / rate.

    Args:
        p: the p-values ``[m]`` of one batch, in [0, 1].
        rate: the false discovery rate, in (0, 1): the mean over batches of the share of ID rows among the rows declared
            OoD (0 if there are none).

    Returns:
        bool ``[m]``, True for rows declared OoD: the k smallest p-values for the largest k whose k-th smallest is at
        most rate k / m.

    Raises:
        BadInput: if p-values are not in [0, 1], or the rate is not in (0, 1). Other errors are those of ``threshold``
            for scores.
    """
    check_shares(rate=rate)
    values = checked_scores(p, "p-value")
    if values.min() < 0 or values.max() > 1:
        raise BadInput(f"p-values must be in [0, 1], got values from {values.min():g} to {values.max():g}.")
    m = len(values)
    order = np.argsort(values, kind="stable")
    met = np.flatnonzero(m * values[order] <= rate * np.arange(1, m + 1) * (1 + ROUNDING))
    rejected = np.zeros(m, dtype=bool)
    if len(met):
        rejected[order[: met[-1] + 1]] = True
    return rejected


def threshold_of(scores: NDArray[np.float64], keep: float, delta: float | None) -> Threshold:
    n = len(scores)
    rank = _rank(n, keep) if delta is None else _sure_rank(n, keep, delta)
    value = float(np.partition(scores, rank - 1)[rank - 1]) if rank else -math.inf
    return Threshold(value, keep, n, rank, delta)


def _rank(n: int, keep: float) -> int:
    return math.floor((n + 1) * (1 - Fraction(str(keep))))


def _sure_rank(n: int, keep: float, delta: float) -> int:
    ranks = np.arange(1, n + 1)
    return int(np.count_nonzero(betainc(n + 1 - ranks, ranks, keep) <= delta))


def _rows_needed(keep: float, delta: float | None) -> int:
    if delta is None:
        return math.ceil(1 / (1 - Fraction(str(keep)))) - 1
    return math.ceil(math.log(delta) / math.log(keep))


def _surely(delta: float | None) -> str:
    return "" if delta is None else f" with {1 - delta:.2%} certainty"


def check_shares(**shares: float | None) -> None:
    for name, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise BadInput(f"{name} must be in (0, 1), got {share}.")


def _class_indices(predictions: Any, classes: int, rows: int) -> NDArray[np.int64]:
    array = np.asarray(predictions.cpu() if isinstance(predictions, torch.Tensor) else predictions)
    if array.shape != (rows,):
        raise ShapeMismatch(f"{rows} scores, but predictions of shape {list(array.shape)}: pass one class per row.")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= classes:
        raise BadLabels(f"predictions must be class indices in 0 .. {classes - 1}: pass logits.argmax(dim=1).")
    return array
