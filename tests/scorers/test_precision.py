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
from ood_scores.metrics import auroc

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


# --- logits so far apart that float32 exponentials become 0 -----------------------------------------------------------


def certain_logits(gap: float, rows: int = 400) -> Tensor:
    logits = 0.1 * gap * torch.randn(rows, 10, generator=torch.Generator().manual_seed(3))
    logits[torch.arange(rows), torch.arange(rows) % 10] += gap
    return logits


def odds_of_others(logits: Array) -> Array:
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds[np.arange(len(odds)), odds.argmax(axis=1)] = 0
    return odds


def certain_entropy(logits: Array) -> Array:
    odds, below = odds_of_others(logits), logits - logits.max(axis=1, keepdims=True)
    total = odds.sum(axis=1)
    return (odds * below).sum(axis=1) / (1 + total) - np.log1p(total)


def certain_doctor(logits: Array) -> Array:
    odds = odds_of_others(logits)
    total, squares = odds.sum(axis=1), (odds**2).sum(axis=1)
    return -(2 * total + total**2 - squares) / (1 + squares)


def certain_renyi(order: float, logits: Array) -> Array:
    odds = odds_of_others(logits)
    total = np.log1p(odds.sum(axis=1))
    return -total if order == np.inf else (np.log1p((odds**order).sum(axis=1)) - order * total) / (order - 1)


def certain_gradnorm(p: float, logits: Array) -> Array:
    odds = odds_of_others(logits)
    total = odds.sum(axis=1, keepdims=True)
    shares = np.concatenate([odds / total, np.ones_like(total)], axis=1)
    return -(total[:, 0] / (1 + total[:, 0])) * (shares**p).sum(axis=1) ** (1 / np.longdouble(p))


CERTAIN: list[tuple[str, dict[str, Any], Callable[[Array], Array]]] = [
    ("entropy", {}, certain_entropy),
    ("doctor", {}, certain_doctor),
    ("doctor", {"temperature": 0.5}, lambda logits: certain_doctor(2 * logits)),
    ("renyi", {}, lambda logits: certain_renyi(0.5, logits)),
    ("renyi", {"alpha": 2.0}, lambda logits: certain_renyi(2.0, logits)),
    ("renyi", {"alpha": float("inf")}, lambda logits: certain_renyi(np.inf, logits)),
    ("gradnorm", {"target": "predicted", "part": "V"}, lambda logits: certain_gradnorm(1.0, logits)),
    ("gradnorm", {"target": "predicted", "part": "V", "p": 2.0}, lambda logits: certain_gradnorm(2.0, logits)),
    ("gradnorm", {"target": "predicted", "part": "V", "p": 0.3}, lambda logits: certain_gradnorm(0.3, logits)),
]


@pytest.mark.parametrize("gap", [10.0, 50.0, 80.0, 120.0, 200.0])
@pytest.mark.parametrize(("name", "parameters", "reference"), CERTAIN)
def test_certain_predictions(name, parameters, reference, gap):
    logits = certain_logits(gap)
    found = score(name, FeatureSet(logits, logits), **parameters)
    expected = reference(logits.numpy().astype(np.longdouble)).astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # float32 logits are rounded to 1e-5
    assert len(set(found.tolist())) == len(logits)


@pytest.mark.parametrize("name", ["entropy", "doctor", "renyi", "gen"])
def test_large_logits_rank_as_in_float64(name):
    sets = [40 * torch.randn(1000, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for logits, gap in zip(sets, (400, 300), strict=True):
        logits[:, 0] += gap
    found = auroc(*(score(name, FeatureSet(logits, logits)) for logits in sets))
    expected = auroc(*(score(name, FeatureSet(logits.double(), logits.double())) for logits in sets))
    assert found == pytest.approx(expected, abs=1e-5)
    assert found > 0.93


def test_pnml_of_certain_predictions():
    """The head has logits 300 times as large as its weights of length 1, and the scores are far below 1e-16."""
    rows = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)))
    head = Head(300 * torch.eye(8)[:4], torch.zeros(4))
    fit, feats = FeatureSet(rows[:200], head=head), FeatureSet(rows[200:], head=head)
    found = create_scorer("pnml").fit(fit).score(feats)
    z = np.concatenate([rows.numpy().astype(np.longdouble), np.ones((300, 1))], axis=1)
    products = np.linalg.inv((z[:200].T @ z[:200]).astype(np.float64))
    share = ((z[200:] @ products) * z[200:]).sum(axis=1)
    share = (share / (1 + share))[:, None]
    logits = 300 * z[200:, :4]
    others = odds_of_others(logits)
    total = others.sum(axis=1, keepdims=True)
    below = logits - logits.max(axis=1, keepdims=True)
    p = np.exp(below) / (1 + total)
    rest = np.where(below == 0, total / (1 + total), 1 - p)
    normalizers = np.where(below == 0, 0, p / (p + rest * p**share))
    missing = np.where(below == 0, rest * p**share / (p + rest * p**share), 0)
    expected = -np.log1p((normalizers - missing).sum(axis=1)) / np.log(4)
    assert (found > -1e-20).sum() > 30
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=2e-3)


