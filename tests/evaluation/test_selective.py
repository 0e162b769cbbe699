"""Metrics of classifier and reject option together, against definitions written out row by row."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ood_scores import FeatureSet, evaluate
from ood_scores.errors import BadInput, ShapeMismatch, UnknownName
from ood_scores.evaluation.metrics import METRICS, compare, headline_metrics, table_metrics
from ood_scores.evaluation.uncertainty import bootstrap, interval

ON_REQUEST = [metric.name for metric in METRICS.values() if metric.on_request and not metric.of_classifier]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def rows(seed: int, n: int, m: int, values: int) -> Rows:
    """Scores of ID and OoD rows with many ties, and whether ID rows are classified correctly."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, values + 1, n) * 1.0, rng.integers(0, values, m) * 1.0, rng.random(n) < 0.7


def risks(failed: np.ndarray) -> np.ndarray:
    """Share of failures among the first 1, 2, … rows."""
    return np.cumsum(failed) / np.arange(1, len(failed) + 1)


def mean_over_orders(scores: np.ndarray, failed: np.ndarray, area: Callable[[np.ndarray], float]) -> float:
    """Mean of ``area`` of the failures, best first, over every order of the rows that keeps scores descending."""
    orders = [list(order) for order in permutations(range(len(scores)))]
    kept = [order for order in orders if (np.diff(scores[order]) <= 0).all()]
    return float(np.mean([area(failed[order]) for order in kept]))


