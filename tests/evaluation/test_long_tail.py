"""Long-tailed subsets and reports: the published counts and groups, and figures worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset

from ood_scores import FeatureSet
from ood_scores.data.images import ImageArrays, ImageFiles, TorchvisionImages
from ood_scores.data.kinds.digits import digits
from ood_scores.data.long_tail import labels_of, long_tail, long_tail_counts
from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingInput, NotFinite, ShapeMismatch, UnknownName
from ood_scores.evaluation.long_tail import (
    class_fpr95_id,
    class_fpr95_ood,
    class_groups,
    expected_calibration_error,
    long_tail_report,
    sc_ood,
)
from ood_scores.evaluation.metrics import fpr95_id, fpr95_ood

CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
NAN = float("nan")

# --- datasets -------------------------------------------------------------------------------------------------------


def test_the_published_counts() -> None:
    assert long_tail_counts(5000, 10, 100) == CIFAR10_LT
    assert sum(long_tail_counts(5000, 10, 100)) == 12406
    cifar100 = long_tail_counts(500, 100, 100)
    assert (cifar100[0], cifar100[-1], sum(cifar100)) == (500, 5, 10847)
    assert long_tail_counts(5000, 10, 1) == [5000] * 10
    assert long_tail_counts(7, 1, 3) == [7]


@pytest.mark.parametrize("ratio", [10, 50, 100, 1000])
@pytest.mark.parametrize(("n_max", "classes"), [(5000, 10), (5000, 4), (1300, 7)])
def test_counts_are_rounded_down_exactly(n_max: int, classes: int, ratio: int) -> None:
    for c, count in enumerate(long_tail_counts(n_max, classes, ratio)):
        power = classes - 1  # n <= n_max ratio^(-c/power), in whole numbers
        assert count**power * ratio**c <= n_max**power < (count + 1) ** power * ratio**c


@pytest.mark.parametrize(("n_max", "classes", "ratio"), [(0, 10, 10), (5, 0, 10), (5, 3, 0.5), (5, 3, NAN), (5, 3, 6)])
def test_counts_that_cannot_be(n_max: int, classes: int, ratio: float) -> None:
    with pytest.raises(BadInput):
        long_tail_counts(n_max, classes, ratio)


def test_the_first_images_of_each_class_in_the_order_of_the_dataset() -> None:
    labels = [2, 0, 1, 0, 0, 1, 2, 0, 1, 2, 1, 2]  # four of each; 4, 2 and 1 are kept
    images = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), dtype=np.uint8)
    dataset = ImageArrays(images, labels, np.asarray, name="tiny")
    subset = long_tail(dataset, 4)
    assert subset.indices == [0, 1, 2, 3, 4, 5, 7]
    assert subset.labels.tolist() == [2, 0, 1, 0, 0, 1, 0]
    assert subset.class_counts.tolist() == [4, 2, 1]
    assert (subset.name, subset.transform) == ("tiny-LT[4]", np.asarray)
    items = [(int(image.max()), label) for image, label in subset]  # type: ignore[attr-defined]
    assert items == [(index, labels[index]) for index in subset.indices]
    assert long_tail(dataset, 2, n_max=2).class_counts.tolist() == [2, 1, 1]
    assert len(long_tail(dataset, 1)) == 12


def test_digits_with_a_long_tail() -> None:
    images, labels = digits()
    subset = long_tail(ImageArrays(images, labels), 100, n_max=150)
    assert subset.class_counts.tolist() == long_tail_counts(150, 10, 100)
    for c in range(10):
        rows = [row for row in subset.indices if labels[row] == c]
        assert rows == np.flatnonzero(labels == c)[: len(rows)].tolist()
    batch, classes = next(iter(DataLoader(long_tail(ImageArrays(images, labels, to_tensor), 5, n_max=100), 8)))
    assert batch.shape[0] == 8
    assert classes.tolist() == subset.labels[:8].tolist()


def to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


class Bare(Dataset[int]):
    """Eight rows that say nothing of themselves but what is given."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        raise AssertionError("no item is needed")


LABELS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "dataset",
    [
        Bare(targets=LABELS),
        Bare(targets=torch.tensor(LABELS)),
        Bare(labels=np.array(LABELS)),
        Bare(_labels=LABELS),
        Bare(dataset=Bare(targets=LABELS)),
        Subset(Bare(targets=LABELS[::-1]), range(7, -1, -1)),
        ImageFiles([""] * 8, LABELS, None, "files"),
    ],
)
def test_labels_are_found_without_reading_an_image(dataset: Any) -> None:
    assert labels_of(dataset).tolist() == LABELS
    assert long_tail(dataset, 4).indices == [0, 1, 2, 3, 4]


def test_a_long_tail_of_a_long_tail_and_of_torchvision_images() -> None:
    subset = long_tail(Bare(), 2, labels=LABELS)
    assert long_tail(subset, 4).labels.tolist() == [0, 0, 0, 0, 1]

    from torchvision.datasets import FakeData

    fake = FakeData(8, (3, 4, 4))
    fake.targets = LABELS
    assert long_tail(TorchvisionImages(fake, None, "fake"), 4).class_counts.tolist() == [4, 1]


