"""Tests of gradient_classifier: its regression, its split, and its saved state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores import FeatureSet, create_scorer, load_scorer
from ood_scores.errors import BadInput
from ood_scores.scorers.gradients import STRENGTHS

Array = NDArray[np.float64]


def gradients(rows: int, seed: int, shift: float = 0.6) -> FeatureSet:
    """Norms of inputs and of noise that overlap: log-normal, with different means in two of four columns."""
    generator = torch.Generator().manual_seed(seed)
    inputs, noise = torch.randn(2, rows, 4, generator=generator, dtype=torch.float64)
    noise[:, :2] += torch.tensor([shift, -2 * shift])
    extras = {"gradients.inputs": inputs.exp(), "gradients.noise": noise.exp()}
    return FeatureSet(torch.zeros(rows, 1), extras=extras)


def classifier(train: FeatureSet, **params: Any) -> Any:
    return create_scorer("gradient_classifier", **params).fit(train)


def test_log_odds() -> None:
    """Standardized normal columns with a shift d have the log odds of Gaussians, in the direction of the shift."""
    fitted = classifier(gradients(20_000, seed=0))
    direction = fitted.weight_ / fitted.scale_
    expected = torch.tensor([-0.6, 1.2, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(direction, expected, rtol=0, atol=0.06)
    assert fitted.accuracy_ == pytest.approx(0.749, abs=0.02)  # Phi(|(0.6, 1.2)| / 2)
    test = gradients(500, seed=1)
    logs = test.extras["gradients.inputs"].log()
    by_hand = ((logs - fitted.mean_) / fitted.scale_ * fitted.weight_).sum(dim=1) + fitted.bias_
    torch.testing.assert_close(fitted.score(test), by_hand)
    noise = FeatureSet(torch.zeros(500, 1), extras={"gradients.inputs": test.extras["gradients.noise"]})
    assert (fitted.score(test)[:, None] > fitted.score(noise)).double().mean() > 0.8


def test_the_logistic_regression_is_at_its_optimum() -> None:
    """The gradient of the penalized likelihood of the training part vanishes, and the chosen strength is the most
    likely one.
    """
    train = gradients(400, seed=2)
    fitted = classifier(train)
    rows = fitted._shuffled(train)
    part, validation, test = rows.split([160, 160, 80])
    logs = torch.cat([part[:, 0], part[:, 1]]).log()
    torch.testing.assert_close(fitted.mean_, logs.mean(dim=0))
    torch.testing.assert_close(fitted.scale_, logs.std(dim=0, correction=0))
    labels = torch.arange(320) < 160
    missing = labels.double() - fitted._odds(logs, fitted.weight_, fitted.bias_).sigmoid()
    slope = missing @ ((logs - fitted.mean_) / fitted.scale_) - fitted.weight_ / fitted.strength_
    assert slope.abs().max() < 0.01
    assert missing.sum().abs() < 0.01

    def likelihood(strength: float) -> float:
        weight, bias = fitted._trained((logs, labels), strength)
        odds = [fitted._odds(validation[:, kind].log(), weight, bias) for kind in (0, 1)]
        return float(odds[0].sigmoid().log().sum() + (-odds[1]).sigmoid().log().sum())

    assert fitted.strength_ == max(STRENGTHS, key=likelihood)
    right = [fitted._odds(test[:, kind].log(), fitted.weight_, fitted.bias_) for kind in (0, 1)]
    assert fitted.accuracy_ == (int((right[0] > 0).sum()) + int((right[1] <= 0).sum())) / 160


def test_the_split_is_seeded_and_follows_the_rows() -> None:
    train = gradients(100, seed=3)
    test = gradients(50, seed=4)
    scores = [classifier(train, seed=seed).score(test) for seed in (0, 0, 1)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(classifier(train[order]).score(test), scores[0])
    assert sorted(classifier(train)._shuffled(train)[:, 0, 0].tolist()) == sorted(
        train.extras["gradients.inputs"][:, 0].tolist()
    )


def test_columns_without_variation_or_gradient_count_for_nothing() -> None:
    train = gradients(200, seed=5)
    dead = {name: torch.cat([values, torch.zeros(200, 1)], dim=1) for name, values in train.extras.items()}
    fitted = classifier(FeatureSet(torch.zeros(200, 1), extras=dead))
    assert fitted.weight_[4] == 0
    assert fitted.score(FeatureSet(torch.zeros(200, 1), extras=dead)).isfinite().all()


@pytest.mark.parametrize("rows", [3, 4, 7])
def test_few_rows(rows: int) -> None:
    train = gradients(rows, seed=6)
    assert classifier(train).score(train).isfinite().all()
    with pytest.raises(BadInput, match="the fit needs at least 3 rows, got 2"):
        classifier(train[:2])


def test_saved_without_scikit_learn_objects(tmp_path: Any) -> None:
    fitted = classifier(gradients(60, seed=7))
    kinds = {name: type(value) for name, value in fitted.fitted_state().items()}
    assert kinds == dict.fromkeys(("mean_", "scale_", "weight_"), Tensor) | dict.fromkeys(
        ("bias_", "strength_", "accuracy_"), float
    )
    fitted.save(tmp_path / "scorer.safetensors")
    again: Any = load_scorer(tmp_path / "scorer.safetensors")
    assert again.accuracy_ == fitted.accuracy_
    assert torch.equal(again.score(gradients(20, seed=8)), fitted.score(gradients(20, seed=8)))