def all_rows(id_scores: np.ndarray, ood_scores: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.append(id_scores, ood_scores), np.append(~correct, np.ones(len(ood_scores), bool))


@pytest.mark.parametrize("seed", range(6))
def test_aurc_is_the_mean_over_all_orders_of_tied_rows(seed: int) -> None:
    id_scores, ood_scores, correct = rows(seed, 5, 2, values=3)
    by_hand = mean_over_orders(id_scores, ~correct, lambda failed: float(risks(failed).mean()))
    assert METRICS["aurc"](id_scores, ood_scores, correct) == pytest.approx(by_hand, rel=1e-12)
    together = all_rows(id_scores, ood_scores, correct)
    by_hand = mean_over_orders(*together, lambda failed: float(risks(failed).mean()))
    assert METRICS["aurc_scod"](id_scores, ood_scores, correct) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_augrc_is_the_area_over_all_orders_of_tied_rows(seed: int) -> None:
    id_scores, ood_scores, correct = rows(seed, 5, 2, values=3)

    def area(failed: np.ndarray) -> float:
        accepted = np.append(0, np.cumsum(failed)) / len(failed)
        return float(((accepted[1:] + accepted[:-1]) / 2).mean())

    assert METRICS["augrc"](id_scores, ood_scores, correct) == pytest.approx(
        mean_over_orders(id_scores, ~correct, area), rel=1e-12
    )
    assert METRICS["augrc_scod"](id_scores, ood_scores, correct) == pytest.approx(
        mean_over_orders(*all_rows(id_scores, ood_scores, correct), area), rel=1e-12
    )


@pytest.mark.parametrize("values", [4, 10**6])
def test_augrc_follows_from_the_error_rate_and_the_auroc_of_failures(values: int) -> None:
    """Traub et al. 2024: e (1 - e) (1 - A) + e^2 / 2."""
    id_scores, ood_scores, correct = rows(0, 400, 300, values)
    area, error = roc_auc_score(correct, id_scores), 1 - correct.mean()
    assert METRICS["augrc"](id_scores, ood_scores, correct) == pytest.approx(
        error * (1 - error) * (1 - area) + error**2 / 2, rel=1e-10
    )
    scores, failed = all_rows(id_scores, ood_scores, correct)
    area, error = roc_auc_score(~failed, scores), failed.mean()
    assert METRICS["augrc_scod"](id_scores, ood_scores, correct) == pytest.approx(
        error * (1 - error) * (1 - area) + error**2 / 2, rel=1e-10
    )


def test_e_aurc_is_zero_for_the_best_ranking_and_else_the_excess() -> None:
    correct = np.arange(12) < 9
    best = np.arange(12)[::-1] * 1.0
    assert METRICS["e_aurc"](best, [0.0], correct) == pytest.approx(0, abs=1e-15)
    assert METRICS["aurc"](best, [0.0], correct) == pytest.approx(risks(~correct).mean())
    worst = risks(~correct[::-1]).mean()
    assert METRICS["e_aurc"](-best, [0.0], correct) == pytest.approx(worst - risks(~correct).mean())
    assert METRICS["e_aurc_scod"](best + 2, [0.0, 1.0], correct) == pytest.approx(0, abs=1e-15)


def test_aurc_of_many_rows_is_exact() -> None:
    rng = np.random.default_rng(1)
    scores, correct = rng.permutation(200_000) * 1.0, rng.random(200_000) < 0.9
    failed = ~correct[np.argsort(-scores)]
    assert METRICS["aurc"](scores, [0.0], correct) == pytest.approx(risks(failed).mean(), rel=1e-12)


@pytest.mark.parametrize("values", [3, 10**6])
def test_oscr_is_a_probability_over_pairs(values: int) -> None:
    id_scores, ood_scores, correct = rows(2, 90, 80, values)
    above = (id_scores[:, None] > ood_scores) + (id_scores[:, None] == ood_scores) / 2
    assert METRICS["oscr"](id_scores, ood_scores, correct) == pytest.approx(
        (above * correct[:, None]).mean(), rel=1e-12
    )
    everything = np.ones(90, bool)
    assert METRICS["oscr"](id_scores, ood_scores, everything) == METRICS["auroc"](id_scores, ood_scores)


def test_ccr_counts_correct_rows_at_the_loosest_allowed_threshold() -> None:
    id_scores, ood_scores = np.arange(100.0), np.arange(100.0) - 5
    correct = np.arange(100) % 2 == 0
    for places in (1, 2, 3):
        best = max(
            ((id_scores >= t) & correct).sum()
            for t in np.append(id_scores, ood_scores)
            if (ood_scores >= t).mean() <= 10**-places
        )
        assert METRICS[f"ccr_fpr{places}"](id_scores, ood_scores, correct) == best / 100
    assert METRICS["ccr_fpr4"](np.zeros(3), np.zeros(3), np.ones(3, bool)) == 0


def test_detection_error_is_the_smallest_mean_error() -> None:
    id_scores, ood_scores, _ = rows(3, 50, 60, 8)
    errors = [((id_scores < t).mean() + (ood_scores >= t).mean()) / 2 for t in np.arange(-1, 10)]
    assert METRICS["detection_error"](id_scores, ood_scores) == pytest.approx(min(errors))
    assert METRICS["detection_error"]([0.0], [1.0]) == 0.5
    assert METRICS["detection_error"]([1.0], [0.0]) == 0


def test_autc_is_the_mean_error_over_uniform_thresholds() -> None:
    rng = np.random.default_rng(4)
    id_scores, ood_scores = rng.normal(1, 1, 300), rng.normal(0, 2, 200)
    low, high = min(id_scores.min(), ood_scores.min()), max(id_scores.max(), ood_scores.max())
    thresholds = np.linspace(low, high, 20_001)[:, None]
    errors = (id_scores < thresholds).mean(axis=1) / 2 + (ood_scores >= thresholds).mean(axis=1) / 2
    assert METRICS["autc"](id_scores, ood_scores) == pytest.approx(errors.mean(), abs=1e-4)
    assert METRICS["autc"]([2.0, 2.0], [2.0]) == 0.5
    assert METRICS["autc"]([4.0], [1.0]) == 0
    assert np.isnan(METRICS["autc"]([float("inf")], [1.0]))


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20), st.integers(1, 6))
def test_metrics_do_not_depend_on_the_order_of_rows_or_the_unit_of_scores(
    seed: int, n: int, m: int, values: int
) -> None:
    id_scores, ood_scores, correct = rows(seed, n, m, values)
    rng = np.random.default_rng(seed)
    order, other = rng.permutation(n), rng.permutation(m)
    found = compare(id_scores, ood_scores, correct=correct, metrics=ON_REQUEST)
    again = compare(2 * id_scores[order] - 1, 2 * ood_scores[other] - 1, correct=correct[order], metrics=ON_REQUEST)
    assert dict(again) == pytest.approx(dict(found), abs=1e-12, nan_ok=True)
    assert all(-1e-12 <= found[name] <= 1 for name in ON_REQUEST)


