"""Conformal thresholds and p-values: exact values, and every guarantee in simulations that include the calibration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import beta, binom, false_discovery_control, kstest

from ood_scores.detector.conformal import Threshold, benjamini_hochberg, class_thresholds, p_values, threshold
from ood_scores.errors import BadInput, BadLabels, EmptyInput, NotFinite, ShapeMismatch

Array = NDArray[Any]
TRIALS = 1000
SURE = 1e-4
"""Probability that a count in a correct simulation is outside its band; the seeds are fixed."""


def continuous(rng: np.random.Generator, *shape: int) -> Array:
    """Draw uniform scores: P(score < v) = v."""
    return rng.random(shape)


def tied(rng: np.random.Generator, *shape: int) -> Array:
    """Draw five values with equal probability: P(score < v) = v for each of them."""
    return np.floor(5 * rng.random(shape)) / 5


def values(n: int, keep: float, delta: float | None = None, draw: Callable[..., Array] = continuous) -> Array:
    """Return the threshold for each of many calibration sets; a row is below it with that probability."""
    sets = draw(np.random.default_rng(n), TRIALS, n)
    return np.array([threshold(rows, keep, delta=delta).value for rows in sets])


def at_least(count: int, share: float, trials: int = TRIALS) -> bool:
    return count >= binom.ppf(SURE, trials, share)


def at_most(count: int, share: float, trials: int = TRIALS) -> bool:
    return count <= binom.isf(SURE, trials, share)


@pytest.mark.parametrize(
    ("scores", "keep", "value", "rank"),
    [
        (range(1, 21), 0.95, 1, 1),
        (range(1, 20), 0.95, 1, 1),
        (range(1, 40), 0.95, 2, 2),
        (range(1, 39), 0.95, 1, 1),
        (range(1, 10), 0.9, 1, 1),
        (range(1, 101), 0.9, 10, 10),
        ([3, 2, 2, 2], 0.5, 2, 2),
        ([7, 7, 7], 0.25, 7, 3),
        ([5], 0.5, 5, 1),
        ([-math.inf, 1, math.inf], 0.25, math.inf, 3),
    ],
)
def test_the_value_is_an_order_statistic(scores: Any, keep: float, value: float, rank: int) -> None:
    shuffled = np.random.default_rng(0).permutation(np.array(list(scores), dtype=float))
    assert threshold(shuffled, keep) == Threshold(value, keep, len(shuffled), rank)


def test_with_delta_the_rank_is_that_of_tolerance_limits() -> None:
    """For 95/95, 59 and 93 rows are needed to reject one and two; 100 rows allow 2 (Wilks' tolerance limits)."""
    ranks = {n: threshold(range(n), 0.95, delta=0.05).rank for n in (59, 92, 93, 100, 124)}
    assert ranks == {59: 1, 92: 1, 93: 2, 100: 2, 124: 3}
    found = threshold(range(100), 0.95, delta=0.05)
    assert found.value == 1
    assert found.level == pytest.approx(1 - 2 / 101)
    assert found.guarantee == (
        "at least 98.02% of ID rows are kept on average over calibration sets of 100 rows, and at least 95.00% with "
        "95.00% of them"
    )


@pytest.mark.parametrize(
    ("keep", "delta", "needed"),
    [(0.95, None, 19), (0.6, None, 2), (0.999, None, 999), (0.95, 0.05, 59), (0.9, 0.05, 29)],
)
def test_too_few_rows_reject_nothing_and_warn_how_many_are_needed(
    keep: float, delta: float | None, needed: int
) -> None:
    with pytest.warns(UserWarning, match=f"no row can be rejected .*: at least {needed} are needed"):
        few = threshold(range(needed - 1), keep, delta=delta)
    assert few == Threshold(-math.inf, keep, needed - 1, 0, delta)
    assert few.level == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert threshold(range(needed), keep, delta=delta).rank == 1


@pytest.mark.parametrize(("n", "keep", "level"), [(20, 0.95, 20 / 21), (20, 0.8, 17 / 21), (200, 0.95, 191 / 201)])
def test_coverage_over_calibration_sets_is_the_stated_level(n: int, keep: float, level: float) -> None:
    """With one new row per calibration set, the number of kept rows is binomial with the level, at least ``keep``."""
    limits = values(n, keep)
    kept = int((np.random.default_rng(1).random(TRIALS) >= limits).sum())
    assert threshold(range(n), keep).level == pytest.approx(level)
    assert level >= keep
    assert at_least(kept, level)
    assert at_most(kept, level)


@pytest.mark.parametrize(("n", "keep"), [(20, 0.8), (100, 0.95)])
def test_the_share_kept_by_a_calibration_set_has_a_beta_distribution(n: int, keep: float) -> None:
    rank = threshold(range(n), keep).rank
    assert kstest(1 - values(n, keep), beta(n + 1 - rank, rank).cdf).pvalue > SURE


@pytest.mark.parametrize(("n", "keep"), [(20, 0.95), (20, 0.7), (200, 0.7)])
def test_ties_only_keep_more(n: int, keep: float) -> None:
    limits = values(n, keep, draw=tied)
    kept = int((tied(np.random.default_rng(1), TRIALS) >= limits).sum())
    assert at_least(kept, keep)
    assert len(np.unique(limits)) > 1
    assert np.mean(1 - limits) > threshold(range(n), keep).level


@pytest.mark.parametrize(("n", "keep", "delta"), [(20, 0.8, 0.1), (60, 0.95, 0.05), (300, 0.9, 0.2)])
def test_with_delta_all_but_that_share_of_calibration_sets_keep_enough(n: int, keep: float, delta: float) -> None:
    enough = [int((1 - values(n, keep, delta, draw) >= keep).sum()) for draw in (continuous, tied)]
    assert all(at_least(count, 1 - delta) for count in enough)
    rank = threshold(range(n), keep, delta=delta).rank
    assert binom.cdf(rank - 1, n, 1 - keep) <= delta < binom.cdf(rank, n, 1 - keep), "the largest such rank"
    assert not at_least(int((1 - values(n, keep) >= keep).sum()), 1 - delta), "without delta this does not hold"


def test_each_predicted_class_has_the_threshold_of_its_rows() -> None:
    rng = np.random.default_rng(0)
    scores, predictions = rng.normal(size=500), rng.integers(0, 3, 500)
    found = class_thresholds(scores, predictions, 3, 0.9, delta=0.1)
    assert found == tuple(threshold(scores[predictions == c], 0.9, delta=0.1) for c in range(3))
    assert class_thresholds(torch.tensor(scores), torch.tensor(predictions), 3, 0.9, delta=0.1) == found


def test_coverage_is_guaranteed_in_each_predicted_class() -> None:
    """The classes have different scores, so that a single threshold keeps too few rows of the first class."""
    rng = np.random.default_rng(0)
    kept, kept_by_one, rows = np.zeros(3, int), np.zeros(3, int), np.zeros(3, int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(TRIALS):
            predicted = rng.choice(3, size=101, p=[0.15, 0.25, 0.6])
            scores = rng.normal(size=101) + predicted
            new, its = scores[100], predicted[100]
            rows[its] += 1
            kept[its] += new >= class_thresholds(scores[:100], predicted[:100], 3, 0.9)[its].value
            kept_by_one[its] += new >= threshold(scores[:100], 0.9).value
    assert all(at_least(kept[c], 0.9, rows[c]) for c in range(3))
    assert not at_least(kept_by_one[0], 0.9, rows[0])


def test_classes_with_too_few_rows_reject_nothing() -> None:
    predictions = [0] * 18 + [2] * 19
    with pytest.warns(UserWarning, match=r"2 of 3 classes \(0, 1\) .* keep 0.95, .*: each needs at least 19 rows"):
        found = class_thresholds(np.arange(37.0), predictions, 3)
    assert [each.value for each in found] == [-math.inf, -math.inf, 18]
    assert [each.n for each in found] == [18, 0, 19]


def test_p_values_by_hand() -> None:
    found = p_values([3, 1, 2, 2], [0, 1, 1.5, 2, 2.5, 3, 9, -math.inf])
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, np.array([1, 2, 2, 4, 4, 5, 5, 1]) / 5)


@pytest.mark.parametrize("draw", [continuous, tied])
def test_p_values_are_super_uniform(draw: Callable[..., Array]) -> None:
    """Without ties, each of the n + 1 values is equally likely."""
    n = 20
    rows = draw(np.random.default_rng(3), TRIALS, n + 1)
    found = np.array([p_values(row[:n], row[n:])[0] for row in rows])
    for place in range(1, n + 1):
        share = place / (n + 1)
        count = int((found <= share).sum())
        assert at_most(count, share)
        assert draw is tied or at_least(count, share)


@given(
    calibration=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    keep=st.sampled_from([0.5, 0.8, 0.9, 0.95]),
    delta=st.sampled_from([None, 0.3]),
)
def test_a_small_p_value_is_a_score_below_the_threshold(
    calibration: list[int], keep: float, delta: float | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = threshold(calibration, keep, delta=delta)
    scores = np.arange(-1, 11)
    small = p_values(calibration, scores) <= found.rank / (found.n + 1)
    np.testing.assert_array_equal(small, scores < found.value)


def test_benjamini_hochberg_by_hand() -> None:
    p = [0.9, 0.005, 0.03, 0.04, 0.03]
    np.testing.assert_array_equal(benjamini_hochberg(p, 0.05), [False, True, True, True, True])
    np.testing.assert_array_equal(benjamini_hochberg(p, 0.045), [False, True, False, False, False])
    assert not benjamini_hochberg([0.02, 0.5], 0.03).any()
    assert benjamini_hochberg([0.1, 0.7, 0.8], 0.3).tolist() == [True, False, False], "3 * 0.1 is rounded above 0.3"


@given(
    p=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    rate=st.floats(0.01, 0.9),
)
def test_benjamini_hochberg_agrees_with_scipy(p: list[float], rate: float) -> None:
    adjusted = false_discovery_control(p)
    clear = np.abs(adjusted - rate) > 1e-9
    np.testing.assert_array_equal(benjamini_hochberg(p, rate)[clear], (adjusted <= rate)[clear])


def discoveries(draw: Callable[..., Array], n: int, rate: float) -> tuple[Array, Array]:
    """Return the false discovery rate and the share of OoD rows found, for batches of 16 ID and 4 OoD rows."""
    rng = np.random.default_rng(5)
    false, found = [], []
    for _ in range(4 * TRIALS):
        rows = draw(rng, n + 16)
        batch = np.concatenate([rows[n:], rng.random(4) / 20 - (draw is tied)])
        declared = benjamini_hochberg(p_values(rows[:n], batch), rate)
        false.append(declared[:16].sum() / max(declared.sum(), 1))
        found.append(declared[16:].mean())
    return np.array(false), np.array(found)


def test_the_false_discovery_rate_with_a_shared_calibration_set() -> None:
    """If rate (n + 1) / m is a whole number, the rate is exactly ``rate`` times the share of ID rows."""
    false, found = discoveries(continuous, n=199, rate=0.1)
    error = false.std() / math.sqrt(len(false))
    assert abs(false.mean() - 0.1 * 16 / 20) < 4 * error
    assert found.mean() > 0.05
    false, found = discoveries(tied, n=199, rate=0.1)
    assert false.mean() <= 0.1 * 16 / 20 + 4 * false.std() / math.sqrt(len(false))
    assert found.mean() > 0.9


def test_tensors_arrays_and_lists_have_the_same_results() -> None:
    scores = np.random.default_rng(0).normal(size=50).astype(np.float16)
    for other in (torch.tensor(scores), scores.tolist(), scores.astype(np.float64)):
        assert threshold(other) == threshold(scores)
        np.testing.assert_array_equal(p_values(other, other), p_values(scores, scores))


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, math.nan])
def test_shares_must_be_between_0_and_1(share: float) -> None:
    with pytest.raises(BadInput, match=r"keep must be in \(0, 1\)"):
        threshold([1.0], share)
    with pytest.raises(BadInput, match=r"delta must be in \(0, 1\)"):
        threshold([1.0], 0.9, delta=share)
    with pytest.raises(BadInput, match=r"keep must be in \(0, 1\)"):
        class_thresholds([1.0], [0], 1, share)
    with pytest.raises(BadInput, match=r"rate must be in \(0, 1\)"):
        benjamini_hochberg([0.5], share)


def test_bad_scores_are_refused() -> None:
    calls: list[Callable[[Any], Any]] = [threshold, lambda bad: p_values(bad, [1.0]), lambda bad: p_values([1.0], bad)]
    for call in calls:
        with pytest.raises(NotFinite, match=r"1 of 2 .* scores are NaN"):
            call([1.0, math.nan])
        with pytest.raises(EmptyInput, match="there are no"):
            call([])
        with pytest.raises(ShapeMismatch, match=r"have shape \[1, 2\]"):
            call([[1.0, 2.0]])
    for bad in ([0.5, 1.1], [-0.1, 0.5]):
        with pytest.raises(BadInput, match=r"p-values must be in \[0, 1\]"):
            benjamini_hochberg(bad, 0.1)


def test_bad_predictions_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"2 scores, but predictions of shape \[3\]"):
        class_thresholds([1.0, 2.0], [0, 1, 1], 2)
    for bad in ([0, 2], [-1, 0], [0.0, 1.0], [True, False]):
        with pytest.raises(BadLabels, match=r"class indices in 0 \.\. 1"):
            class_thresholds([1.0, 2.0], bad, 2)
