"""Outlier exposure and its relatives compared with their formulas in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ood_scores.errors import BadInput, ShapeMismatch
from ood_scores.training.objectives import Objective, create_objective
from ood_scores.training.objectives.classification import CrossEntropy, LogitAdjustment
from ood_scores.training.objectives.exposure import (
    OECC,
    balanced_energy_hinge,
    confidence_control,
    energy_hinge,
    outlier_exposure,
    total_variation,
)

Array = NDArray[np.float64]
COUNTS = [70, 20, 9, 1]


def example() -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(1)
    head = nn.Linear(6, 4).double()
    return torch.randn(5, 6).double() * 9, head, torch.tensor([0, 3, 1, 2, 2]), torch.randn(3, 6).double() * 9


def logits() -> tuple[Tensor, Tensor]:
    features, head, _, ood = example()
    return head(features).detach() * 3, head(ood).detach() * 3


def logsumexp(f: Array) -> Array:
    return np.log(np.exp(f).sum(axis=1))


def softmax(f: Array) -> Array:
    return np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


# ---- formulas


def test_outlier_exposure_is_the_cross_entropy_to_the_uniform_distribution() -> None:
    _, f = logits()
    expected = -np.log(softmax(f.numpy())).mean(axis=1).mean()
    assert outlier_exposure(f).item() == pytest.approx(expected, rel=1e-12)
    assert outlier_exposure(torch.full((3, 7), 2.5)).item() == pytest.approx(np.log(7))


@pytest.mark.parametrize(("m_in", "m_out"), [(-23.0, -5.0), (-1.0, -9.0), (-9.0, -1.0)])
def test_energy_hinge_matches_its_formula(m_in: float, m_out: float) -> None:
    f, g = logits()
    expected = (relu(-logsumexp(f.numpy()) - m_in) ** 2).mean() + (relu(m_out + logsumexp(g.numpy())) ** 2).mean()
    assert energy_hinge(f, g, m_in, m_out).item() == pytest.approx(expected, rel=1e-12)


def test_energy_hinge_is_zero_within_its_margins() -> None:
    low, high = torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert energy_hinge(low, high).item() == 0
    assert energy_hinge(high, high).item() == pytest.approx((-np.logaddexp(0, 1) + 23) ** 2)
    assert energy_hinge(low, low).item() == pytest.approx((-5 + 30) ** 2)


def test_balanced_energy_hinge_matches_its_formula() -> None:
    f, g = logits()
    weight = np.array([0.5, 0.3, 0.15, 0.05])
    z = softmax(g.numpy()) @ weight
    lack = relu(-5 + 10 * z + logsumexp(g.numpy())) ** 2
    expected = (relu(-logsumexp(f.numpy()) + 23) ** 2).mean() + (z * lack).sum() / z.sum()
    assert balanced_energy_hinge(f, g, torch.from_numpy(weight)).item() == pytest.approx(expected, rel=1e-12)


def test_balanced_energy_with_equal_classes_is_energy_with_a_shifted_margin() -> None:
    f, g = logits()
    balanced = balanced_energy_hinge(f, g, torch.full((4,), 0.25).double(), m_out=-5, shift=8)
    torch.testing.assert_close(balanced, energy_hinge(f, g, m_out=-3), rtol=1e-12, atol=0)


def test_confidence_control_and_total_variation_match_their_formulas() -> None:
    f, g = logits()
    confidence, p = softmax(f.numpy()).max(axis=1), softmax(g.numpy())
    distances = np.abs(p - 0.25).sum(axis=1)
    assert confidence_control(f, 0.9).item() == pytest.approx((confidence.mean() - 0.9) ** 2, rel=1e-10)
    assert confidence_control(f, 0.9, "sum").item() == pytest.approx(((confidence - 0.9) ** 2).sum(), rel=1e-10)
    assert total_variation(g).item() == pytest.approx(distances.mean(), rel=1e-12)
    assert total_variation(g, "sum").item() == pytest.approx(distances.sum(), rel=1e-12)


# ---- objectives: a base and a weighted term

TERMS: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "oe": ({}, lambda f, g: 0.5 * outlier_exposure(g)),
    "energy_oe": ({"m_in": -27.0}, lambda f, g: 0.1 * energy_hinge(f, g, -27.0, -5.0)),
    "balanced_energy": ({}, lambda f, g: 0.1 * balanced_energy_hinge(f, g, scaled_powers(COUNTS, 0.75))),
    "oecc": ({"train_accuracy": 0.9}, lambda f, g: 0.07 * confidence_control(f, 0.9) + 0.05 * total_variation(g)),
}


def scaled_powers(counts: list[int], gamma: float) -> Tensor:
    powers = (np.array(counts) / sum(counts)) ** gamma
    return torch.from_numpy(powers / powers.sum())


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("base", ["cross_entropy", "logit_adjustment"])
def test_exposure_objective_is_the_sum_of_base_and_term(name: str, base: str) -> None:
    features, head, labels, ood = example()
    settings, term = TERMS[name]
    objective = create_objective(name, class_counts=COUNTS, base=base, **settings)
    plain: Objective = CrossEntropy() if base == "cross_entropy" else LogitAdjustment(COUNTS)
    expected = plain(features, head, labels) + term(head(features), head(ood))
    torch.testing.assert_close(objective(features, head, labels, ood), expected, rtol=1e-12, atol=0)


def test_oecc_with_sum_reduction_sums_over_the_batch() -> None:
    features, head, labels, ood = example()
    p, q = softmax(head(features).detach().numpy()), softmax(head(ood).detach().numpy())
    expected = CrossEntropy()(features, head, labels).item()
    expected += 0.07 * ((p.max(axis=1) - 0.9) ** 2).sum() + 0.05 * np.abs(q - 0.25).sum()
    assert OECC(0.9, reduction="sum")(features, head, labels, ood).item() == pytest.approx(expected, rel=1e-12)


def test_balanced_energy_uses_the_ood_prior_if_given() -> None:
    features, head, labels, ood = example()
    ood_counts = [3, 0, 5, 2]
    objective = create_objective("balanced_energy", class_counts=COUNTS, ood_counts=ood_counts, gamma=0.5, shift=2.0)
    term = balanced_energy_hinge(head(features), head(ood), scaled_powers(ood_counts, 0.5), shift=2.0)
    expected = CrossEntropy()(features, head, labels) + 0.1 * term
    torch.testing.assert_close(objective(features, head, labels, ood), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ood_counts", [[0, 0, 0, 0], [5, -1, 2, 2]])
def test_balanced_energy_refuses_invalid_ood_counts(ood_counts: list[int]) -> None:
    with pytest.raises(BadInput, match="samples"):
        create_objective("balanced_energy", class_counts=COUNTS, ood_counts=ood_counts)


def test_balanced_energy_refuses_counts_of_other_classes() -> None:
    features, head, labels, ood = example()
    with pytest.raises(ShapeMismatch, match="3 classes, but the head has 4"):
        create_objective("balanced_energy", class_counts=[3, 2, 1])(features, head, labels, ood)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_of_exposure_with_respect_to_id_and_ood_features(name: str) -> None:
    features, head, labels, ood = example()
    objective = create_objective(name, class_counts=COUNTS, **TERMS[name][0])
    assert torch.autograd.gradcheck(
        lambda z, o: objective(z, head, labels, o), (features.requires_grad_(), ood.requires_grad_())
    )
