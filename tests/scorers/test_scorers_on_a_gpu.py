"""Every scorer on a CUDA device: the scores of the CPU, wherever it was fitted, and few waits of the host."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from gpu_waits import waits_of
from torch import Tensor

from ood_scores import FeatureSet, Scorer, create_scorer, list_scorers
from ood_scores.features.statistics import moments
from ood_scores.scorers.one_pass import score_all
from ood_scores.testing.problem import Case, problem

pytestmark = pytest.mark.gpu


def waits_for_each_block(scorer: Scorer, feats: FeatureSet) -> float:
    """Count how often the host waits for a block of 50 rows on the device."""
    scorer.score(feats, block_rows=25)  # brings the state to the device
    few, many = (waits_of(partial(scorer.score, feats, block_rows=rows)) for rows in (25, 10))
    return (many - few) / 3


def on_gpu(feats: FeatureSet) -> FeatureSet:
    extras = {name: values.cuda() for name, values in feats.extras.items()}
    assert feats.logits is not None
    assert feats.labels is not None
    assert feats.head is not None
    return FeatureSet(feats.features.cuda(), feats.logits.cuda(), feats.labels.cuda(), feats.head.to("cuda"), extras)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", list_scorers())
def test_scores_on_a_gpu_are_those_of_the_cpu(name: str) -> None:
    case = Case(type(create_scorer(name)), create_scorer(name).tags.small_parameters)
    fitted = case.make().fit(on_gpu(case.train))
    state = [value for value in vars(fitted).values() if isinstance(value, Tensor)]
    assert {value.device.type for value in state} <= {"cpu"}
    for scorer in (fitted, case.fitted, pickle.loads(pickle.dumps(fitted))):
        assert_same(scorer.score(on_gpu(case.id), block_rows=17), case.expected)
    assert_same(fitted.score(case.id), case.expected)


@pytest.mark.parametrize("name", list_scorers())
def test_the_host_waits_for_a_block_as_often_as_the_tags_say(name: str) -> None:
    case = Case(type(create_scorer(name)), create_scorer(name).tags.small_parameters)
    assert waits_for_each_block(case.fitted, on_gpu(case.id)) == case.fitted.tags.waits


def test_the_host_waits_once_for_all_classes_of_a_packed_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "CLASS_SCATTER_BYTES", 5_000)
    labels = torch.arange(300) % 5
    features = torch.eye(5, 12)[labels] + torch.rand(300, 12, generator=torch.Generator().manual_seed(0))
    scorer = create_scorer("gmm").fit(FeatureSet(features, labels=labels))
    assert vars(scorer)["packed_"] is not None
    assert waits_for_each_block(scorer, FeatureSet(features[:50].cuda())) == 1


def test_all_scorers_of_one_pass_share_the_wait() -> None:
    scorers = [create_scorer(name) for name in ("energy", "msp", "gradnorm", "feature_norm")]
    feats = on_gpu(problem(60, 0, {}))
    score_all(scorers, feats, block_rows=30)
    few, many = (waits_of(partial(score_all, scorers, feats, block_rows=rows)) for rows in (30, 10))
    assert (many - few) / 4 == 1
