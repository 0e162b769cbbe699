"""Scores that need no fit, and the prior scores, against plain float64 definitions."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats

from ood_scores import FeatureSet, Head, create_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.row_reductions import PIECE

Array = NDArray[np.float64]
INF = float("inf")


def example(dtype: torch.dtype = torch.float64, rows: int = 40, width: int = 9, classes: int = 6) -> FeatureSet:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, width, generator=generator).relu().to(dtype)
    head = Head(torch.randn(classes, width, generator=generator).to(dtype), torch.randn(classes, generator=generator))
    labels = torch.arange(rows) % (classes - 1)  # the last class has no row
    return FeatureSet(features, head(features), labels, head)


def arrays(feats: FeatureSet) -> tuple[Array, Array, Array]:
    """Features, logits, and softmax."""
    assert feats.logits is not None
    logits = feats.logits.double().numpy()
    return feats.features.double().numpy(), logits, special.softmax(logits, axis=1)


def prior(feats: FeatureSet) -> Array:
    assert feats.labels is not None
    return np.bincount(feats.labels.numpy(), minlength=feats.num_classes or 0) / len(feats)


def cosine(p: Array, q: Array) -> Array:
    return p @ q / np.linalg.norm(p, axis=1) / np.linalg.norm(q)


def gen(p: Array, gamma: float, top: int) -> Array:
    largest = np.sort(p, axis=1)[:, ::-1][:, :top]
    return -(largest**gamma * (1 - largest) ** gamma).sum(axis=1)


def scaled_logits(feats: FeatureSet, scale: float) -> Array:
    assert feats.head is not None
    return feats.features.numpy() * scale @ feats.head.weight.numpy().T + feats.head.bias.numpy()


# (scorer, parameters, definition on features z, logits f, softmax p)
DEFINITIONS: list[tuple[str, dict[str, Any], Callable[[Array, Array, Array], Array]]] = [
    ("msp", {}, lambda z, f, p: p.max(axis=1)),
    ("msp", {"temperature": 3.0}, lambda z, f, p: special.softmax(f / 3, axis=1).max(axis=1)),
    ("msp", {"temperature": 0.5, "double": True}, lambda z, f, p: special.softmax(f / 0.5, axis=1).max(axis=1)),
    ("max_logit", {}, lambda z, f, p: f.max(axis=1)),
    ("energy", {}, lambda z, f, p: special.logsumexp(f, axis=1)),
    ("energy", {"temperature": 2.5}, lambda z, f, p: 2.5 * special.logsumexp(f / 2.5, axis=1)),
    ("entropy", {}, lambda z, f, p: -stats.entropy(p, axis=1)),
    ("kl_uniform", {}, lambda z, f, p: stats.entropy(np.full_like(p, 1 / p.shape[1]), p, axis=1)),
    ("gen", {}, lambda z, f, p: gen(p, 0.1, 100)),
    ("gen", {"gamma": 0.5, "top": 3}, lambda z, f, p: gen(p, 0.5, 3)),
    ("gen", {"gamma": 2.0, "top": 1}, lambda z, f, p: gen(p, 2.0, 1)),
    ("logit_norm", {}, lambda z, f, p: np.linalg.norm(f, axis=1)),
    *(("logit_norm", {"p": p}, lambda z, f, _, p=p: np.linalg.norm(f, ord=p, axis=1)) for p in (0.3, 1, 3, INF)),
    ("feature_norm", {}, lambda z, f, p: np.linalg.norm(z, axis=1)),
    *(("feature_norm", {"p": p}, lambda z, f, _, p=p: np.linalg.norm(z, ord=p, axis=1)) for p in (0.3, 1, 3, INF)),
    ("activation_ratio", {}, lambda z, f, p: (z > 0).sum(axis=1) / z.shape[1]),
]


@pytest.mark.parametrize(
    ("name", "params", "definition"), DEFINITIONS, ids=lambda value: None if callable(value) else str(value)
)
def test_equals_its_definition(name: str, params: dict[str, Any], definition: Callable[..., Array]) -> None:
    feats = example()
    expected = definition(*arrays(feats))
    np.testing.assert_allclose(score(name, feats, **params), expected, rtol=1e-12, atol=1e-14)
    single = FeatureSet(feats.features.float(), None if feats.logits is None else feats.logits.float())
    np.testing.assert_allclose(score(name, single, **params), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1, 7])
def test_scaled_msp(scale: float) -> None:
    feats = example()
    expected = special.softmax(scaled_logits(feats, scale), axis=1).max(axis=1)
    np.testing.assert_allclose(score("scaled_msp", feats, scale=scale), expected, rtol=1e-12)


def test_scaled_msp_at_scale_one_is_msp() -> None:
    feats = example()
    torch.testing.assert_close(score("scaled_msp", feats, scale=1.0), score("msp", feats))


def test_prior_msp() -> None:
    feats = example()
    expected = (arrays(feats)[2] - prior(feats)).max(axis=1)
    np.testing.assert_allclose(score("prior_msp", feats, fit=feats), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_prior_energy(temperature: float) -> None:
    """The temperature applies to the energy; the cosine is that of the plain softmax, as in the authors' code."""
    feats = example()
    _, logits, softmax = arrays(feats)
    energy = temperature * special.logsumexp(logits / temperature, axis=1)
    expected = energy * (1 - cosine(softmax, prior(feats)))
    np.testing.assert_allclose(score("prior_energy", feats, fit=feats, temperature=temperature), expected, rtol=1e-12)


