"""Thresholds and p-values that hold for any score and any data: split conformal prediction on score vectors.

Higher score = more in-distribution (ID). The calibration scores are those of ID rows that the scorer was not fitted on
and the model not trained on. Everything here holds at finite n, whatever the scores' distribution, as long as
calibration rows and new ID rows are exchangeable, as independent draws from one distribution are.

Sources: Vovk, Gammerman & Shafer 2005, Algorithmic learning in a random world (p-values, Mondrian categories); Lei et
al. 2018, Distribution-free predictive inference for regression (the split); Vovk 2012, Conditional validity of
inductive conformal predictors (`delta`); Bates et al. 2023, Testing for outliers with conformal p-values.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betainc

from ood_scores.errors import BadInput, BadLabels, ShapeMismatch
from ood_scores.evaluation.metrics import Scores, checked_scores

ROUNDING = 1e-12
"""Benjamini and Hochberg's bounds are met by p-values that exceed them by this share: both are rounded."""


@dataclass(frozen=True)
class Threshold:
    """A row is kept as ID when its score is at least `value`.

    Attributes:
        value: the `rank`-th smallest calibration score; -inf, which keeps every row, for rank 0.
        keep: the share of ID rows that was asked for.
        n: calibration rows.
        rank: the place of `value` among the calibration scores, the smallest being 1.
        delta: how often over calibration sets the kept share may lie below `keep`; None where `keep` is meant on
            average over them.
    """

    value: float
    keep: float
    n: int
    rank: int
    delta: float | None = None

    @property
    def level(self) -> float:
        """The share of ID rows kept on average over calibration sets: exactly this without ties, more with them."""
        return 1 - self.rank / (self.n + 1)

    @property
    def guarantee(self) -> str:
        """What holds for new rows that are exchangeable with the calibration rows."""
        on_average = f"at least {self.level:.2%} of ID rows are kept on average over calibration sets of {self.n} rows"
        if self.delta is None:
            return on_average
        return f"{on_average}, and at least {self.keep:.2%} with {1 - self.delta:.2%} of them"


def threshold(scores: Scores, keep: float = 0.95, *, delta: float | None = None) -> Threshold:
    """The highest threshold that provably keeps the share `keep` of ID rows.

    Args:
        scores: [n] calibration scores: a tensor on any device, an array or a list of numbers; infinities are allowed.
        keep: in (0, 1), taken as the decimal number it prints as, so that 0.95 of 20 rows is exactly 19.
        delta: None, or in (0, 1).

    Without `delta` the value is the floor((n + 1)(1 - keep))-th smallest score. A new ID row is as likely to take any
    of the n + 1 places among all, so it lies below that score with a probability of at most rank / (n + 1): P(kept) >=
    keep, over the draw of both the calibration rows and the new one (Lei et al. 2018). The share kept by one
    calibration set is above or below: without ties it is Beta(n + 1 - rank, rank) distributed.

    With `delta` that share is at least `keep` for all but a share `delta` of calibration sets: the rank is the largest
    with P(Beta(n + 1 - rank, rank) < keep) <= delta (Vovk 2012, Proposition 2a). This needs independent rows.

    Ties only keep more. Where even rank 1 would be too much the value is -inf, with a warning that says how many rows
    are needed: ceil(1 / (1 - keep)) - 1 without `delta`, ceil(log delta / log keep) with it.

    Raises:
        NotFinite: a score is NaN.
        EmptyInput: no scores.
        ShapeMismatch: scores that are not one-dimensional.
        BadInput: scores that are not real numbers, or `keep` or `delta` outside (0, 1).
    """
    check_shares(keep=keep, delta=delta)
    found = threshold_of(checked_scores(scores, "calibration"), keep, delta)
    if found.rank == 0:
        warnings.warn(
            f"{found.n} calibration rows are too few to keep {keep:g}{_surely(delta)}: at least "
            f"{_rows_needed(keep, delta)} are needed, and until then no row can be rejected (the threshold is -inf).",
            stacklevel=2,
        )
    return found


