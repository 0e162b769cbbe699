"""A small classification problem on which scorers are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ood_scores.features import FeatureSet, Head
from ood_scores.scorers.base import Scorer

CLASSES, WIDTH = 4, 8

Extras = Mapping[str, Callable[[Tensor, Tensor], Tensor]]
"""Functions that create extras from features ``[N, D]`` and logits ``[N, C]``, by the name of the extra."""


@dataclass
class Case:
    """A scorer class to check, with its parameters and the data."""

    cls: type[Scorer]
    parameters: Mapping[str, Any]

    @cached_property
    def train(self) -> FeatureSet:
        return self.problem(120, seed=0)

    @cached_property
    def id(self) -> FeatureSet:
        return self.problem(50, seed=1)

    @cached_property
    def ood(self) -> FeatureSet:
        return self.problem(50, seed=2, ood=True)

    @cached_property
    def other(self) -> FeatureSet:
        """Another fit set."""
        return self.problem(40, seed=5)

    @cached_property
    def fitted(self) -> Scorer:
        """A scorer fitted on ``train``; checks only score with it."""
        return self.make().fit(self.train)

    @cached_property
    def expected(self) -> Tensor:
        """The scores of ``id`` by the fitted scorer."""
        return self.fitted.score(self.id)

    def problem(self, rows: int, seed: int, **options: Any) -> FeatureSet:
        return problem(rows, seed, self.cls.tags.small_extras, **options)

    def make(self) -> Scorer:
        return self.cls(**self.parameters)


def problem(rows: int, seed: int, extras: Extras, *, ood: bool = False, classes: int = CLASSES) -> FeatureSet:
    """Create features after a ReLU, float64: ID rows are long and near their class mean, OoD rows are short.

    Args:
        rows: the number of rows.
        seed: the seed of the noise.
        extras: functions that create the extras of the set.
        ood: whether the rows are OoD.
        classes: the number of classes.
    """
    labels = torch.arange(rows) % classes
    noise = 0.4 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    means = 1.5 + 3 * torch.eye(classes, WIDTH)
    features = (noise if ood else means[labels] + noise).relu().double()
    weight = (means - means.mean(dim=1, keepdim=True)).double()
    head = Head(weight, torch.full((classes,), 0.1, dtype=torch.float64), _negatives())
    logits = head(features)
    return FeatureSet(features, logits, labels, head, {name: make(features, logits) for name, make in extras.items()})


def _negatives() -> dict[str, Tensor]:
    """Return words that are not classes: the features that no class has, alone and in pairs."""
    alone = torch.eye(WIDTH, dtype=torch.float64)[CLASSES:]
    return {"nouns": alone, "adjectives": (alone + alone.roll(1, 0)) / 2**0.5, "conjugated": alone.flip(0) + alone}


@contextmanager
def unusual_torch_state() -> Iterator[None]:
    """Set autocast, inference mode, the default device, and the default dtype to what changes most computations."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def changed(feats: FeatureSet, **changes: Any) -> FeatureSet:
    """Return the set with some parts replaced: ``features``, ``logits``, ``labels``, ``head`` or ``extras``."""
    parts = {"features": feats.features, "logits": feats.logits, "labels": feats.labels, "head": feats.head}
    return FeatureSet(**(parts | {"extras": dict(feats.extras)} | changes))


def converted(feats: FeatureSet, convert: Callable[[Tensor], Any]) -> FeatureSet:
    """Return the set with its floating-point columns converted."""
    extras = {name: convert(values) for name, values in feats.extras.items()}
    logits = None if feats.logits is None else convert(feats.logits)
    return changed(feats, features=convert(feats.features), logits=logits, extras=extras)


def reduced(feats: FeatureSet, names: list[str]) -> FeatureSet:
    """Return the set with only the named parts; features are zeros if they are not named."""
    parts = {part: getattr(feats, part) if part in names else None for part in ("logits", "labels", "head")}
    features = feats.features if "features" in names else torch.zeros_like(feats.features)
    return changed(feats, features=features, extras=_extras(feats, names, keep=True), **parts)


def without(feats: FeatureSet, name: str) -> FeatureSet:
    """Return the set without ``logits``, ``labels``, ``head``, its negatives, or an extra and all below it."""
    if name.startswith("negatives") and feats.head:
        return changed(feats, head=Head(feats.head.weight, feats.head.bias))
    if name in ("logits", "labels", "head"):
        return changed(feats, **{name: None})
    return changed(feats, extras=_extras(feats, [name], keep=False))


def _extras(feats: FeatureSet, names: list[str], keep: bool) -> dict[str, Tensor]:
    """Return the extras with one of the names or below one, or all other extras if ``keep`` is false."""
    return {
        extra: values
        for extra, values in feats.extras.items()
        if keep == any(extra == name or extra.startswith(f"{name}.") for name in names)
    }
