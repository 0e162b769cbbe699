"""The calibration of a detector: sorted scores, and the thresholds that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ood_scores.detector.conformal import Threshold, class_thresholds, p_values, threshold
from ood_scores.errors import MissingInput


@dataclass(frozen=True, eq=False)
class Calibration:
    """The scores of held-out ID data, and the thresholds that keep a requested share of it.

    Attributes:
        scores: float64 ``[n]``, ascending.
        thresholds: one threshold, or one per predicted class.
        predicted: int64 ``[n]``, the predicted class of each row if there is a threshold per class, else None.
    """

    scores: NDArray[np.float64]
    thresholds: tuple[Threshold, ...]
    predicted: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        scores: NDArray[np.float64],
        predicted: NDArray[np.int64] | None,
        classes: int,
        keep: float,
        delta: float | None,
        per_class: bool,
    ) -> Calibration:
        """Calibrate on the scores and predicted classes of ID rows; raises the errors of ``conformal.threshold``.

        Raises:
            MissingInput: if there are no predicted classes, and each is to have a threshold.
        """
        order = np.argsort(scores, kind="stable")
        if per_class:
            if predicted is None:
                raise MissingInput(
                    "a threshold per class needs predicted classes, but the sets have no logits: leave out per_class, "
                    "or calibrate on sets with the head of a linear probe."
                )
            found = class_thresholds(scores, predicted, classes, keep, delta=delta)
            return cls(scores[order], found, predicted[order])
        return cls(scores[order], (threshold(scores, keep, delta=delta),))

    @property
    def keep(self) -> float:
        """The requested share of ID rows."""
        return self.thresholds[0].keep

    @property
    def delta(self) -> float | None:
        """The share of calibration sets for which less than ``keep`` may be kept; None if ``keep`` is an average."""
        return self.thresholds[0].delta

    @property
    def guarantee(self) -> str:
        """The guarantee, in words, for new rows that are exchangeable with the calibration rows."""
        if self.predicted is None:
            return self.thresholds[0].guarantee
        of = (
            "on average over calibration sets"
            if self.delta is None
            else f"with {1 - self.delta:.2%} of calibration sets"
        )
        return f"at least {self.keep:.2%} of the ID rows predicted as each class are kept {of}"

    def rejects(self, scores: NDArray[np.float64], labels: NDArray[np.int64] | None) -> NDArray[np.bool_]:
        """Return which rows ``[m]`` are below the threshold, or that of their predicted class if each has its own."""
        limits = np.array([each.value for each in self.thresholds])
        return scores < (limits[0] if self.predicted is None else limits[labels])

    def p_values(self, scores: NDArray[np.float64], labels: NDArray[np.int64] | None) -> NDArray[np.float64]:
        """Return conformal p-values ``[m]``, within each predicted class if each has its own threshold.

        The p-values of a class without calibration rows are 1.
        """
        if self.predicted is None or labels is None:
            return p_values(self.scores, scores)
        found = np.ones(len(scores))
        for label in np.unique(labels):
            among = self._of_class[label]
            if len(among):
                found[labels == label] = p_values(among, scores[labels == label])
        return found

    @cached_property
    def _of_class(self) -> list[NDArray[np.float64]]:
        return [self.scores[self.predicted == label] for label in range(len(self.thresholds))]

    def __str__(self) -> str:
        share = f"keeps {self.keep:.4g} of ID data"
        sure = "" if self.delta is None else f" with {1 - self.delta:.4g} certainty"
        limit = f"score >= {self.thresholds[0].value:.6g}" if self.predicted is None else "a threshold for each class"
        return f"{share}{sure} by {limit}, after {len(self.scores):,} rows"
