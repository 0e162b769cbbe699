"""ora, caref, cadref, and core against plain float64 references that handle one row, class, and feature at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ood_scores import FeatureSet, Head, create_scorer, score
from ood_scores.errors import BadInput

Array = NDArray[np.float64]
CLASSES, WIDTH = 12, 9
MEANS = 1.5 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
WEIGHT, BIAS = MEANS / 2, np.linspace(-0.2, 0.2, CLASSES)
WEIGHT[:, 4] = 0  # no effect on any logit


def rows(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return MEANS[np.arange(count) % CLASSES] + rng.normal(size=(count, WIDTH))


FIT, ROWS = rows(300, seed=0), np.concatenate([rows(40, seed=1), 0.3 * rows(20, seed=2)])
FIT_LOGITS, LOGITS = FIT @ WEIGHT.T + BIAS, ROWS @ WEIGHT.T + BIAS
TRAIN = FeatureSet(FIT, FIT_LOGITS, head=Head(WEIGHT, BIAS))
FEATS = FeatureSet(ROWS, LOGITS)


def ours(name: str, feats: FeatureSet = FEATS, fit: FeatureSet = TRAIN, **params: Any) -> Array:
    return score(name, feats, fit=fit, **params).numpy()


def relative_angles(features: Array, weight: Array, bias: Array, mu: Array) -> list[list[float]]:
    """Angles of each feature to its projections onto the boundaries, as drawn in the paper."""
    found = []
    for z in features:
        f = weight @ z + bias
        best, angles = int(f.argmax()), []
        for c in range(len(f)):
            normal = weight[best] - weight[c]
            if not normal.any():
                angles.append(0.0)
                continue
            boundary = z - (f[best] - f[c]) * normal / (normal @ normal)
            a, b = z - mu, boundary - mu
            angles.append(math.acos(max(-1.0, min(1.0, a @ b / math.sqrt((a @ a) * (b @ b))))))
        found.append(angles)
    return found


@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_ora(aggregate: str) -> None:
    angles = relative_angles(ROWS, WEIGHT, BIAS, FIT.mean(axis=0))
    expected = [max(row) if aggregate == "max" else sum(row) / CLASSES for row in angles]
    np.testing.assert_allclose(ours("ora", aggregate=aggregate), expected, rtol=1e-7)


def test_ora_is_the_largest_angle_by_default() -> None:
    np.testing.assert_array_equal(ours("ora"), ours("ora", aggregate="max"))


@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_ora_with_equal_weights_and_large_offsets(aggregate: str) -> None:
    """There is no boundary between equal weights, but there is one between weights far from 0."""
    weight = WEIGHT + 100
    weight[3] = weight[1]
    angles = relative_angles(ROWS, weight, BIAS, FIT.mean(axis=0))
    expected = [max(row) if aggregate == "max" else sum(row) / CLASSES for row in angles]
    fit = FeatureSet(FIT, head=Head(weight, BIAS))
    found = ours("ora", FeatureSet(ROWS, ROWS @ weight.T + BIAS), fit, aggregate=aggregate)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_ora_beyond_a_right_angle_and_at_the_mean() -> None:
    """Two classes in the plane: the boundary is the second axis, and features are seen from (0.5, 0)."""
    head, fit = Head(np.array([[1.0, 0], [-1.0, 0]])), np.array([[0.0, 0], [1.0, 0]])
    features = np.array([[0.5, 0], [2.0, 0], [1.0, 0.5], [-1.0, 1.5]])
    found = ours("ora", FeatureSet(features, features @ head.weight.numpy().T), FeatureSet(fit, head=head))
    expected = [0, math.pi, math.pi / 2, math.atan2(1.5, -1.5) - math.atan2(1.5, -0.5)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    single = Head(np.array([[2.0, 0]]))  # the same boundary, between the logits (0, z)
    found = ours("ora", FeatureSet(features, 2 * features[:, :1]), FeatureSet(fit, head=single))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_ora_of_an_unknown_aggregate() -> None:
    with pytest.raises(BadInput, match="aggregate must be 'max' or 'mean', got 'min'"):
        create_scorer("ora", aggregate="min")


def class_means(logits: Array) -> list[Array]:
    predicted = logits.argmax(axis=1)
    return [FIT[predicted == c].mean(axis=0) if (predicted == c).any() else FIT.mean(axis=0) for c in range(CLASSES)]


def caref(features: Array, logits: Array, means: list[Array]) -> list[float]:
    found = []
    for z, f in zip(features, logits, strict=True):
        mean = means[int(f.argmax())]
        found.append(-sum(abs(z[d] - mean[d]) for d in range(WIDTH)) / sum(abs(z)))
    return found


def test_caref() -> None:
    np.testing.assert_allclose(ours("caref"), caref(ROWS, LOGITS, class_means(FIT_LOGITS)), rtol=1e-12)


def confidence(name: str, f: Array) -> float:
    p = np.exp(f) / np.exp(f).sum()
    if name == "gen":
        return float(1 / sum(q**0.1 * (1 - q) ** 0.1 for q in sorted(p)[-10:]))
    return float({"energy": math.log(np.exp(f).sum()), "max_logit": f.max(), "msp": p.max()}[name])


@pytest.mark.parametrize("name", ["energy", "max_logit", "msp", "gen"])
def test_cadref(name: str) -> None:
    means, found = class_means(FIT_LOGITS), []
    average = np.mean([confidence(name, f) for f in FIT_LOGITS])
    for z, f in zip(ROWS, LOGITS, strict=True):
        best = int(f.argmax())
        raising = lowering = 0.0
        for d in range(WIDTH):
            aligned = np.sign(WEIGHT[best, d]) * (z[d] - means[best][d])
            raising, lowering = raising + max(aligned, 0), lowering + max(-aligned, 0)
        found.append(-(raising / confidence(name, f) + lowering / average) / sum(abs(z)))
    np.testing.assert_allclose(ours("cadref", confidence=name), found, rtol=1e-9)
    if name == "energy":
        np.testing.assert_array_equal(ours("cadref"), ours("cadref", confidence=name))


def test_cadref_of_a_constant_confidence_is_caref() -> None:
    """If no weight is zero, the two parts add up to the whole."""
    weight = np.where(WEIGHT == 0, 0.1, WEIGHT)
    ones = FeatureSet(FIT, np.ones_like(FIT_LOGITS), head=Head(weight, BIAS))
    feats = FeatureSet(ROWS, np.ones_like(LOGITS))
    energy = 1 + math.log(CLASSES)
    with pytest.warns(UserWarning, match="11 of 12 classes are never predicted"):
        found = ours("cadref", feats, ones)
    with pytest.warns(UserWarning, match="11 of 12 classes are never predicted"):
        whole = ours("caref", feats, ones)
    np.testing.assert_allclose(found, whole / energy, rtol=1e-12)


@pytest.mark.parametrize("name", ["caref", "cadref"])
def test_a_class_never_predicted_has_the_mean_of_all(name: str) -> None:
    logits = FIT_LOGITS.copy()
    logits[:, 2] = -50
    with pytest.warns(UserWarning, match=f"{name}: 1 of 12 classes are never predicted in the fit set"):
        scorer: Any = create_scorer(name).fit(FeatureSet(FIT, logits, head=Head(WEIGHT, BIAS)))
    np.testing.assert_allclose(scorer.means_, class_means(logits), rtol=1e-12)


@pytest.mark.parametrize("name", ["caref", "cadref"])
def test_a_row_of_zeros_scores_lowest(name: str) -> None:
    found = ours(name, FeatureSet(np.concatenate([np.zeros((1, WIDTH)), ROWS]), np.concatenate([LOGITS[:1], LOGITS])))
    assert np.isfinite(found).all()
    assert found[0] < found[1:].min()


def core_parts(z: Array, f: Array, directions: list[Array]) -> tuple[float, float]:
    best = int(f.argmax())
    residual = z - (z @ WEIGHT[best]) / (WEIGHT[best] @ WEIGHT[best]) * WEIGHT[best]
    towards = directions[best]
    return math.log(np.exp(f).sum()), residual @ towards / np.linalg.norm(residual) / np.linalg.norm(towards)


def test_core() -> None:
    directions = []
    for c in range(CLASSES):
        rows = FIT[FIT_LOGITS.argmax(axis=1) == c]
        along = rows @ WEIGHT[c] / (WEIGHT[c] @ WEIGHT[c])
        directions.append((rows - along[:, None] * WEIGHT[c]).mean(axis=0))
    known = np.array([core_parts(z, f, directions) for z, f in zip(FIT, FIT_LOGITS, strict=True)])
    found = np.array([core_parts(z, f, directions) for z, f in zip(ROWS, LOGITS, strict=True)])
    expected = ((found - known.mean(axis=0)) / known.std(axis=0)).sum(axis=1)
    np.testing.assert_allclose(ours("core"), expected, rtol=1e-9, atol=1e-12)


def test_core_of_features_along_their_weights_is_the_energy() -> None:
    """These features have no residual and therefore no direction."""
    labels = torch.arange(30) % CLASSES
    features = torch.from_numpy(WEIGHT)[labels] * torch.linspace(1, 3, 30, dtype=torch.float64)[:, None]
    feats = FeatureSet(features, features @ torch.from_numpy(WEIGHT).T, head=Head(WEIGHT))
    assert feats.logits is not None
    assert (feats.logits.argmax(dim=1) == labels).all()
    energies = feats.logits.logsumexp(dim=1)
    expected = (energies - energies.mean()) / energies.std(correction=0)
    torch.testing.assert_close(score("core", feats, fit=feats), expected, rtol=0, atol=1e-3)


def test_cadref_where_confidences_are_not_positive() -> None:
    """A lower confidence never raises the score; confidences below 0 count as 0."""
    low = FeatureSet(FIT, FIT_LOGITS - 100, head=Head(WEIGHT, BIAS))
    with pytest.warns(UserWarning, match=r"'energy' is -.* on average over the fit set, but must be positive"):
        create_scorer("cadref").fit(low)
    same = FeatureSet(np.repeat(ROWS[:1], 3, axis=0), LOGITS[0] - np.array([[0.0], [10.0], [100.0]]))
    found = ours("cadref", same)
    assert found[0] > found[1] >= found[2]
    assert np.isfinite(found).all()
    with pytest.raises(BadInput, match="confidence must be 'energy' or 'max_logit' or 'msp' or 'gen', got 'margin'"):
        create_scorer("cadref", confidence="margin")


def test_gen_of_saturated_rows_is_finite() -> None:
    steep = FeatureSet(FIT, 1e4 * FIT_LOGITS, head=Head(WEIGHT, BIAS))
    found = score("cadref", FeatureSet(ROWS, 1e4 * LOGITS), fit=steep, confidence="gen")
    assert torch.isfinite(found).all()
