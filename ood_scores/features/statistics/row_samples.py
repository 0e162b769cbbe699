"""Statistics that are rows of the fit set, a sample of them, or one value per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.row_reductions import unit_rows
from ood_scores.features.statistics.base import Accumulator
from ood_scores.runtime import CPU


@dataclass(frozen=True)
class Rows:
    """The features, float32 ``[M, D]``, optionally L2-normalized, of all rows or a seeded share of them.

    Rows keep their order. A share is at least one row; see ``drawn_numbers``.
    """

    normalize: bool = False
    share: float = 1.0
    seed: int = 0
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        if self.share < 1:
            return ChosenRows(drawn_numbers(len(feats), self.share, self.seed), self._values)
        return _AllRows(self._values, len(feats))

    def _values(self, block: Block) -> Tensor:
        return unit_rows(block.features) if self.normalize else block.features.float()


@dataclass(frozen=True)
class Energies:
    """``logsumexp(logits)``, float64 ``[M]``, of the rows that ``Rows`` selects by the same share and seed."""

    share: float = 1.0
    seed: int = 0

    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        if self.share < 1:
            return ChosenRows(drawn_numbers(len(feats), self.share, self.seed), Block.logsumexp)
        return _AllRows(Block.logsumexp, len(feats))


@dataclass(frozen=True)
class Probabilities:
    """The softmax of the logits, float32 ``[M, C]``, of the rows that ``Rows`` selects by the same share and seed."""

    share: float = 1.0
    seed: int = 0

    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        if self.share < 1:
            return ChosenRows(drawn_numbers(len(feats), self.share, self.seed), self._values)
        return _AllRows(self._values, len(feats))

    def _values(self, block: Block) -> Tensor:
        return block.softmax().float()


@dataclass(frozen=True)
class Logits:
    """The logits ``[N, C]`` on the CPU, in the dtype of blocks (float32 or float64)."""

    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        return _AllRows(lambda block: block.logits, len(feats))


@dataclass(frozen=True)
class SampledRows:
    """Features, or an extra of their width, for quantiles, ``[M, D]``, in their own precision (if half, as float32).

    All rows are used if they hold at most ``values`` values, so that quantiles are exact. Otherwise as many rows as
    that allows are evenly spaced, which is a fair sample unless the order of the rows repeats in the same rhythm. Like
    other statistics, the sample is kept with the set: by default at most 256 MiB in float32, once for all scorers.
    """

    values: int = 2**26
    space: str = "features"

    @property
    def reads(self) -> Sequence[str]:
        return (self.space,)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        count = min(len(feats), max(1, self.values // max(feats.num_features, 1)))
        return ChosenRows(torch.arange(count) * len(feats) // count, self._values)

    def _values(self, block: Block) -> Tensor:
        values = block.features if self.space == "features" else block.extras[self.space]
        return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def quantiles(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Quantiles along the first dimension, ``[len(shares), ...]`` on the CPU, interpolated linearly.

    They are those of ``numpy.quantile``; ``torch.quantile`` accepts at most 2^24 values.
    """
    return torch.from_numpy(np.quantile(values.cpu().numpy(), list(shares), axis=0))


@dataclass
class _AllRows:
    """The value of each row, on the CPU."""

    values: Callable[[Block], Tensor]
    length: int
    rows: Tensor | None = None

    def update(self, block: Block) -> None:
        values = self.values(block)
        if self.rows is None:
            self.rows = torch.empty(self.length, *values.shape[1:], dtype=values.dtype)
        self.rows[block.start : block.start + len(block)] = values

    def result(self) -> Tensor:
        if self.rows is None:
            raise BadInput("no block was read.")
        return self.rows


def drawn_numbers(rows: int, share: float, seed: int, least: int = 1) -> Tensor:
    """Draw the numbers of a share of the rows without replacement, in ascending order: at least ``least`` of them.

    The draw depends on the number of rows and the seed, not on the values: copies of a row are drawn independently.
    """
    count = min(rows, max(least, round(share * rows)))
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@dataclass
class ChosenRows:
    """The values of the rows with the given ascending numbers, on the CPU or, if ``device`` is None, where they are."""

    numbers: Tensor
    values: Callable[[Block], Tensor]
    device: torch.device | None = CPU
    rows: Tensor | None = None

    def update(self, block: Block) -> None:
        values = self.values(block)
        if self.rows is None:
            self.rows = torch.empty(
                len(self.numbers), *values.shape[1:], dtype=values.dtype, device=self.device or values.device
            )
        first, last = torch.searchsorted(self.numbers, torch.tensor([block.start, block.start + len(block)])).tolist()
        chosen = self.numbers[first:last] - block.start
        self.rows[first:last] = values if len(chosen) == len(values) else values[chosen.to(values.device)]

    def result(self) -> Tensor:
        if self.rows is None:
            raise BadInput("no block was read.")
        return self.rows
