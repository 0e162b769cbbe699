from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chisquare, kstest, norm

from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch, UnknownName
from ood_scores.evaluation import metrics
from ood_scores.evaluation.uncertainty import (
    Comparison,
    Interval,
    auroc_covariance,
    auroc_interval,
    bootstrap,
    compare_auroc,
    mean_auroc_covariance,
    tied_with_best,
)

METRICS: dict[str, Callable[..., float]] = {
    "auroc": metrics.auroc,
    "aupr_in": metrics.aupr_in,
    "aupr_out": metrics.aupr_out,
    "fpr95_id": metrics.fpr95_id,
    "fpr95_ood": metrics.fpr95_ood,
}


def pair(seed: int, n: int, m: int, decimals: int = 15, shift: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, n).round(decimals), rng.normal(0, 1.3, m).round(decimals)


CASES = {
    "random": pair(0, 150, 90),
    "few OoD": pair(1, 300, 4),
    "heavily tied": pair(2, 120, 200, decimals=0),
    "some tied": pair(3, 80, 70, decimals=1),
    "two rows each": (np.array([1.0, 3.0]), np.array([2.0, 0.0])),
    "infinities": (np.array([np.inf, 1.0, 2.0, -np.inf]), np.array([-np.inf, 1.0, np.inf])),
}


def wins(id_scores: np.ndarray, ood_scores: np.ndarray) -> np.ndarray:
    """1 where the ID row outscores the OoD row, one half where they tie, ``[N, M]``."""
    below, equal = ood_scores < id_scores[:, None], ood_scores == id_scores[:, None]
    return below + equal / 2


def naive_covariance(tables: list[np.ndarray]) -> np.ndarray:
    """Covariance of DeLong et al. 1988 from wins ``[S, N, M]`` of each OoD set; the sets share the ID rows."""
    id_placements = np.mean([table.mean(axis=2) for table in tables], axis=0)
    covariance = np.atleast_2d(np.cov(id_placements)) / id_placements.shape[1]
    for table in tables:
        covariance = covariance + np.atleast_2d(np.cov(table.mean(axis=1))) / table.shape[2] / len(tables) ** 2
    return covariance


@pytest.mark.parametrize("case", CASES)
def test_auroc_variance_is_that_of_the_placement_values(case):
    id_scores, ood_scores = CASES[case]
    table = wins(id_scores, ood_scores)
    found = auroc_interval(id_scores, ood_scores)
    assert found.value == metrics.auroc(id_scores, ood_scores)
    assert found.standard_error**2 == pytest.approx(naive_covariance([table[None]])[0, 0], rel=1e-12)
    odds = np.log(found.value / (1 - found.value))
    half = 1.959963984540054 * found.standard_error / (found.value * (1 - found.value))
    assert found.low == pytest.approx(1 / (1 + np.exp(half - odds)), rel=1e-12)
    assert found.high == pytest.approx(1 / (1 + np.exp(-half - odds)), rel=1e-12)


def test_interval_of_separated_scores_has_the_exact_bound():
    better, worse = np.linspace(2, 3, 40), np.linspace(0, 1, 25)
    bound = 0.025 ** (1 / 25)
    assert dataclasses.astuple(auroc_interval(better, worse)) == pytest.approx((1.0, bound, 1.0, 0.0), rel=1e-12)
    assert dataclasses.astuple(auroc_interval(worse, better)) == pytest.approx((0.0, 0.0, 1 - bound, 0.0), rel=1e-12)
    assert auroc_interval(better, worse, level=0.5).low == 0.25 ** (1 / 25)


def test_interval_of_a_single_row_is_infinite():
    assert auroc_interval([1.0], [0.0, 2.0, 0.5, 0.1]) == Interval(0.75, 0.0, 1.0, np.inf)
    assert auroc_interval([1.0, 0.0], [0.5]) == Interval(0.5, 0.0, 1.0, np.inf)
    assert auroc_interval([1.0], [0.0]) == Interval(1.0, (1 - 0.95) / 2, 1.0, np.inf)
    assert compare_auroc(([1.0], [0.0, 2.0]), ([3.0], [0.0, 2.0])) == Comparison(-0.5, -1.0, 1.0, np.inf, 0.0, 1.0)
    areas, covariance = auroc_covariance([[1.0], [3.0]], [[0.0, 2.0], [0.0, 2.0]])
    assert areas.tolist() == [0.5, 1.0]
    assert tied_with_best(areas, covariance).all()


def test_interval_of_equal_scores_is_a_point():
    assert auroc_interval([2.0] * 5, [2.0] * 4) == Interval(0.5, 0.5, 0.5, 0.0)


