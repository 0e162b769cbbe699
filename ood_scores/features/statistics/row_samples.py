"""Statistics that are rows of the fit set, a sample of them, or one value per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.statistics.base import Accumulator


@dataclass(frozen=True)
class Rows:
    """The features, float32 ``[M, D]``, optionally L2-normalized, of all rows or a seeded share of them.

    All rows keep their order. A share is at least one row; see ``HashedSample``.
    """

    normalize: bool = False
    share: float = 1.0
    seed: int = 0
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        if self.share < 1:
            return HashedSample(self._values, feats, self.share, self.seed)
        return _AllRows(self._values, len(feats))

    def _values(self, block: Block) -> Tensor:
        return (block.space("features", True) if self.normalize else block.features).float()


@dataclass(frozen=True)
class Energies:
    """``logsumexp(logits)``, float64 ``[M]``, of the rows that ``Rows`` selects by the same share and seed."""

    share: float = 1.0
    seed: int = 0

    @property
    def reads(self) -> Sequence[str]:
        return ("features", "logits") if self.share < 1 else ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        if self.share < 1:
            return HashedSample(Block.logsumexp, feats, self.share, self.seed)
        return _AllRows(Block.logsumexp, len(feats))


@dataclass(frozen=True)
class Logits:
    """The logits ``[N, C]`` on the CPU, in the dtype of blocks (float32 or float64)."""

    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        return _AllRows(lambda block: block.logits, len(feats))


@dataclass(frozen=True)
class SampledRows:
    """Features for quantiles, ``[M, D]``, in their own precision (half precision as float32).

    All rows are used if they hold at most ``values`` values, so that quantiles are exact. Otherwise as many rows as
    that allows are evenly spaced, which is a fair sample unless the order of the rows repeats in the same rhythm. Like
    other statistics, the sample is kept with the set: by default at most 256 MiB in float32, once for all scorers.
    """

    values: int = 2**26
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        count = min(len(feats), max(1, self.values // max(feats.num_features, 1)))
        return _SampledRowsAccumulator(torch.arange(count) * len(feats) // count)


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


@dataclass
class _SampledRowsAccumulator:
    numbers: Tensor
    rows: Tensor | None = None

    def update(self, block: Block) -> None:
        if self.rows is None:
            self.rows = torch.empty(len(self.numbers), block.features.shape[1], dtype=block.features.dtype)
        first, last = torch.searchsorted(self.numbers, torch.tensor([block.start, block.start + len(block)])).tolist()
        chosen = self.numbers[first:last] - block.start
        self.rows[first:last] = block.features[chosen.to(block.features.device)].to(self.rows)

    def result(self) -> Tensor:
        if self.rows is None:
            raise BadInput("no block was read.")
        return self.rows


@dataclass
class HashedSample:
    """The values of a share of the rows, at least ``least`` rows if there are as many.

    The sample consists of the rows with the smallest hash of their features (as float32) and the seed, in that order:
    a fair sample that does not depend on the order of the rows. Up to four times as many rows are in memory meanwhile.
    """

    values: Callable[[Block], Tensor]
    feats: FeatureSet
    share: float
    seed: int
    least: int = 1
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.count = min(len(self.feats), max(self.least, round(self.share * len(self.feats))))
        generator = torch.Generator().manual_seed(self.seed)
        self.factors = torch.randint(-(2**62), 2**62, (self.feats.num_features,), generator=generator) * 2 + 1
        self.most = torch.iinfo(torch.int64).max

    def update(self, block: Block) -> None:
        bits = block.features.float().contiguous().view(torch.int32).long()
        hashes = (bits * self.factors.to(bits.device)).sum(dim=1).cpu()
        small, values = hashes <= self.most, self.values(block)
        self.found.append((hashes[small], values[small.to(values.device)]))
        if sum(len(hashes) for hashes, _ in self.found) >= 2 * self.count:
            self._keep_smallest()

    def result(self) -> Tensor:
        self._keep_smallest()
        return self.found[0][1]

    def _keep_smallest(self) -> None:
        hashes, values = (torch.cat(parts) for parts in zip(*self.found, strict=True))
        order = hashes.argsort()[: self.count]
        self.found = [(hashes[order], values[order.to(values.device)])]
        self.most = int(hashes[order[-1]])
