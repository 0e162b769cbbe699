"""The state of scorers on devices, and blocks scored with one wait of the host, as far as the CPU can show them."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ood_scores import FeatureSet, Head, create_scorer
from ood_scores.device_memory import bytes_on
from ood_scores.errors import NotFinite
from ood_scores.features import Block
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.on_device import COPIES
from ood_scores.scorers.queued import QueuedScores

META = torch.device("meta")
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(60) % 3
FEATURES = 3 * torch.eye(3, 8)[LABELS] + torch.rand(60, 8, generator=GENERATOR)
HEAD = Head(torch.eye(3, 8))


def feats() -> FeatureSet:
    return FeatureSet(FEATURES, HEAD(FEATURES), LABELS, HEAD)


def tensors(scorer: Scorer) -> dict[str, Tensor]:
    return {name: value for name, value in vars(scorer).items() if isinstance(value, Tensor)}


def test_the_copy_on_a_device_is_made_once_and_again_after_a_fit() -> None:
    scorer = create_scorer("mahalanobis").fit(feats())
    there = scorer.on_device(META)
    assert {value.device for value in tensors(there).values()} == {META}
    assert {value.device.type for value in tensors(scorer).values()} == {"cpu"}
    assert scorer.on_device(META) is there
    assert scorer.on_device(torch.device("cpu")) is scorer
    scorer.fit(feats())
    assert scorer.on_device(META) is not there


def test_a_bank_that_scorers_share_is_copied_once() -> None:
    data = feats()
    knn, nnguide = create_scorer("knn", k=3).fit(data), create_scorer("nnguide", k=3).fit(data)
    banks = [vars(scorer.on_device(META))["bank_"] for scorer in (knn, nnguide)]
    assert banks[0] is banks[1]
    assert knn.on_device(META).scored_with() == nnguide.on_device(META).scored_with()


def test_a_tensor_that_changes_in_place_is_copied_again() -> None:
    scorer = create_scorer("she").fit(feats())
    first = vars(scorer.on_device(META))["means_"]
    vars(scorer)["means_"].mul_(2)
    other = copy.deepcopy(scorer)  # its attributes are new, so that a copy is made
    assert vars(other.on_device(META))["means_"] is not first


def test_scorers_within_scorers_go_to_the_device_too() -> None:
    react = create_scorer("react", base="mahalanobis")
    there = react.fit(feats()).on_device(META)
    inner = [value for value in vars(there).values() if isinstance(value, Scorer)]
    assert inner
    assert all(value.device == META for scorer in inner for value in tensors(scorer).values())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))])
def test_copies_of_a_scorer_leave_the_device_behind(copied: Callable[[Scorer], Scorer]) -> None:
    scorer = create_scorer("mahalanobis").fit(feats())
    scorer.on_device(META)
    assert COPIES not in vars(copied(scorer))
    assert torch.equal(copied(scorer).score(feats()), scorer.score(feats()))


# --- one wait for each block ------------------------------------------------------------------------------------------


def block() -> Block:
    return Block(FEATURES, HEAD(FEATURES), start=100)


def energy(block: Block, scores: Tensor) -> None:
    scores[0] = block.logsumexp()


def written(score: Callable[[Block, Tensor], None], rows: Block) -> Tensor:
    scores = torch.full((1, len(rows)), torch.nan, dtype=torch.float64)
    QueuedScores(score).write(rows, scores)
    return scores[0]


def test_the_scores_are_those_of_the_scorer() -> None:
    assert torch.equal(written(energy, block()), create_scorer("energy").score(feats()))


def test_the_logits_come_with_the_scores() -> None:
    scores, logits = torch.empty(1, 60, dtype=torch.float64), torch.empty(60, 3, dtype=torch.float64)
    queued = QueuedScores(energy)
    queued.parts.rows = 25
    queued.write(block(), scores, logits)
    assert torch.equal(scores[0], create_scorer("energy").score(feats()))
    assert torch.equal(logits, HEAD(FEATURES).double())


def test_rows_with_a_rare_condition_are_scored_with_waits() -> None:
    logits = torch.cat([HEAD(FEATURES[:30]), 1e-3 * HEAD(FEATURES[30:])])  # nearly uniform: refined in float64
    calls: list[bool] = []

    def score(rows: Block, scores: Tensor) -> None:
        calls.append(rows.postponed is None)
        energy(rows, scores)

    queued, scores = QueuedScores(score), torch.empty(1, 60, dtype=torch.float64)
    queued.write(Block(logits=logits, rows=60), scores)
    assert calls == [False, True]
    assert torch.equal(scores[0], Block(logits=logits, rows=60).logsumexp())
    queued.write(Block(logits=logits, rows=60), scores)
    assert calls == [False, True, True]


@pytest.mark.parametrize("column", [0, 1])
def test_values_that_are_not_finite_are_named(column: int) -> None:
    columns = [FEATURES.clone(), HEAD(FEATURES)]
    columns[column][7, 2] = torch.inf
    with pytest.raises(NotFinite, match=f"{('features', 'logits')[column]} hold .* first in row 107"):
        written(energy, Block(columns[0], columns[1], start=100))


def test_blocks_that_do_not_fit_into_memory_are_halved_and_one_warning_says_so() -> None:
    sizes: list[int] = []

    def score(rows: Block, scores: Tensor) -> None:
        sizes.append(len(rows))
        if len(rows) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        energy(rows, scores)

    queued, scores = QueuedScores(score), torch.empty(1, 60, dtype=torch.float64)
    with pytest.warns(UserWarning, match="does not suffice for a block of 60 rows") as caught:
        queued.write(block(), scores)
    assert len(caught) == 1
    assert sizes == [60, 30, 15, 15, 15, 15]
    assert torch.equal(scores[0], create_scorer("energy").score(feats()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        queued.write(block(), scores)
    assert sizes[6:] == [15, 15, 15, 15]


def test_a_row_that_does_not_fit_into_memory_is_an_error() -> None:
    def score(rows: Block, scores: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning, match="does not suffice"), pytest.raises(torch.OutOfMemoryError):
        written(score, block())


@pytest.mark.parametrize(("memory", "expected"), [(2**40, 2**34), (2**30, 2**28)])
def test_more_is_done_at_a_time_on_a_large_gpu(memory: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    assert bytes_on(torch.device("cuda"), 2**28, 1 / 64) == expected
    assert bytes_on(torch.device("cpu"), 2**28, 1 / 64) == 2**28
