"""Spectral normalization: its bound, power iteration, and gradient."""

from __future__ import annotations

import pytest
import torch
from networks import create, images, settle
from torch import Tensor, nn

from ood_scores.models.networks import SpectralConv2d


def spectral_conv(norm: float, coefficient: float = 3.0) -> SpectralConv2d:
    torch.manual_seed(0)
    conv = SpectralConv2d(8, 12, 3, padding=1, bias=False, coefficient=coefficient)
    with torch.no_grad():
        conv.weight.mul_(norm / largest_singular_value(conv.weight))
    return conv


def largest_singular_value(weight: Tensor) -> float:
    return torch.linalg.svdvals(weight.detach().flatten(1))[0].item()


@pytest.mark.parametrize("norm", [3.5, 30.0])
def test_spectral_norm_bounds_the_matrix(norm: float) -> None:
    conv = spectral_conv(norm)
    for _ in range(200):
        conv(images(1, size=4, channels=8))
    assert largest_singular_value(conv.constrained_weight()) == pytest.approx(3.0, rel=1e-4)
    assert largest_singular_value(conv.weight) == pytest.approx(norm, rel=1e-5)


def test_spectral_norm_does_not_change_small_weights() -> None:
    conv = spectral_conv(2.9)
    x = images(2, size=4, channels=8)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight, padding=1))
    assert torch.equal(conv.constrained_weight(), conv.weight)


def test_spectral_norm_takes_one_power_iteration_per_training_forward() -> None:
    conv = spectral_conv(30.0)
    matrix, start = conv.weight.detach().flatten(1).double(), conv.u.double()
    conv(images(1, size=4, channels=8))
    step = matrix @ (matrix.T @ start)
    torch.testing.assert_close(conv.u.double(), step / step.norm(), rtol=0, atol=1e-6)
    kept = conv.u.clone()
    conv.eval()(images(1, size=4, channels=8))
    assert torch.equal(conv.u, kept)


def test_spectral_norm_gradient_equals_that_of_weight_over_sigma() -> None:
    conv = spectral_conv(30.0)
    for _ in range(500):
        conv(images(1, size=4, channels=8))
    direction = torch.randn(conv.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    conv.double()
    (conv.constrained_weight() * direction).sum().backward()
    exact = conv.weight.detach().clone().requires_grad_()
    (3.0 * exact / torch.linalg.matrix_norm(exact.flatten(1), ord=2) * direction).sum().backward()
    torch.testing.assert_close(conv.weight.grad, exact.grad, rtol=1e-4, atol=1e-6)


def test_spectral_norm_allows_two_forwards_before_a_backward() -> None:
    conv = spectral_conv(30.0)
    x = images(1, size=4, channels=8)
    (conv(x) + conv(x)).sum().backward()
    assert conv.weight.grad is not None


def test_spectral_norm_applies_to_every_convolution_and_nothing_else() -> None:
    model = create("haas_resnet18")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 17
    assert all(isinstance(conv, SpectralConv2d) and conv.coefficient == 3.0 for conv in convs)
    plain = create("haas_resnet18", spectral_norm=0)
    assert {key for key in model.state_dict() if not key.endswith(".u")} == set(plain.state_dict())


def test_eval_is_deterministic_under_spectral_norm() -> None:
    model = create("haas_resnet18", spectral_norm=0.5)
    settle(model, size=16)
    with torch.no_grad():
        assert torch.equal(model(images(size=16)), model(images(size=16)))
