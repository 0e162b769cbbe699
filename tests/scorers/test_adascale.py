"""adascale_a and adascale_l against a transcription of OpenOOD's version by the author."""

from __future__ import annotations

import numpy as np
import pytest
from classified import BIAS, FIT, FIT_LOGITS, HEAD, LOGITS, ROWS, WEIGHT, Array, labels_of_fit, ours
from scipy.special import logsumexp

from ood_scores import FeatureSet
from ood_scores.errors import BadInput
from ood_scores.scorers.registry import create_scorer

FIT_MOVED = FIT + 0.3 * np.random.default_rng(5).normal(size=FIT.shape)
MOVED = ROWS + 0.6 * np.random.default_rng(6).normal(size=ROWS.shape)
TRAIN = FeatureSet(FIT, FIT_LOGITS, labels_of_fit, HEAD, {"adascale": FIT_MOVED})
FEATS = FeatureSet(ROWS, LOGITS, head=HEAD, extras={"adascale": MOVED})
K1, K2, WEIGHT_OF_Q = 0.5, 0.25, 10.0


def shifts(features: Array, moved: Array) -> Array:
    found = []
    for row, after in zip(features, moved, strict=True):
        order = np.argsort(-row)
        most, top = order[: int(K1 * len(row))], order[: int(K2 * len(row))]
        found.append(np.maximum(after[most], 0).sum() + WEIGHT_OF_Q * np.abs(row - after)[top].sum())
    return np.array(found)


def ratios(low: float, high: float) -> Array:
    of_fit, found = shifts(FIT, FIT_MOVED), []
    for row, shift in zip(ROWS, shifts(ROWS, MOVED), strict=True):
        percentile = low + (1 - (of_fit <= shift).mean()) * (high - low)
        kept = len(row) - round(len(row) * percentile)
        positive = np.sort(np.maximum(row, 0))[::-1]
        found.append(positive.sum() / positive[:kept].sum())
    return np.array(found)[:, None]


@pytest.mark.parametrize(("low", "high"), [(0.75, 0.85), (0.5, 0.9)])
def test_adascale(low: float, high: float) -> None:
    found = {name: ours(name, FEATS, TRAIN, low=low, high=high, k1=K1, k2=K2) for name in ("adascale_a", "adascale_l")}
    scale = ratios(low, high)
    assert len(np.unique(scale.round(6))) > 20
    expected = logsumexp(ROWS * np.exp(scale) @ WEIGHT.T + BIAS, axis=1)
    np.testing.assert_allclose(found["adascale_a"], expected, rtol=1e-9)
    np.testing.assert_allclose(found["adascale_l"], logsumexp(LOGITS * scale**2, axis=1), rtol=1e-9)


def test_another_base() -> None:
    found = ours("adascale_l", FEATS, TRAIN, k1=K1, k2=K2, base="max_logit")
    np.testing.assert_allclose(found, (LOGITS * ratios(0.75, 0.85) ** 2).max(axis=1), rtol=1e-9)


def test_a_row_without_positive_activations_is_scaled_by_e() -> None:
    negative = FeatureSet(-np.abs(ROWS), -np.abs(ROWS) @ WEIGHT.T, head=HEAD, extras={"adascale": MOVED})
    expected = logsumexp(-np.abs(ROWS) * np.e @ WEIGHT.T + BIAS, axis=1)
    np.testing.assert_allclose(ours("adascale_a", negative, TRAIN), expected, rtol=1e-9)


def test_parameters_that_cannot_be_right() -> None:
    with pytest.raises(BadInput, match="0 <= low <= high < 1 is required"):
        create_scorer("adascale_a", low=0.9)
    with pytest.raises(BadInput, match=r"k2 must be in \(0, 1\]"):
        create_scorer("adascale_l", k2=0)
