"""Class ranks: the order of the classes in the logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.base import Accumulator, Found
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work

PIECE = 2**22
"""How many distances to the bank, or counts of ranks, are computed at a time; at least one row or class."""


@register_scorer("excel")
@dataclass
class ExCeL(Scorer):
    """How typical the order of the classes is for the predicted class, combined with the largest logit.

    ``alpha sum_{i=2..k} v_i + (1 - alpha) max_c f_c``. The value v_i depends on the share of the fit rows predicted as
    yhat that have the same class at rank i as this row: it is ``reward/C`` if the share is above ``upper/C``, ``1/C``
    if it is above ``1/C``, ``-1/C`` if it is above 0, and ``-reward/C`` if no row has that class there.

    Fits which of the four cases applies, for each predicted class, rank, and class; the fit does not read labels. Equal
    logits are ranked by class.

    Source: Karunanayake, Seneviratne & Chawla 2023, "ExCeL: Combined Extreme and Collective Logit Information for
    Enhancing Out-of-Distribution Detection"; the defaults are theirs for CIFAR-100 and ImageNet-200, and all ranks
    count. No public code of the authors was found. All rows predicted as a class are counted, whether or not the
    prediction is right; a class that is never predicted has ``-reward/C`` everywhere.

    Fails with few classes, whose order carries little information, and with few rows for each class, because most
    orders are then new.

    Args:
        alpha: The weight of the ranks, in [0, 1].
        upper: The multiple of the chance share 1/C above which a class is typical; at least 1.
        reward: The value of a typical class, in units of 1/C.
        ranks: The number of ranks that count; None for all.

    Cost: one sort of the logits; ``C^2 ranks`` bytes, which is 1 GB for 1,000 classes and all ranks, and three times
    that during the fit.
    """

    tags = Tags(
        formula=(
            r"s(x) = \alpha \sum_{i=2}^{k} v_{\hat y, i}(c_i) + (1 - \alpha) \max_c f_c, \quad c_i = \text{the "
            r"class at rank } i"
        ),
        paper=Paper(
            "ExCeL: Combined Extreme and Collective Logit Information for Enhancing Out-of-Distribution Detection",
            "Naveen Karunanayake, Suranga Seneviratne, Sanjay Chawla",
            "arXiv",
            2023,
            "https://arxiv.org/abs/2311.14754",
        ),
        no_graph="it ranks all logits, and rounding alone changes the order of nearly equal ones",
        waits=2,
    )
    alpha: float = 0.8
    upper: float = 5.0
    reward: float = 10.0
    ranks: int | None = None
    levels_: Tensor = fitted()
    needs = ("logits",)
    fit_needs = ("logits",)

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha <= 1, f"alpha must be in [0, 1], got {self.alpha}")
        self.require(1 <= self.upper < math.inf, f"upper must be at least 1 and finite, got {self.upper}")
        self.require_positive("reward")
        if self.ranks is not None:
            self.require_count("ranks")

    def work(self, sizes: Sizes) -> Work:
        return Work(memory=3.0 * sizes.classes**2 * (self.ranks or sizes.classes))

    def statistics(self) -> tuple[RankLevels]:
        return (RankLevels(self.upper, self.ranks),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.levels_ = found[self.statistics()[0]]

    def score_block(self, block: Block) -> Tensor:
        logits = block.logits64()
        order = ranking(logits, self.levels_.shape[1])
        at = torch.arange(1, order.shape[1], device=order.device)
        levels = self.levels_.to(order.device)[order[:, :1], at, order[:, 1:]]
        worth = logits.new_tensor([-self.reward, -1, 1, self.reward]) / logits.shape[1]
        return self.alpha * worth[levels.long()].sum(dim=1) + (1 - self.alpha) * logits.amax(dim=1)


def ranking(logits: Tensor, ranks: int) -> Tensor:
    """The classes of the largest logits, the largest first, ``[B, ranks]``; equal logits are ordered by class."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, :ranks]


@dataclass(frozen=True)
class RankLevels:
    """Statistic: how typical each class is at each rank among the rows predicted as a class, int8 ``[C, ranks, C]``.

    The value is 3 if the share of these rows is above ``upper / C``, 2 if it is above ``1 / C``, 1 if it is above 0,
    and 0 if there are none.
    """

    upper: float
    ranks: int | None = None
    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        return _RankLevelsAccumulator(self)


@dataclass
class _RankLevelsAccumulator:
    """Counts in 16 bits until a class is predicted too often for them, and then in 32 bits."""

    statistic: RankLevels
    rows: Tensor | None = None
    counts: Tensor | None = None

    def update(self, block: Block) -> None:
        classes = block.logits.shape[1]
        ranks = min(self.statistic.ranks or classes, classes)
        order = ranking(block.logits, ranks)
        if self.rows is None or self.counts is None:
            self.rows = torch.zeros(classes, dtype=torch.int64, device=order.device)
            self.counts = torch.zeros(classes, ranks, classes, dtype=torch.int16, device=order.device)
        self.rows = self.rows + torch.bincount(order[:, 0], minlength=classes)
        if self.counts.dtype == torch.int16 and self.rows.max() >= 2**15:
            self.counts = self.counts.int()
        cells = (order[:, :1] * ranks + torch.arange(ranks, device=order.device)) * classes + order
        self.counts.view(-1).index_add_(0, cells.flatten(), self.counts.new_ones(cells.numel()))

    def result(self) -> Tensor:
        if self.rows is None or self.counts is None:
            raise BadInput("no block was read.")
        levels = torch.empty(self.counts.shape, dtype=torch.int8, device=self.counts.device)
        usual, chance = ((times * self.rows.double() / len(self.rows)).floor() for times in (self.statistic.upper, 1))
        pieces = (values.split(max(1, PIECE // self.counts[0].numel())) for values in (levels, self.counts))
        done = 0
        for level, counts in zip(*pieces, strict=True):
            limits = (values[done : done + len(counts), None, None].to(counts.dtype) for values in (usual, chance))
            level.copy_((counts > 0).to(torch.int8).add_(counts > next(limits)).add_(counts > next(limits)))
            done += len(counts)
        return levels
