"""nac, and the probe of its states, against a transcription of the authors' estimator and autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from classified import CLASSES, FIT, FIT_LOGITS, LOGITS, ROWS, WEIGHT, Array, ours
from scipy.special import expit, softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ood_scores import FeatureSet, create_scorer, extract
from ood_scores.errors import BadInput
from ood_scores.probes import NeuronStates


def thresholds(count: int) -> Array:
    """As ``logspace(1e3, count)`` of BierOne/ood_coverage."""
    left = np.log(np.linspace(1, np.sqrt(1000), count // 2)) / np.log(1000)
    inner = np.concatenate([left[:-1], (1 - left)[::-1]])
    inner[-1] += 0.01
    return np.append(inner, 1.2)


def coverage(fit: Array, rows: Array, count: int, full: float) -> Array:
    """The estimator of their code: hits of each interval by the fit states, then lookups, compared one by one."""
    ends = thresholds(count)[:, None]
    hits = ((fit[:, None] >= ends[:-1]) & (fit[:, None] < ends[1:])).sum(axis=0)
    covered = np.minimum(hits / (full * len(fit)), 1)
    here = (rows[:, None] >= ends[:-1]) & (rows[:, None] < ends[1:])
    return (here * covered).sum(axis=1).mean(axis=1)


def states(features: Array, logits: Array, alpha: float) -> Array:
    return expit(alpha * features * ((softmax(logits, axis=1) - 1 / CLASSES) @ WEIGHT))


@pytest.mark.parametrize(("alpha", "full", "bins"), [(100.0, 0.05, 50), (1.0, 0.3, 8)])
def test_nac(alpha: float, full: float, bins: int) -> None:
    expected = coverage(states(FIT, FIT_LOGITS, alpha), states(ROWS, LOGITS, alpha), bins, full)
    assert len(np.unique(expected)) > 5
    np.testing.assert_allclose(ours("nac", alpha=alpha, full=full, bins=bins), expected, rtol=1e-9)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(6, 5, 3), nn.ReLU())
        self.fc = nn.Linear(5, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(images).mul_(2)).mean(dim=(2, 3)))


def extracted(model: nn.Module, rows: int, seed: int, layers: Any = ("first", "second")) -> FeatureSet:
    images = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    data = DataLoader(TensorDataset(images, torch.arange(rows) % 4), 7)
    return extract(model, data, probes=[NeuronStates(layers=layers)], progress=False)


def test_the_probe_multiplies_activations_by_their_gradients() -> None:
    model = Network().eval().requires_grad_(False)
    feats = extracted(model, 9, seed=1)
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for name, expected in feats.extras.items():
        leaf = model.first(images).requires_grad_()
        if name == "nac.second":
            leaf = model.second(2 * leaf.detach()).requires_grad_()
        pooled = (leaf if name == "nac.second" else model.second(2 * leaf)).mean(dim=(2, 3))
        loss = -model.fc(pooled).log_softmax(dim=1).mean(dim=1).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(expected, leaf.detach().sum(dim=(2, 3)) * gradient.sum(dim=(2, 3)))


def test_the_states_before_the_mean_are_those_of_the_features() -> None:
    """The mean over P positions divides the gradient by P, and the two sums over positions multiply by P each."""
    feats, more = extracted(Network(), 40, seed=1), extracted(Network(), 20, seed=2)
    from_features = create_scorer("nac", alpha=30.0).fit(feats).score(more)
    from_maps = create_scorer("nac", layers=("second",), alpha=30.0 / 16).fit(feats).score(more)
    torch.testing.assert_close(from_maps, from_features)


def test_layers_are_averaged_each_with_its_own_parameters() -> None:
    feats, more = extracted(Network(), 40, seed=1), extracted(Network(), 20, seed=2)
    both: Any = create_scorer("nac", layers=("features", "first"), alpha=(30.0, 1.0), full=(0.2, 0.1), bins=(50, 8))
    parts = [
        create_scorer("nac", layers=(layer,), alpha=alpha, full=full, bins=bins).fit(feats).score(more)
        for layer, alpha, full, bins in (("features", 30.0, 0.2, 50), ("first", 1.0, 0.1, 8))
    ]
    torch.testing.assert_close(both.fit(feats).score(more), (parts[0] + parts[1]) / 2)


def test_parameters_that_cannot_be_right() -> None:
    for wrong, message in (
        ({"layers": "layer4"}, "layers must be a list"),
        ({"alpha": (1.0, 2.0)}, "alpha must be one number, or one for each of the 1 layers"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"full": 2.0}, r"full must be in \(0, 1\]"),
        ({"bins": 9}, "bins must be an even number"),
    ):
        with pytest.raises(BadInput, match=message):
            create_scorer("nac", **wrong)
    assert create_scorer("nac", layers=("features", "a")).needs == ("features", "logits", "head", "nac.a")
