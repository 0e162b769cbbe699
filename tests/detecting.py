"""Small networks and their inputs for the tests of detectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import tiny  # noqa: F401  makes timm know the networks
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ood_scores
from ood_scores.detector import Prediction
from ood_scores.features import FeatureSet

PIXELS = np.random.default_rng(7).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


class Rows(Dataset[Any]):
    """Inputs whose mean depends on their class."""

    def __init__(self, rows: int, seed: int, classes: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(classes, (rows,), generator=generator)
        self.inputs = torch.randn(rows, 3, 8, 8, generator=generator) + self.labels[:, None, None, None] / 2

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row], self.labels[row]


def loader(rows: int, seed: int) -> DataLoader[Any]:
    return DataLoader(Rows(rows, seed), 64)


def network(seed: int = 0) -> nn.Module:
    """Create a network with random features whose head predicts the class with the nearest mean of the features."""
    torch.manual_seed(seed)
    model: Any = timm.create_model("tiny_net", num_classes=4).eval()
    rows = Rows(200, seed)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(rows.inputs), pre_logits=True)
        means = torch.stack([features[rows.labels == label].mean(dim=0) for label in range(4)])
        model.fc.weight.copy_(9 * means)
        model.fc.bias.copy_(-4.5 * means.square().sum(dim=1))
    return model


def extracted(model: nn.Module, rows: int, seed: int, **options: Any) -> FeatureSet:
    return ood_scores.extract(model, loader(rows, seed), progress=False, **options)


class Plain(nn.Sequential):
    """A classifier that is unknown to timm."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def same(one: Prediction, other: Prediction) -> bool:
    """Whether all columns are equal, except for the names of the images."""
    columns = {name: values for name, values in one.columns().items() if name != "id"}
    return all(np.array_equal(values, other.columns()[name]) for name, values in columns.items())
