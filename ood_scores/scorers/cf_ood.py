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
from ood_scores.features.statistics.base import Accumulator, Found
from ood_scores.features.statistics.row_samples import ChosenRows, drawn_numbers
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.class_ranks import PIECE
from ood_scores.scorers.numerics.distances import squared_distances
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work

NARROW_PIECE = 2**20
"""How many distances are computed in float32 at a time: few enough for the CPU caches."""


ROUNDING = 1e-12
"""Squared distances of unit vectors whose difference is smaller count as equal."""


@register_scorer("cf_ood")
@dataclass
class CFOOD(Scorer):
    """Negative share of neighbors needed until a share ``rho`` of the fit rows have this row among theirs.

    ``-min{s : a share of rho or more of the bank rows b have ||x - b|| <= r_s(b)}``, where r_s(b) is the distance of b
    to its ``s n``-th nearest among the n bank rows, b itself excluded, and all features are L2-normalized. The share s
    is one of 230 values from 0.001 to 0.99; if none is large enough, it is 1.

    Fits the bank, a sample of the fit rows, and the distances r_s(b).

    Source: Angiulli, Fassetti & Zupi 2025, "CF-OOD: Concentration-Free Density Estimation for Reliable
    Out-of-Distribution Detection", after the postprocessor that its authors contributed to OpenOOD, which is the source
    of the values of share and rho (alpha and k there) and of the values of s. Departure: squared distances that differ
    by less than 1e-12 are equal.

    Fails to separate rows finely: no more than 231 scores are possible, fewer with a small bank, so that ties are
    frequent.

    Distances in float32 decide the rows for which their rounding makes no difference, which are nearly all; distances
    in float64 decide the others, so that scores are those of float64.

    Args:
        share: The share of the fit rows that make up the bank, drawn by their number.
        rho: The share of the bank rows that must have the row among their neighbors.
        seed: The seed of the sample.

    Cost: one distance to each bank row and eight comparisons of it for each row; the fit sorts ``n^2`` distances; ``12
    n (D + 230)`` bytes.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\min \Bigl\{ \sigma : \tfrac{1}{n} \, \#\{ b : \lVert x - b \rVert \le r_\sigma(b) \} \ge "
            r"\rho \Bigr\}"
        ),
        aliases=("cfood",),
        paper=Paper(
            "CF-OOD: Concentration-Free Density Estimation for Reliable Out-of-Distribution Detection",
            "Fabrizio Angiulli, Fabio Fassetti, Maria Pia Zupi",
            "SISAP",
            2025,
            "https://link.springer.com/chapter/10.1007/978-3-032-06069-3_5",
        ),
        small_parameters={"share": 1.0},  # the rows of a smaller share depend on their order
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
            self.require(0 < value <= 1, f"{share} must be in (0, 1], got {value}")

    def work(self, sizes: Sizes) -> Work:
        bank = self.share * sizes.fit_rows
        sorting, looking = 8000, 1000  # measured, per pair of rows
        pairs = bank * (bank * (2 * sizes.features + sorting) + sizes.rows * (2 * sizes.features + looking))
        return Work(pairs, 12 * bank * (sizes.features + 230))

    def statistics(self) -> tuple[UnitRows]:
        return (UnitRows(self.share, self.seed),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.bank_ = found[self.statistics()[0]]
        count = len(self.bank_)
        if count < 2:
            raise BadInput("cf_ood: the bank needs at least two rows: fit on more rows or raise share.")
        self.shares_, positions = neighbor_shares(count)
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
        if block.happens(~sure):
            found[~sure] = self._found_in_float64(rows[~sure])
        return -torch.cat([self.shares_, self.shares_.new_ones(1)]).to(rows)[found]

    def _found_in_float64(self, rows: Tensor) -> Tensor:
        """The number of the first share that is large enough, ``[B]``; the number of shares if there is none."""
        bank, reaches = self.bank_.to(rows), self.reaches_.to(rows)
        found = []
        for piece in rows.split(max(1, PIECE // len(bank))):
            first = torch.searchsorted(reaches, squared_distances(bank, piece) - ROUNDING)
            found.append(first.kthvalue(self._enough(), dim=0).values)
        return torch.cat(found)

    def _found_in_float32(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and a mask of the rows for which rounding makes no difference.

        ``||x - b||^2 <= r`` if ``<x, b> - ||x||^2 / 2`` is at least ``(||b||^2 - r) / 2``.
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
        """The bank, and the limits ``[shares, n]`` that products with it must reach, in float32; computed once."""
        known: tuple[Tensor, Tensor, Tensor] | None = getattr(self, "_narrowed", None)
        if known is None or known[0] is not self.bank_:
            limits = (self.bank_.square().sum(dim=1, keepdim=True) - self.reaches_) / 2
            known = self._narrowed = self.bank_, self.bank_.float(), limits.float().T.contiguous()
        return known[1:]


def first_with_enough(values: Tensor, limits: Tensor, enough: int) -> Tensor:
    """The first of the decreasing limits ``[S, n]`` that ``enough`` of a row's values reach; S if none."""
    low = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    high = low + len(limits)
    for _ in range(len(limits).bit_length()):
        middle = (low + high) // 2
        there = count_reached(values, limits, middle.clamp_max(len(limits) - 1)) >= enough
        high = torch.where(there, middle, high)
        low = torch.where(there, low, (middle + 1).minimum(high))
    return high


def count_reached(values: Tensor, limits: Tensor, numbers: Tensor) -> Tensor:
    """How many of a row's values ``[B, n]`` reach the limits with the row's number, ``[B]``."""
    return limits.index_select(0, numbers).le_(values).sum(dim=1)


def neighbor_shares(count: int) -> tuple[Tensor, Tensor]:
    """The shares of neighbors that ``cf_ood`` tries in a bank of ``count`` rows, and the neighbors' ranks, from 1."""
    parts = ((0.001, 0.1, 100), (0.105, 0.5, 81), (0.51, 0.99, 49))
    shares = torch.from_numpy(
        np.concatenate([np.linspace(*part) for part in parts])
    )  # equal to theirs to the last digit
    positions = (shares * count - 1).long() + 1
    new = positions.diff(prepend=positions.new_zeros(1)) > 0
    return shares[new], positions[new]


@dataclass(frozen=True)
class UnitRows:
    """Statistic: a share of the rows, L2-normalized, float64 ``[n, D]``; at least two if the set has as many.

    See ``drawn_numbers``.
    """

    share: float
    seed: int = 0
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        numbers = drawn_numbers(len(feats), self.share, self.seed, least=2)
        return ChosenRows(numbers, lambda block: block.space("features", True), device=None)
