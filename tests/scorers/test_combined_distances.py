"""combood against a transcription of its authors' code with scikit-learn and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from classified import FIT, FIT_LOGITS, LOGITS, ROWS, Array, ours
from scipy.spatial.distance import mahalanobis
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import PowerTransformer, StandardScaler

from ood_scores import FeatureSet
from ood_scores.scorers.combined_distances import yeo_johnson


def extremes(rows: Array, seed: int) -> Array:
    """Skewed values, as the extremes of activations are."""
    noise = np.random.default_rng(seed).normal(size=(len(rows), 1))
    return np.hstack([rows[:, :3] ** 3, np.exp(rows[:, 3:5]), noise])


def feature_set(rows: Array, logits: Array, values: Array) -> FeatureSet:
    return FeatureSet(rows, logits, extras={"extremes": values})


FIT_VALUES, VALUES = extremes(FIT, 1), extremes(ROWS, 2)
TRAIN, FEATS = feature_set(FIT, FIT_LOGITS, FIT_VALUES), feature_set(ROWS, LOGITS, VALUES)


def combood(k: int, ridge: float) -> Array:
    """``square_log_probability`` of rmagesh148/combood."""
    fit, rows = (
        np.column_stack([values, logits.max(axis=1), -logits.min(axis=1)])
        for values, logits in ((FIT_VALUES, FIT_LOGITS), (VALUES, LOGITS))
    )
    scaler, power = StandardScaler(), PowerTransformer()
    of_fit = power.fit_transform(scaler.fit_transform(fit))
    inverse = np.linalg.inv(np.cov(of_fit, rowvar=False) + ridge * np.identity(of_fit.shape[1]))
    zero = np.zeros(of_fit.shape[1])
    far = np.array([mahalanobis(row, zero, inverse) for row in power.transform(scaler.transform(rows))])
    unit_fit, unit = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (FIT, ROWS))
    squares = NearestNeighbors(n_neighbors=k).fit(unit_fit).kneighbors(unit)[0][:, -1] ** 2
    return -np.sqrt(FIT.shape[1]) * np.log(squares) - far**2


@pytest.mark.parametrize(("k", "ridge"), [(50, 1.0), (3, 0.1)])
def test_combood(k: int, ridge: float) -> None:
    np.testing.assert_allclose(ours("combood", FEATS, TRAIN, k=k, ridge=ridge), combood(k, ridge), rtol=1e-6, atol=1e-5)


def test_a_value_that_does_not_vary_is_left_out() -> None:
    more = feature_set(FIT, FIT_LOGITS, np.column_stack([FIT_VALUES, np.full(len(FIT), 7.0)]))
    scored = feature_set(ROWS, LOGITS, np.column_stack([VALUES, np.full(len(ROWS), 9.0)]))
    np.testing.assert_allclose(ours("combood", scored, more), ours("combood", FEATS, TRAIN), rtol=1e-9)


def test_the_power_transform_at_its_limits() -> None:
    values = torch.tensor([[-3.0], [0.0], [2.0], [1e300]], dtype=torch.float64)
    zero, two = (yeo_johnson(values, values.new_tensor([power]))[:, 0] for power in (0.0, 2.0))
    torch.testing.assert_close(zero[:3], values.new_tensor([-7.5, 0.0, np.log(3)]))
    torch.testing.assert_close(two[:3], values.new_tensor([-np.log(4), 0.0, 4.0]))
    assert two[3] == 1e100
