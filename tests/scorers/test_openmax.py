"""openmax against a plain float64 reference and pytorch-ood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from classified import (
    CLASSES,
    FEATS,
    FIT,
    FIT_LOGITS,
    LOGITS,
    PREDICTED,
    TRAIN,
    Array,
    labels_of_fit,
    ours,
    predicted_of_fit,
)
from pytorch_ood import detector as peer
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax
from scipy.stats import spearmanr, weibull_min

from ood_scores import FeatureSet, create_scorer
from ood_scores.errors import BadInput
from ood_scores.scorers.openmax import TRANSLATION, largest_by_class, weibull_fit


def weibull(tail: Array) -> tuple[float, float]:
    """Most likely shape and scale, from a root of the derivative."""
    logs = np.log(tail)

    def derivative(shape: float) -> float:
        weights = softmax(shape * logs)
        return float(weights @ logs - logs.mean() - 1 / shape)

    typical = 1 / logs.std()
    shape = brentq(derivative, typical / 100, typical * 100, xtol=1e-12, rtol=1e-14)
    return shape, float(np.exp((logsumexp(shape * logs) - np.log(len(logs))) / shape))


def openmax(tail: int, alpha: int, euclidean: float, cosine: float) -> list[float]:
    """log(1 - p_unknown), one row and one class at a time."""

    def distance(f: Array, mean: Array) -> float:
        angle = 1 - f @ mean / (np.linalg.norm(f) * np.linalg.norm(mean))
        return float(euclidean * np.linalg.norm(f - mean) + cosine * angle)

    models = []
    for c in range(CLASSES):
        right = FIT_LOGITS[(labels_of_fit == c) & (predicted_of_fit == c)]
        mean = right.mean(axis=0)
        largest = np.sort([distance(f, mean) for f in right])[-tail:]
        models.append((mean, largest[0], *weibull(largest - largest[0] + TRANSLATION)))
    found = []
    for f in LOGITS:
        moved = f.copy()
        for i, c in enumerate(np.argsort(-f)[:alpha]):
            mean, nearest, shape, scale = models[c]
            probability = weibull_min.cdf(distance(f, mean) - nearest + TRANSLATION, shape, scale=scale)
            moved[c] = f[c] * (1 - probability * (alpha - i) / alpha)
        unknown = (f - moved).sum()
        found.append(float(logsumexp(moved) - np.logaddexp(logsumexp(moved), unknown)))
    return found


@pytest.mark.parametrize(
    ("tail", "alpha", "euclidean", "cosine"), [(20, 5, 1.0, 0.0), (7, 3, 0.005, 1.0), (20, 1, 0.0, 1.0)]
)
def test_openmax(tail: int, alpha: int, euclidean: float, cosine: float) -> None:
    found = ours("openmax", tail=tail, alpha=alpha, euclidean=euclidean, cosine=cosine)
    np.testing.assert_allclose(found, openmax(tail, alpha, euclidean, cosine), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("alpha", [3, 10])
def test_openmax_is_pytorch_oods_on_correct_rows(alpha: int) -> None:
    """pytorch-ood leaves the choice of rows to the caller, fits by a simplex search, and returns p_unknown itself."""
    right = predicted_of_fit == labels_of_fit
    detector: Any = peer.OpenMax(None, tailsize=20, alpha=alpha)
    detector.fit_logits(torch.tensor(FIT_LOGITS[right]), torch.tensor(labels_of_fit[right]))
    theirs = detector.predict_logits(torch.tensor(LOGITS))
    scorer: Any = create_scorer("openmax", alpha=alpha).fit(TRAIN)
    found = scorer.score(FEATS)
    assert spearmanr(found, -theirs).statistic > 0.999
    fitted = detector._openmax.distributions
    scorer.shape_ = torch.tensor([fitted[c].c for c in range(CLASSES)])
    scorer.log_scale_ = torch.tensor([math.log(fitted[c].scale / TRANSLATION) for c in range(CLASSES)])
    np.testing.assert_allclose(-torch.expm1(scorer.score(FEATS)), theirs, rtol=1e-6)


def test_openmax_of_classes_with_no_or_few_rows() -> None:
    """A class without correct rows is unknown; the distribution of a class with a single row is a step at that row."""
    right = np.flatnonzero((predicted_of_fit == labels_of_fit) & (labels_of_fit == 1))
    few = np.setdiff1d(np.arange(len(labels_of_fit)), np.concatenate([right[1:], np.flatnonzero(labels_of_fit == 3)]))
    with pytest.warns(UserWarning, match="openmax: 1 of 5 classes have no correctly predicted row"):
        scorer: Any = create_scorer("openmax", alpha=1).fit(TRAIN[few])
    found = scorer.score(FEATS).numpy()
    moved = LOGITS.copy()
    gone = np.isin(PREDICTED, [1, 3])
    moved[gone, PREDICTED[gone]] = 0
    unknown = LOGITS.max(axis=1)
    expected = logsumexp(moved, axis=1) - np.logaddexp(logsumexp(moved, axis=1), unknown)
    np.testing.assert_allclose(found[gone], expected[gone], rtol=1e-9)
    own = FeatureSet(FIT[right[:1]], FIT_LOGITS[right[:1]])
    assert np.isfinite(scorer.score(own).numpy()).all()


def test_openmax_needs_a_correct_row_and_valid_parameters() -> None:
    with pytest.raises(BadInput, match="no row of the fit set is predicted correctly"):
        create_scorer("openmax").fit(TRAIN[predicted_of_fit != labels_of_fit])
    for params in ({"tail": 0}, {"alpha": 0}, {"euclidean": 0.0}, {"cosine": -1.0}, {"euclidean": math.inf}):
        with pytest.raises(BadInput, match=r"tail|alpha|euclidean and cosine"):
            create_scorer("openmax", **params)


def test_weibull_fit_equals_scipy() -> None:
    rng = np.random.default_rng(5)
    tails = [weibull_min.rvs(shape, scale=scale, size=40, random_state=rng) for shape, scale in ((0.7, 3), (9, 0.01))]
    tails.append(TRANSLATION + rng.exponential(size=25))
    logs = np.full((4, 40), np.nan)
    for row, tail in zip(logs, tails, strict=False):
        row[: len(tail)] = np.log(tail)
    shape, log_scale = weibull_fit(torch.tensor(logs))
    for found, scale, tail in zip(shape, log_scale, tails, strict=False):
        expected = weibull(tail)
        np.testing.assert_allclose([float(found), float(scale.exp())], expected, rtol=1e-6)
        theirs = weibull_min.fit(tail, floc=0)
        likelihood = [weibull_min.logpdf(tail, c, scale=s).sum() for c, s in (expected, theirs[::2])]
        assert likelihood[0] >= likelihood[1] - 1e-6
    assert shape.isfinite().all()
    assert log_scale.isfinite().all()


def test_largest_by_class() -> None:
    values, labels = torch.tensor([3.0, 1, 4, 1, 5, 9, 2]), torch.tensor([0, 0, 0, 2, 2, 0, 2])
    found = largest_by_class(values, labels, 4, 3)
    nan = math.nan
    np.testing.assert_array_equal(found, [[9, 4, 3], [nan] * 3, [5, 2, 1], [nan] * 3])