def test_datasets_that_have_no_long_tail() -> None:
    with pytest.raises(BadLabels, match="Bare says no labels"):
        long_tail(Bare(), 10)
    with pytest.raises(BadLabels, match="unlabelled"):
        long_tail(Bare(labels=[-1, *LABELS[1:]]), 10)
    with pytest.raises(BadLabels, match="float64"):
        long_tail(Bare(), 10, labels=np.zeros(8))
    with pytest.raises(ShapeMismatch, match="beside 8 rows"):
        long_tail(Bare(), 10, labels=LABELS[1:])
    with pytest.raises(BadInput, match="class 0 has 4 images and should keep 6 of 6"):
        long_tail(Bare(targets=[0, 0, 0, 0, 1, 1, 1, 1]), 1.2, n_max=6)
    with pytest.raises(BadInput, match="class 1 has 0 images"):
        long_tail(Bare(targets=[0, 0, 0, 0, 0, 0, 2, 2]), 3)


# --- groups ---------------------------------------------------------------------------------------------------------


def test_groups_of_cifar_and_imagenet() -> None:
    assert class_groups(CIFAR10_LT).tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert np.bincount(class_groups(long_tail_counts(500, 100, 100))).tolist() == [34, 34, 32]
    assert class_groups(CIFAR10_LT, "imagenet").tolist() == [0] * 8 + [1, 1]
    assert class_groups([101, 100, 20, 19], "imagenet").tolist() == [0, 1, 1, 2]
    many = np.array([1280, *[50] * 998, 5])
    assert np.array_equal(class_groups(many), class_groups(torch.from_numpy(many), "imagenet"))


def test_the_order_of_the_classes_is_irrelevant() -> None:
    order = np.random.default_rng(0).permutation(10)
    shuffled = class_groups(np.array(CIFAR10_LT)[order])
    assert shuffled.tolist() == class_groups(CIFAR10_LT)[order].tolist()


def test_balanced_classes_are_all_medium() -> None:
    assert class_groups([500] * 10).tolist() == [1] * 10


def test_groups_that_cannot_be() -> None:
    with pytest.raises(UnknownName, match="choose from cifar, imagenet"):
        class_groups([3, 2], "places")  # type: ignore[arg-type]
    for counts in ([], [1.5, 2], [3, -1], [[1, 2]]):
        with pytest.raises(BadInput, match="non-negative integers"):
            class_groups(counts)


# --- FPR95 of a class -----------------------------------------------------------------------------------------------


def test_fpr95_of_a_class_by_hand() -> None:
    id_scores, labels = [9, 8, 7, 3, 2, 5], [0, 0, 0, 1, 1, 3]
    ood_scores = [1, 2, 4, 7.5]
    # Keeping class 0 accepts what is at least 7: 7.5. Class 1: at least 2. Class 2 has no rows.
    assert class_fpr95_id(id_scores, ood_scores, labels, 4) == pytest.approx([1 / 4, 3 / 4, NAN, 1 / 4], nan_ok=True)
    # Catching all four OoD rows rejects what is at most 7.5.
    assert class_fpr95_ood(id_scores, ood_scores, labels, 4) == pytest.approx([1 / 3, 1, NAN, 1], nan_ok=True)


few = st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 3)), min_size=1, max_size=80)


@given(few, st.lists(st.integers(-4, 4), min_size=1, max_size=80))
def test_fpr95_of_a_class_is_that_of_the_metrics(inside: Any, outside: Any) -> None:
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


def test_scores_and_labels_that_cannot_be() -> None:
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


def test_sc_ood_moves_what_has_an_id_class() -> None:
    inside, outside = sc_ood([1.0, 2.0], torch.tensor([3.0, 4.0, 5.0]), [-1, 0, 7])
    assert (inside.tolist(), outside.tolist()) == ([1, 2, 4, 5], [3])
    with pytest.raises(ShapeMismatch, match="one label each"):
        sc_ood([1.0], [2.0, 3.0], [0])


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_error_by_hand() -> None:
    # Two bins, (0, 1/2] and (1/2, 1]: |0.5 - 0.35| and |1 - 0.9|, half of the rows in each.
    assert expected_calibration_error([0.2, 0.5, 0.8, 1.0], [0, 1, 1, 1], bins=2) == pytest.approx(0.075 + 0.05)
    assert expected_calibration_error([0.3], [True]) == pytest.approx(0.7)
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0


@pytest.mark.parametrize("edge", range(1, 15))
def test_an_edge_belongs_to_the_bin_below(edge: int) -> None:
    """With a right and a wrong row one bin has no error, two bins have."""
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


def test_calibration_that_cannot_be() -> None:
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
    """Four classes, the last without rows; class 0 has 3 of 4 right, class 1 1 of 2, class 2 none of 1."""
    labels = [0, 0, 0, 0, 1, 1, 2]
    predicted = torch.tensor([0, 0, 0, 1, 1, 2, 0])
    logits = torch.nn.functional.one_hot(predicted, 4) * np.log(9.0)  # a confidence of 9/12
    features = torch.tensor([[1.0, 1], [1, 1], [1, 0], [1, 0], [0, 0], [1, 1], [0, 1]])
    return FeatureSet(features, logits, labels)


def test_report_by_hand() -> None:
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
def test_report_in_any_blocks_and_any_order(rows: int) -> None:
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


def test_without_scores_there_is_no_fpr95() -> None:
    report = long_tail_report(tailed(), [40, 30, 20, 10])
    assert report.groups[["fpr95_id", "fpr95_ood"]].isna().all(axis=None)
    assert report.groups["accuracy"].notna().sum() == 3


def test_reports_that_cannot_be() -> None:
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
