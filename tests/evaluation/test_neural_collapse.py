"""Tests of neural collapse and singular values against their definitions written as loops."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_features import collapsed, random_set
from numpy.typing import NDArray

from ood_scores import FeatureSet, Head
from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingInput, NotFinite, ShapeMismatch, UnknownName
from ood_scores.evaluation.neural_collapse import neural_collapse, singular_values

Array = NDArray[Any]
SHAPES = [(4, 9), (4, 3), (7, 3), (10, 2), (2, 1), (2, 5), (5, 64)]
"""Numbers of classes and features, with more of either, and D = C - 1."""


def by_loops(feats: FeatureSet, columns: bool = False, against_label: bool = False) -> dict[str, float]:
    """The definitions of docs/collapse.md as loops."""
    assert feats.head is not None
    assert feats.labels is not None
    assert feats.logits is not None
    z, labels, weight = feats.features.double().numpy(), feats.labels.numpy(), feats.head.weight.double().numpy()
    classes, width = weight.shape
    mean = [np.mean([row for row, label in zip(z, labels, strict=True) if label == c], axis=0) for c in range(classes)]
    center = sum(mean) / classes
    within = sum(np.outer(z[n] - mean[labels[n]], z[n] - mean[labels[n]]) for n in range(len(z))) / len(z)
    between = sum(np.outer(mean[c] - center, mean[c] - center) for c in range(classes)) / classes
    values, vectors = np.linalg.eigh(between)
    rank = min(classes - 1, width)
    inverse = sum(np.outer(vectors[:, -k], vectors[:, -k]) / values[-k] for k in range(1, rank + 1))
    means = [mean[c] - center for c in range(classes)]

    def unequal_norms(vectors: Any) -> float:
        norms = [float(np.sqrt(vector @ vector)) for vector in vectors]
        average = sum(norms) / classes
        return float(np.sqrt(sum((norm - average) ** 2 for norm in norms) / (classes - 1))) / average

    def unequal_angles(vectors: Any) -> float:
        total = 0.0
        for i in range(classes):
            for j in range(classes):
                if i != j:
                    cosine = vectors[i] @ vectors[j] / np.sqrt((vectors[i] @ vectors[i]) * (vectors[j] @ vectors[j]))
                    total += abs(cosine + 1 / (classes - 1))
        return total / (classes * (classes - 1))

    def distance(one: Any, other: Any) -> float:
        if columns:
            pairs = zip(one, other, strict=True)
            return sum(float(np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2)) for a, b in pairs)
        return float(np.sum((one / np.sqrt(np.sum(one**2)) - np.array(other) / np.sqrt(np.sum(np.square(other)))) ** 2))

    wrong = 0
    for n in range(len(z)):
        nearest = min(range(classes), key=lambda c: float(np.linalg.norm(z[n] - mean[c])))
        wrong += nearest != (labels[n] if against_label else int(feats.logits[n].argmax()))
    return {
        "nc1": float(np.trace(within @ inverse)) / classes,
        "en_means": unequal_norms(means),
        "en_classifier": unequal_norms(weight),
        "ea_means": unequal_angles(means),
        "ea_classifier": unequal_angles(weight),
        "nc3": distance(weight, means),
        "nc4": wrong / len(z),
    }


# --- neural collapse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "features"), [(2, 1), (2, 4), (4, 3), (5, 16), (10, 9), (10, 64)])
@pytest.mark.parametrize("nc3_norm", ["frobenius", "columns"])
@pytest.mark.parametrize("nc4_against", ["prediction", "label"])
def test_measures_of_a_collapsed_simplex_are_zero(classes: int, features: int, nc3_norm: Any, nc4_against: Any) -> None:
    found = asdict(neural_collapse(collapsed(classes, features), nc3_norm=nc3_norm, nc4_against=nc4_against))
    assert found.keys() == {"nc1", "en_means", "en_classifier", "ea_means", "ea_classifier", "nc3", "nc4"}
    assert found == pytest.approx(dict.fromkeys(found, 0.0), abs=1e-12)


@pytest.mark.parametrize(("classes", "features"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_measures_equal_their_definitions_as_loops(classes: int, features: int, dtype: Any) -> None:
    feats = random_set(classes, features, dtype=dtype)
    assert asdict(neural_collapse(feats)) == pytest.approx(by_loops(feats), rel=1e-9, abs=1e-13)
    switched = neural_collapse(feats, nc3_norm="columns", nc4_against="label")
    assert asdict(switched) == pytest.approx(by_loops(feats, columns=True, against_label=True), rel=1e-9, abs=1e-13)


def test_papyans_nc1_is_not_divided_by_the_classes() -> None:
    feats = random_set(6, 8)
    whole = neural_collapse(feats, nc1_over_classes=False).nc1
    assert whole == pytest.approx(6 * neural_collapse(feats).nc1, rel=1e-14)


def test_measures_of_normalized_features() -> None:
    feats = random_set(5, 8)
    unit = FeatureSet(torch.nn.functional.normalize(feats.features), feats.logits, feats.labels, feats.head)
    assert asdict(neural_collapse(feats, normalize=True)) == pytest.approx(asdict(neural_collapse(unit)), rel=1e-12)


def test_measures_computed_by_hand() -> None:
    # Two classes in one dimension: means -1 and 1, variance 1/4 within, 1 between.
    feats = FeatureSet([[-1.5], [-0.5], [0.5], [1.5]], None, [0, 0, 1, 1], Head([[-1.0], [3.0]]))
    found = neural_collapse(feats)
    assert found.nc1 == pytest.approx(0.25 / 2)
    assert (found.en_means, found.en_classifier) == pytest.approx((0, np.sqrt(2) / 2))
    assert (found.ea_means, found.ea_classifier) == pytest.approx((0, 0))
    # Weights (-1, 3) / sqrt 10 against means (-1, 1) / sqrt 2.
    assert found.nc3 == pytest.approx(2 - 2 * 4 / np.sqrt(20))
    assert neural_collapse(feats, nc3_norm="columns").nc3 == pytest.approx(0)
    assert found.nc4 == 0


def test_nc4_counts_rows_against_the_prediction_or_the_label() -> None:
    # Nearest mean: 0, 0, 1 (the third row is closest to class 1), 1, 1, 1; predictions: 0, 1, 0, 1, 1, 1.
    values = torch.tensor([[-3.0], [-2.0], [1.0], [2.0], [3.0], [2.5]])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 1, 1, 1])).double()
    feats = FeatureSet(values, logits, [0, 0, 0, 1, 1, 1], Head([[-1.0], [1.0]]))
    assert neural_collapse(feats).nc4 == pytest.approx(2 / 6)
    assert neural_collapse(feats, nc4_against="label").nc4 == pytest.approx(1 / 6)


def test_nc4_computes_logits_with_the_head_if_the_set_has_none() -> None:
    feats = random_set(5, 8)
    bare = FeatureSet(feats.features, None, feats.labels, feats.head)
    assert neural_collapse(bare) == neural_collapse(feats)


def test_nc1_truncates_the_pseudo_inverse() -> None:
    """Neither the C-th singular value, a rounding error, nor that of a direction without spread is inverted."""
    feats = random_set(4, 6)
    shifted = FeatureSet(feats.features + 1000, feats.logits, feats.labels, feats.head)
    assert neural_collapse(shifted).nc1 == pytest.approx(neural_collapse(feats).nc1, rel=1e-9)

    labels = np.arange(40) % 4
    pairs = np.random.default_rng(0).normal(size=(20, 6))  # row by row in classes 0 and 1, and again in 2 and 3
    values = np.stack([pairs[::2], 1 - pairs[::2], pairs[::2], pairs[1::2]], axis=1).reshape(40, 6)
    twins = FeatureSet(values, None, labels, Head(np.eye(4, 6)))
    means = np.stack([values[labels == c].mean(axis=0) for c in range(4)])
    within = sum(np.outer(row - means[c], row - means[c]) for row, c in zip(values, labels, strict=True)) / 40
    centered = means - means.mean(axis=0)
    expected = np.trace(within @ np.linalg.pinv(centered.T @ centered / 4, rcond=1e-10)) / 4
    assert np.linalg.matrix_rank(centered, tol=1e-10) == 2
    assert neural_collapse(twins).nc1 == pytest.approx(expected, rel=1e-10)


def test_a_class_mean_at_the_center_has_no_direction() -> None:
    feats = FeatureSet([[-1.0], [0.0], [1.0]], None, [0, 1, 2], Head([[-1.0], [0.0], [1.0]]))
    # cos = -1 between the outer two, 0 with the middle: |-1 + 1/2| twice and |0 + 1/2| four times.
    assert neural_collapse(feats).ea_means == pytest.approx(0.5)
    assert neural_collapse(feats, nc3_norm="columns").nc3 == 0


@given(rows=st.integers(1, 95), seed=st.integers(0, 99), shape=st.sampled_from(SHAPES))
@settings(max_examples=25, deadline=None)
def test_measures_ignore_the_blocks_and_the_order_of_rows(rows: int, seed: int, shape: tuple[int, int]) -> None:
    feats = random_set(*shape)
    expected = asdict(neural_collapse(feats))
    order = np.random.default_rng(seed).permutation(len(feats))
    found = asdict(neural_collapse(feats[order].in_blocks(rows)))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_measures_of_a_set_on_disk_are_the_same(tmp_path: Any) -> None:
    import ood_scores

    feats = random_set(4, 6)
    feats.save(tmp_path / "feats.h5")
    assert neural_collapse(ood_scores.load(tmp_path / "feats.h5")) == neural_collapse(feats)


def test_neural_collapse_errors() -> None:
    feats = random_set(4, 6)
    z, labels = feats.features, feats.labels
    with pytest.raises(MissingInput, match="has none: extract it"):
        neural_collapse(FeatureSet(z, None, labels))
    with pytest.raises(BadLabels, match="no labels"):
        neural_collapse(FeatureSet(z, None, None, feats.head))
    with pytest.raises(BadLabels, match=r"1 of 2 classes have no rows \(1\)"):
        neural_collapse(FeatureSet(z, None, [0] * len(z), Head(np.ones((1, 6)))))
    with pytest.raises(BadLabels, match=r"2 of 6 classes have no rows \(4, 5\)"):
        neural_collapse(FeatureSet(z, None, labels, Head(np.ones((6, 6)))))
    with pytest.raises(BadInput, match="all class means are equal"):
        neural_collapse(FeatureSet(torch.full((8, 3), 0.1), None, [0, 1] * 4, Head(np.eye(2, 3))))
    with pytest.raises(BadInput, match="all zeros"):
        neural_collapse(FeatureSet(z, None, labels, Head(np.zeros((4, 6)))))
    with pytest.raises(EmptyInput):
        neural_collapse(feats[:0])
    with pytest.raises(NotFinite, match="row 3"):
        neural_collapse(FeatureSet(z.index_fill(0, torch.tensor([3]), float("nan")), None, labels, feats.head))
    with pytest.raises(UnknownName, match="choose from frobenius, columns"):
        neural_collapse(feats, nc3_norm="rows")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="choose from prediction, label"):
        neural_collapse(feats, nc4_against="truth")  # type: ignore[arg-type]


# --- singular values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 8), (5, 8)])
def test_singular_values_are_those_of_the_matrix(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=shape) + 1
    expected = np.zeros(8)
    expected[: min(shape)] = np.linalg.svd(values, compute_uv=False)
    table = singular_values(FeatureSet(values), per_row=False)
    assert table["rank"].tolist() == list(range(1, 9))
    np.testing.assert_allclose(table["value"], expected, atol=1e-7 * expected[0])
    np.testing.assert_allclose(singular_values(FeatureSet(values))["value"] * shape[0] ** 0.5, table["value"])
    centered = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    found = singular_values(FeatureSet(values), center=True, per_row=False)["value"][: min(shape)]
    np.testing.assert_allclose(found, centered, atol=1e-7 * expected[0])


def test_singular_values_of_other_sets_use_the_directions_of_the_first() -> None:
    rng = np.random.default_rng(0)
    train, other = rng.normal(size=(60, 5)) * [5, 4, 3, 2, 1], rng.normal(size=(40, 5)) + 2
    directions = np.linalg.svd(train)[2]
    table = singular_values(FeatureSet(train), {"svhn": FeatureSet(other)}, per_row=False)
    found = table.loc[table["set"] == "svhn", "value"]
    np.testing.assert_allclose(found, np.linalg.norm(other @ directions.T, axis=0), rtol=1e-10)
    shifted = singular_values(FeatureSet(train), {"svhn": FeatureSet(other)}, center=True)
    centered = train - train.mean(axis=0)
    reach = np.linalg.norm((other - train.mean(axis=0)) @ np.linalg.svd(centered)[2].T, axis=0) / 40**0.5
    np.testing.assert_allclose(shifted.loc[shifted["set"] == "svhn", "value"], reach, rtol=1e-10)


def test_collapsed_features_have_as_many_singular_values_as_classes() -> None:
    values = singular_values(collapsed(5, 16))["value"]
    assert (values > 1e-6).sum() == 5
    assert (singular_values(collapsed(5, 16), center=True)["value"] > 1e-6).sum() == 4


def test_singular_values_errors() -> None:
    feats = FeatureSet(torch.ones(4, 2))
    with pytest.raises(BadInput, match="two sets are called 'train'"):
        singular_values(feats, {"train": feats})
    with pytest.raises(ShapeMismatch, match="'svhn' has 3 features, 'train' has 2"):
        singular_values(feats, {"svhn": FeatureSet(torch.ones(4, 3))})
