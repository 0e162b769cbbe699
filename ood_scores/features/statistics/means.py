"""Means of the features and of other spaces, over all rows or by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.row_reductions import column_sums
from ood_scores.features.statistics.base import Accumulator

FROM_LOGITS: Mapping[str, Callable[[Block], Tensor]] = {
    "softmax": lambda block: block.logits.double().softmax(dim=1),
    "max_logit": lambda block: block.max_logit()[:, None],
}
"""Quantities ``[B, K]`` derived from the logits whose means can be requested."""


@dataclass(frozen=True)
class FeatureMean:
    """The mean of the features over all rows, float64 ``[D]``."""

    reads: ClassVar[Sequence[str]] = ("features",)
    stored_as: ClassVar[type] = Tensor

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        return _FeatureMeanAccumulator()


@dataclass(frozen=True)
class GroupMeans:
    """Means by group.

    Attributes:
        counts: The number of rows of each group, int64 ``[G]``.
        means: The mean of each group, float64 ``[G, K]`` (zeros for an empty group).
    """

    counts: Tensor
    means: Tensor


@dataclass(frozen=True)
class Means:
    """The ``GroupMeans`` of ``"features"``, ``"logits"``, ``"softmax"``, ``"max_logit"``, or an extra.

    ``group`` is ``"all"`` for one group of all rows; ``"label"`` or ``"predicted"`` for one group per labeled or
    predicted class; or ``"correct"`` for one group per class of the rows whose predicted class is their label.
    """

    space: str = "features"
    group: Literal["all", "label", "predicted", "correct"] = "all"
    stored_as: ClassVar[type] = GroupMeans

    @property
    def reads(self) -> Sequence[str]:
        space = "logits" if self.space in FROM_LOGITS else self.space
        return (space, "logits") if self.group in ("predicted", "correct") else (space,)

    def start(self, feats: FeatureSet) -> Accumulator[GroupMeans]:
        labels = feats.class_labels() if self.group in ("label", "correct") else None
        highest = 0 if labels is None else int(labels.max())
        return _MeansAccumulator(self, labels, 1 if self.group == "all" else feats.num_classes or highest + 1)


@dataclass
class _FeatureMeanAccumulator:
    """The sum of deviations from the first row, so that a large offset costs no precision; float64 across blocks."""

    first: Tensor | None = None
    total: Tensor | float = 0.0
    rows: int = 0

    def update(self, block: Block) -> None:
        features = block.features
        self.first = features[0].clone() if self.first is None else self.first
        self.total = self.total + (features - self.first).sum(dim=0).double()
        self.rows += len(block)

    def result(self) -> Tensor:
        if self.first is None:
            raise BadInput("no block was read.")
        return self.first.double() + self.total / self.rows


@dataclass
class _MeansAccumulator:
    statistic: Means
    labels: Tensor | None
    groups: int
    counts: Tensor | None = None
    sums: Tensor | None = None

    def update(self, block: Block) -> None:
        values = _values(block, self.statistic.space)
        if self.counts is None or self.sums is None:
            self.counts = torch.zeros(self.groups + 1, dtype=torch.int64, device=values.device)
            self.sums = values.new_zeros(self.groups + 1, values.shape[1], dtype=torch.float64)
        if self.statistic.group == "all":
            self.counts += len(block)
            self.sums += block.feature_sums() if self.statistic.space == "features" else column_sums(values)
            return
        group = self._group(block)
        self.counts.index_add_(0, group, torch.ones_like(group))
        self.sums.index_add_(0, group, values.double())

    def _group(self, block: Block) -> Tensor:
        """The group of each row; rows that belong to none are in one more, the last one."""
        if self.labels is None:
            return block.prediction()
        labels = self.labels[block.start : block.start + len(block)].to(block.device)
        if self.statistic.group == "label":
            return labels
        return torch.where(block.prediction() == labels, labels, self.groups)

    def result(self) -> GroupMeans:
        if self.counts is None or self.sums is None:
            raise BadInput("no block was read.")
        counts, sums = self.counts[: self.groups], self.sums[: self.groups]
        return GroupMeans(counts, sums / counts.clamp_min(1)[:, None])


def _values(block: Block, space: str) -> Tensor:
    """A column of the block, or a quantity derived from its logits."""
    if space in FROM_LOGITS:
        return FROM_LOGITS[space](block)
    return getattr(block, space) if space in ("features", "logits") else block.extras[space]
