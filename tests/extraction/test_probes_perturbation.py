"""Probes that perturb inputs against a computation with autograd, one input at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ood_scores import FeatureSet, extract
from ood_scores.errors import BadInput
from ood_scores.probes import IODIN, AdaSCALE, Probe

IMAGES = torch.randn(9, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).eval()


def extracted(probe: Probe) -> FeatureSet:
    return extract(network(), DataLoader(TensorDataset(IMAGES), 4), probes=[probe], progress=False)


def gradient_of_largest_logit(image: Tensor) -> Tensor:
    leaf = image[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network()(leaf).max(), leaf)
    return gradient[0]


def test_adascale_moves_the_least_influential_values() -> None:
    feats = extracted(AdaSCALE(epsilon=0.3, share=0.1))
    for image, found in zip(IMAGES, feats.extras["adascale"], strict=True):
        gradient = gradient_of_largest_logit(image).flatten()
        least = gradient.abs().argsort()[:10]  # 10% of 108, rounded down
        moved = image.flatten().clone()
        moved[least] += 0.3 * gradient[least].sign()
        torch.testing.assert_close(found, network()[:4](moved.view(1, 3, 6, 6))[0].detach())
    assert torch.equal(feats.features, extract(network(), DataLoader(TensorDataset(IMAGES), 4)).features)


def test_adascale_refuses_parameters_that_cannot_be_right() -> None:
    with pytest.raises(BadInput, match="epsilon must be positive"):
        AdaSCALE(epsilon=0)
    with pytest.raises(BadInput, match=r"share in \(0, 1\]"):
        AdaSCALE(share=2)


@pytest.mark.parametrize("std", [None, (0.5, 1.0, 2.0)])
def test_iodin_moves_the_most_influential_value(std: tuple[float, ...] | None) -> None:
    """As the mask of OpenOOD's ``IODINPostprocessor``."""
    feats = extracted(IODIN(epsilon=0.2, temperature=10.0, std=std))
    for image, found in zip(IMAGES, feats.extras["iodin"], strict=True):
        leaf = image[None].clone().requires_grad_()
        logits = network()(leaf)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits / 10, logits.argmax(dim=1)), leaf)
        place = int(gradient.abs().argmax())
        moved = image.flatten().clone()
        moved[place] -= 0.2 * gradient.flatten()[place].sign() / (std[place // 36] if std else 1)
        torch.testing.assert_close(found, network()(moved.view(1, 3, 6, 6))[0].detach())
    assert feats.logits is not None
    assert not torch.isclose(feats.extras["iodin"], feats.logits, rtol=1e-4).any()