def continuous(rng: np.random.Generator, n: int, shift: float) -> np.ndarray:
    return rng.normal(shift, 1, n)


def rounded(rng: np.random.Generator, n: int, shift: float) -> np.ndarray:
    return rng.normal(shift, 1, n).round()


def rounded_auroc(shift: float) -> float:
    edges = np.arange(-15, 16) - 0.5
    id_mass, ood_mass = np.diff(norm.cdf(edges - shift)), np.diff(norm.cdf(edges))
    return float(id_mass @ (np.cumsum(ood_mass) - ood_mass / 2))


@pytest.mark.parametrize(
    ("draw", "shift", "truth"),
    [
        (continuous, 1.0, norm.cdf(1 / np.sqrt(2))),
        (continuous, 0.0, 0.5),
        (rounded, 1.0, rounded_auroc(1.0)),
    ],
)
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_interval_covers_the_true_auroc_at_its_level(draw, shift, truth, level):
    rng = np.random.default_rng(4)
    found = [auroc_interval(draw(rng, 200, shift), draw(rng, 100, 0), level) for _ in range(4000)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert abs(covered - level) < 3.5 * np.sqrt(level * (1 - level) / len(found))  # 0.012 at 95%


def test_bound_of_separated_scores_covers_the_true_auroc():
    rng = np.random.default_rng(5)
    truth = norm.cdf(3.5 / np.sqrt(2))
    found = [auroc_interval(rng.normal(3.5, 1, 12), rng.normal(0, 1, 9)) for _ in range(2000)]
    separated = [interval for interval in found if interval.value == 1]
    assert len(separated) > 1000
    assert all(interval.low < truth for interval in separated)


def correlated(seed: int, n: int, shifts: list[float], decimals: int = 15) -> np.ndarray:
    """Scores of correlated scorers, ``[S, n]``."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=n)
    return np.stack([(shared + rng.normal(shift, 0.7, n)).round(decimals) for shift in shifts])


@pytest.mark.parametrize("decimals", [15, 0])
def test_paired_test_equals_the_textbook_formula(decimals):
    id_scores, ood_scores = correlated(6, 130, [1.2, 0.8], decimals), correlated(7, 90, [0, 0], decimals)
    table = np.stack([wins(a, b) for a, b in zip(id_scores, ood_scores, strict=True)])
    covariance = naive_covariance([table])
    difference = table[0].mean() - table[1].mean()
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found = compare_auroc((id_scores[0], ood_scores[0]), (id_scores[1], ood_scores[1]), level=0.9)
    expected = Comparison(
        difference,
        difference - 1.6448536269514722 * error,
        difference + 1.6448536269514722 * error,
        error,
        difference / error,
        2 * norm.sf(difference / error),
    )
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-10)
    swapped = compare_auroc((id_scores[1], ood_scores[1]), (id_scores[0], ood_scores[0]), level=0.9)
    assert (swapped.difference, swapped.low, swapped.p_value) == (-found.difference, -found.high, found.p_value)


def test_paired_test_of_scorers_with_equal_ranks():
    id_scores, ood_scores = pair(8, 50, 40)
    found = compare_auroc((id_scores, ood_scores), (np.exp(id_scores), np.exp(ood_scores)))
    assert found == Comparison(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_paired_test_of_a_difference_without_variance():
    found = compare_auroc(([2.0, 3.0], [0.0, 1.0]), ([5.0, 5.0], [5.0, 5.0]))
    assert found == Comparison(0.5, 0.5, 0.5, 0.0, np.inf, 0.0)


def test_paired_p_values_of_equal_scorers_are_uniform():
    draws = [(correlated(seed, 120, [1, 1]), correlated(-seed % 2**32, 80, [0, 0])) for seed in range(1, 2001)]
    found = [compare_auroc((a[0], b[0]), (a[1], b[1])).p_value for a, b in draws]
    assert kstest(found, "uniform").pvalue > 1e-3
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=3.5 * np.sqrt(0.05 * 0.95 / len(found)))


@pytest.mark.parametrize("decimals", [15, 0])
def test_covariance_over_sets_is_that_of_the_placement_values(decimals):
    id_scores = correlated(9, 70, [1, 1.5, 0.5, 1], decimals)
    sets = [correlated(10, 60, [0, 0.2, 0, 0], decimals), correlated(11, 33, [-1, 0, 0.1, 0], decimals)]
    tables = [np.stack([wins(a, b) for a, b in zip(id_scores, ood, strict=True)]) for ood in sets]
    areas, covariance = mean_auroc_covariance(id_scores, sets)
    np.testing.assert_allclose(areas, np.mean([table.mean(axis=(1, 2)) for table in tables], axis=0), rtol=1e-14)
    np.testing.assert_allclose(covariance, naive_covariance(tables), rtol=1e-11)
    for ood, table in zip(sets, tables, strict=True):
        areas, covariance = auroc_covariance(torch.from_numpy(id_scores), list(ood))
        assert areas.tolist() == [metrics.auroc(a, b) for a, b in zip(id_scores, ood, strict=True)]
        np.testing.assert_allclose(covariance, naive_covariance([table]), rtol=1e-11)


def test_covariance_over_sets_is_that_of_resampling():
    rng = np.random.default_rng(12)
    id_scores, sets = correlated(13, 150, [1, 1.2]), [correlated(14, 120, [0, 0.3]), correlated(15, 90, [-0.5, 0])]
    drawn_id = rng.multinomial(150, np.full(150, 1 / 150), 6000)
    means = np.zeros((2, 6000))
    for ood in sets:
        m = ood.shape[1]
        drawn = rng.multinomial(m, np.full(m, 1 / m), 6000)
        for s in range(2):
            means[s] += ((drawn_id @ wins(id_scores[s], ood[s])) * drawn).sum(axis=1) / (150 * m) / 2
    np.testing.assert_allclose(mean_auroc_covariance(id_scores, sets)[1], np.cov(means), rtol=0.08)


def holm_reference(areas: np.ndarray, covariance: np.ndarray, level: float) -> list[bool]:
    best = int(np.argmax(areas))
    p_values = {}
    for s in range(len(areas)):
        if s != best:
            error = np.sqrt(covariance[s, s] + covariance[best, best] - 2 * covariance[s, best])
            p_values[s] = 2 * norm.sf((areas[best] - areas[s]) / error)
    tied = [True] * len(areas)
    for done, s in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if p_values[s] > level / (len(p_values) - done):
            break
        tied[s] = False
    return tied


@given(seed=st.integers(0, 10**6), scorers=st.integers(1, 8), level=st.sampled_from([0.01, 0.05, 0.3]))
@settings(deadline=None)
def test_ties_follow_holm(seed, scorers, level):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(scorers, scorers)) / 100
    areas, covariance = rng.uniform(0.85, 0.9, scorers), root @ root.T + 1e-5 * np.eye(scorers)
    assert tied_with_best(areas, covariance, level).tolist() == holm_reference(areas, covariance, level)


def test_ties_step_down():
    errors = np.array([0.0, 2.0, 2.2, 3.0])  # p-values 1, .0455, .0278, .0027 of three comparisons
    covariance = np.diag([0.0, 1e-4, 1e-4, 1e-4])
    assert tied_with_best(0.9 - errors / 100, covariance).tolist() == [True, True, True, False]
    assert tied_with_best(0.9 - errors / 100, covariance, 0.06).tolist() == [True, False, False, False]  # .02 .03 .06


def test_scorers_with_equal_ranks_are_tied():
    id_scores, ood_scores = pair(16, 4000, 3000)
    nearly = id_scores.copy()
    nearly[np.argsort(id_scores)[2000]] += 1e-3
    id_table = np.stack([id_scores, 3 * id_scores, nearly, id_scores - 0.3])
    ood_table = np.stack([ood_scores, 3 * ood_scores, ood_scores, ood_scores])
    assert tied_with_best(*auroc_covariance(id_table, ood_table)).tolist() == [True, True, True, False]
    assert tied_with_best(*mean_auroc_covariance(id_table, [ood_table] * 3)).tolist() == [True, True, True, False]


def test_ties_ignore_rounding():
    covariance = np.full((3, 3), 1e-6)  # differences without variance, as far as float64 can tell
    assert tied_with_best([0.9, 0.9 - 1e-10, 0.9 - 1e-8], covariance).tolist() == [True, True, False]


def test_a_separating_scorer_is_not_tied_with_a_constant_one():
    table = auroc_covariance([[2.0, 3.0], [5.0, 5.0]], [[0.0, 1.0], [5.0, 5.0]])
    assert tied_with_best(*table).tolist() == [True, False]


def test_the_truly_best_scorer_is_tied_with_the_best():
    rng = np.random.default_rng(17)
    covariance = 1e-4 * (0.3 * np.eye(8) + 0.7)
    draws = rng.multivariate_normal(np.full(8, 0.9), covariance, 2000)
    kept = np.array([tied_with_best(areas, covariance) for areas in draws])
    assert 0.01 < 1 - kept.mean() < 0.04


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_interval(metric):
    id_scores, ood_scores = pair(18, 400, 300, decimals=1)
    found = bootstrap(id_scores, ood_scores, metric, replicates=200, seed=3, level=0.9)
    assert found.value == METRICS[metric](id_scores, ood_scores)
    assert (found.replicates.shape, found.replicates.dtype) == ((200,), np.float64)
    assert [found.low, found.high] == pytest.approx(np.quantile(found.replicates, [0.05, 0.95]))
    assert found.standard_error == pytest.approx(np.std(found.replicates, ddof=1))
    assert found.low < found.value < found.high
    again = bootstrap(torch.from_numpy(id_scores), list(ood_scores), metric, replicates=200, seed=3)
    other = bootstrap(id_scores, ood_scores, metric, replicates=200, seed=4)
    assert found.replicates.tolist() == again.replicates.tolist()
    assert found.replicates.tolist() != other.replicates.tolist()


@pytest.mark.parametrize("metric", ["auroc", "aupr_in", "aupr_out"])
@pytest.mark.parametrize("shape", [(60, 45, 15), (60, 45, 0), (1, 7, 15), (5, 1, 0)])
def test_bootstrap_replicates_are_the_metric_on_resamples(metric, shape):
    id_scores, ood_scores = pair(19, *shape)
    positive, negative = np.sort(id_scores)[::-1], np.sort(ood_scores)[::-1]
    if metric == "aupr_out":
        positive, negative = np.sort(ood_scores), np.sort(id_scores)
    rng = np.random.default_rng(8)
    expected = []
    for _ in range(50):
        drawn = [side[rng.integers(len(side), size=len(side))] for side in (positive, negative)]
        expected.append(METRICS[metric](*(drawn[::-1] if metric == "aupr_out" else drawn)))
    assert bootstrap(id_scores, ood_scores, metric, replicates=50, seed=8).replicates.tolist() == expected


def fpr95_distribution(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Probability of each number of accepted negatives if positives and negatives are resampled, ``[M + 1]``."""
    n, m = len(positive), len(negative)
    kept = int(np.ceil(19 * n / 20))
    at_most = binom.sf(kept - 1, n, np.arange(n + 1) / n)  # the kept-th highest row is among the r highest rows
    accepted = (negative[:, None] >= np.sort(positive)[::-1]).mean(axis=0)
    return np.diff(at_most) @ binom.pmf(np.arange(m + 1), m, accepted[:, None])


def misfit(values: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the chi-square test; neighboring counts are pooled to an expectation of at least 10."""
    m = len(probabilities) - 1
    observed = np.bincount(np.rint(values * m).astype(int), minlength=m + 1)
    pools = np.floor(np.cumsum(probabilities) * len(values) / 10 - 1e-9).astype(int)
    pools = np.unique(np.minimum(pools, pools[-1] - 1), return_inverse=True)[1]
    return chisquare(np.bincount(pools, observed), np.bincount(pools, probabilities) * len(values)).pvalue


@pytest.mark.parametrize("metric", ["fpr95_id", "fpr95_ood"])
@pytest.mark.parametrize("shape", [(45, 30, 15), (45, 30, 0), (40, 50, 1), (7, 20, 15), (20, 6, 0)])
def test_fpr95_replicates_have_the_distribution_of_resampling(metric, shape):
    id_scores, ood_scores = pair(20, *shape)
    sides = (id_scores, ood_scores) if metric == "fpr95_id" else (-ood_scores, -id_scores)
    probabilities = fpr95_distribution(*sides)
    assert probabilities.sum() == pytest.approx(1)
    rng = np.random.default_rng(21)
    naive = [
        METRICS[metric](rng.choice(id_scores, len(id_scores)), rng.choice(ood_scores, len(ood_scores)))
        for _ in range(3000)
    ]
    assert misfit(np.array(naive), probabilities) > 1e-3
    assert misfit(bootstrap(id_scores, ood_scores, metric, replicates=50_000).replicates, probabilities) > 1e-3


def test_fpr95_interval_covers_the_truth():
    rng = np.random.default_rng(22)
    truth = norm.sf(norm.isf(0.95, loc=2))
    found = [bootstrap(rng.normal(2, 1, 800), rng.normal(0, 1, 500), "fpr95_id", seed=i) for i in range(1500)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in found])
    assert abs(covered - 0.95) < 0.025


@given(
    id_ranks=st.lists(st.integers(-12, 12), min_size=2, max_size=25),
    ood_ranks=st.lists(st.integers(-12, 12), min_size=2, max_size=25),
    seed=st.integers(0, 1000),
    monotone=st.sampled_from([np.exp, np.cbrt, lambda x: 7 * x - 3, np.tanh]),
)
@settings(deadline=None)
def test_intervals_depend_on_the_order_of_scores_only(id_ranks, ood_ranks, seed, monotone):
    id_scores, ood_scores = np.array(id_ranks, float), np.array(ood_ranks, float)
    rng = np.random.default_rng(seed)
    shuffled = monotone(rng.permutation(id_scores)), monotone(rng.permutation(ood_scores))
    plain = auroc_interval(id_scores, ood_scores)
    assert dataclasses.astuple(auroc_interval(*shuffled)) == pytest.approx(dataclasses.astuple(plain), abs=1e-12)
    mirrored = auroc_interval(ood_scores, id_scores)
    assert [1 - mirrored.value, 1 - mirrored.high, 1 - mirrored.low, mirrored.standard_error] == pytest.approx(
        dataclasses.astuple(plain), abs=1e-12
    )
    for metric in METRICS:
        values = [
            bootstrap(*s, metric, replicates=9, seed=seed).replicates for s in ((id_scores, ood_scores), shuffled)
        ]
        np.testing.assert_array_equal(*values)
    second = np.abs(id_scores), np.abs(ood_scores)
    again = rng.permutation(len(id_scores)), rng.permutation(len(ood_scores))
    compared = compare_auroc((id_scores, ood_scores), second)
    reordered = compare_auroc(
        (monotone(id_scores[again[0]]), monotone(ood_scores[again[1]])), (second[0][again[0]], second[1][again[1]])
    )
    assert reordered.difference == compared.difference
    assert reordered.standard_error == pytest.approx(compared.standard_error, abs=1e-12)


GOOD = ([1.0, 2.0, 0.5], [0.0, 1.5])
NAN = ([1.0, float("nan"), 0.5], [0.0, 1.5])


@pytest.mark.parametrize(
    "call",
    [auroc_interval, lambda *s: compare_auroc(s, s), lambda a, b: auroc_covariance([a], [b]), bootstrap],
)
@pytest.mark.parametrize(
    ("scores", "error"),
    [
        (NAN, NotFinite),
        (([], [1.0]), EmptyInput),
        (([1.0], []), EmptyInput),
        (([[1.0]], [1.0]), ShapeMismatch),
        ((["high"], [1.0]), BadInput),
    ],
)
def test_intervals_refuse_bad_scores(call, scores, error):
    with pytest.raises(error):
        call(*scores)


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, float("nan")])
def test_level_out_of_range(level):
    for call in (
        lambda: auroc_interval(*GOOD, level),
        lambda: compare_auroc(GOOD, GOOD, level),
        lambda: tied_with_best([0.5], [[0.0]], level),
        lambda: bootstrap(*GOOD, level=level),
    ):
        with pytest.raises(BadInput, match=r"level must be in \(0, 1\)"):
            call()


def test_score_table_errors():
    with pytest.raises(ShapeMismatch, match="2 and 3 ID scores"):
        compare_auroc(GOOD, ([1.0, 2.0], [0.0, 1.5]))
    with pytest.raises(ShapeMismatch, match="1 and 2 ID scores"):
        auroc_covariance([[1.0, 2.0], [3.0]], [[0.0], [0.0]])
    with pytest.raises(ShapeMismatch, match="2 scorers on the ID rows and 1 on the OoD"):
        auroc_covariance(np.ones((2, 4)), np.ones((1, 3)))
    with pytest.raises(EmptyInput, match="no scorer"):
        auroc_covariance(np.ones((0, 4)), np.ones((0, 3)))
    with pytest.raises(EmptyInput, match="no OoD set"):
        mean_auroc_covariance(np.ones((2, 4)), [])


def test_covariance_errors():
    with pytest.raises(EmptyInput, match="no scorer"):
        tied_with_best([], np.ones((0, 0)))
    with pytest.raises(ShapeMismatch, match=r"\[2\].*\[3, 3\]"):
        tied_with_best([0.5, 0.6], np.eye(3))
    with pytest.raises(NotFinite, match="NaN"):
        tied_with_best([0.5, np.nan], np.eye(2))


def test_bootstrap_errors():
    with pytest.raises(UnknownName, match="did you mean 'fpr95_id'"):
        bootstrap(*GOOD, "fpr95")
    with pytest.raises(BadInput, match="at least 2, got 1"):
        bootstrap(*GOOD, replicates=1)
