"""Statistics that are the fit rows themselves, or one number for each: banks of neighbours."""

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
    """Asks for the features themselves, float32 ``[M, D]``, optionally L2-normalised; of a seeded share of the rows.

    All of them keep their order. Of a share at least one row is chosen; see ``HashedSample``.
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
    """Asks for ``logsumexp(logits)``, float64 ``[M]``, of the rows that ``Rows`` chooses by this share and seed."""

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
    """Asks for the logits themselves, ``[N, C]`` on the CPU in the dtype blocks have them in (float32 or float64)."""

    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        return _AllRows(lambda block: block.logits, len(feats))


@dataclass(frozen=True)
class SampledRows:
    """Asks for features to take quantiles of, ``[M, D]``, in their own precision (half precision as float32).

    All rows as long as they hold at most ``values`` values in all, so that quantiles of them are exact; otherwise as
    many as that allows, evenly spaced, which is a fair sample unless the order of the rows repeats in the same rhythm.
    Kept with the set, as other statistics are: by default 256 MiB at most in float32, once for all that ask.
    """

    values: int = 2**26
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator[Tensor]:
        count = min(len(feats), max(1, self.values // max(feats.num_features, 1)))
        return _SampledRowsAccumulator(torch.arange(count) * len(feats) // count)


def quantiles(values: Tensor, shares: Sequence[float]) -> Tensor:
    """Quantiles along the first dimension, ``[len(shares), ...]`` on the CPU: those of ``numpy.quantile``.

    They are interpolated linearly. PyTorch's own takes no more than 2^24 values.
    """
    return torch.from_numpy(np.quantile(values.cpu().numpy(), list(shares), axis=0))


@dataclass
class _AllRows:
    """Accumulates a value of each row, on the CPU."""

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
    """Accumulates a value of each row of a share of the rows, ``least`` at least where there are as many.

    They are those with the smallest hash of their features (as float32) and the seed, in that order: a fair sample that
    does not depend on the order of the rows. Up to four times as many are in memory while it is made.
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
