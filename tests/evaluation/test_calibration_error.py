"""Calibration of a classifier against definitions written out row by row."""

from __future__ import annotations

from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from ood_scores import FeatureSet, evaluate
from ood_scores.errors import BadInput, BadLabels, MissingInput
from ood_scores.evaluation.calibration_error import ClassifiedRows, ClassifierCalibration, classifier_calibration
from ood_scores.evaluation.metrics import METRICS
from ood_scores.evaluation.threshold_counts import roc_counts
from ood_scores.evaluation.uncertainty import bootstrap

NAMES = [each.name for each in fields(ClassifierCalibration)]


def labeled(rows: int, scale: float = 1.0, seed: int = 0) -> FeatureSet:
    """A set whose labels are drawn from the softmax of the logits, which are then multiplied by ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 4, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    return FeatureSet(logits, scale * logits, labels=labels)


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


def tied(rows: int = 200) -> FeatureSet:
    """A set whose confidences have few values."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(0, 3, (rows, 3), generator=generator).double()
    return FeatureSet(torch.zeros(rows, 2), logits, labels=torch.randint(0, 3, (rows,), generator=generator))


def test_the_order_of_rows_with_equal_confidence_makes_no_difference() -> None:
    feats, order = tied(), torch.randperm(200, generator=torch.Generator().manual_seed(3))
    assert asdict(classifier_calibration(feats[order], bins=7)) == pytest.approx(
        asdict(classifier_calibration(feats, bins=7)), abs=1e-12
    )
    p, labels = arrays(feats)
    confidence, correct = p.max(axis=1), (torch.as_tensor(feats.logits).argmax(dim=1).numpy() == labels).astype(float)
    shared = np.array([correct[np.isclose(confidence, each)].mean() for each in confidence])
    bins = np.array_split(np.argsort(confidence, kind="stable"), 8)
    expected = sum(abs(shared[rows].sum() - confidence[rows].sum()) for rows in bins) / 200
    assert classifier_calibration(feats, bins=8).ece_equal_mass == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_of_the_classifier_are_those_of_all_scorers_and_sets(name: str) -> None:
    feats, ood = labeled(90), {"a": labeled(40, seed=1), "b": labeled(50, seed=2)}
    table = evaluate(["msp", "max_logit"], id=feats, ood=ood, metrics=[name])
    assert table[name].tolist() == 4 * [getattr(classifier_calibration(feats), name)]
    without = FeatureSet(feats.features, feats.logits)
    assert evaluate(["msp"], id=without, ood=ood, metrics=[name])[name].isna().all()


@pytest.mark.parametrize("feats", [labeled(90), tied()])
@pytest.mark.parametrize("name", NAMES)
def test_intervals_are_those_of_resampled_rows(name: str, feats: FeatureSet) -> None:
    rows = ClassifiedRows.of(feats, feats.class_labels())
    found = bootstrap([1.0], [0.0], name, classified=rows, replicates=40, seed=3)
    order, rng = np.argsort(rows.confidence, kind="stable"), np.random.default_rng(3)
    resampled = [feats[order[np.sort(rng.integers(len(feats), size=len(feats)))]] for _ in range(40)]
    expected = [getattr(classifier_calibration(each), name) for each in resampled]
    assert found.replicates == pytest.approx(expected, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(np.quantile(expected, [0.025, 0.975]), abs=1e-12)
    assert found.value == getattr(classifier_calibration(feats), name)
    assert np.isnan(bootstrap([1.0], [0.0], name).value)


def test_rows_without_a_class_and_too_few_rows_have_no_value() -> None:
    feats = labeled(40)
    labels = torch.as_tensor(feats.labels).clone()
    labels[3] = -1
    rows = ClassifiedRows.of(feats, labels)
    assert all(np.isnan(METRICS[name].of(roc_counts([1.0], [0.0]), rows)) for name in NAMES)
    few = ClassifiedRows.of(feats, feats.class_labels())[np.arange(29)]
    assert np.isnan(METRICS["rms_debiased"].of(roc_counts([1.0], [0.0]), few))
    assert METRICS["ece_equal_mass"].of(roc_counts([1.0], [0.0]), few[:1]) == abs(few.correct[0] - few.confidence[0])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(BadInput, match="15 bins need at least 30 rows, and there are 29"):
        classifier_calibration(labeled(29))
    with pytest.raises(BadInput, match="bins must be at least 1"):
        classifier_calibration(labeled(29), bins=0)
    with pytest.raises(MissingInput, match="calibration needs logits"):
        classifier_calibration(FeatureSet(torch.zeros(40, 2), labels=torch.zeros(40, dtype=torch.int64)))
    with pytest.raises(BadLabels):
        classifier_calibration(FeatureSet(torch.zeros(40, 2), torch.zeros(40, 3)))
