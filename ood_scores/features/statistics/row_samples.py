"""Statistics that are the fit rows themselves, or one number for each: banks of neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.statistics.collect import Accumulator


@dataclass(frozen=True)
class Rows:
    """Asks for the features themselves, float32 ``[M, D]``, optionally L2-normalised; of a seeded share of the rows.

    All of them keep their order. Of a share at least one row is chosen; see ``HashedSample``.
    """

    normalize: bool = False
    share: float = 1.0
    seed: int = 0
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator:
        if self.share < 1:
            return HashedSample(self._values, feats, self.share, self.seed)
        return _AllRows(self._values, torch.empty(len(feats), feats.num_features))

    def _values(self, block: Block) -> Tensor:
        return (block.space("features", True) if self.normalize else block.features).float().cpu()


@dataclass(frozen=True)
class Energies:
    """Asks for ``logsumexp(logits)``, float64 ``[M]``, of the rows that ``Rows`` chooses by this share and seed."""

    share: float = 1.0
    seed: int = 0

    @property
    def reads(self) -> Sequence[str]:
        return ("features", "logits") if self.share < 1 else ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator:
        if self.share < 1:
            return HashedSample(Block.logsumexp, feats, self.share, self.seed)
        return _AllRows(Block.logsumexp, torch.empty(len(feats), dtype=torch.float64))


@dataclass
class _AllRows:
    values: Callable[[Block], Tensor]
    rows: Tensor

    def update(self, block: Block) -> None:
        self.rows[block.start : block.start + len(block)] = self.values(block)

    def result(self) -> Tensor:
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
