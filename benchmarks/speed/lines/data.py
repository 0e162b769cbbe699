"""Feature sets of the size of ImageNet: 2,048 features and 1,000 classes."""

from __future__ import annotations

import torch
from torch import nn

import ood_scores
from benchmarks.speed.scorers import problem

WIDTH, CLASSES = 2048, 1000


def random_set(rows: int, device: str = "cpu") -> tuple[ood_scores.FeatureSet, nn.Linear]:
    """Create uniform features, and the logits of a random head."""
    head = nn.Linear(WIDTH, CLASSES, device=device)
    generator = torch.Generator(device).manual_seed(0)
    features = torch.rand(rows, WIDTH, generator=generator, device=device)
    with torch.no_grad():
        return ood_scores.FeatureSet(features, head(features), head=ood_scores.Head(head.weight, head.bias)), head


def fitted(name: str, rows: int) -> tuple[ood_scores.Scorer, ood_scores.FeatureSet]:
    """Create a scorer fitted on 10,000 rows around class means, and a number of such rows to score."""
    data = problem(10_000, rows, WIDTH, CLASSES)
    return ood_scores.create_scorer(name).fit(data.train), data.test
