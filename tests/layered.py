"""Feature sets with extras of two layers, for tests of scorers that read several layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ood_scores import FeatureSet

ROWS, CLASSES = 60, 3
WIDTHS = {"stem": 4, "block.1": 6}


def problem(rows: int = ROWS, seed: int = 0, shift: float = 0.0, classes: int = CLASSES, **extras: Any) -> FeatureSet:
    """Layers with separated classes; perturbed copies deviate more in one layer than in the other."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    layers, perturbed = {}, {}
    for number, (name, width) in enumerate(WIDTHS.items()):
        mix = torch.randn(width, width, generator=torch.Generator().manual_seed(100 + number))
        means = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(200 + number))
        values = means[labels] + torch.randn(rows, width, generator=random) @ mix + shift
        layers[f"layers.{name}"] = values
        perturbed[f"fgsm.{name}"] = values + (1 + number) * torch.randn(rows, width, generator=random)
    logits = 3 * torch.eye(classes)[labels] + torch.randn(rows, classes, generator=random)
    grams = {
        f"gram.{name}": torch.randn(rows, 2, width, generator=random) + logits[:, :1, None] + shift
        for name, width in WIDTHS.items()
    }
    return FeatureSet(logits[:, :2], logits.double(), labels, extras={**layers, **perturbed, **grams, **extras})


TRAIN, TEST, FAR = problem(), problem(20, seed=1), problem(20, seed=2, shift=4.0)


def without(feats: FeatureSet, *prefixes: str, **extras: Tensor) -> FeatureSet:
    kept = {name: values for name, values in feats.extras.items() if not name.startswith(prefixes)}
    return FeatureSet(feats.features, feats.logits, feats.labels, extras={**kept, **extras})
