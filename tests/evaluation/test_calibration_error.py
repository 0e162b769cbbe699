"""Calibration of a classifier against definitions written out row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from ood_scores import FeatureSet
from ood_scores.errors import BadInput, BadLabels, MissingInput
from ood_scores.evaluation.calibration_error import classifier_calibration


def labeled(rows: int, scale: float = 1.0, seed: int = 0) -> FeatureSet:
    """A set whose labels are drawn from the softmax of the logits, which are then multiplied by ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return FeatureSet(torch.zeros(rows, 2), scale * logits, labels=labels)


def arrays(feats: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    assert feats.logits is not None
    assert feats.labels is not None
    return torch.as_tensor(feats.logits).double().softmax(dim=1).numpy(), torch.as_tensor(feats.labels).numpy()


def test_scores_and_errors_follow_their_definitions() -> None:
    feats = labeled(101, scale=1.5)
    p, labels = arrays(feats)
    found = classifier_calibration(feats, bins=5)
    assert found.brier == pytest.approx(((p - np.eye(4)[labels]) ** 2).sum(axis=1).mean())
    assert found.nll == pytest.approx(log_loss(labels, p, labels=range(4)))
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == labels
    order = np.argsort(confidence)
    mass, squared = 0.0, 0.0
    for part in np.array_split(order, [21, 41, 61, 81]):
        gap, accuracy = correct[part].mean() - confidence[part].mean(), correct[part].mean()
        mass += len(part) / 101 * abs(gap)
        squared += len(part) / 101 * (gap**2 - accuracy * (1 - accuracy) / (len(part) - 1))
    assert found.ece_equal_mass == pytest.approx(mass)
    assert found.rms_debiased == pytest.approx(max(squared, 0) ** 0.5)
    width = sum(
        abs((correct[here] - confidence[here]).sum()) / 101
        for m in range(5)
        if (here := (confidence > m / 5) & (confidence <= (m + 1) / 5)).any()
    )
    assert found.ece == pytest.approx(width)


def test_the_debiased_error_of_a_calibrated_classifier_is_small_on_few_rows() -> None:
    found = [classifier_calibration(labeled(300, seed=seed)) for seed in range(40)]
    assert np.mean([each.ece_equal_mass for each in found]) > 0.05
    assert np.mean([each.rms_debiased**2 for each in found]) < 0.05**2
    assert classifier_calibration(labeled(2000, scale=3)).rms_debiased > 0.1


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(BadInput, match="15 bins need at least 30 rows, and there are 29"):
        classifier_calibration(labeled(29))
    with pytest.raises(BadInput, match="bins must be at least 1"):
        classifier_calibration(labeled(29), bins=0)
    with pytest.raises(MissingInput, match="calibration needs logits"):
        classifier_calibration(FeatureSet(torch.zeros(40, 2), labels=torch.zeros(40, dtype=torch.int64)))
    with pytest.raises(BadLabels):
        classifier_calibration(FeatureSet(torch.zeros(40, 2), torch.zeros(40, 3)))
