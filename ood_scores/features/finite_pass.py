"""The check of the blocks of a pass over a feature set for NaN and infinite values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ood_scores.features.block import Block
from ood_scores.features.featureset import FeatureSet


@dataclass
class FinitePass:
    """A pass over columns of a set, whose blocks are checked after their use: what is derived from them makes it cheap.

    On a device, the host would have to wait for each answer: there, all blocks are checked at the end of the pass.
    """

    feats: FeatureSet
    columns: Sequence[str]
    answers: list[Tensor] = field(default_factory=list, init=False)

    def blocks(self) -> Iterator[Block]:
        """Iterate over the blocks, each of which is used within ``used``.

        Raises:
            NotFinite: if a column holds NaN or infinite values.
        """
        yield from self.feats.blocks(only=self.columns)
        if self.answers and not torch.stack(self.answers).all():
            for block in self.feats.blocks(only=self.columns):
                block.require_finite()

    @contextmanager
    def used(self, block: Block) -> Iterator[None]:
        """Check a block after its use, on a device later; an error in between may be due to its values.

        Raises:
            NotFinite: if a column holds NaN or infinite values.
        """
        try:
            yield
        except Exception:
            block.require_finite()
            raise
        if block.device.type == "cpu":
            block.require_finite()
        else:
            self.answers.append(block.is_finite())
