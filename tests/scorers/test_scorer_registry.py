"""The registry of scorers, and user-defined scorers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ood_scores import FeatureSet, Scorer, create_scorer, evaluate, list_scorers, register_scorer, score
from ood_scores.errors import BadInput, NotFinite, NotFitted, ShapeMismatch, UnknownName
from ood_scores.features import Block
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.moments import ClassMoments

pytestmark = pytest.mark.usefixtures("registered_scorers")


def feature_set(seed: int = 0, rows: int = 24) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    return FeatureSet(
        torch.randn(rows, 5, generator=generator), torch.randn(rows, 3, generator=generator), torch.arange(rows) % 3
    )


def register_mean_distance() -> type[Scorer]:
    @register_scorer("mean_distance")
    @dataclass
    class MeanDistance(Scorer):
        """Minus a factor times the distance to the mean of all class means."""

        factor: float = 1.0
        mean_: Tensor = field(init=False, repr=False, compare=False)
        needs = ("features",)
        fit_needs = ("features", "labels")

        def statistics(self) -> Sequence[Statistic]:
            return (ClassMoments(),)

        def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
            self.mean_ = found[ClassMoments()].means.mean(dim=0)

        def score_block(self, block: Block) -> Tensor:
            return -self.factor * (block.space("features") - self.mean_).norm(dim=1)

    return MeanDistance


class First(Scorer):
    """The first logit; neither registered nor a dataclass."""

    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return block.logits[:, 0]


def test_a_user_defined_scorer_can_be_scored_and_evaluated() -> None:
    register_mean_distance()
    fit, feats = feature_set(0), feature_set(1)
    assert "mean_distance" in list_scorers()
    assert fit.labels is not None
    mean = torch.stack([fit.features[fit.labels == c].double().mean(dim=0) for c in range(3)]).mean(dim=0)
    expected = -2 * (feats.features.double() - mean).norm(dim=1)
    found = score("mean_distance", feats, fit=fit, factor=2.0)
    torch.testing.assert_close(found, expected)
    table = evaluate(["energy", "mean_distance"], id=feats, ood={"ood": feature_set(2)}, fit=fit)
    assert table["scorer"].tolist() == ["energy", "mean_distance"]
    with pytest.raises(NotFitted, match="mean_distance"):
        score("mean_distance", feats)
    with pytest.raises(UnknownName, match="has no parameter 'power': choose from factor"):
        create_scorer("mean_distance", power=2)


def test_an_unregistered_scorer_can_be_scored_and_evaluated() -> None:
    feats = feature_set()
    assert feats.logits is not None
    assert torch.equal(score(First(), feats), feats.logits[:, 0].double())
    table = evaluate([First()], id=feats, ood={"ood": feature_set(1)})
    assert table["scorer"].tolist() == ["First"]
    assert "First" not in list_scorers()


def test_a_registered_name_cannot_be_reused() -> None:
    with pytest.raises(BadInput, match=r"the scorer 'msp' exists already: ood_scores\.scorers\.softmax\.MSP"):
        register_scorer("msp")(First)
    assert create_scorer("msp").name == "msp"
    namesake = type("MSP", (First,), {"__module__": "elsewhere"})
    with pytest.raises(BadInput, match="exists already"):
        register_scorer("msp")(namesake)


def test_a_scorer_can_be_registered_again_on_reload() -> None:
    register_mean_distance()
    again = register_mean_distance()
    assert type(create_scorer("mean_distance")) is again


def test_list_scorers_matches_patterns() -> None:
    names = list_scorers()
    assert names == sorted(names)
    assert {"msp", "energy", "gradnorm", "knn", "gmm", "mahalanobis"} <= set(names)
    assert list_scorers("*norm") == [name for name in names if name.endswith("norm")]
    assert list_scorers("nothing*") == []


def test_errors_for_unknown_names_suggest_or_list_the_known_ones() -> None:
    for call in (lambda: create_scorer("gradnrom"), lambda: score("gradnrom", feature_set())):
        with pytest.raises(
            UnknownName,
            match=r"no scorer 'gradnrom' \(did you mean 'gradnorm'.* or '\w+'\?\): ood-scores list shows all\.$",
        ):
            call()
    with pytest.raises(UnknownName, match="scorer 'gradnorm' has no parameter 'T': choose from p, temperature, target"):
        score("gradnorm", feature_set(), T=2)
    with pytest.raises(UnknownName, match="scorer 'max_logit' has no parameter 'p': there are none"):
        create_scorer("max_logit", p=2)
    with pytest.raises(UnknownName, match="has no parameter 'bank_'"):
        create_scorer("knn", bank_=torch.ones(1))


def test_parameters_require_a_scorer_name() -> None:
    with pytest.raises(BadInput, match="'energy' exists already, so temperature cannot be set: pass the name"):
        score(create_scorer("energy"), feature_set(), temperature=2.0)


def test_score_refuses_objects_that_are_not_scorers() -> None:
    for wrong in (First, 3, None):
        with pytest.raises(BadInput, match="scorer must be a registered name or a Scorer object"):
            score(wrong, feature_set())  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "index"), [("(24, 3)", slice(None)), ("(24, 1)", slice(0, 1))])
def test_scores_must_be_one_per_row(shape: str, index: slice) -> None:
    class Wide(First):
        def score_block(self, block: Block) -> Tensor:
            return block.logits[:, index]

    with pytest.raises(ShapeMismatch, match=r"'Wide' returned scores of shape \(24, .\) for 24 rows: score_block must"):
        score(Wide(), feature_set())


def test_a_scalar_score_is_not_broadcast() -> None:
    class Mean(First):
        def score_block(self, block: Block) -> Tensor:
            return block.logits.mean()

    with pytest.raises(ShapeMismatch, match=r"'Mean' returned scores of shape \(\) for 24 rows"):
        evaluate([Mean()], id=feature_set(), ood={"ood": feature_set()})


def test_nan_scores_are_refused_but_infinite_scores_are_not() -> None:
    class Log(First):
        def score_block(self, block: Block) -> Tensor:
            return block.logits[:, 0].log()

    logits = torch.ones(5, 2)
    logits[1, 0] = 0
    feats = FeatureSet(torch.ones(5, 2), logits)
    assert score(Log(), feats)[1] == -float("inf")
    logits[3, 0] = -1
    with pytest.raises(NotFinite, match="'Log' returned NaN for finite inputs, first for row 3"):
        score(Log(), feats)


def test_fitting_a_scorer_that_needs_no_fit_has_no_effect() -> None:
    scorer = create_scorer("energy")
    assert scorer.is_fitted
    assert scorer.fit(feature_set()) is scorer
    assert torch.equal(score("energy", feature_set(), fit=FeatureSet(torch.ones(1, 1))), scorer.score(feature_set()))
