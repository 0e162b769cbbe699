"""Tests of the evaluation on long-tailed data: published groups, and values computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ood_scores import FeatureSet
from ood_scores.data.long_tail import long_tail_counts
from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingInput, NotFinite, ShapeMismatch, UnknownName
from ood_scores.evaluation.calibration_error import expected_calibration_error
from ood_scores.evaluation.long_tail import (
    class_fpr95_id,
    class_fpr95_ood,
    class_groups,
    long_tail_report,
    sc_ood,
)
from ood_scores.evaluation.metrics import fpr95_id, fpr95_ood

CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
NAN = float("nan")

# --- groups ---------------------------------------------------------------------------------------------------------


def test_class_groups_of_cifar_and_imagenet() -> None:
    assert class_groups(CIFAR10_LT).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert np.bincount(class_groups(long_tail_counts(500, 100, 100))).tolist() == [34, 34, 32]
    assert class_groups(CIFAR10_LT, "imagenet").tolist() == [0] * 8 + [1, 1]
    assert class_groups([101, 100, 20, 19], "imagenet").tolist() == [0, 1, 1, 2]
    many = np.array([1280, *[50] * 998, 5])
    assert np.array_equal(class_groups(many), class_groups(torch.from_numpy(many), "imagenet"))


def test_class_groups_ignore_the_order_of_classes() -> None:
    order = np.random.default_rng(0).permutation(10)
    shuffled = class_groups(np.array(CIFAR10_LT)[order])
    assert shuffled.tolist() == class_groups(CIFAR10_LT)[order].tolist()


def test_balanced_classes_all_have_medium_counts() -> None:
    assert class_groups([500] * 10).tolist() == [1] * 10


def test_class_groups_errors() -> None:
    with pytest.raises(UnknownName, match="choose from cifar, imagenet"):
        class_groups([3, 2], "places")  # type: ignore[arg-type]
    for counts in ([], [1.5, 2], [3, -1], [[1, 2]]):
        with pytest.raises(BadInput, match="non-negative integers"):
            class_groups(counts)


# --- FPR95 of a class -----------------------------------------------------------------------------------------------


def test_class_fpr95_computed_by_hand() -> None:
    id_scores, labels = [9, 8, 7, 3, 2, 5], [0, 0, 0, 1, 1, 3]
    ood_scores = [1, 2, 4, 7.5]
    # The threshold of class 0 is 7, which accepts 7.5. The threshold of class 1 is 2. Class 2 has no rows.
    assert class_fpr95_id(id_scores, ood_scores, labels, 4) == pytest.approx([1 / 4, 3 / 4, NAN, 1 / 4], nan_ok=True)
    # Rejecting all four OoD rows rejects scores of at most 7.5.
    assert class_fpr95_ood(id_scores, ood_scores, labels, 4) == pytest.approx([1 / 3, 1, NAN, 1], nan_ok=True)


few = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=80)


@given(few, st.lists(st.integers(-4, 4), min_size=1, max_size=80))
def test_class_fpr95_equals_the_metric_of_the_class(inside: Any, outside: Any) -> None:
    scores, labels = (np.array(part) for part in zip(*inside, strict=True))
    by_id, by_ood = class_fpr95_id(scores, outside, labels, 4), class_fpr95_ood(scores, outside, labels, 4)
    for c in range(4):
        if (labels == c).any():
            assert by_id[c] == fpr95_id(scores[labels == c], outside)
            assert by_ood[c] == fpr95_ood(scores[labels == c], outside)
        else:
            assert np.isnan(by_id[c])
            assert np.isnan(by_ood[c])
    rows = np.bincount(labels, minlength=4)
    assert np.nansum(by_ood * rows) / len(scores) == pytest.approx(fpr95_ood(scores, outside))


def test_class_fpr95_errors() -> None:
    for function in (class_fpr95_id, class_fpr95_ood):
        with pytest.raises(NotFinite, match="ID scores are NaN"):
            function([NAN], [1], [0], 2)
        with pytest.raises(EmptyInput):
            function([1], [], [0], 2)
        with pytest.raises(ShapeMismatch, match="2 ID scores"):
            function([1, 2], [1], [0], 2)
        for labels in ([0, 2], [0, -1], [0.0, 1.0]):
            with pytest.raises(BadLabels, match="from 0 to 1"):
                function([1, 2], [1], labels, 2)


def test_sc_ood_moves_rows_with_an_id_class() -> None:
    inside, outside = sc_ood([1.0, 2.0], torch.tensor([3.0, 4.0, 5.0]), [-1, 0, 7])
    assert (inside.tolist(), outside.tolist()) == ([1, 2, 4, 5], [3])
    with pytest.raises(ShapeMismatch, match="one label each"):
        sc_ood([1.0], [2.0, 3.0], [0])


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_error_computed_by_hand() -> None:
    # Two bins, (0, 1/2] and (1/2, 1]: |0.5 - 0.35| and |1 - 0.9|, half of the rows in each.
    assert expected_calibration_error([0.2, 0.5, 0.8, 1.0], [0, 1, 1, 1], bins=2) == pytest.approx(0.075 + 0.05)
    assert expected_calibration_error([0.3], [True]) == pytest.approx(0.7)
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0


@pytest.mark.parametrize("edge", range(1, 15))
def test_a_calibration_edge_belongs_to_the_bin_below(edge: int) -> None:
    """A correct and a wrong row have no error in one bin, but an error in two bins."""
    value = edge / 15
    below, above = value - 0.01, np.nextafter(value, 1)
    together = abs(1 - below - value) / 2
    assert expected_calibration_error([below, value], [0, 1]) == pytest.approx(together)
    assert expected_calibration_error([below, above], [0, 1]) == pytest.approx((below + 1 - value) / 2)


def test_calibration_error_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(size=500), rng.integers(0, 2, 500)
    total = 0.0
    for m in range(15):
        here = [n for n in range(500) if m / 15 < confidence[n] <= (m + 1) / 15]
        total += abs(sum(correct[n] for n in here) - sum(confidence[n] for n in here))
    assert expected_calibration_error(confidence, correct) == pytest.approx(total / 500, rel=1e-12)


def test_calibration_errors_are_raised() -> None:
    with pytest.raises(BadInput, match="bins must be at least 1"):
        expected_calibration_error([0.5], [1], bins=0)
    with pytest.raises(BadInput, match="probabilities"):
        expected_calibration_error([1.5], [1])
    with pytest.raises(NotFinite):
        expected_calibration_error([NAN], [1])
    with pytest.raises(EmptyInput):
        expected_calibration_error([], [])
    with pytest.raises(ShapeMismatch):
        expected_calibration_error([0.5, 0.5], [1])


# --- the report -----------------------------------------------------------------------------------------------------


def tailed() -> FeatureSet:
    """Four classes, the last without rows; 3 of 4, 1 of 2 and 0 of 1 rows of the others are correct."""
    labels = [0, 0, 0, 0, 1, 1, 2]
    predicted = torch.tensor([0, 0, 0, 1, 1, 2, 0])
    logits = torch.nn.functional.one_hot(predicted, 4) * np.log(9.0)  # a confidence of 9/12
    features = torch.tensor([[1.0, 1], [1, 1], [1, 0], [1, 0], [0, 0], [1, 1], [0, 1]])
    return FeatureSet(features, logits, labels)


def test_long_tail_report_computed_by_hand() -> None:
    scores, outside = [5, 6, 7, 1, 4, 0.5, 3], [0, 2]
    report = long_tail_report(tailed(), [1000, 100, 30, 10], rule="imagenet", id_scores=scores, ood_scores=outside)
    assert report.accuracy == pytest.approx(4 / 7)
    assert report.ece == pytest.approx(0.75 - 4 / 7)
    assert report.activation_ratio == pytest.approx(9 / 14)
    expected = pd.DataFrame(
        {
            "label": [0, 1, 2, 3],
            "group": ["many", "medium", "medium", "few"],
            "train_rows": [1000, 100, 30, 10],
            "rows": [4, 2, 1, 0],
            "accuracy": [3 / 4, 1 / 2, 0, NAN],
            "confidence": [3 / 4, 3 / 4, 3 / 4, NAN],
            "activation_ratio": [3 / 4, 1 / 2, 1 / 2, NAN],
            "fpr95_id": [1 / 2, 1 / 2, 0, NAN],
            "fpr95_ood": [1 / 4, 1 / 2, 0, NAN],
        }
    )
    pd.testing.assert_frame_equal(report.classes, expected)
    groups = report.groups.set_index("group")
    assert groups.index.tolist() == ["all", "many", "medium", "few"]
    assert groups["classes"].tolist() == [4, 1, 2, 1]
    assert groups["rows"].tolist() == [7, 4, 3, 0]
    assert groups["accuracy"].tolist() == pytest.approx([5 / 12, 3 / 4, 1 / 4, NAN], nan_ok=True)
    assert groups["fpr95_ood"].tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 4, NAN], nan_ok=True)
    assert groups["fpr95_id"].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 4, NAN], nan_ok=True)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_long_tail_report_ignores_blocks_and_order(rows: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 20)
    feats = FeatureSet(rng.normal(size=(200, 6)), 2 * rng.normal(size=(200, 10)) + np.eye(10)[labels], labels)
    scores, outside = rng.normal(size=200) + 1, rng.normal(size=150)
    expected = long_tail_report(feats, CIFAR10_LT, id_scores=scores, ood_scores=outside)
    order = rng.permutation(200)
    found = long_tail_report(feats[order].in_blocks(rows), CIFAR10_LT, id_scores=scores[order], ood_scores=outside)
    pd.testing.assert_frame_equal(found.classes, expected.classes, rtol=1e-12)
    pd.testing.assert_frame_equal(found.groups, expected.groups, rtol=1e-12)
    assert (found.accuracy, found.ece) == pytest.approx((expected.accuracy, expected.ece))
    assert found.groups["accuracy"][0] == pytest.approx(found.accuracy)  # the set is balanced
    assert found.groups["fpr95_ood"][0] == pytest.approx(fpr95_ood(scores, outside))


def test_long_tail_report_without_scores_has_no_fpr95() -> None:
    report = long_tail_report(tailed(), [40, 30, 20, 10])
    assert report.groups[["fpr95_id", "fpr95_ood"]].isna().all(axis=None)
    assert report.groups["accuracy"].notna().sum() == 3


def test_long_tail_report_errors() -> None:
    feats = tailed()
    with pytest.raises(MissingInput, match="need logits"):
        long_tail_report(FeatureSet(feats.features, None, feats.labels), [1, 1, 1, 1])
    with pytest.raises(BadLabels, match="no labels"):
        long_tail_report(FeatureSet(feats.features, feats.logits), [1, 1, 1, 1])
    with pytest.raises(ShapeMismatch, match="3 class counts for 4 classes"):
        long_tail_report(feats, [3, 2, 1])
    with pytest.raises(BadInput, match="both sides"):
        long_tail_report(feats, [4, 3, 2, 1], id_scores=[1.0] * 7)
    with pytest.raises(ShapeMismatch, match="6 ID scores"):
        long_tail_report(feats, [4, 3, 2, 1], id_scores=[1.0] * 6, ood_scores=[0.0])


def test_activation_ratio_is_that_of_the_map_if_the_set_has_it() -> None:
    feats = tailed()
    shares = torch.arange(7) / 10
    mapped = FeatureSet(feats.features, feats.logits, feats.labels, extras={"activations.last": shares})
    report = long_tail_report(mapped, [1000, 100, 30, 10], rule="imagenet")
    assert report.activation_ratio == pytest.approx(0.3)
    assert long_tail_report(feats, [1000, 100, 30, 10], rule="imagenet").activation_ratio == pytest.approx(9 / 14)