def test_metrics_that_need_correctness_are_nan_without_it() -> None:
    found = compare([2.0, 3.0], [1.0], metrics=["oscr", "autc"])
    assert np.isnan(found.oscr)
    assert found.autc == pytest.approx(0.125)
    assert np.isnan(interval("oscr", [2.0, 3.0], [1.0]).low)


def test_metrics_on_request_are_only_there_when_asked_for() -> None:
    usual = ["auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood"]
    assert list(compare([2.0], [1.0]))[:-2] == usual == [metric.name for metric in table_metrics()]
    assert list(compare([2.0], [1.0], metrics=["autc"]))[:-2] == [*usual, "autc"]
    assert [metric.name for metric in headline_metrics(["oscr"])] == ["auroc", "fpr95_id", "fpr95_ood", "oscr"]
    with pytest.raises(UnknownName, match="there is no metric"):
        compare([2.0], [1.0], metrics=["oscar"])
    with pytest.raises(BadInput, match=r"metrics is the text 'oscr': give a list of names, such as \['oscr'\]"):
        table_metrics("oscr")


def test_correctness_of_the_wrong_form_is_refused() -> None:
    with pytest.raises(ShapeMismatch, match="correct has shape"):
        compare([2.0, 1.0], [1.0], correct=[True])
    with pytest.raises(BadInput, match="correct has values other than 0 and 1"):
        compare([2.0, 1.0], [1.0], correct=np.array([0.5, 1.0]))
    tensors = compare([2.0, 1.0], [1.5], correct=torch.tensor([True, False]), metrics=["oscr"])
    assert tensors.oscr == 0.5


@pytest.mark.parametrize("name", ["oscr", "aurc", "augrc_scod"])
def test_the_bootstrap_draws_rows_with_their_correctness(name: str) -> None:
    id_scores, ood_scores, correct = rows(5, 60, 50, values=9)
    found = bootstrap(id_scores, ood_scores, name, correct=correct, replicates=400)
    rng = np.random.default_rng(7)
    drawn = []
    for _ in range(400):
        inside, outside = rng.integers(60, size=60), rng.integers(50, size=50)
        drawn.append(METRICS[name](id_scores[inside], ood_scores[outside], correct[inside]))
    assert found.value == METRICS[name](id_scores, ood_scores, correct)
    assert found.replicates.mean() == pytest.approx(np.mean(drawn), abs=0.3 * float(np.std(drawn)))
    assert found.standard_error == pytest.approx(np.std(drawn), rel=0.2)


def test_evaluate_adds_the_metrics_asked_for() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 4), torch.randint(4, (200,))
    logits[torch.arange(200), labels] += 1.5
    known = FeatureSet(torch.randn(200, 5), logits, labels=labels)
    noise = torch.randn(100, 4)
    unknown = FeatureSet(torch.randn(100, 5), noise)
    (row,) = evaluate(["msp"], id=known, ood={"noise": unknown}, metrics=["oscr", "aurc"]).to_dict("records")
    correct = logits.argmax(dim=1) == labels
    scores = [of.double().softmax(dim=1).amax(dim=1) for of in (logits, noise)]
    assert row["oscr"] == pytest.approx(METRICS["oscr"](scores[0], scores[1], correct), abs=1e-6)
    assert row["aurc"] == pytest.approx(METRICS["aurc"](scores[0], scores[1], correct), abs=1e-6)
    (row,) = evaluate(["msp"], id=unknown, ood={"known": known}, metrics=["oscr"]).to_dict("records")
    assert np.isnan(row["oscr"])
