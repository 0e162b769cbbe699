"""Metrics of scores that come in batches, with the verbs of torchmetrics: update, compute, reset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, EmptyInput, ShapeMismatch
from ood_scores.evaluation.metrics import METRICS, compare


class OODMetric:
    """Exact metrics over all batches of ID and OoD scores.

    >>> metric = OODMetric()
    >>> for scores, is_ood in batches:
    ...     metric.update(scores, is_ood)
    >>> metric.compute()
    {'auroc': 0.93, 'fpr95_id': 0.31}

    All scores are kept, 8 bytes each, since AUROC and FPR95 depend on the order of all of them. In a process group of
    ``torch.distributed``, ``compute`` gathers the scores of all processes; every process must call it.

    Args:
        metrics: names of metrics of ``ood_scores.metrics.METRICS`` that scores alone determine.

    Raises:
        UnknownName: if there is no such metric.
        BadInput: if a metric needs labels or logits.
    """

    def __init__(self, metrics: Sequence[str] = ("auroc", "fpr95_id")) -> None:
        self.metrics = [METRICS[name].name for name in metrics]
        for name in self.metrics:
            if METRICS[name].needs_correct or METRICS[name].of_classifier:
                raise BadInput(f"{name} does not follow from scores alone: pass it to ood_scores.evaluate as metrics=.")
        self.reset()

    def update(self, scores: Tensor, is_ood: Tensor) -> None:
        """Add a batch.

        Args:
            scores: scores ``[B]``; higher means more in-distribution.
            is_ood: which rows are OoD, bool ``[B]``.

        Raises:
            ShapeMismatch: if there is not one flag for each score.
        """
        if scores.ndim != 1 or scores.shape != is_ood.shape:
            raise ShapeMismatch(
                f"scores have shape {list(scores.shape)} and is_ood {list(is_ood.shape)}: pass one of each for a row."
            )
        self._scores.append(scores.detach().double().cpu().numpy())
        self._is_ood.append(is_ood.detach().bool().cpu().numpy())

    def compute(self) -> dict[str, float]:
        """Return the metrics by name, as shares.

        Raises:
            EmptyInput: if there are no ID scores, or no OoD scores.
            NotFinite: if a score is NaN.
        """
        scores, is_ood = np.concatenate(_gathered(self._scores)), np.concatenate(_gathered(self._is_ood))
        if is_ood.all() or not is_ood.any():
            raise EmptyInput("there are no scores of ID rows, or none of OoD rows: call update with both kinds.")
        found = compare(scores[~is_ood], scores[is_ood], metrics=self.metrics)
        return {name: found[name] for name in self.metrics}

    def reset(self) -> None:
        """Forget all batches."""
        self._scores: list[np.ndarray] = [np.empty(0)]
        self._is_ood: list[np.ndarray] = [np.empty(0, dtype=bool)]


def _gathered(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Return the arrays of all processes, in the order of their ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return arrays
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, np.concatenate(arrays))
    return found
