"""Tests of norm groups and norm bins against loops and values computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_features import random_set

from ood_scores import FeatureSet
from ood_scores.errors import BadInput, BadLabels, MissingInput, ShapeMismatch
from ood_scores.evaluation.feature_norms import norm_bins, norm_groups

# --- change of features by norm group -------------------------------------------------------------------------------


def test_norm_groups_computed_by_hand() -> None:
    # Last norms 5, 10 (an edge belongs to the group above), 25, 50; the second group of three has two rows.
    last = torch.tensor([[3.0, 4.0], [10.0, 0.0], [0.0, 25.0], [30.0, 40.0]])
    middle = last - torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    table = norm_groups([FeatureSet(torch.zeros(4, 2)), FeatureSet(middle), FeatureSet(last)], edges=(10, 30))
    assert table[["epoch", "group"]].to_numpy().tolist() == [[1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert table["low"].tolist() == [0, 10, 30] * 2
    assert table["high"].tolist() == [10, 30, float("inf")] * 2
    assert table["rows"].tolist() == [1, 2, 1] * 2
    first = [2**2 + 4**2, (10**2 + 2**2 + 3**2 + 21**2) / 2, 50**2]
    assert table["change"].tolist() == [*first, 1, (4 + 25) / 2, 0]
    assert table["total"].tolist() == [*first, first[0] + 1, first[1] + 29 / 2, first[2]]


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_norm_groups_equal_a_loop(rows: int) -> None:
    rng = np.random.default_rng(0)
    walk = rng.normal(size=(4, 60, 5)).cumsum(axis=0)
    table = norm_groups([FeatureSet(epoch).in_blocks(rows) for epoch in walk], edges=(2, 4, 5))
    norms = np.sqrt((walk[-1] ** 2).sum(axis=1))
    assert len(table) == 3 * 4
    for epoch, low, high, count, change in table[["epoch", "low", "high", "rows", "change"]].to_numpy():
        old, new = walk[int(epoch) - 1], walk[int(epoch)]
        members = [n for n in range(60) if low <= norms[n] < high]
        assert count == len(members)
        assert change == pytest.approx(sum(np.sum((new[n] - old[n]) ** 2) for n in members) / count, rel=1e-12)


def test_an_empty_norm_group_has_no_change() -> None:
    table = norm_groups([FeatureSet(torch.ones(2, 2)), FeatureSet(torch.zeros(2, 2))])
    assert table["rows"].tolist() == [2, 0, 0, 0]
    assert table["change"].tolist() == pytest.approx([2, *[float("nan")] * 3], nan_ok=True)


def test_norm_groups_errors() -> None:
    one, wide, long = FeatureSet(torch.ones(4, 2)), FeatureSet(torch.ones(4, 3)), FeatureSet(torch.ones(5, 2))
    with pytest.raises(BadInput, match="at least two epochs are needed, got 1"):
        norm_groups([one])
    for other in (wide, long):
        with pytest.raises(ShapeMismatch, match="same rows"):
            norm_groups([one, other])
    for edges in ([3, 2], [0, 1], [2, 2], [float("inf")]):
        with pytest.raises(BadInput, match="positive and increasing"):
            norm_groups([one, one], edges)


# --- norm against accuracy and softmax ------------------------------------------------------------------------------


def test_norm_bins_computed_by_hand() -> None:
    # Norms 5, 1, 2, 3, 4, 6 in bins {1, 2}, {3, 4}, {5, 6}; logits +-log 3 give a confidence of 3/4 or, twice it, 9/10.
    norms = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    side = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 2.0]) * np.log(3)
    logits = torch.stack([side, torch.zeros(6)], dim=1)
    feats = FeatureSet(norms[:, None], logits, [0, 1, 1, 0, 1, 0])
    table = norm_bins(feats, bins=3)
    assert list(table) == ["low", "high", "norm", "rows", "accuracy", "confidence"]
    assert table[["low", "high", "norm"]].to_numpy().tolist() == [[1, 2, 1.5], [3, 4, 3.5], [5, 6, 5.5]]
    assert table["rows"].tolist() == [2, 2, 2]
    assert table["accuracy"].tolist() == [0, 0.5, 1]
    assert table["confidence"].tolist() == pytest.approx([0.75, 0.75, 0.9])
    assert norm_bins(feats, bins=3, labeled=False)["accuracy"].isna().all()


def test_default_norm_bins_hold_eighty_of_ten_thousand_rows() -> None:
    feats = FeatureSet(torch.rand(10_000, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(10_000, 2))
    assert norm_bins(feats, labeled=False)["rows"].tolist() == [80] * 125


def test_rows_with_equal_norms_share_a_norm_bin() -> None:
    feats = FeatureSet(torch.tensor([1.0, 1, 1, 2, 2, 3])[:, None], torch.zeros(6, 2))
    assert norm_bins(feats, bins=4, labeled=False)["rows"].tolist() == [3, 3]
    assert norm_bins(feats, bins=50, labeled=False)["rows"].tolist() == [3, 2, 1]
    assert norm_bins(feats, bins=1, labeled=False)["rows"].tolist() == [6]


@pytest.mark.parametrize("rows", [1, 13, 1000])
def test_norm_bins_of_scaled_features_in_any_blocks(rows: int) -> None:
    feats = random_set(4, 6)
    assert feats.head is not None
    assert feats.logits is not None
    assert feats.labels is not None
    expected = norm_bins(FeatureSet(feats.features, feats.head(feats.features * 0.1), feats.labels), bins=5)
    order = np.random.default_rng(0).permutation(len(feats))
    table = norm_bins(feats[order].in_blocks(rows), bins=5, scale=0.1)
    np.testing.assert_allclose(table["confidence"], expected["confidence"], rtol=1e-12)
    unscaled = norm_bins(feats, bins=5)
    np.testing.assert_allclose(table["accuracy"], unscaled["accuracy"])
    correct = feats.logits.argmax(dim=1).eq(feats.labels).double().mean()
    assert np.average(table["accuracy"], weights=table["rows"]) == pytest.approx(float(correct))


def test_norm_bins_errors() -> None:
    feats = FeatureSet(torch.ones(4, 2), torch.zeros(4, 3), [0, 1, 2, 3])
    with pytest.raises(BadLabels, match="labels run from 0 to 3"):
        norm_bins(feats)
    with pytest.raises(BadInput, match="bins must be at least 1"):
        norm_bins(feats, bins=0)
    with pytest.raises(BadInput, match="scale must be positive"):
        norm_bins(feats, scale=0)
    with pytest.raises(MissingInput, match="pass scale=1"):
        norm_bins(feats, scale=0.5, labeled=False)
    with pytest.raises(MissingInput, match="need logits"):
        norm_bins(FeatureSet(torch.ones(4, 2)))
