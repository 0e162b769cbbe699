"""Collapsed and random feature sets with labels and a head."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_scores import FeatureSet, Head

Array = NDArray[Any]


def simplex(classes: int, features: int, seed: int = 0) -> Array:
    """A randomly rotated simplex equiangular tight frame ``[C, D]``, D >= C - 1."""
    rng = np.random.default_rng(seed)
    frame = np.eye(classes) - 1 / classes
    basis = np.linalg.svd(frame)[0][:, : classes - 1]
    turned = np.linalg.qr(rng.normal(size=(features, features)))[0][:, : classes - 1]
    return basis @ turned.T


def collapsed(classes: int, features: int, rows: int = 6) -> FeatureSet:
    """A set with every row at its class mean; the means and the weights are a shifted and a scaled simplex."""
    frame = simplex(classes, features)
    labels = np.repeat(np.arange(classes), rows)
    offset = np.random.default_rng(1).normal(size=features)
    values = (3 * frame + offset)[labels]
    head = Head(7 * frame, -7 * frame @ offset)
    return FeatureSet(values, values @ (7 * frame).T - 7 * frame @ offset, labels, head)


def random_set(classes: int, features: int, rows: int = 90, seed: int = 0, dtype: Any = np.float64) -> FeatureSet:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, rows - classes)])
    values = (rng.normal(size=(classes, features))[labels] + 0.7 * rng.normal(size=(rows, features)) + 2).astype(dtype)
    weight, bias = rng.normal(size=(classes, features)), rng.normal(size=classes)
    return FeatureSet(values, values.astype(np.float64) @ weight.T + bias, labels, Head(weight, bias))
