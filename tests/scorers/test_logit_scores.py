"""Scores of the logits against plain float64 references and, where it has them, pytorch-ood."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_ood import detector as peer
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import spearmanr

from ood_scores import FeatureSet, create_scorer, score
from ood_scores.errors import BadInput, ShapeMismatch

Array = NDArray[np.float64]
CLASSES = 6


def rows(count: int, seed: int, sharpness: float = 4.0) -> tuple[Array, NDArray[np.int64]]:
    """Logits of a model that is right for about four in five rows, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    return sharpness * (np.eye(CLASSES)[labels] + 0.6 * rng.normal(size=(count, CLASSES))), labels


LOGITS, LABELS = rows(60, seed=0)
FIT_LOGITS, FIT_LABELS = rows(400, seed=1)


def feats(logits: Any, labels: Any = None) -> FeatureSet:
    return FeatureSet(np.ones((len(logits), 2)), logits, labels)


def ours(name: str, logits: Any = LOGITS, **params: Any) -> Array:
    return score(name, feats(logits), fit=feats(FIT_LOGITS, FIT_LABELS), **params).numpy()


def nll(temperature: float) -> float:
    return float(-log_softmax(FIT_LOGITS / temperature, axis=1)[np.arange(len(FIT_LABELS)), FIT_LABELS].mean())


def test_temperature_minimizes_the_loss() -> None:
    scorer: Any = create_scorer("temperature").fit(feats(FIT_LOGITS, FIT_LABELS))
    best = minimize_scalar(nll, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-10})
    assert scorer.temperature_ == pytest.approx(best.x, rel=1e-6)
    near = [nll(scorer.temperature_ * factor) for factor in (0.999, 1.0, 1.001)]
    assert near[1] < min(near[0], near[2])
    np.testing.assert_allclose(ours("temperature"), softmax(LOGITS / scorer.temperature_, axis=1).max(axis=1))


@pytest.mark.parametrize("factor", [0.05, 0.3, 7.0, 40.0])
def test_temperature_scales_with_the_logits(factor: float) -> None:
    scorer: Any = create_scorer("temperature")
    first = scorer.fit(feats(FIT_LOGITS, FIT_LABELS)).temperature_
    assert scorer.fit(feats(factor * FIT_LOGITS, FIT_LABELS)).temperature_ == pytest.approx(factor * first, rel=1e-9)


def test_pytorch_ood_stops_before_the_best_temperature() -> None:
    """Its fit takes 50 steps of L-BFGS with a learning rate of .01 in float32; at our T, the scores are equal."""
    scorer: Any = create_scorer("temperature").fit(feats(FIT_LOGITS, FIT_LABELS))
    theirs: Any = peer.TemperatureScaling(None).fit_logits(torch.tensor(FIT_LOGITS), torch.tensor(FIT_LABELS))
    temperature = theirs.t.item()
    assert nll(scorer.temperature_) <= nll(temperature) + 1e-12
    assert temperature == pytest.approx(scorer.temperature_, rel=0.3)
    assert spearmanr(ours("temperature"), -theirs.predict_logits(torch.tensor(LOGITS)).detach()).statistic > 0.99
    equal = -peer.MaxSoftmax.score(torch.tensor(LOGITS), t=scorer.temperature_)
    np.testing.assert_allclose(ours("temperature"), equal, rtol=1e-9)


def test_temperature_stays_1_without_a_minimum() -> None:
    for labels in (FIT_LOGITS.argmax(axis=1), FIT_LOGITS.argmin(axis=1)):
        with pytest.warns(
            UserWarning, match="temperature: no T between 0.01 and 100.0 minimizes the loss on these rows"
        ):
            scorer: Any = create_scorer("temperature").fit(feats(FIT_LOGITS, labels))
        assert scorer.temperature_ == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_scorer("temperature").fit(feats(FIT_LOGITS, FIT_LABELS))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_weighted_energy(temperature: float) -> None:
    weights = (0.5, 2.0, 0.0, -1.0, 1.0, 3.0)
    expected = [
        temperature * math.log(sum(max(w, 0) * math.exp(f / temperature) for w, f in zip(weights, row, strict=True)))
        for row in LOGITS
    ]
    np.testing.assert_allclose(ours("weighted_energy", weights=weights, temperature=temperature), expected)


def test_weighted_energy_is_pytorch_oods() -> None:
    weights = [0.5, 2.0, 0.0, -1.0, 1.0, 3.0]
    theirs = -peer.WeightedEBO.score(torch.tensor(LOGITS), torch.tensor(weights, dtype=torch.float64))
    np.testing.assert_allclose(ours("weighted_energy", weights=weights), theirs)


