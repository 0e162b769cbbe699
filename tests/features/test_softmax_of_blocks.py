"""What blocks derive from the softmax of float32 logits, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ood_scores.features import Block

SPREADS = (1e-6, 1.0, 10.0, 100.0)


def logits(spread: float) -> torch.Tensor:
    return spread * torch.randn(500, 100, generator=torch.Generator().manual_seed(0)) + 30


def exact_entropy(values: torch.Tensor) -> torch.Tensor:
    """The entropy ``log(1 + S) + sum_c d_c e^-d_c / (1 + S)``, where d are the distances to the largest logit and S is
    the sum of ``e^-d`` over all other classes, which keeps its digits where a probability is nearly 1."""
    distances = (values.amax(dim=1, keepdim=True) - values).sort(dim=1).values
    others = (-distances[:, 1:]).exp()
    total = others.sum(dim=1)
    return torch.log1p(total) + (distances[:, 1:] * others).sum(dim=1) / (1 + total)


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("temperature", [1.0, 3.4, 1000.0])
def test_logsumexp_and_confidence(spread: float, temperature: float) -> None:
    values = logits(spread)
    block, exact = Block(logits=values), values.double() / temperature
    np.testing.assert_allclose(block.logsumexp(temperature), exact.logsumexp(dim=1), rtol=0, atol=5e-7)
    np.testing.assert_allclose(block.confidence(temperature), exact.softmax(dim=1).amax(dim=1), rtol=5e-7)


@pytest.mark.parametrize("spread", SPREADS)
def test_entropy_keeps_the_digits_of_nearly_certain_rows(spread: float) -> None:
    values = logits(spread)
    np.testing.assert_allclose(Block(logits=values).entropy(), exact_entropy(values.double()), rtol=1e-5, atol=1e-37)


def test_confidence_near_1_has_no_ties() -> None:
    gaps = torch.linspace(20, 34, 50)
    confidence = Block(logits=torch.stack([gaps, torch.zeros(50)], dim=1)).confidence()
    np.testing.assert_allclose(1 - confidence, (-gaps.double()).exp(), rtol=1e-6, atol=3e-16)
    assert (confidence.diff() > 0).all()