# --- a softmax that is close to a typical one -------------------------------------------------------------------------


def classified_logits(seed: int, rows: int, noise: float, scale: float, classes: int = 20) -> Tensor:
    logits = noise * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(rows), torch.arange(rows) % classes] += 3
    return scale * logits


def kl_matching(fit: Array, logits: Array) -> Array:
    """The divergences from the means as sums of terms of one sign, whose first digits do not cancel."""
    p, typical, predicted = softmax(logits), softmax(fit), fit.argmax(axis=1)
    found = []
    for k in np.unique(predicted):
        d = typical[predicted == k].mean(axis=0)
        log_ratio = np.log(p / d)
        small = log_ratio**2 / 2 - log_ratio**3 / 6 + log_ratio**4 / 24
        found.append(np.where(np.abs(log_ratio) < 1e-4, p * small, d - p + p * log_ratio).sum(axis=1))
    return -np.min(found, axis=0)


@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 20.0])
def test_kl_matching_near_a_mean(scale):
    fit, logits = classified_logits(0, 400, 0.5, scale), classified_logits(1, 200, 0.5, scale)
    scorer = create_scorer("kl_matching").fit(FeatureSet(fit, fit))
    found = scorer.score(FeatureSet(logits, logits))
    expected = kl_matching(*(given.numpy().astype(np.longdouble) for given in (fit, logits)))
    assert_same(found, expected, 2e-4)
    assert (found <= 0).all()
    alone = scorer.score(FeatureSet(logits, logits), block_rows=1)
    np.testing.assert_allclose(alone, found, rtol=1e-4 if scale >= 1 else 1e-12)


def test_kl_matching_of_a_repeated_softmax():
    """Logits that differ by 1e-3 from peaked ones: the entropy is 1e7 times as large as the divergence."""
    peaked = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    fit, logits = (
        peaked + 1e-3 * torch.randn(200, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    found = create_scorer("kl_matching").fit(FeatureSet(fit, fit)).score(FeatureSet(logits, logits))
    expected = kl_matching(*(given.numpy().astype(np.longdouble) for given in (fit, logits)))
    assert_same(found, expected, 1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e-4])
def test_kl_matching_ranks_small_logits_as_in_float64(scale):
    fit, near, far = (
        classified_logits(seed, rows, noise, scale, classes=100)
        for seed, rows, noise in ((0, 2000, 0.5), (1, 500, 0.5), (2, 500, 1.0))
    )
    scorer = create_scorer("kl_matching").fit(FeatureSet(fit, fit))
    assert auroc(*(scorer.score(FeatureSet(logits, logits)) for logits in (near, far))) == pytest.approx(1, abs=1e-5)


def test_kl_matching_means_of_certain_predictions():
    """The fit finds means far below 1e-45, the smallest number of float32."""
    fit = certain_logits(150.0)
    scorer: Any = create_scorer("kl_matching").fit(FeatureSet(fit, fit))
    p, predicted = softmax(fit.numpy().astype(np.longdouble)), fit.argmax(dim=1).numpy()
    expected = np.log(np.stack([p[predicted == k].mean(axis=0) for k in range(10)]))
    np.testing.assert_allclose(scorer.log_means_, expected.astype(np.float64), rtol=1e-12, atol=1e-15)
    assert expected.min() < -110


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
