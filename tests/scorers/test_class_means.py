"""kl_matching, she, ctm, and nci against plain float64 references and pytorch-ood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from classified import (
    CLASSES,
    FIT,
    FIT_LOGITS,
    HEAD,
    LOGITS,
    PREDICTED,
    ROWS,
    TRAIN,
    WEIGHT,
    WIDTH,
    Array,
    float32,
    labels_of_fit,
    layer,
    ours,
    predicted_of_fit,
    same,
)
from pytorch_ood import detector as peer
from scipy.special import softmax

from ood_scores import FeatureSet, create_scorer
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import Means
from ood_scores.features.statistics.row_samples import Logits, Rows


def test_the_fit_set_has_errors() -> None:
    assert 0.02 < (predicted_of_fit != labels_of_fit).mean() < 0.5


def kl_matching(logits: Array, fit_logits: Array) -> list[float]:
    fit, found = softmax(fit_logits, axis=1), []
    means = [fit[fit.argmax(axis=1) == k].mean(axis=0) for k in np.unique(fit.argmax(axis=1))]
    for p in softmax(logits, axis=1):
        found.append(-min(sum(p[c] * math.log(p[c] / d[c]) for c in range(len(p))) for d in means))
    return found


def test_kl_matching() -> None:
    np.testing.assert_allclose(ours("kl_matching"), kl_matching(LOGITS, FIT_LOGITS), rtol=1e-9)
    same(
        ours("kl_matching"),
        peer.KLMatching(None).fit_logits(torch.tensor(FIT_LOGITS)).predict_logits(torch.tensor(LOGITS)),
    )


def test_kl_matching_leaves_out_classes_never_predicted() -> None:
    kept = predicted_of_fit != 2
    found = ours("kl_matching", fit=TRAIN[kept])
    np.testing.assert_allclose(found, kl_matching(LOGITS, FIT_LOGITS[kept]), rtol=1e-9)
    assert create_scorer("kl_matching").fit(TRAIN[kept]).log_means_.shape == (CLASSES - 1, CLASSES)  # type: ignore[attr-defined]


def test_kl_matching_where_probabilities_underflow() -> None:
    steep = FeatureSet(FIT, 1e4 * FIT_LOGITS)
    assert np.isfinite(ours("kl_matching", steep[:50], steep)).all()


def test_she() -> None:
    means = [FIT[(labels_of_fit == c) & (predicted_of_fit == c)].mean(axis=0) for c in range(CLASSES)]
    np.testing.assert_allclose(
        ours("she"), [z @ means[c] for z, c in zip(ROWS, PREDICTED, strict=True)], rtol=1e-9, atol=1e-12
    )
    detector: Any = peer.SHE(None, layer())
    same(
        ours("she"),
        detector.fit_features(torch.tensor(FIT), torch.tensor(labels_of_fit)).predict_features(torch.tensor(ROWS)),
    )


def test_she_of_a_class_never_predicted_correctly_is_0() -> None:
    """pytorch-ood refuses such a fit set."""
    wrong = TRAIN[(labels_of_fit != 3) | (predicted_of_fit != 3)]
    with pytest.warns(UserWarning, match="she: 1 of 5 classes have no correctly predicted row in the fit set"):
        found = ours("she", fit=wrong)
    assert (found[PREDICTED == 3] == 0).all()
    np.testing.assert_allclose(found[PREDICTED != 3], ours("she")[PREDICTED != 3], rtol=1e-9, atol=1e-12)


def test_ctm() -> None:
    means = np.stack([FIT[labels_of_fit == c].mean(axis=0) for c in range(CLASSES)])
    expected = [max(z @ m / np.linalg.norm(z) / np.linalg.norm(m) for m in means) for z in ROWS]
    np.testing.assert_allclose(ours("ctm"), expected, rtol=1e-9)
    with pytest.warns(UserWarning, match="ctm: 1 of 5 classes have no fit row and are left out"):
        found = ours("ctm", fit=TRAIN[labels_of_fit != 2])
    assert (found <= ours("ctm") + 1e-12).all()
    assert ours("ctm", FeatureSet(np.zeros((1, WIDTH)))).tolist() == [0.0]


@pytest.mark.parametrize("name", ["fdbd", "nci"])
def test_a_row_at_the_mean(name: str) -> None:
    fit = np.array([[1.0, 0, 0, 0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0, 0, 0]])
    row = fit.mean(axis=0, keepdims=True)
    found = ours(name, FeatureSet(row, row @ WEIGHT.T), FeatureSet(fit, head=HEAD))
    assert np.isfinite(found).all()
    assert name == "fdbd" or found[0] == 0


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_nci(alpha: float) -> None:
    center = FIT.mean(axis=0)
    expected = [
        (z - center) @ WEIGHT[c] / np.linalg.norm(z - center) + alpha * np.abs(z).sum()
        for z, c in zip(ROWS, PREDICTED, strict=True)
    ]
    np.testing.assert_allclose(ours("nci", alpha=alpha), expected, rtol=1e-9)
    same(ours("nci", alpha=alpha), float32(peer.NCI(None, layer(), alpha=alpha)), rtol=1e-4)


def test_statistics_do_not_depend_on_blocks() -> None:
    wanted = [Means(s, g) for s in ("features", "logits", "softmax") for g in ("all", "predicted", "correct")]
    found = collect(TRAIN[:].in_blocks(17), [*wanted, Logits(), Rows(True, 0.5, 1)])
    spaces = {"features": FIT, "logits": FIT_LOGITS, "softmax": softmax(FIT_LOGITS, axis=1)}
    for statistic in wanted:
        right = predicted_of_fit == labels_of_fit
        groups = {
            "all": [np.ones(len(FIT), dtype=bool)],
            "predicted": [predicted_of_fit == c for c in range(CLASSES)],
            "correct": [right & (labels_of_fit == c) for c in range(CLASSES)],
        }[statistic.group]
        np.testing.assert_array_equal(found[statistic].counts, [group.sum() for group in groups])
        means = [spaces[statistic.space][group].mean(axis=0) for group in groups]
        np.testing.assert_allclose(found[statistic].means, means, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(found[Logits()], FIT_LOGITS)
    assert found[Rows(True, 0.5, 1)].shape == (150, WIDTH)
    assert torch.equal(found[Rows(True, 0.5, 1)], collect(TRAIN, [Rows(True, 0.5, 1)])[Rows(True, 0.5, 1)])
