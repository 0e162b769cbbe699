"""Fusion of scorers: its scores, its members, and its guarantee, which needs no independence."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2, norm
from torch import Tensor

from ood_scores import FeatureSet, Head, Scorer, create_scorer, load_scorer
from ood_scores.detector.conformal import p_values, threshold
from ood_scores.errors import BadInput, MissingInput, NotFinite, NotFitted
from ood_scores.features import Block
from ood_scores.features.halves import halves
from ood_scores.scorers.fusion import METHODS, Fusion

TRIALS = 1000
SURE = 1e-4


@dataclass
class Column(Scorer):
    """A scorer that returns one feature."""

    number: int = 0
    needs = ("features",)

    def score_block(self, block: Block) -> Tensor:
        return block.features[:, self.number]


class Root(Column):
    def score_block(self, block: Block) -> Tensor:
        return block.features[:, 0].sqrt()


def columns(values: Any) -> FeatureSet:
    return FeatureSet(torch.as_tensor(np.asarray(values, dtype=np.float64)))


def made(rows: int, seed: int) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 6, generator=generator, dtype=torch.float64).exp()
    head = Head(torch.randn(3, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
    logits = head(features)
    return FeatureSet(features, logits, logits.argmax(dim=1), head)


TRAIN, HELD_OUT, NEW = made(60, 0), made(40, 1), made(20, 2)
BOTH = (Column(0), Column(1))


@pytest.mark.parametrize(
    ("method", "combine"),
    [
        ("fisher", lambda p: np.log(p).sum(axis=1)),
        ("stouffer", lambda p: norm.ppf(p).sum(axis=1) / np.sqrt(2)),
        ("min", lambda p: p.min(axis=1)),
    ],
)
def test_scores_combine_ranks_among_the_reference_rows(method: Any, combine: Any) -> None:
    reference = [[3, 10], [1, 30], [2, 20]]
    new = [[2, 5], [0, 99], [9, 25], [-9e9, 9e9]]
    p = np.array([[3, 1], [1, 4], [4, 3], [1, 4]]) / 5
    found = Fusion(BOTH, method).fit(columns(reference)).score(columns(new))
    np.testing.assert_allclose(found, combine(p), rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_no_score_is_infinite(method: Any) -> None:
    scores = Fusion(BOTH, method).fit(columns([[0, 0]])).score(columns([[-9, 9], [9, 9], [-9, -9], [0, 0]]))
    assert scores.isfinite().all()
    assert scores[1] == scores.max() == scores[3]
    assert scores[2] == scores.min()


def pairs(dependence: str, rng: np.random.Generator, rows: int) -> Any:
    first = rng.normal(size=rows)
    others = {"same": first, "opposite": -first, "tied": np.floor(first) + np.floor(rng.normal(size=rows))}
    return np.stack([first, others[dependence]], axis=1)


@pytest.mark.parametrize(("dependence", "method"), list(product(["same", "opposite", "tied"], METHODS)))
def test_the_guarantee_is_valid_whatever_the_dependence(dependence: str, method: Any) -> None:
    """Half of the ID rows are reference rows, the other half calibrates; one new row in each of a thousand draws."""
    rng = np.random.default_rng(1)
    kept = 0
    for _ in range(TRIALS):
        rows = pairs(dependence, rng, 80)
        fusion = Fusion(BOTH, method).fit(columns(rows[:40]))
        scores = fusion.score(columns(rows[40:])).numpy()
        kept += scores[39] >= threshold(scores[:39], 0.9).value
    assert kept >= binom.ppf(SURE, TRIALS, 0.9)
    if dependence == "same":
        assert kept <= binom.isf(SURE, TRIALS, 0.96), "ties of the reference's places keep more, but not all"


def test_standard_quantiles_are_invalid_for_dependent_scores() -> None:
    """The reason to calibrate the combined score: Fisher's own test at 5% rejects 9.3% of pairs of equal p-values."""
    rng = np.random.default_rng(1)
    rows = pairs("same", rng, 500 + TRIALS)
    p = np.stack([p_values(column[:500], column[500:]) for column in rows.T])
    rejected = int((-2 * np.log(p).sum(axis=0) > chi2.isf(0.05, 4)).sum())
    assert rejected > binom.isf(SURE, TRIALS, 0.05)


def test_with_fitted_members_all_rows_are_reference_rows() -> None:
    knn = create_scorer("knn", k=3).fit(TRAIN)
    fusion = Fusion([knn, "energy"]).fit(HELD_OUT)
    assert isinstance(fusion, Fusion)
    expected = torch.stack([knn.score(HELD_OUT), create_scorer("energy").score(HELD_OUT)]).sort(dim=1).values
    assert torch.equal(fusion.reference_, expected)
    twice = Fusion([knn, "energy"]).fit(TRAIN).fit(HELD_OUT)
    assert torch.equal(twice.score(NEW), fusion.score(NEW))