def test_weighted_energy_without_weights_is_energy() -> None:
    np.testing.assert_array_equal(ours("weighted_energy", temperature=2.0), ours("energy", temperature=2.0))
    np.testing.assert_allclose(ours("weighted_energy", weights=[1] * CLASSES), ours("energy"))


def test_weighted_energy_does_not_overflow_as_theirs_does() -> None:
    huge = LOGITS + 1000
    assert torch.isinf(peer.WeightedEBO.score(torch.tensor(huge), torch.ones(CLASSES))).all()
    np.testing.assert_allclose(ours("weighted_energy", huge, weights=[2.0] * CLASSES), ours("energy", huge) + np.log(2))


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(ShapeMismatch, match="weighted_energy: 2 weights do not fit logits of 6 classes"):
        ours("weighted_energy", weights=[1.0, 2.0])
    for weights in ([], [0.0, -1.0], [1.0, math.nan], [math.inf]):
        with pytest.raises(BadInput, match="weight"):
            create_scorer("weighted_energy", weights=weights)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_doctor(temperature: float) -> None:
    g = (softmax(LOGITS / temperature, axis=1) ** 2).sum(axis=1)
    np.testing.assert_allclose(ours("doctor", temperature=temperature), -(1 - g) / g, rtol=1e-9)


def test_doctor_tells_confident_rows_apart() -> None:
    logits = np.array([[40.0, 0, 0], [60.0, 0, 0], [80.0, 0, 0]])
    found = ours("doctor", logits)
    np.testing.assert_allclose(found, -4 * np.exp(-logits[:, 0]), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.999999, 2.0, 7.0])
def test_renyi(alpha: float) -> None:
    entropy = np.log((softmax(LOGITS, axis=1) ** alpha).sum(axis=1)) / (1 - alpha)
    np.testing.assert_allclose(ours("renyi", alpha=alpha), -entropy, rtol=1e-7)


def test_renyi_of_special_orders() -> None:
    np.testing.assert_array_equal(ours("renyi", alpha=1), ours("entropy"))
    np.testing.assert_allclose(ours("renyi", alpha=1 + 1e-7), ours("entropy"), rtol=1e-5)
    np.testing.assert_allclose(ours("renyi", alpha=math.inf), np.log(ours("msp", double=True)), rtol=1e-9)
    assert spearmanr(ours("renyi", alpha=2), ours("doctor")).statistic > 1 - 1e-9
    uniform = ours("renyi", np.zeros((1, CLASSES)))
    np.testing.assert_allclose(uniform, -math.log(CLASSES))


def test_margin() -> None:
    ordered = np.sort(LOGITS, axis=1)
    np.testing.assert_array_equal(ours("margin"), ordered[:, -1] - ordered[:, -2])
    p = np.sort(softmax(LOGITS, axis=1), axis=1)
    np.testing.assert_allclose(ours("margin", space="softmax"), p[:, -1] - p[:, -2], rtol=1e-9)
    np.testing.assert_allclose(ours("margin"), np.log(p[:, -1] / p[:, -2]), rtol=1e-9)
    np.testing.assert_array_equal(ours("margin", np.array([[3.0], [-2.0]])), [3.0, 2.0])


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_joint_energy(combine: str) -> None:
    """``log(1 + exp(f))``, summed or its largest value, as ``get_logits`` of deeplearning-wisc/multi-label-ood."""
    energies = np.log(1 + np.exp(LOGITS))
    expected = energies.sum(axis=1) if combine == "sum" else energies.max(axis=1)
    np.testing.assert_allclose(ours("joint_energy", combine=combine), expected, rtol=1e-12)
    np.testing.assert_allclose(ours("joint_energy", np.array([[800.0, -800.0]]), combine=combine), [800.0])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("joint_energy", {"combine": "mean"}),
        ("doctor", {"temperature": 0.0}),
        ("weighted_energy", {"temperature": -1.0}),
        ("renyi", {"alpha": 0.0}),
        ("renyi", {"alpha": math.nan}),
        ("margin", {"space": "features"}),
    ],
)
def test_parameters_out_of_range(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(params))):
        create_scorer(name, **params)


def test_the_reference_is_stable() -> None:
    """Energy serves as a sanity check of the helpers of this file."""
    np.testing.assert_allclose(ours("energy"), logsumexp(LOGITS, axis=1))
