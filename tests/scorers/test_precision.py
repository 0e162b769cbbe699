"""Scores of float32 data whose differences float32 would round away, against references in extended precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores import FeatureSet, Head, create_scorer, score
from ood_scores.features import Block

Array = NDArray[Any]


def softmax(logits: Array) -> Array:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def log_mean_exp(logits: Array) -> Array:
    deviations = logits - logits.mean(axis=1, keepdims=True)
    return np.log1p(np.expm1(deviations).mean(axis=1))


def entropy(logits: Array) -> Array:
    p = softmax(logits)
    return (p * np.log(p)).sum(axis=1)


def renyi(logits: Array) -> Array:
    return np.log((softmax(logits) ** 0.5).sum(axis=1)) / -0.5


def gen(logits: Array) -> Array:
    p = softmax(logits)
    return -((p * (1 - p)) ** np.longdouble("0.1")).sum(axis=1)


def doctor(logits: Array) -> Array:
    p = softmax(logits)
    return -(p * (1 - p)).sum(axis=1) / (p * p).sum(axis=1)


def energy(logits: Array) -> Array:
    return logits.mean(axis=1) + np.log(np.longdouble(logits.shape[1])) + log_mean_exp(logits)


SMALL: dict[str, Callable[[Array], Array]] = {
    "energy": energy,
    "entropy": entropy,
    "kl_uniform": log_mean_exp,
    "renyi": renyi,
    "gen": gen,
    "doctor": doctor,
}


def logits_like(scale: float, rows: int = 400, classes: int = 10) -> Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(3))


def assert_same(found: Tensor, expected: Array, tolerance: float) -> None:
    """The values differ by at most a small share of the spread of the scores, or the rounding of float64 values."""
    spread, rounding = expected.std(), 10 * np.finfo(np.float64).eps * np.abs(expected).max()
    error = np.abs(found.numpy().astype(np.longdouble) - expected).max()
    assert error < tolerance * spread + rounding, f"{float(error / spread):.2g} of the spread"


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("name", SMALL)
def test_small_logits(name, scale):
    logits = logits_like(scale)
    expected = SMALL[name](logits.numpy().astype(np.longdouble))
    assert_same(score(name, FeatureSet(logits, logits)), expected, 1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e-8])
def test_divergence_from_uniform_of_tiny_logits(scale):
    logits = logits_like(scale)
    deviations = logits.numpy().astype(np.longdouble)
    deviations -= deviations.mean(axis=1, keepdims=True)
    expected = (deviations**2 / 2 + deviations**3 / 6).mean(axis=1)
    assert_same(score("kl_uniform", FeatureSet(logits, logits)), expected, 1e-6)


@pytest.mark.parametrize("temperature", [100.0, 1e4, 1e6])
def test_large_temperatures(temperature):
    logits = logits_like(3.0)
    feats, wide = FeatureSet(logits, logits), logits.numpy().astype(np.longdouble) / temperature
    assert_same(score("energy", feats, temperature=temperature), temperature * energy(wide), 1e-4)
    assert_same(score("doctor", feats, temperature=temperature), doctor(wide), 1e-4)
    assert_same(score("msp", feats, temperature=temperature, double=True), softmax(wide).max(axis=1), 1e-4)


def test_a_row_is_refined_alone_and_among_others():
    logits = torch.cat([logits_like(1e-3, 20), logits_like(3.0, 20)])
    feats = FeatureSet(logits, logits)
    for name in SMALL:
        together = score(name, feats)
        alone = torch.cat([score(name, feats[row : row + 1]) for row in range(40)])
        torch.testing.assert_close(together, alone, rtol=1e-14, atol=1e-14)


def test_ordinary_rows_are_not_refined():
    logits = logits_like(3.0)
    block = Block(logits=logits, rows=len(logits))
    assert torch.equal(block.total_odds(), (logits - logits.amax(dim=1, keepdim=True)).exp().double().sum(dim=1))


# --- features with a common offset, and heads that are nearly rank-deficient ------------------------------------------


def offset_set(rows: int, seed: int, offset: float, shift: float = 0.0) -> FeatureSet:
    """Float32 features around class means, with a common offset; ``shift`` moves rows off the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 4
    means = torch.randn(4, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    away = torch.randn(12, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    noise = 0.3 * torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    features = (offset + means[labels] + noise + shift * away).float()
    head = Head((means - means.mean(dim=1, keepdim=True)).float(), torch.zeros(4))
    return FeatureSet(features, head(features), labels, head)


def wide(feats: FeatureSet) -> FeatureSet:
    head = feats.head
    assert head is not None
    assert feats.logits is not None
    return FeatureSet(
        feats.features.double(), feats.logits.double(), feats.labels, Head(head.weight.double(), head.bias.double())
    )


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_pp", "relative_mahalanobis", "core"])
def test_common_offset(name, offset):
    fit, feats = offset_set(400, 0, offset), offset_set(200, 1, offset, shift=0.3)
    reference, sets = name, [wide(fit), wide(feats)]
    if name == "mahalanobis_pp" and offset >= 1e3:  # unit features vary along the offset by their last digit alone
        reference, sets = "mahalanobis", across_the_offset(*sets)
    expected = create_scorer(reference).fit(sets[0]).score(sets[1])
    assert_same(create_scorer(name).fit(fit).score(feats), expected.numpy().astype(np.longdouble), 1e-2)


def across_the_offset(*sets: FeatureSet) -> list[FeatureSet]:
    """Unit features without the direction in which those of the first set vary least."""
    rows = [torch.nn.functional.normalize(feats.features) for feats in sets]
    groups = [rows[0][sets[0].labels == c] for c in range(4)]
    centered = torch.cat([group - group.mean(dim=0) for group in groups])
    kept = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, 1:]
    return [FeatureSet(each @ kept, feats.logits, feats.labels) for each, feats in zip(rows, sets, strict=True)]


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("name", ["vim", "residual"])
def test_nearly_rank_deficient_head(name, smallest):
    fit, feats = offset_set(400, 0, 1.0), offset_set(200, 1, 1.0, shift=0.3)

    def with_head(given: FeatureSet) -> FeatureSet:
        weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        values[-1] = smallest * values[0]
        head = Head(left * values @ right, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
        return FeatureSet(given.features, head(given.features.double()).float(), given.labels, head)

    expected = create_scorer(name).fit(wide(with_head(fit))).score(wide(with_head(feats)))
    found = create_scorer(name).fit(with_head(fit)).score(with_head(feats))
    assert_same(found, expected.numpy().astype(np.longdouble), 1e-3)
