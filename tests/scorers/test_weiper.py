"""weiper against a plain float64 reference of the authors' definition, one row, copy, and bin at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ood_scores import FeatureSet, Head, create_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.collect import collect
from ood_scores.scorers import weiper as weiper_module
from ood_scores.scorers.weiper import PerturbedRange, histogram, perturbed_weight, smoothed

Array = NDArray[np.float64]
CLASSES, WIDTH = 5, 16
MEANS = 1.5 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
WEIGHT, BIAS = MEANS / 3, np.linspace(-0.2, 0.2, CLASSES)


def rows(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    features: Array = MEANS[np.arange(count) % CLASSES] + rng.normal(size=(count, WIDTH))
    return np.maximum(features, 0)


FIT, ROWS = rows(200, seed=0), np.concatenate([rows(20, seed=1), 2 * rows(10, seed=2)])
HEAD = Head(WEIGHT, BIAS)
TRAIN, FEATS = FeatureSet(FIT, head=HEAD), FeatureSet(ROWS)
SMALL: dict[str, Any] = {"repeats": 7, "bins": 20, "smoothing": 4, "perturbed_smoothing": 5}


def shares(values: Array, low: float, high: float, bins: int) -> Array:
    edges = np.linspace(low, high + 1e-8, bins + 1)
    return np.array([np.mean((values >= edges[i]) & (values < edges[i + 1])) for i in range(bins)])


def moving_average(density: Array, width: int) -> Array:
    last, found = len(density) - 1, []
    for i in range(len(density)):
        first = i - (width - 1) // 2
        found.append(np.mean([density[min(max(j, 0), last)] for j in range(first, first + width)]))
    return np.array(found)


def both_divergences(p: Array, q: Array, floor: float) -> float:
    p, q = (p + floor) / (p + floor).sum(), (q + floor) / (q + floor).sum()
    return sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p, q, strict=True))


def weiper(weights: Array, bins: int, lambda_1: float, lambda_2: float, smoothing: int, perturbed: int) -> list[float]:
    def logits(z: Array) -> Array:
        return np.array([copy @ z + BIAS for copy in weights])

    fit_logits = np.array([logits(z) for z in FIT])
    limits, other_limits = (FIT.min(), FIT.max()), (fit_logits.min(), fit_logits.max())
    usual = np.mean([shares(z, *limits, bins) for z in FIT], axis=0)
    other_usual = np.mean([shares(f.flatten(), *other_limits, bins) for f in fit_logits], axis=0)
    found = []
    for z in ROWS:
        own = both_divergences(usual, moving_average(shares(z, *limits, bins), smoothing), 0.01)
        other = moving_average(shares(logits(z).flatten(), *other_limits, bins), perturbed)
        msp = np.mean([np.exp(f).max() / np.exp(f).sum() for f in logits(z)])
        found.append(-(own + lambda_1 * both_divergences(other_usual, other, 0.025) - lambda_2 * msp))
    return found


@pytest.mark.parametrize(
    ("bins", "lambda_1", "lambda_2", "smoothing", "perturbed_smoothing"),
    [(20, 2.5, 0.25, 4, 5), (10, 0.1, 1.0, 1, 12), (7, 0.0, 0.0, 40, 1)],
)
def test_weiper(bins: int, lambda_1: float, lambda_2: float, smoothing: int, perturbed_smoothing: int) -> None:
    scorer: Any = create_scorer(
        "weiper",
        repeats=7,
        bins=bins,
        lambda_1=lambda_1,
        lambda_2=lambda_2,
        smoothing=smoothing,
        perturbed_smoothing=perturbed_smoothing,
    ).fit(TRAIN)
    weights = scorer.weight_.double().numpy()
    expected = weiper(weights, bins, lambda_1, lambda_2, smoothing, perturbed_smoothing)
    np.testing.assert_allclose(scorer.score(FEATS), expected, rtol=1e-9)


def test_the_noise_has_its_length_and_no_direction() -> None:
    head = Head(np.random.default_rng(0).normal(size=(3, 400)), np.zeros(3))
    noise = perturbed_weight(head, 50, 1.7, seed=0).double() - head.weight
    lengths = noise.norm(dim=2) / head.weight.norm(dim=1)
    np.testing.assert_allclose(lengths, np.full((50, 3), 1.7), rtol=1e-5)
    cosines = torch.nn.functional.cosine_similarity(noise[:, None, 0], noise[None, :, 1], dim=2)
    assert cosines.abs().max() < 0.35
    assert abs(float(cosines.mean())) < 0.01


def test_the_noise_is_seeded() -> None:
    weights = [perturbed_weight(HEAD, 4, 2.0, seed) for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    scores = [score("weiper", FEATS, fit=TRAIN, seed=seed, **SMALL) for seed in (1, 1, 2)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_with_distance_0_the_copies_are_the_head() -> None:
    found = score("weiper", FEATS, fit=TRAIN, distance=0.0, lambda_1=0.0, lambda_2=1.0, **SMALL)
    without = score("weiper", FEATS, fit=TRAIN, distance=0.0, lambda_1=0.0, lambda_2=0.0, **SMALL)
    msp = score("msp", FeatureSet(ROWS, ROWS @ WEIGHT.T + BIAS))
    np.testing.assert_allclose(found - without, msp, rtol=1e-5)


def test_the_number_of_copies_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score("weiper", FEATS, fit=TRAIN, **SMALL)
    monkeypatch.setattr(weiper_module, "PIECE", 300)
    np.testing.assert_allclose(score("weiper", FEATS, fit=FeatureSet(FIT, head=HEAD), **SMALL), whole, rtol=1e-12)


def test_float32_features_change_only_logits_at_bin_edges() -> None:
    narrow = FeatureSet(ROWS.astype(np.float32), head=HEAD)
    scorer = create_scorer("weiper").fit(TRAIN)
    found, expected = scorer.score(narrow), scorer.score(FeatureSet(narrow.features.double(), head=HEAD))
    np.testing.assert_allclose(found, expected, atol=3e-5)
    assert (found - expected).abs().median() < 1e-6


def test_values_outside_the_limits_are_in_no_bin() -> None:
    values = torch.tensor([[-1e30, -0.1, 0.0, 0.5, 1.0, 1.1, 1e30]], dtype=torch.float32)
    assert histogram(values, [0.0, 1.0], 2).tolist() == [[2, 1]]


def test_ranges() -> None:
    asked = PerturbedRange(7, 2.4, 0)
    found = collect(TRAIN, [asked])[asked]
    logits = np.einsum("rcd,nd->nrc", found.weight.double().numpy(), FIT) + BIAS
    assert found.features == [FIT.min(), FIT.max()]
    np.testing.assert_allclose(found.perturbed, [logits.min(), logits.max()], rtol=1e-12)


def test_histogram() -> None:
    values = torch.tensor([[0.0, 0.5, 1.0, 4.0], [-1.0, 3.9, 4.1, 2.0]], dtype=torch.float64)
    assert histogram(values, [0.0, 4.0], 4).tolist() == [[3, 0, 0, 1], [0, 1, 0, 1]]  # the edges are at 1 + 2.5e-9, ...
    assert histogram(values, [0.0, 3.0], 3).tolist() == [[3, 0, 0], [0, 1, 0]]
    assert histogram(torch.full((1, 3), 2.0, dtype=torch.float64), [2.0, 2.0], 5).sum() == 3


def test_smoothed_is_the_convolution_of_the_authors() -> None:
    """Theirs is a convolution with padding "same", which replicates the ends."""
    values = torch.rand(3, 11, dtype=torch.float64)
    for width in (1, 2, 3, 4, 9, 10):
        layer = torch.nn.Conv1d(1, 1, width, padding="same", padding_mode="replicate", bias=False).double()
        layer.weight.data.fill_(1 / width)
        torch.testing.assert_close(smoothed(values, width), layer(values[:, None])[:, 0].detach())


def test_bad_parameters_are_named() -> None:
    for params in ({"repeats": 0}, {"bins": 1.5}, {"smoothing": 0}, {"perturbed_smoothing": -1}):
        with pytest.raises(BadInput, match=f"{next(iter(params))} must be a whole number"):
            create_scorer("weiper", **params)
    for params in ({"distance": -1.0}, {"lambda_1": math.inf}, {"lambda_2": math.nan}):
        with pytest.raises(BadInput, match=f"{next(iter(params))} must be at least 0 and finite"):
            create_scorer("weiper", **params)
