"""Counts of accepted rows by threshold: one sort of the scores, from which every metric is computed.

Higher scores mean more in-distribution (ID). Counts are int64, so ties and thresholds are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch

Scores: TypeAlias = "torch.Tensor | NDArray[Any] | Sequence[float]"
Correct: TypeAlias = "torch.Tensor | NDArray[Any] | Sequence[bool]"


@dataclass(frozen=True)
class RocCounts:
    """Numbers of positive and negative rows that each threshold accepts.

    The T thresholds are the distinct scores in descending order. A threshold accepts the rows whose score is at least
    the threshold, so the last threshold accepts every row.

    Attributes:
        thresholds: Distinct scores, float64 ``[T]``, strictly descending.
        positives: Number of accepted rows of the positive class, int64 ``[T]``.
        negatives: Number of accepted rows of the negative class, int64 ``[T]``.
        correct: Number of accepted ID rows that the classifier classifies correctly, int64 ``[T]``; None if that is not
            known, or if ID is not the positive class.
    """

    thresholds: NDArray[np.float64]
    positives: NDArray[np.int64]
    negatives: NDArray[np.int64]
    correct: NDArray[np.int64] | None = None

    @property
    def n_positive(self) -> int:
        return int(self.positives[-1])

    @property
    def n_negative(self) -> int:
        return int(self.negatives[-1])

    def mirrored(self) -> RocCounts:
        """Swap the classes and negate the scores, so that rejected rows become accepted rows."""
        return RocCounts(-self.thresholds[::-1], _rejected(self.negatives), _rejected(self.positives))


def roc_counts(id_scores: Scores, ood_scores: Scores, correct: Correct | None = None) -> RocCounts:
    """Count accepted rows with ID as the positive class, in O(n log n) time and linear memory.

    Args:
        id_scores: Scores of ID rows, ``[N]``: a tensor on any device, an array, or a list of numbers. Infinities are
            allowed.
        ood_scores: Scores of OoD rows, ``[M]``, in the same forms.
        correct: Whether the classifier classifies each ID row correctly, bool ``[N]`` (or 0 and 1); None if unknown.

    Raises:
        NotFinite: if a score is NaN.
        EmptyInput: if there are no ID scores or no OoD scores.
        ShapeMismatch: if scores are not one-dimensional, or there is not one ``correct`` per ID row.
        BadInput: if scores are not real numbers, or ``correct`` has other values than 0 and 1.
    """
    id_negated, ood_negated = -checked_scores(id_scores, "ID"), -checked_scores(ood_scores, "OoD")
    right_negated = None if correct is None else id_negated[_checked_correct(correct, len(id_negated))]
    id_negated.sort()
    ood_negated.sort()
    scores = np.concatenate([id_negated, ood_negated])
    order = np.argsort(scores, kind="stable")  # merges two sorted runs: linear time
    scores = scores[order]
    last_of_value = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1)
    positives = np.cumsum(order < len(id_negated), dtype=np.int64)[last_of_value]
    accepted_right = None
    if right_negated is not None:
        right_negated.sort()
        accepted_right = np.searchsorted(right_negated, scores[last_of_value], side="right").astype(np.int64)
    return RocCounts(-scores[last_of_value], positives, last_of_value + 1 - positives, accepted_right)


def checked_scores(scores: Scores, side: str) -> NDArray[np.float64]:
    """Return scores as float64 ``[N]``; errors are those of ``roc_counts`` and name the side."""
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().cpu().to(torch.promote_types(scores.dtype, torch.float64)).numpy()
    array = np.asarray(scores)
    if array.ndim != 1:
        raise ShapeMismatch(f"{side} scores have shape {list(array.shape)}: pass one score per row, shape [N].")
    if len(array) == 0:
        raise EmptyInput(f"there are no {side} scores: pass at least one.")
    if array.dtype.kind not in "biuf":
        raise BadInput(f"{side} scores have dtype {array.dtype}: pass real numbers.")
    array = array.astype(np.float64, copy=False)
    n_nan = np.count_nonzero(np.isnan(array))
    if n_nan:
        raise NotFinite(f"{n_nan} of {len(array)} {side} scores are NaN: NaN has no rank, so find where it comes from.")
    return array


def _checked_correct(correct: Correct, rows: int) -> NDArray[np.bool_]:
    array = correct.detach().cpu().numpy() if isinstance(correct, torch.Tensor) else np.asarray(correct)
    if array.shape != (rows,):
        raise ShapeMismatch(f"correct has shape {list(array.shape)} for {rows} ID scores: pass one value for each.")
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise BadInput("correct has values other than 0 and 1: pass whether each ID row is classified correctly.")
    return array.astype(bool)


def _rejected(accepted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of rows below each threshold, from the lowest threshold up, ending with all rows."""
    below = np.empty_like(accepted)
    np.subtract(accepted[-1], accepted[-2::-1], out=below[:-1])
    below[-1] = accepted[-1]
    return below
