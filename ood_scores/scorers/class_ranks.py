"""Scores of ranks: of the classes in a row's logits, and of a row among the neighbours of the fit rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.collect import Accumulator, Statistic
from ood_scores.features.statistics.row_samples import HashedSample
from ood_scores.scorers.base import Scorer, register_scorer
from ood_scores.scorers.gaussian import squared_distances

PIECE = 2**22
"""How many distances to the bank, or counts of ranks, there are at a time, but for one row or class at least."""

NARROW_PIECE = 2**20
"""The same of distances in float32: with what they are compared to, they stay in the caches."""

ROUNDING = 1e-12
"""Squared distances of unit vectors that differ by less are equal."""


@register_scorer("excel")
@dataclass
class ExCeL(Scorer):
    """How usual the order of the classes is for the predicted one, and the largest logit.

    ``alpha sum_{i=2..k} v_i + (1 - alpha) max_c f_c``. The share of the fit rows predicted as yhat that have at rank i
    the same class as this row gives v_i: ``reward/C`` if it is above ``upper/C``, else ``1/C`` above ``1/C``, ``-1/C``
    above 0, and ``-reward/C`` where no row has it.

    Fits which of the four it is for every predicted class, rank and class; labels are not read. Logits that are equal
    are ranked by class.

    Source: Karunanayake, Seneviratne & Chawla 2023, "ExCeL: Combined Extreme and Collective Logit Information for
    Out-of-Distribution Detection"; the values are theirs for CIFAR-100 and ImageNet-200, and all ranks count. As in
    their code the rows predicted as a class are counted whether or not that is right; a class never predicted has
    ``-reward/C`` everywhere.

    Fails with few classes, whose order says little, and with few rows for each, most orders of which are new.

    Args:
        alpha: weight of the ranks, in [0, 1].
        upper: how many times the share that chance gives a class, 1/C, are usual; at least 1.
        reward: what that is worth, times 1/C.
        ranks: how many ranks count; None for all.

    Cost: one sort of the logits; ``C^2 ranks`` bytes, which is 1 GB for 1,000 classes and all ranks, and three times
    that while it is fitted.
    """

    alpha: float = 0.8
    upper: float = 5.0
    reward: float = 10.0
    ranks: int | None = None
    levels_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("logits",)
    fit_needs = ("logits",)

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha <= 1, f"alpha is a share in [0, 1], got {self.alpha}")
        self.require(1 <= self.upper < math.inf, f"upper must be at least 1 and finite, got {self.upper}")
        self.require_positive("reward")
        if self.ranks is not None:
            self.require_count("ranks")

    def statistics(self) -> Sequence[Statistic]:
        return (RankLevels(self.upper, self.ranks),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (self.levels_,) = (found[statistic] for statistic in self.statistics())

    def score_block(self, block: Block) -> Tensor:
        logits = block.logits64()
        order = ranking(logits, self.levels_.shape[1])
        at = torch.arange(1, order.shape[1], device=order.device)
        levels = self.levels_.to(order.device)[order[:, :1], at, order[:, 1:]]
        worth = logits.new_tensor([-self.reward, -1, 1, self.reward]) / logits.shape[1]
        return self.alpha * worth[levels.long()].sum(dim=1) + (1 - self.alpha) * logits.amax(dim=1)


def ranking(logits: Tensor, ranks: int) -> Tensor:
    """The classes of the largest logits, the largest first, ``[B, ranks]``; of equal logits the first class first."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, :ranks]


@dataclass(frozen=True)
class RankLevels:
    """Asks how usual each class is at each rank among the rows predicted as a class, int8 ``[C, ranks, C]``.

    3: the share of these rows is above ``upper / C``; 2: above ``1 / C``; 1: above 0; 0: none.
    """

    upper: float
    ranks: int | None = None
    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator:
        return _RankLevelsAccumulator(self)


@dataclass
class _RankLevelsAccumulator:
    """Counts, in 16 bits until one class is predicted too often for them, and then in 32."""

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


