"""Classification objectives compared with their formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import ood_scores.models.networks
from ood_scores.errors import BadInput, ShapeMismatch
from ood_scores.training.objectives import Objective
from ood_scores.training.objectives.classification import (
    CrossEntropy,
    L2Norm,
    LogitAdjustment,
    LogitNorm,
    cross_entropy,
    l2_norm,
    logit_adjustment,
    logit_norm,
)

COUNTS = [70, 20, 9, 1]


def example() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 6, dtype=torch.float64) * 3, nn.Linear(6, 4).double(), torch.tensor([0, 3, 1, 2, 2])


def numpy_cross_entropy(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return float(-log_p[np.arange(len(labels)), labels].mean())


# ---- formulas


def test_cross_entropy_matches_its_formula() -> None:
    z, head, labels = example()
    logits = head(z).detach()
    expected = numpy_cross_entropy(logits.numpy(), labels.numpy())
    assert cross_entropy(logits, labels).item() == pytest.approx(expected, rel=1e-12)
    assert CrossEntropy()(z, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_l2_norm_matches_its_formula_with_one_norm_per_sample() -> None:
    z, head, labels = example()
    unit = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    logits = unit @ head.weight.detach().numpy().T + head.bias.detach().numpy()
    expected = numpy_cross_entropy(logits, labels.numpy())
    assert l2_norm(z, head.weight, head.bias, labels).item() == pytest.approx(expected, rel=1e-12)
    assert L2Norm()(z, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_l2_norm_ignores_the_norm_of_each_feature_vector() -> None:
    z, head, labels = example()
    lengths = torch.tensor([[0.1], [2.0], [30.0], [1.0], [5.0]], dtype=torch.float64)
    torch.testing.assert_close(L2Norm()(z * lengths, head, labels), L2Norm()(z, head, labels), rtol=1e-12, atol=0)


def test_l2_norm_gradient_is_orthogonal_to_the_feature() -> None:
    z, head, labels = example()
    z.requires_grad_()
    L2Norm()(z, head, labels).backward()
    assert z.grad is not None
    assert z.grad.norm(dim=1).min() > 1e-3
    assert (z.grad * z).sum(dim=1).abs().max() < 1e-15


def test_l2_norm_of_tiny_features_divides_by_eps() -> None:
    z, head, labels = example()
    tiny = z * 1e-3
    expected = cross_entropy(tiny @ head.weight.T / 0.5 + head.bias, labels)
    torch.testing.assert_close(L2Norm(eps=0.5)(tiny, head, labels), expected)
    zeros = torch.zeros_like(z)
    torch.testing.assert_close(L2Norm()(zeros, head, labels), cross_entropy(head(zeros), labels))


def test_l2_norm_equals_cross_entropy_of_an_l2_head_in_training() -> None:
    z, head, labels = example()
    l2_head = ood_scores.models.networks.L2Head(6, 4).double()
    l2_head.load_state_dict(head.state_dict())
    torch.testing.assert_close(CrossEntropy()(z, l2_head.train(), labels), L2Norm()(z, head, labels))
    torch.testing.assert_close(CrossEntropy()(z, l2_head.eval(), labels), CrossEntropy()(z, head, labels))


def test_logit_norm_matches_its_formula() -> None:
    z, head, labels = example()
    logits = head(z).detach().numpy()
    lengths = np.sqrt((logits**2).sum(axis=1, keepdims=True)) + 1e-7
    expected = numpy_cross_entropy(logits / lengths / 0.04, labels.numpy())
    assert logit_norm(head(z), labels).item() == pytest.approx(expected, rel=1e-12)
    assert LogitNorm()(z, head, labels).item() == pytest.approx(expected, rel=1e-12)
    assert LogitNorm(temperature=1.0)(z, head, labels).item() == pytest.approx(
        numpy_cross_entropy(logits / lengths, labels.numpy()), rel=1e-12
    )


def test_logit_norm_ignores_the_norm_of_the_logits() -> None:
    z, head, labels = example()
    logits = head(z)
    for factor in (0.1, 100.0):
        torch.testing.assert_close(logit_norm(logits * factor, labels), logit_norm(logits, labels), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            logit_norm(logits * factor, labels, eps=0.0), logit_norm(logits, labels, eps=0.0), rtol=1e-12, atol=0
        )


def test_logit_norm_of_zero_logits_is_finite() -> None:
    zeros = torch.zeros(2, 3, requires_grad=True)
    loss = logit_norm(zeros, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(np.log(3))
    assert zeros.grad is not None
    assert zeros.grad.isfinite().all()


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_logit_adjustment_matches_its_formula(tau: float) -> None:
    z, head, labels = example()
    prior = np.array(COUNTS) / 100
    expected = numpy_cross_entropy(head(z).detach().numpy() + tau * np.log(prior), labels.numpy())
    log_prior = torch.from_numpy(np.log(prior))
    assert logit_adjustment(head(z), labels, log_prior, tau).item() == pytest.approx(expected, rel=1e-12)
    assert LogitAdjustment(COUNTS, tau)(z, head, labels).item() == pytest.approx(expected, rel=1e-12)


def test_logit_adjustment_with_equal_counts_is_cross_entropy() -> None:
    z, head, labels = example()
    plain = CrossEntropy()(z, head, labels)
    torch.testing.assert_close(LogitAdjustment([7, 7, 7, 7])(z, head, labels), plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(LogitAdjustment(COUNTS, tau=0.0)(z, head, labels), plain, rtol=0, atol=0)


def test_logit_adjustment_accepts_counts_of_any_type_and_precision() -> None:
    z, head, labels = example()
    expected = LogitAdjustment(COUNTS)(z, head, labels)
    others: list[Any] = [np.array(COUNTS), torch.tensor(COUNTS, dtype=torch.int32), tuple(COUNTS)]
    for counts in others:
        torch.testing.assert_close(LogitAdjustment(counts)(z, head, labels), expected, rtol=0, atol=0)
    half = LogitAdjustment([60_000, 60_000, 9, 1]).half()
    assert half(z.half(), head.half(), labels).isfinite()


@pytest.mark.parametrize("counts", [[3], [3, 0, 2, 1], [1.0, 2.0, 3.0, 4.0], [[1, 2], [3, 4]], [True, True]])
def test_invalid_class_counts_are_refused(counts: Any) -> None:
    with pytest.raises(BadInput):
        LogitAdjustment(counts)


def test_logit_adjustment_refuses_counts_of_other_classes() -> None:
    z, head, labels = example()
    with pytest.raises(ShapeMismatch, match="3 classes, but the head has 4"):
        LogitAdjustment([1, 2, 3])(z, head, labels)


@pytest.mark.parametrize("objective", [CrossEntropy(), L2Norm(), LogitNorm(1.0), LogitAdjustment(COUNTS)])
def test_gradients_of_classification_objectives(objective: Objective) -> None:
    z, head, labels = example()
    assert torch.autograd.gradcheck(lambda features: objective(features, head, labels), z.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda weight: objective(z.detach(), _with(head, weight), labels), head.weight.detach().requires_grad_()
    )


def _with(head: nn.Linear, weight: Tensor) -> nn.Linear:
    """Return the head with another weight, which keeps its autograd graph."""
    other = nn.Linear(head.in_features, head.out_features).double()
    del other.weight
    other.weight = weight
    other.bias = nn.Parameter(head.bias.detach())
    return other
