"""optfs against a plain reference that follows the authors' code one bin at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ood_scores import FeatureSet, Head, create_scorer, score
from ood_scores.errors import BadInput

Array = NDArray[np.float64]
CLASSES, WIDTH = 5, 12
MEANS = 1 + np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
WEIGHT, BIAS = MEANS - MEANS.mean(axis=0), np.linspace(-0.2, 0.2, CLASSES)


def rows(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    features: Array = MEANS[np.arange(count) % CLASSES] + 0.5 * rng.normal(size=(count, WIDTH))
    return np.maximum(features, 0)


FIT, ROWS = rows(300, seed=0), np.concatenate([rows(40, seed=1), 2 * rows(20, seed=2), -rows(5, seed=3)])
TRAIN, FEATS = FeatureSet(FIT, head=Head(WEIGHT, BIAS)), FeatureSet(ROWS, head=Head(WEIGHT, BIAS))


def bin_of(value: float, edges: Array) -> int | None:
    return next((i for i in range(len(edges) - 1) if edges[i] <= value < edges[i + 1]), None)


def factors(bins: int) -> tuple[Array, Array]:
    edges = np.linspace(np.quantile(FIT, 1e-3), np.quantile(FIT, 1 - 1e-3), bins + 1)
    found = np.zeros(bins)
    for z in FIT:
        best = int((WEIGHT @ z + BIAS).argmax())
        for d in range(WIDTH):
            number = bin_of(z[d], edges)
            if number is not None:
                found[number] += WEIGHT[best, d] * z[d] / len(FIT)
    return 1000 * found / np.linalg.norm(found), edges


def shaped(bins: int) -> Array:
    theta, edges = factors(bins)
    found = np.zeros_like(ROWS)
    for i, z in enumerate(ROWS):
        for d in range(WIDTH):
            number = bin_of(z[d], edges)
            found[i, d] = 0 if number is None else theta[number] * z[d]
    return found


@pytest.mark.parametrize("bins", [100, 7, 1])
def test_optfs(bins: int) -> None:
    scorer: Any = create_scorer("optfs", bins=bins).fit(TRAIN)
    np.testing.assert_allclose(scorer.factors_, factors(bins)[0], rtol=1e-9)
    np.testing.assert_allclose(scorer.shape_features(torch.tensor(ROWS)), shaped(bins), rtol=1e-9)
    logits = shaped(bins) @ WEIGHT.T + BIAS
    np.testing.assert_allclose(scorer.score(FEATS), np.logaddexp.reduce(logits, axis=1), rtol=1e-9)


@pytest.mark.parametrize("base", ["max_logit", "feature_norm"])
def test_optfs_with_another_base(base: str) -> None:
    features = shaped(100)
    feats = FeatureSet(features, features @ WEIGHT.T + BIAS)
    np.testing.assert_allclose(score("optfs", FEATS, fit=TRAIN, base=base), score(base, feats), rtol=1e-9)


def test_optfs_under_another_shaper_sees_its_features() -> None:
    outer: Any = create_scorer("react", q=0.8, base="optfs").fit(TRAIN)
    clipped = FeatureSet(np.minimum(FIT, outer.threshold_), head=Head(WEIGHT, BIAS))
    rows = FeatureSet(np.minimum(ROWS, outer.threshold_), head=Head(WEIGHT, BIAS))
    np.testing.assert_allclose(outer.score(FEATS), score("optfs", rows, fit=clipped), rtol=1e-9)


def test_optfs_of_constant_features_and_bad_parameters() -> None:
    with pytest.raises(BadInput, match="optfs: the features do not vary"):
        create_scorer("optfs").fit(FeatureSet(np.ones((5, WIDTH)), head=Head(WEIGHT, BIAS)))
    with pytest.raises(BadInput, match="bins"):
        create_scorer("optfs", bins=0)
    nothing = FeatureSet(FIT, head=Head(np.zeros_like(WEIGHT), BIAS))
    assert torch.isfinite(score("optfs", FEATS, fit=nothing)).all()