def class_thresholds(
    scores: Scores, predictions: Any, classes: int, keep: float = 0.95, *, delta: float | None = None
) -> tuple[Threshold, ...]:
    """A threshold for each predicted class, so that `keep` holds among the rows predicted as each (Mondrian).

    Args:
        scores: [n] calibration scores, as in `threshold`.
        predictions: [n] the model's predicted classes, integers in 0 .. classes - 1; labels must not take their place,
            since a new row has none.
        classes: how many classes the model has.
        keep, delta: as in `threshold`, for each class by itself.

    A class with too few rows has the threshold -inf: its guarantee holds, but no row predicted as it can be rejected. A
    warning says how many classes that are and how many rows each needs. No threshold of other classes takes its place,
    as that would hold nothing for the class.

    Raises:
        ShapeMismatch: not one prediction for each score.
        BadLabels: predictions that are not class indices. Besides, what `threshold` raises.
    """
    check_shares(keep=keep, delta=delta)
    rows = checked_scores(scores, "calibration")
    of_class = _class_indices(predictions, classes, len(rows))
    found = tuple(threshold_of(rows[of_class == index], keep, delta) for index in range(classes))
    too_few = [index for index, each in enumerate(found) if each.rank == 0]
    if too_few:
        named = ", ".join(map(str, too_few[:5])) + (", …" if len(too_few) > 5 else "")
        warnings.warn(
            f"{len(too_few)} of {classes} classes ({named}) are predicted for too few calibration rows to keep "
            f"{keep:g}{_surely(delta)}: each needs at least {_rows_needed(keep, delta)}, and until then no row "
            "predicted as one of them can be rejected (its threshold is -inf).",
            stacklevel=2,
        )
    return found


def p_values(calibration: Scores, scores: Scores) -> NDArray[np.float64]:
    """Conformal p-values: the share of calibration rows that look at most as ID as the row itself. Small = OoD.

    Args:
        calibration: [n] calibration scores, as in `threshold`; takes linear time if they are in ascending order.
        scores: [m] scores of the rows in question.

    Returns:
        float64 [m], (1 + #{calibration <= score}) / (n + 1), between 1 / (n + 1) and 1. For an ID row P(p <= u) <= u
        for every u, over the draw of calibration and row (Vovk et al. 2005). p <= rank / (n + 1) says the same as
        score < `threshold(calibration, keep).value`.

    Raises: what `threshold` raises for scores.
    """
    ordered = np.sort(checked_scores(calibration, "calibration"), kind="stable")
    places = np.searchsorted(ordered, checked_scores(scores, "new"), side="right")
    return (1 + places) / (len(ordered) + 1)


def benjamini_hochberg(p: Scores, rate: float) -> NDArray[np.bool_]:
    """Which rows of a batch to declare OoD, so that of those declared a share of at most `rate` is ID on average.

    Args:
        p: [m] p-values of one batch, in [0, 1].
        rate: the false discovery rate, in (0, 1): the mean over batches of the share of ID rows among those declared
            OoD (0 where none is).

    Returns:
        bool [m], True = declared OoD: the k smallest p-values for the largest k whose k-th smallest is at most
        rate k / m.

    Conformal p-values that share a calibration set are dependent, but positively (PRDS), so that the rate holds for
    independent rows without ties (Bates et al. 2023), and is even rate times the share of ID
    rows in the batch. The smallest p-value is 1 / (n + 1): a lone OoD row of m is found only if n + 1 >= m / rate.

    Raises:
        BadInput: p-values outside [0, 1], or a rate outside (0, 1). Besides, what `threshold` raises for scores.
    """
    check_shares(rate=rate)
    values = checked_scores(p, "p-value")
    if values.min() < 0 or values.max() > 1:
        raise BadInput(f"p-values lie in [0, 1], these run from {values.min():g} to {values.max():g}")
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
            raise BadInput(f"{name} is a share above 0 and below 1, got {share}")


def _class_indices(predictions: Any, classes: int, rows: int) -> NDArray[np.int64]:
    array = np.asarray(predictions.cpu() if isinstance(predictions, torch.Tensor) else predictions)
    if array.shape != (rows,):
        raise ShapeMismatch(f"{rows} scores, but predictions of shape {list(array.shape)}; give one class for each row")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= classes:
        raise BadLabels(f"predictions must be class indices in 0 .. {classes - 1}; pass logits.argmax(dim=1)")
    return array
