"""Scores of zero-shot classifiers against plain NumPy formulas, and on a bank where the answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from ood_scores import FeatureSet, Head, create_scorer, score, zero_shot_head
from ood_scores.errors import BadInput, MissingInput, NotFinite, ShapeMismatch
from ood_scores.scorers.zero_shot import SEED

Array = NDArray[np.float64]
RNG = np.random.default_rng(0)
TEXTS, IMAGES = RNG.normal(size=(5, 16)), RNG.normal(size=(30, 16))
NEGATIVES = {
    kind: RNG.normal(size=(count, 16)) for kind, count in {"nouns": 23, "adjectives": 8, "conjugated": 9}.items()
}
LOCAL = RNG.uniform(size=30)


def unit(values: Array) -> Array:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def softmax(values: Array) -> Array:
    shares = np.exp(values - values.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def feats(scale: float = 100.0, bias: float = 0.0, dtype: Any = np.float64) -> FeatureSet:
    images = torch.from_numpy(unit(IMAGES).astype(dtype))
    head = zero_shot_head(TEXTS.astype(dtype), scale, bias, negatives=NEGATIVES)
    return FeatureSet(images, head(images), head=head, extras={"local_mcm.1.0": LOCAL, "local_mcm.0.5": LOCAL**2})


COSINES = unit(IMAGES) @ unit(TEXTS).T


@pytest.mark.parametrize(("scale", "bias"), [(100.0, 0.0), (4.7, -12.9)])
def test_head_gives_the_logits_of_clip_and_siglip(scale: float, bias: float) -> None:
    found = feats(scale, bias).logits
    assert found is not None
    np.testing.assert_allclose(found, scale * COSINES + bias, rtol=0, atol=1e-12)


def test_head_averages_the_directions_of_templates() -> None:
    templates = RNG.normal(size=(5, 3, 16)) * np.array([1.0, 10.0, 100.0])[:, None]
    expected = 50 * unit(unit(templates).mean(axis=1))
    np.testing.assert_allclose(zero_shot_head(templates, 50.0).weight, expected, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize(("scale", "bias"), [(100.0, 0.0), (4.7, -12.9)])
def test_mcm(scale: float, bias: float, temperature: float) -> None:
    expected = softmax(COSINES / temperature).max(axis=1)
    found = score("mcm", feats(scale, bias), temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    in_float32 = score("mcm", feats(scale, bias, np.float32), temperature=temperature)
    np.testing.assert_allclose(in_float32, expected, rtol=0, atol=1e-7 / temperature)
    np.testing.assert_allclose(found, score("msp", feats(scale, bias), temperature=scale * temperature), atol=1e-6)


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (1.0, 0.3), (0.5, 2.0)])
def test_gl_mcm(temperature: float, weight: float) -> None:
    local = LOCAL if temperature == 1 else LOCAL**2
    expected = softmax(COSINES / temperature).max(axis=1) + weight * local
    found = score("gl_mcm", feats(), temperature=temperature, weight=weight)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def grouped_share(negatives: Array, temperature: float, groups: int) -> Array:
    """The mean over groups of the share of the classes in a softmax over classes and negatives."""
    kept = negatives[: len(negatives) - len(negatives) % groups]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(SEED)).numpy()
    shares = []
    for group in np.split(unit(kept)[order], groups):
        both = np.concatenate([COSINES, unit(IMAGES) @ group.T], axis=1)
        shares.append(softmax(both / temperature)[:, : len(TEXTS)].sum(axis=1))
    return np.mean(shares, axis=0)


@pytest.mark.parametrize(("name", "kinds"), [("neglabel", ("nouns", "adjectives")), ("csp", ("nouns", "conjugated"))])
@pytest.mark.parametrize(("temperature", "groups"), [(0.01, 1), (0.01, 5), (0.2, 4)])
def test_negatives(name: str, kinds: tuple[str, str], temperature: float, groups: int) -> None:
    negatives = np.concatenate([NEGATIVES[kind] for kind in kinds])
    expected = grouped_share(negatives, temperature, groups)
    found = score(name, feats(), temperature=temperature, groups=groups)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_more_groups_than_words_are_one_for_each_word() -> None:
    negatives = np.concatenate([NEGATIVES["nouns"], NEGATIVES["adjectives"]])
    np.testing.assert_allclose(score("neglabel", feats()), grouped_share(negatives, 0.01, len(negatives)), atol=1e-6)


def test_negatives_of_nouns_alone() -> None:
    full = feats()
    assert full.head is not None
    head = Head(full.head.weight, full.head.bias, {"nouns": full.head.negatives["nouns"]})
    only = FeatureSet(full.features, full.logits, head=head)
    np.testing.assert_allclose(score("neglabel", only, groups=1), grouped_share(NEGATIVES["nouns"], 0.01, 1), atol=1e-6)
    with pytest.raises(MissingInput, match=r"'csp' needs negatives\.conjugated to score"):
        score("csp", only)
    with pytest.raises(MissingInput, match=r"'neglabel' needs negatives to score.*negatives=NegativeWords"):
        score("neglabel", FeatureSet(full.features, full.logits, head=Head(head.weight)))


def known_problem(spread: float) -> tuple[FeatureSet, FeatureSet]:
    """ID images near the texts of classes and OoD images near those of other words, some of which are negatives."""
    rng = np.random.default_rng(1)
    words = unit(rng.normal(size=(60, 64)))
    classes, negatives, unknown = words[:20], words[20:50], words[50:]
    head = zero_shot_head(classes, 100.0, negatives={"nouns": negatives[:20], "conjugated": negatives[20:]})

    def near(texts: Array, rows: int) -> FeatureSet:
        chosen = texts[rng.integers(len(texts), size=rows)]
        images = torch.from_numpy(unit(chosen + spread * rng.normal(size=chosen.shape) / 8))
        local = (images @ head.weight.T / 100).softmax(1).amax(1)
        return FeatureSet(images, head(images), head=head, extras={"local_mcm.1.0": local})

    return near(classes, 200), near(np.concatenate([negatives, unknown]), 200)


@pytest.mark.parametrize("name", ["mcm", "gl_mcm", "neglabel", "csp", "msp", "energy", "max_logit"])
def test_known_separation(name: str) -> None:
    ids, ood = (score(name, each).numpy() for each in known_problem(spread=0.5))
    labels = np.repeat([1, 0], [len(ids), len(ood)])
    assert roc_auc_score(labels, np.concatenate([ids, ood])) > (0.95 if name == "msp" else 0.99)


def test_negatives_help_where_they_are_what_ood_images_show() -> None:
    ids, ood = known_problem(spread=2.5)
    labels = np.repeat([1, 0], [len(ids), len(ood)])

    def auroc(name: str) -> float:
        return float(roc_auc_score(labels, np.concatenate([score(name, ids), score(name, ood)])))

    assert auroc("csp") > auroc("mcm") + 0.02


def test_wrong_parameters() -> None:
    for name, wrong in (
        ("mcm", "temperature"),
        ("gl_mcm", "temperature"),
        ("neglabel", "groups"),
        ("csp", "temperature"),
    ):
        with pytest.raises(BadInput, match=wrong):
            create_scorer(name, **{wrong: 0})
    with pytest.raises(BadInput, match="weight must be at least 0"):
        create_scorer("gl_mcm", weight=-1.0)


def test_wrong_banks() -> None:
    with pytest.raises(BadInput, match="logit_scale must be positive and finite"):
        zero_shot_head(TEXTS, 0.0)
    with pytest.raises(ShapeMismatch, match=r"text features must be \[classes, features\]"):
        zero_shot_head(TEXTS[0], 100.0)
    with pytest.raises(NotFinite, match="a text feature is zero"):
        zero_shot_head(np.zeros((3, 4)), 100.0)
    with pytest.raises(ShapeMismatch, match=r"negatives of a head with 16 inputs must be \[words, 16\], got \(3, 4\)"):
        zero_shot_head(TEXTS, 100.0, negatives={"nouns": np.ones((3, 4))})
    with pytest.raises(BadInput, match="negatives must be of the kinds nouns, adjectives, conjugated, got 'verbs'"):
        Head(TEXTS, negatives={"verbs": TEXTS})
    with pytest.raises(ShapeMismatch, match="the head has 16 inputs, but the set has 4 features"):
        FeatureSet(np.ones((3, 4)), head=zero_shot_head(TEXTS, 100.0))
