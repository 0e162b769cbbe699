"""Conversion of scores of other packages, against scores that these packages compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import ood_scores
from ood_scores.errors import UnknownName
from ood_scores.evaluation.conventions import from_package
from ood_scores.metrics import auroc

LOGITS = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 4, 200)[:, None]


PAIRS = [("EnergyBased", "energy"), ("MaxSoftmax", "msp"), ("MaxLogit", "max_logit")]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_converted_scores_of_pytorch_ood_are_ours(theirs: str, ours: str) -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    converted = from_package("pytorch-ood", getattr(detectors, theirs)(nn.Identity())(LOGITS))
    expected = ood_scores.score(ours, ood_scores.FeatureSet(LOGITS, LOGITS))
    assert converted.dtype == np.float64
    np.testing.assert_allclose(converted, expected, rtol=1e-5)


def test_converted_scores_of_scikit_learn_rank_outliers_low() -> None:
    from sklearn.ensemble import IsolationForest

    rng = np.random.default_rng(0)
    forest = IsolationForest(random_state=0).fit(rng.normal(size=(200, 3)))
    scores = [forest.score_samples(rng.normal(mean, 1, (50, 3))) for mean in (0, 8)]
    inliers, outliers = (from_package("scikit-learn", each) for each in scores)
    assert auroc(inliers, outliers) > 0.99


def test_signs_are_those_of_the_packages() -> None:
    scores = [1.0, -2.0]
    assert from_package("OpenOOD", scores).tolist() == scores
    assert from_package("PyTorch_OOD", scores).tolist() == [-1.0, 2.0]
    assert from_package("oodeel", from_package("oodeel", scores)).tolist() == scores


def test_unknown_package_is_refused() -> None:
    with pytest.raises(UnknownName, match="openood"):
        from_package("openod", [1.0])
