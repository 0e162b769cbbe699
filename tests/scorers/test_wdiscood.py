"""wdiscood against a transcription of its authors' code with scikit-learn's covariances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from classified import CLASSES, FIT, ROWS, TRAIN, WIDTH, Array, labels_of_fit, ours
from sklearn.covariance import EmpiricalCovariance

from ood_scores import FeatureSet


def scatter(rows: Array) -> Array:
    return EmpiricalCovariance(assume_centered=True).fit(rows).covariance_


def wdiscood(fit: Array, rows: Array, labels: Any, dimension: int, weight: float) -> Array:
    """``WDiscOOD`` of ivalab, with the distances of its final script: ``ClsEucl`` and ``CenterEucl``."""
    means = np.stack([fit[labels == c].mean(axis=0) for c in range(CLASSES)])
    values, vectors = np.linalg.eigh(np.linalg.inv(scatter(fit - means[labels])))
    white = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    fit, rows, means = fit @ white, rows @ white, means @ white
    center = fit.mean(axis=0)
    within, between = scatter(fit - means[labels]), scatter(means - center)
    ratios, directions = np.linalg.eig(np.linalg.inv(within + 1e-5 * np.eye(WIDTH)) @ between)
    discriminants = directions.real.T[np.argsort(-ratios.real)][:dimension]
    _, _, basis = np.linalg.svd(discriminants)
    basis = basis[:dimension]
    rest = np.eye(WIDTH) - basis.T @ basis
    nearest = np.linalg.norm((rows[:, None] - means) @ discriminants.T, axis=2).min(axis=1)
    return -nearest - weight * np.linalg.norm((rows - center) @ rest, axis=1)


@pytest.mark.parametrize(("dimension", "weight"), [(CLASSES - 1, 5.0), (2, 1.0)])
def test_wdiscood(dimension: int, weight: float) -> None:
    expected = wdiscood(FIT, ROWS, labels_of_fit, dimension, weight)
    np.testing.assert_allclose(ours("wdiscood", dimension=dimension, weight=weight), expected, rtol=1e-6)


def test_wdiscood_of_normalized_features_and_all_dimensions() -> None:
    unit, unit_rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (FIT, ROWS))
    found = ours("wdiscood", normalize=True)
    np.testing.assert_allclose(found, wdiscood(unit, unit_rows, labels_of_fit, CLASSES - 1, 5.0), rtol=1e-6)


def test_classes_of_different_sizes() -> None:
    """The center is the mean of the rows, and every class counts the same in the scatter between classes."""
    kept = (labels_of_fit != 1) | (np.arange(len(FIT)) % 3 == 0)
    expected = wdiscood(FIT[kept], ROWS, labels_of_fit[kept], CLASSES - 1, 5.0)
    np.testing.assert_allclose(ours("wdiscood", fit=TRAIN[kept]), expected, rtol=1e-6)


def test_directions_without_variation_are_left_out() -> None:
    wider, scored = (np.column_stack([rows, np.full(len(rows), 3.0)]) for rows in (FIT, ROWS))
    fit = FeatureSet(wider, labels=labels_of_fit)
    np.testing.assert_allclose(ours("wdiscood", FeatureSet(scored), fit), ours("wdiscood"), rtol=1e-6)