@register_scorer("cf_ood")
@dataclass
class CFOOD(Scorer):
    """Minus the share of neighbours that it takes until a share ``rho`` of the fit rows have this row among theirs.

    ``-min{s : a share of rho or more of the bank rows b have ||x - b|| <= r_s(b)}``, where r_s(b) is the distance of b
    to its ``s n``-th nearest among the n bank rows, itself left out, and all features are L2-normalised. The share s
    takes one of 230 values from 0.001 to 0.99; where none is enough it is 1.

    Fits the bank, a sample of the fit rows, and the distances r_s(b).

    Source: Angiulli, Fassetti & Zupi 2025, "CF-OOD: Concentration-Free Density Estimation for Reliable
    Out-of-Distribution Detection", after the postprocessor that its authors gave to OpenOOD, from which the values of
    share and rho, and those that s takes, are; theirs are called alpha and k. Departures: rows are sampled by a hash of
    their values and the seed, not by their number, so that their order does not matter; a difference of squared
    distances below 1e-12 is none.

    Fails to tell rows apart finely: no more than 231 scores are possible, fewer with a small bank, so that ties are
    many.

    Distances in float32 decide about the rows for which their rounding makes no difference, nearly all; about the
    others those in float64, so that scores are what float64 makes them.

    Args:
        share: of the fit rows that make up the bank.
        rho: how many of the bank rows have to have the row among their neighbours, as a share.
        seed: of the sample.

    Cost: for each row one distance to every bank row, and eight comparisons of it; the fit sorts ``n^2`` distances;
    ``12 n (D + 230)`` bytes.
    """

    share: float = 0.1
    rho: float = 0.01
    seed: int = 0
    bank_: Tensor = field(init=False, repr=False, compare=False)
    reaches_: Tensor = field(init=False, repr=False, compare=False)
    shares_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("features",)
    fit_needs = ("features",)

    def __post_init__(self) -> None:
        for share in ("share", "rho"):
            value = getattr(self, share)
            self.require(0 < value <= 1, f"{share} must be more than 0 and at most 1, got {value}")

    def statistics(self) -> Sequence[Statistic]:
        return (HashedRows(self.share, self.seed),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (self.bank_,) = (found[statistic] for statistic in self.statistics())
        count = len(self.bank_)
        if count < 2:
            raise BadInput("cf_ood: the neighbours of fit rows are other fit rows, of which it takes two at least.")
        self.shares_, positions = neighbour_shares(count)
        positions = positions.to(self.bank_.device)
        self.reaches_ = torch.cat(
            [
                squared_distances(piece, self.bank_).sort(dim=1).values[:, positions]
                for piece in self.bank_.split(max(1, PIECE // count))
            ]
        )

    def score_block(self, block: Block) -> Tensor:
        rows = block.space("features", True)
        found, sure = self._found_in_float32(rows)
        if not sure.all():
            found[~sure] = self._found_in_float64(rows[~sure])
        return -torch.cat([self.shares_, self.shares_.new_ones(1)]).to(rows)[found]

    def _found_in_float64(self, rows: Tensor) -> Tensor:
        """Which of the shares is the first that is enough, ``[B]``; their number where none is."""
        bank, reaches = self.bank_.to(rows), self.reaches_.to(rows)
        found = []
        for piece in rows.split(max(1, PIECE // len(bank))):
            first = torch.searchsorted(reaches, squared_distances(bank, piece) - ROUNDING)
            found.append(first.kthvalue(self._enough(), dim=0).values)
        return torch.cat(found)

    def _found_in_float32(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and where rounding makes no difference.

        ``||x - b||^2 <= r`` where ``<x, b> - ||x||^2 / 2`` is at least ``(||b||^2 - r) / 2``.
        """
        bank, limits = (part.to(rows.device) for part in self._narrow())
        rounding = torch.finfo(torch.float32).eps * math.sqrt(rows.shape[1] + 8)
        found, sure = [], []
        for piece in rows.split(max(1, NARROW_PIECE // len(bank))):
            products = piece.float() @ bank.T
            products.sub_((piece.square().sum(dim=1, keepdim=True) / 2 - rounding).float())
            first = first_with_enough(products, limits, self._enough())
            counts = count_reached(products.sub_(2 * rounding), limits, first.clamp_max(len(limits) - 1))
            found.append(first)
            sure.append((counts >= self._enough()) | (first == len(limits)))
        return torch.cat(found), torch.cat(sure)

    def _enough(self) -> int:
        return max(1, math.ceil(self.rho * len(self.bank_) * (1 - ROUNDING)))

    def _narrow(self) -> tuple[Tensor, Tensor]:
        """The bank and what products with it have to reach, ``[shares, n]``, in float32: made once."""
        known: tuple[Tensor, Tensor, Tensor] | None = getattr(self, "_narrowed", None)
        if known is None or known[0] is not self.bank_:
            limits = (self.bank_.square().sum(dim=1, keepdim=True) - self.reaches_) / 2
            known = self._narrowed = self.bank_, self.bank_.float(), limits.float().T.contiguous()
        return known[1:]


def first_with_enough(values: Tensor, limits: Tensor, enough: int) -> Tensor:
    """By bisection the first of the falling limits ``[S, n]`` that ``enough`` of a row's values reach; S if none."""
    low = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    high = low + len(limits)
    for _ in range(len(limits).bit_length()):
        middle = (low + high) // 2
        there = count_reached(values, limits, middle.clamp_max(len(limits) - 1)) >= enough
        high = torch.where(there, middle, high)
        low = torch.where(there, low, (middle + 1).minimum(high))
    return high


def count_reached(values: Tensor, limits: Tensor, numbers: Tensor) -> Tensor:
    """How many of a row's values ``[B, n]`` are at least the limit with the row's number, ``[B]``."""
    return limits.index_select(0, numbers).le_(values).sum(dim=1)


def neighbour_shares(count: int) -> tuple[Tensor, Tensor]:
    """The shares of neighbours that ``cf_ood`` tries in a bank of ``count``, and which neighbour each is, from 1 up."""
    parts = ((0.001, 0.1, 100), (0.105, 0.5, 81), (0.51, 0.99, 49))
    shares = torch.from_numpy(np.concatenate([np.linspace(*part) for part in parts]))  # as theirs, to the last digit
    positions = (shares * count - 1).long() + 1
    new = positions.diff(prepend=positions.new_zeros(1)) > 0
    return shares[new], positions[new]


@dataclass(frozen=True)
class HashedRows:
    """Asks for a share of the rows, L2-normalised, float64 ``[n, D]``, at least two where there are as many.

    See ``HashedSample``.
    """

    share: float
    seed: int = 0
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator:
        return HashedSample(lambda block: block.space("features", True), feats, self.share, self.seed, least=2)
