"""Composition: what an activation shaper is, around any scorer."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet, Head
from ood_scores.features.statistics.base import Found
from ood_scores.scorers.base import Scorer, as_scorer
from ood_scores.scorers.work import Sizes, Work, work_alone


@dataclass
class Shaper(Scorer):
    """Base class of scorers that reshape features or logits and score the result with another scorer, ``base``.

    ``base`` is a name or a Scorer, which may be another shaper: ``create_scorer("react", base="gradnorm")``,
    ``create_scorer("react", base=create_scorer("ash_s", base="msp"))``. The outermost shaper is applied first. A shaper
    needs what its base needs, except the logits, which the head computes from the shaped features; a base that must be
    fitted is fitted on the shaped fit set, in a second pass over it. A base given as a Scorer is copied and never
    changed.

    A new shaper implements ``shape``; if it is fitted, also ``fit_reads``, ``statistics``, and ``fit_shape``.
    """

    base: str | Scorer = field(default="energy", kw_only=True)
    shapes: ClassVar[Sequence[str]] = ("features", "logits")
    fit_reads: ClassVar[Sequence[str]] = ()

    def __post_init__(self) -> None:
        self._inner = copy.deepcopy(as_scorer(self.base))
        changed = " or ".join(self.shapes)
        self.require(
            bool(set(self.shapes) & set(self._inner.needs)),
            f"it changes {changed}, which base={self._inner.name!r} does not read: choose another base",
        )
        self.needs = self.reads(self._inner.needs)
        self.fit_needs = self.fit_reads
        if self._inner.fit_needs:
            self.fit_needs = tuple(dict.fromkeys([*self.fit_reads, *self.reads(self._inner.fit_needs)]))

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names that a block must have so that the base finds ``names`` in the shaped block; logits require the
        head.
        """
        return tuple(dict.fromkeys(["features", *("head" if name == "logits" else name for name in names)]))

    @property
    def makes_logits(self) -> bool:
        """Whether the base reads logits."""
        return "logits" in {*self._inner.needs, *self._inner.fit_needs}

    @abstractmethod
    def shape(self, block: Block) -> Block:
        """Return the same rows, shaped."""

    def shaped_head(self, head: Head | None) -> Head | None:
        """Return the head of the shaped blocks."""
        return head

    def fit_shape(self, found: Found, feats: FeatureSet) -> None:
        """Fit the shaper itself from the collected statistics."""

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.fit_shape(found, feats)
        self._inner.fit(ShapedSet(feats, self))

    def fitted_state(self) -> dict[str, Any]:
        return super().fitted_state() | {"base": self._inner}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore({name: value for name, value in state.items() if name != "base"})
        self._inner = state["base"]

    def why_no_graph(self) -> str | None:
        return super().why_no_graph() or self._inner.why_no_graph()

    def work(self, sizes: Sizes) -> Work:
        return work_alone(self._inner, sizes)

    def score_block(self, block: Block) -> Tensor:
        return self._inner.score_block(self.shape(block))


class ShapedSet(FeatureSet):
    """A feature set whose blocks are shaped when they are read; nothing is stored."""

    def __init__(self, feats: FeatureSet, shaper: Shaper) -> None:
        self._feats, self._shaper = feats, shaper
        self._columns, self.provenance = feats._columns, feats.provenance
        self.head = shaper.shaped_head(feats.head)
        self.statistics = {}

    @property
    def features(self) -> Tensor:
        return torch.cat([block.features for block in self.blocks()])

    @property
    def logits(self) -> Tensor | None:
        return torch.cat([block.logits for block in self.blocks()]) if self.has("logits") else None

    def has(self, name: str) -> bool:
        return self._shaper.makes_logits if name == "logits" else super().has(name)

    def __getitem__(self, rows: slice | Any) -> FeatureSet:
        return ShapedSet(self._feats[rows], self._shaper)

    def blocks(
        self,
        rows: int | None = None,
        device: torch.device | str | None = None,
        *,
        only: Iterable[str] | None = None,
    ) -> Iterator[Block]:
        read = None if only is None else self._shaper.reads(tuple(only))
        for block in self._feats.blocks(rows or self.block_rows, device, only=read):
            block.require_finite()  # a shaper may hide what is not
            yield self._shaper.shape(block)


@dataclass
class FeatureShaper(Shaper):
    """Base class of shapers of the features; the head computes their logits."""

    @abstractmethod
    def shape_features(self, features: Tensor) -> Tensor:
        """Return shaped features ``[B, D]`` without changing the given ones."""

    def shape(self, block: Block) -> Block:
        features = self.shape_features(block.features)
        return block.replaced(features=features, logits=block.head(features) if self.makes_logits else None)
