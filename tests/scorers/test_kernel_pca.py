"""cop and corp against the authors' definition: principal components and their reconstruction error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ood_scores import FeatureSet, create_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.collect import collect
from ood_scores.scorers.kernel_pca import FourierAxes, fourier_features, fourier_map

Array = NDArray[np.float64]
CLASSES, WIDTH = 5, 12
MEANS = 2 + np.random.default_rng(99).normal(size=(CLASSES, WIDTH))


def rows(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return MEANS[np.arange(count) % CLASSES] + 0.3 * rng.normal(size=(count, WIDTH))


FIT, ROWS = rows(300, seed=0), np.concatenate([rows(40, seed=1), np.random.default_rng(2).normal(size=(20, WIDTH))])
TRAIN, FEATS = FeatureSet(FIT), FeatureSet(ROWS)


def unit(features: Array) -> Array:
    return np.array([z / np.sqrt(sum(z * z)) for z in features])


def reconstruction_errors(fit: Array, features: Array, variance: float) -> list[float]:
    mean = fit.mean(axis=0)
    vectors, values, _ = np.linalg.svd((fit - mean).T @ (fit - mean))
    dimension = next(q for q in range(1, len(values)) if sum(values[:q]) / sum(values) >= variance)
    basis = vectors[:, :dimension]
    return [-float(np.linalg.norm((x - mean) - basis @ (basis.T @ (x - mean)))) for x in features]


@pytest.mark.parametrize("variance", [0.2, 0.85, 0.99])
def test_cop(variance: float) -> None:
    found = score("cop", FEATS, fit=TRAIN, variance=variance)
    np.testing.assert_allclose(found, reconstruction_errors(unit(FIT), unit(ROWS), variance), rtol=1e-9)


@pytest.mark.parametrize(("variance", "gamma", "directions"), [(0.5, 3.0, 64), (0.9, 0.5, 40), (0.7, 1.0, 350)])
def test_corp(variance: float, gamma: float, directions: int) -> None:
    scorer: Any = create_scorer("corp", variance=variance, gamma=gamma, directions=directions).fit(TRAIN)
    weight, phase = scorer.weight_.numpy(), scorer.phase_.numpy()
    fit, features = (np.sqrt(2 / directions) * np.cos(unit(z) @ weight.T + phase) for z in (FIT, ROWS))
    np.testing.assert_allclose(scorer.score(FEATS), reconstruction_errors(fit, features, variance), rtol=1e-8)


def test_the_defaults_are_the_authors_for_cifar10() -> None:
    np.testing.assert_array_equal(score("cop", FEATS, fit=TRAIN), score("cop", FEATS, fit=TRAIN, variance=0.85))
    corp: Any = create_scorer("corp")
    assert (corp.variance, corp.gamma, corp.directions) == (0.8, 2.0, 2048)


def test_fourier_features_make_the_gaussian_kernel() -> None:
    x = unit(ROWS[:10])
    features = fourier_features(torch.tensor(x), *fourier_map(WIDTH, 1.5, 40_000, seed=1))
    kernel = [[np.exp(-1.5 * sum((a - b) ** 2)) for b in x] for a in x]
    np.testing.assert_allclose(features @ features.T, kernel, atol=0.03)


def test_the_map_is_seeded() -> None:
    maps = [fourier_map(WIDTH, 1.0, 20, seed) for seed in (3, 3, 4)]
    assert torch.equal(maps[0][0], maps[1][0])
    assert torch.equal(maps[0][1], maps[1][1])
    assert not torch.equal(maps[0][0], maps[2][0])


@pytest.mark.parametrize("directions", [30, 299, 300, 301])
def test_fourier_axes_of_few_and_many_rows_in_any_blocks(directions: int) -> None:
    """With fewer rows than directions, axes without variance are left out."""
    asked = FourierAxes(2.0, directions, 0)
    features = fourier_features(torch.tensor(unit(FIT)), *fourier_map(WIDTH, 2.0, directions, 0)).numpy()
    covariance = np.cov(features.T, bias=True)
    for block_rows in (1000, 17):
        found = collect(FeatureSet(FIT).in_blocks(block_rows), [asked])[asked]
        np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12, atol=1e-14)
        vectors = found.vectors.numpy()
        np.testing.assert_allclose(vectors * found.values.numpy() @ vectors.T, covariance, atol=1e-12)
        leading = vectors[:, :20]
        np.testing.assert_allclose(leading.T @ leading, np.eye(20), atol=1e-9)
        assert vectors.shape == (directions, directions if directions <= 300 else 299)


def test_the_length_of_features_does_not_matter() -> None:
    for name, params in (("cop", {}), ("corp", {"directions": 50})):
        found = score(name, FeatureSet(5 * ROWS), fit=TRAIN, **params)
        np.testing.assert_allclose(found, score(name, FEATS, fit=TRAIN, **params), rtol=1e-9)


def test_a_fit_set_without_residual_is_refused() -> None:
    with pytest.raises(BadInput, match="cop: the features do not vary"):
        create_scorer("cop").fit(FeatureSet(np.ones((5, 3))))
    with pytest.raises(BadInput, match="corp: the features do not vary"):
        create_scorer("corp", directions=8).fit(FeatureSet(np.ones((5, 3))))
    with pytest.raises(BadInput, match=r"cop: variance=0\.85 needs all 2 dimensions and leaves no residual"):
        create_scorer("cop").fit(FeatureSet(np.random.default_rng(0).normal(size=(50, 2))))
    for name, params in (("cop", {"variance": 1.0}), ("corp", {"gamma": 0.0}), ("corp", {"directions": 0})):
        with pytest.raises(BadInput, match=next(iter(params))):
            create_scorer(name, **params)


@pytest.mark.parametrize(("name", "params"), [("cop", {}), ("corp", {"directions": 64}), ("corp", {"directions": 400})])
@pytest.mark.parametrize("variance", [0.2, 0.9])
@pytest.mark.parametrize("spread", [0.3, 1e-3])
def test_float32_features_cost_no_more_than_their_rounding(
    name: str, params: dict[str, Any], variance: float, spread: float
) -> None:
    """This includes a collapsed network, whose residuals are at most a thousandth of the features."""
    rng = np.random.default_rng(5)
    fit, values = (MEANS[np.arange(count) % CLASSES] + spread * rng.normal(size=(count, WIDTH)) for count in (300, 40))
    narrow = FeatureSet(values.astype(np.float32))
    scorer = create_scorer(name, variance=variance, **params).fit(FeatureSet(fit))
    found, expected = scorer.score(narrow), scorer.score(FeatureSet(narrow.features.double()))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["cop", "corp"])
@pytest.mark.parametrize(("variance", "outside"), [(0.05, False), (0.99, True)])
def test_the_smaller_space_is_kept(name: str, variance: float, outside: bool) -> None:
    params = {"directions": 40} if name == "corp" else {}
    scorer: Any = create_scorer(name, variance=variance, **params).fit(TRAIN)
    width = len(scorer.mean_)
    assert scorer.outside_ == outside
    assert scorer.axes_.shape[1] < (width if outside else width / 3)
    np.testing.assert_allclose(scorer.axes_.T @ scorer.axes_, np.eye(scorer.axes_.shape[1]), atol=1e-12)
