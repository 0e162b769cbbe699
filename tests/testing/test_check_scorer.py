"""``check_scorer`` accepts a correct third-party scorer and names the property that a broken one lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ood_scores import FeatureSet, Scorer, list_scorers, register_scorer
from ood_scores.features import Block
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.means import FeatureMean
from ood_scores.scorers.base import fitted
from ood_scores.scorers.tags import Tags
from ood_scores.testing import check_scorer, scorer_checks

pytestmark = pytest.mark.usefixtures("registered_scorers")


@dataclass
class Spread(Scorer):
    """The standard deviation of the logits; not registered."""

    factor: float = 1.0
    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return self.factor * block.logits64().std(dim=1, correction=0)


@dataclass
class MeanDistance(Scorer):
    """Minus the distance of the features to their mean; fitted."""

    mean_: Tensor = fitted()
    needs = ("features",)
    fit_needs = ("features",)

    def statistics(self) -> Sequence[Statistic]:
        return (FeatureMean(),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.mean_ = found[FeatureMean()]

    def score_block(self, block: Block) -> Tensor:
        return -(block.space("features") - self.mean_.to(block.features.device)).norm(dim=1)


@dataclass
class OwnExtra(Scorer):
    """The mean of an extra that a third-party probe computes."""

    tags = Tags(small_extras={"mine.a": lambda features, logits: features.square()})
    needs = ("mine.a",)

    def score_block(self, block: Block) -> Tensor:
        return block.space("mine.a").mean(dim=1)


def test_a_scorer_in_five_lines() -> None:
    check_scorer(Spread)


def test_parameters_are_passed_to_the_scorer() -> None:
    check_scorer(Spread, factor=2.0)
    with pytest.raises(AssertionError, match="'higher_on_id': the mean score is -"):
        check_scorer(Spread, factor=-1.0)


def test_registered_and_fitted_scorers_have_more_properties() -> None:
    @register_scorer("third_party_mean")
    @dataclass
    class Registered(MeanDistance):
        """Registered in this test only."""

    unregistered = {name for name, _ in scorer_checks(MeanDistance)}
    assert {"not_scored_before_fit", "fit_rows_finite", "other_model_refused"} <= unregistered
    assert {name for name, _ in scorer_checks(Registered)} - unregistered >= {"saved_and_loaded", "by_name"}
    assert "third_party_mean" in list_scorers()


def test_a_fitted_scorer_and_one_of_an_extra() -> None:
    check_scorer(MeanDistance)
    check_scorer(OwnExtra)


class Float32(Spread):
    def score_block(self, block: Block) -> Tensor:
        return block.logits.float().std(dim=1)


class WithinBlock(Spread):
    def score_block(self, block: Block) -> Tensor:
        return block.logits.std(dim=1) / block.logits.std()


class Undeclared(Spread):
    needs = ("features",)

    def score_block(self, block: Block) -> Tensor:
        return super().score_block(block) + block.features.norm(dim=1)


class InPlace(Spread):
    def score_block(self, block: Block) -> Tensor:
        return block.logits.mul_(2).std(dim=1)


class Infinite(Spread):
    def score_block(self, block: Block) -> Tensor:
        return super().score_block(block) * math.inf


@dataclass
class Stateful(Spread):
    calls: int = 0

    def score_block(self, block: Block) -> Tensor:
        self.calls += 1
        return super().score_block(block) * self.calls


@dataclass
class Converts(Spread):
    factor: Any = 1.0

    def __post_init__(self) -> None:
        self.factor = torch.tensor(self.factor)


class FirstFitOnly(MeanDistance):
    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        if not hasattr(self, "mean_"):
            super().fit_statistics(found, feats)


class FirstRow(MeanDistance):
    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.mean_ = feats.features[0]


@pytest.mark.parametrize(
    ("broken", "lacking", "found"),
    [
        (WithinBlock, "row_alone", "the scores of a row alone and among others differ"),
        (WithinBlock, "blocks_and_order_of_scored_rows", "in blocks of 1 rows"),
        (Undeclared, "needs_nothing_undeclared", "AttributeError: this block has no logits"),
        (InPlace, "inputs_unchanged", "it changes the logits of the set"),
        (Infinite, "one_finite_float64_per_row", "row 0 has a NaN or infinite score"),
        (Stateful, "deterministic", "the scores of the same set again differ"),
        (Converts, "parameters_and_repr", r"factor=2.0 became tensor\(2.\)"),
        (FirstFitOnly, "second_fit_replaces_first", "the scores after one fit and after two differ"),
        (FirstRow, "blocks_and_order_of_fit_rows", "after a fit on shuffled rows in blocks of"),
    ],
)
def test_the_missing_property_of_a_broken_scorer_is_named(broken: type[Scorer], lacking: str, found: str) -> None:
    parameters = {"factor": 2.0} if broken is Converts else {}
    checks = dict(scorer_checks(broken, **parameters))
    with pytest.raises(AssertionError, match=rf"scorer '{broken.__name__}', property '{lacking}': .*{found}"):
        checks[lacking]()
    with pytest.raises(AssertionError, match=f"scorer '{broken.__name__}', property "):
        check_scorer(broken, **parameters)


class Excepted(Spread):
    tags = Tags(exceptions={"higher_on_id": "its sign is inverted"})


def test_exceptions_are_skipped_and_must_be_known_properties() -> None:
    assert {name for name, _ in scorer_checks(Spread)} - {name for name, _ in scorer_checks(Excepted)} == {
        "higher_on_id"
    }
    check_scorer(Excepted, factor=-1.0)

    class Misspelled(Spread):
        tags = Tags(exceptions={"higher_on_it": "a typing error"})

    with pytest.raises(AssertionError, match=r"unknown properties \['higher_on_it'\]; there are .*'higher_on_id'"):
        check_scorer(Misspelled)