def test_uniform_prior_ranks_as_msp() -> None:
    feats = example(rows=60, classes=6)
    uniform = FeatureSet(feats.features, feats.logits, torch.arange(60) % 6)
    found = score("prior_msp", feats, fit=uniform)
    torch.testing.assert_close(found, score("msp", feats) - 1 / 6)


def test_prior_is_of_the_fit_set_not_of_the_scored_set() -> None:
    feats, other = example(), example(rows=7)
    expected = (arrays(other)[2] - prior(feats)).max(axis=1)
    np.testing.assert_allclose(score("prior_msp", other, fit=feats), expected, rtol=1e-12)


def test_msp_has_the_precision_of_the_logits_by_default() -> None:
    """By default, float32 logits saturate at 1 as in published numbers; in float64, they keep their order."""
    logits = torch.tensor([[20.0, 0.0], [25.0, 0.0], [30.0, 0.0]])
    feats = FeatureSet(torch.ones(3, 1), logits)
    assert score("msp", feats).tolist() == [1.0, 1.0, 1.0]
    first, second, third = score("msp", feats, double=True).tolist()
    assert first < second < third < 1
    wide = score("msp", FeatureSet(torch.ones(3, 1), logits.double()))
    torch.testing.assert_close(score("msp", feats, double=True), wide, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidence_keeps_the_digits_of_the_remaining_probability(dtype: torch.dtype) -> None:
    """The rows are at and around each change of its formula, and include one class with nearly all probability."""
    gaps = [0.0, 1e-7, 1e-3, *(np.log(odds) for odds in (1.0001, 2.9999, 3.0, 3.0001)), 2.0, 8.0, 16.0, 30.0]
    logits = torch.tensor([[gap, 0.0, -60.0] for gap in gaps], dtype=dtype)
    found = 1 - score("msp", FeatureSet(torch.ones(len(gaps), 1), logits), double=True).numpy()
    one, other, last = np.exp(logits.double().numpy()).T
    np.testing.assert_allclose(found, (other + last) / (one + other + last), rtol=5e-7, atol=1e-15)


@pytest.mark.parametrize("name", ["msp", "energy", "entropy", "gradnorm"])
def test_the_size_of_cache_pieces_does_not_matter(name: str) -> None:
    logits = torch.randn(2500, 600, generator=torch.Generator().manual_seed(0))
    feats = FeatureSet(logits[:, :5], logits)
    assert logits.numel() > PIECE
    whole = create_scorer(name).score(feats, block_rows=2500)
    assert create_scorer(name).score(feats, block_rows=100).equal(whole)


def test_gen_does_not_saturate() -> None:
    """(1 - p) is correct where p rounds to 1 in float64; the reference has 200 decimal digits."""
    gaps = [5, 30, 36, 37, 40, 80, 300]
    logits = torch.tensor([[gap, 0.0, -1.0] for gap in gaps], dtype=torch.float64)
    expected = []
    with localcontext(Context(prec=200)):
        for row in logits.tolist():
            powers = [Decimal(value).exp() for value in row]
            shares = [power / sum(powers) for power in powers]
            expected.append(-float(sum((share * (1 - share)) ** Decimal("0.1") for share in shares)))
    np.testing.assert_allclose(score("gen", FeatureSet(torch.ones(len(gaps), 1), logits)), expected, rtol=1e-9)
    assert (np.diff(expected) > 0).all()


@pytest.mark.parametrize("name", ["msp", "energy", "entropy", "kl_uniform", "gen", "max_logit", "logit_norm"])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_extreme_logits_stay_finite(name: str, offset: float) -> None:
    logits = torch.tensor([[1000.0, 0.0, -1000.0], [0.0, 0.0, 0.0], [1e-30, -1e-30, 0.0]]) + offset
    found = score(name, FeatureSet(torch.ones(3, 2), logits))
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["feature_norm", "logit_norm"])
@pytest.mark.parametrize("p", [0.3, 1, 2, 3, INF])
def test_norm_of_zeros_is_zero(name: str, p: float) -> None:
    zeros = FeatureSet(torch.zeros(2, 5), torch.zeros(2, 3))
    assert score(name, zeros, p=p).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("p", [0.3, 3, 10])
def test_norms_of_large_and_small_rows(p: float) -> None:
    """A power would overflow float32, so rows are scaled first."""
    rows = torch.tensor([[1e20, 2e20, 0.0], [1e-20, 2e-20, 0.0]])
    expected = np.linalg.norm(rows.double().numpy(), ord=p, axis=1)
    np.testing.assert_allclose(score("feature_norm", FeatureSet(rows), p=p), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("msp", {"temperature": 0}, "temperature must be positive"),
        ("msp", {"temperature": -2.0}, "temperature must be positive"),
        ("energy", {"temperature": 0}, "temperature must be positive"),
        ("energy", {"temperature": INF}, "temperature must be positive"),
        ("energy", {"temperature": float("nan")}, "temperature must be positive"),
        ("prior_energy", {"temperature": 0}, "temperature must be positive"),
        ("gen", {"gamma": 0}, "gamma must be positive"),
        ("gen", {"top": 0}, "top must be a whole number of at least 1"),
        ("scaled_msp", {"scale": 0}, "scale must be positive"),
        ("scaled_msp", {"scale": -1}, "scale must be positive"),
        ("feature_norm", {"p": 0}, "p must be in"),
        ("feature_norm", {"p": -1}, "p must be in"),
        ("logit_norm", {"p": 0}, "p must be in"),
    ],
)
def test_bad_parameters(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"{name}: {message}"):
        score(name, example(), **params)
