"""Concentration-free density: the share of neighbors until enough fit rows have a row among theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.base import Accumulator, Found, Statistic
from ood_scores.features.statistics.row_samples import HashedSample
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.class_ranks import PIECE
from ood_scores.scorers.gaussian import squared_distances
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags

NARROW_PIECE = 2**20
"""The same of distances in float32: with what they are compared to, they stay in the caches."""


ROUNDING = 1e-12
"""Squared distances of unit vectors that differ by less are equal."""


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

    tags = Tags(
        paper=Paper(
            "CF-OOD: Concentration-Free Density Estimation for Reliable Out-of-Distribution Detection",
            "Fabrizio Angiulli, Fabio Fassetti, Maria Pia Zupi",
            "SISAP",
            2025,
            "https://link.springer.com/chapter/10.1007/978-3-032-06069-3_5",
        ),
        no_graph="it looks distances up in sorted lists, for which ONNX has no operation",
    )
    share: float = 0.1
    rho: float = 0.01
    seed: int = 0
    bank_: Tensor = fitted()
    reaches_: Tensor = fitted()
    shares_: Tensor = fitted()
    needs = ("features",)
    fit_needs = ("features",)

    def __post_init__(self) -> None:
        for share in ("share", "rho"):
            value = getattr(self, share)
            self.require(0 < value <= 1, f"{share} must be more than 0 and at most 1, got {value}")

    def statistics(self) -> Sequence[Statistic]:
        return (HashedRows(self.share, self.seed),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
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