def test_members_that_are_not_fitted_are_fitted_on_half_of_the_rows_of_each_class() -> None:
    split = Fusion(["energy", create_scorer("knn", k=3), "mahalanobis"]).fit(TRAIN)
    first, second = (TRAIN[half] for half in halves(TRAIN))
    by_hand = [create_scorer("knn", k=3).fit(first), create_scorer("mahalanobis").fit(first)]
    assert torch.equal(split.score(NEW), Fusion(["energy", *by_hand]).fit(second).score(NEW))
    refitted = copy.deepcopy(split).fit(HELD_OUT)
    assert torch.equal(
        refitted.score(NEW), Fusion(["energy", create_scorer("knn", k=3), "mahalanobis"]).fit(HELD_OUT).score(NEW)
    )
    with pytest.raises(BadInput, match="needs at least 2 rows"):
        Fusion(["energy", "knn"]).fit(TRAIN[:1])


def test_members_are_copied_and_never_changed() -> None:
    knn = create_scorer("knn", k=3)
    fusion = Fusion([knn]).fit(TRAIN)
    assert not knn.is_fitted
    expected = fusion.score(NEW)
    knn.fit(HELD_OUT)
    assert torch.equal(fusion.fit(TRAIN).score(NEW), expected)
    of_fitted = Fusion([knn]).fit(TRAIN)
    expected = of_fitted.score(NEW)
    knn.fit(TRAIN)
    assert torch.equal(of_fitted.score(NEW), expected)


def test_fusion_needs_what_its_members_need() -> None:
    fusion = Fusion(["energy", "mahalanobis"])
    assert fusion.needs == ("logits", "features")
    assert fusion.fit_needs == ("logits", "features", "labels")
    assert Fusion(["energy", create_scorer("mahalanobis").fit(TRAIN)]).fit_needs == ("logits", "features")
    with pytest.raises(NotFitted, match="'fusion' is fitted on in-distribution features"):
        fusion.score(NEW)
    with pytest.raises(MissingInput, match="'fusion' needs labels to be fitted on"):
        fusion.fit(FeatureSet(TRAIN.features, TRAIN.logits, head=TRAIN.head))


@pytest.mark.parametrize("method", METHODS)
def test_saving_and_loading(method: Any, tmp_path: Path) -> None:
    fusion = Fusion([create_scorer("knn", k=3).fit(TRAIN), "mahalanobis", "energy"], method).fit(HELD_OUT)
    fusion.save(tmp_path / "fusion.safetensors")
    again = load_scorer(tmp_path / "fusion.safetensors")
    assert again == fusion
    assert torch.equal(again.score(NEW), fusion.score(NEW))
    assert torch.equal(again.fit(TRAIN).score(NEW), fusion.fit(TRAIN).score(NEW))


def test_nan_of_a_member_is_an_error() -> None:
    """When sorted, NaN would come last, as if the row were the most ID of all."""
    fusion = Fusion([Column(0), Root()]).fit(columns([[1], [4]]))
    with pytest.raises(NotFinite, match="'Root' returned NaN for finite inputs, first for row 2"):
        fusion.score(columns([[1], [2], [-1], [-1]]), block_rows=2)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scorers": "energy"}, "scorers must be a list of scorers, got 'energy'"),
        ({"scorers": []}, "at least one scorer is needed"),
        ({"method": "mean"}, "method must be 'fisher' or 'stouffer' or 'min', got 'mean'"),
    ],
)
def test_bad_parameters(parameters: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        create_scorer("fusion", **parameters)


@pytest.mark.parametrize("labels", [np.arange(60) % 2, np.arange(60) // 30, np.arange(60) % 7, [5] * 59 + [8]])
def test_both_halves_have_rows_of_every_class(labels: Any) -> None:
    """With labels that alternate, every second row would be one class."""
    feats = FeatureSet(TRAIN.features, labels=np.asarray(labels))
    first, second = halves(feats)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(60))
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        here = [int((np.asarray(labels)[half] == label).sum()) for half in (first, second)]
        assert max(here) - min(here) <= 1
        assert min(here) >= count // 2


def test_rows_without_labels_are_halved_in_random_order() -> None:
    first, second = halves(FeatureSet(torch.zeros(1000, 1)))
    assert len(first) == len(second) == 500
    assert 200 < int((first % 2).sum()) < 300


class Jittered(Column):
    """A scorer that returns 1 up to the rounding of float32, which depends on the place of the row in its block."""

    def score_block(self, block: Block) -> Tensor:
        return 1 + 1e-7 * (torch.arange(len(block)) % 3).double()


@pytest.mark.parametrize("method", METHODS)
def test_a_member_that_varies_by_rounding_alone_says_nothing(method: Any) -> None:
    values = np.random.default_rng(0).normal(size=(40, 1)).astype(np.float32)
    reference, new = FeatureSet(values[:30]), FeatureSet(values[30:])
    found: Any = Fusion((Column(0), Jittered()), method).fit(reference)
    p = (1 + (values[:30, 0] <= values[30:]).sum(axis=1)) / 32
    expected = METHODS[method](torch.from_numpy(np.stack([p, np.full(10, 31 / 32)])))
    for rows in (None, 1, 4):
        np.testing.assert_allclose(found.score(new, block_rows=rows), expected, rtol=1e-12)
    assert found.reference_[0].unique().numel() == 30
