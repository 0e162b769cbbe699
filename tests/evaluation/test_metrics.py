from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

import ood_scores as package
from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch, UnknownName
from ood_scores.evaluation.metrics import (
    aupr_in,
    aupr_out,
    auroc,
    compare,
    fpr95_id,
    fpr95_ood,
    fpr_at_tpr_id,
    fpr_at_tpr_ood,
)
from ood_scores.evaluation.threshold_counts import roc_counts

METRICS: dict[str, Callable[..., float]] = {
    "auroc": auroc,
    "aupr_in": aupr_in,
    "aupr_out": aupr_out,
    "fpr95_id": fpr95_id,
    "fpr95_ood": fpr95_ood,
}
INF = float("inf")


def normal(seed: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(1, 1, n), rng.normal(0, 1.5, m)


def tied(seed: int, n: int, m: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, values + 1, n) / 4, rng.integers(0, values, m) / 4


FINITE_CASES = {
    "random": normal(0, 1000, 700),
    "few OoD": normal(1, 3001, 17),
    "few ID": normal(2, 13, 2000),
    "heavily tied": tied(3, 900, 1100, 5),
    "two values": tied(4, 50, 60, 2),
    "all equal": (np.full(40, 2.5), np.full(30, 2.5)),
    "separated": (np.linspace(1, 2, 30), np.linspace(-1, 0, 20)),
    "reversed": (np.linspace(-1, 0, 30), np.linspace(1, 2, 20)),
    "one each": (np.array([1.0]), np.array([0.0])),
    "one each, tied": (np.array([1.0]), np.array([1.0])),
    "adjacent floats": (np.array([1.0, np.nextafter(1, 2)]), np.array([1.0, np.nextafter(1, 0)])),
    "signed zeros": (np.array([0.0, -0.0, 1.0]), np.array([-0.0, 0.0, -1.0])),
}


def brute_points(positive: np.ndarray, negative: np.ndarray) -> list[tuple[int, int]]:
    """(accepted positives, accepted negatives) at every distinct threshold, highest first."""
    thresholds = sorted({*positive.tolist(), *negative.tolist()}, reverse=True)
    return [(int((positive >= t).sum()), int((negative >= t).sum())) for t in thresholds]


def brute_force(id_scores: np.ndarray, ood_scores: np.ndarray, rule: str = "first") -> dict[str, float]:
    def fpr(positive: np.ndarray, negative: np.ndarray) -> float:
        points = brute_points(positive, negative)
        if rule == "first":
            return next(fp for tp, fp in points if 20 * tp >= 19 * len(positive)) / len(negative)

        def preference(point: tuple[int, int]) -> tuple[Fraction, int, int]:
            tp, fp = point
            return abs(Fraction(tp, len(positive)) - Fraction(19, 20)), -tp, fp if tp == len(positive) else -fp

        return min(points, key=preference)[1] / len(negative)

    def average_precision(positive: np.ndarray, negative: np.ndarray) -> float:
        total, before = 0.0, 0
        for tp, fp in brute_points(positive, negative):
            total += (tp - before) * tp / (tp + fp)
            before = tp
        return total / len(positive)

    wins = (id_scores[:, None] > ood_scores).sum() + 0.5 * (id_scores[:, None] == ood_scores).sum()
    return {
        "auroc": float(wins / (len(id_scores) * len(ood_scores))),
        "aupr_in": average_precision(id_scores, ood_scores),
        "aupr_out": average_precision(-ood_scores, -id_scores),
        "fpr95_id": fpr(id_scores, ood_scores),
        "fpr95_ood": fpr(-ood_scores, -id_scores),
    }


def ratios(id_scores: Any, ood_scores: Any, **options: Any) -> dict[str, float]:
    """The metrics that ``brute_force`` computes."""
    found = compare(id_scores, ood_scores, **options)
    assert (found.n_id, found.n_ood) == (len(id_scores), len(ood_scores))
    return {name: found[name] for name in ("auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood")}


# --- against references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FINITE_CASES)
def test_metrics_equal_scikit_learn(case: str) -> None:
    id_scores, ood_scores = FINITE_CASES[case]
    scores = np.concatenate([id_scores, ood_scores])
    is_id = np.arange(len(scores)) < len(id_scores)

    def fpr(labels: np.ndarray, scores: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        return fpr[np.flatnonzero(np.round(tpr * labels.sum()) * 20 >= 19 * labels.sum())[0]]

    assert auroc(id_scores, ood_scores) == pytest.approx(roc_auc_score(is_id, scores), abs=1e-12)
    assert aupr_in(id_scores, ood_scores) == pytest.approx(average_precision_score(is_id, scores), abs=1e-12)
    assert aupr_out(id_scores, ood_scores) == pytest.approx(average_precision_score(~is_id, -scores), abs=1e-12)
    assert fpr95_id(id_scores, ood_scores) == pytest.approx(fpr(is_id, scores), abs=1e-12)
    assert fpr95_ood(id_scores, ood_scores) == pytest.approx(fpr(~is_id, -scores), abs=1e-12)
    for labels, signed, metric in [(is_id, scores, aupr_in), (~is_id, -scores, aupr_out)]:
        precision, recall, _ = precision_recall_curve(labels, signed)
        expected = auc(recall, precision)
        assert metric(id_scores, ood_scores, interpolation="trapezoid") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rule", ["first", "nearest"])
@pytest.mark.parametrize("case", FINITE_CASES)
def test_metrics_equal_brute_force(case: str, rule: Any) -> None:
    id_scores, ood_scores = FINITE_CASES[case]
    assert ratios(id_scores, ood_scores, rule=rule) == pytest.approx(
        brute_force(id_scores, ood_scores, rule), abs=1e-12
    )


def test_infinities_are_ordered_values() -> None:
    id_scores = np.array([INF, INF, 1.0, -INF])
    ood_scores = np.array([INF, 0.0, -INF, -INF])
    assert ratios(id_scores, ood_scores) == pytest.approx(brute_force(id_scores, ood_scores))
    as_ranks = ratios([3, 3, 2, 0], [3, 1, 0, 0])
    assert ratios(id_scores, ood_scores) == as_ranks


@pytest.mark.parametrize("name", METRICS)
def test_each_function_equals_its_field_of_compare(name: str) -> None:
    options: dict[str, Any] = {}
    if name.startswith("aupr"):
        options = {"interpolation": "trapezoid"}
    elif name.startswith("fpr95"):
        options = {"rule": "nearest"}
    for id_scores, ood_scores in FINITE_CASES.values():
        assert METRICS[name](id_scores, ood_scores) == ratios(id_scores, ood_scores)[name]
        assert METRICS[name](id_scores, ood_scores, **options) == ratios(id_scores, ood_scores, **options)[name]


# --- by hand --------------------------------------------------------------------------------------------------------


def test_roc_counts_computed_by_hand() -> None:
    counts = roc_counts([3, 1, 2, 2], [2, 0, 2])
    np.testing.assert_array_equal(counts.thresholds, [3, 2, 1, 0])
    np.testing.assert_array_equal(counts.positives, [1, 3, 4, 4])
    np.testing.assert_array_equal(counts.negatives, [0, 2, 2, 3])
    assert counts.positives.dtype == counts.negatives.dtype == np.int64
    assert counts.thresholds.dtype == np.float64
    mirrored, direct = counts.mirrored(), roc_counts([-2, 0, -2], [-3, -1, -2, -2])
    for field in ("thresholds", "positives", "negatives"):
        np.testing.assert_array_equal(getattr(mirrored, field), getattr(direct, field))
        assert getattr(mirrored, field).dtype == getattr(direct, field).dtype


def test_metrics_computed_by_hand() -> None:
    found = compare([3, 1, 2, 2], [2, 0, 2])
    assert found.auroc == (3 + 1 + 2 * (1 + 0.5 + 0.5)) / 12  # pairs won by the scores 3, 1 and twice 2
    assert found.aupr_in == pytest.approx(1 / 4 + 2 / 4 * 3 / 5 + 1 / 4 * 4 / 6)
    assert found.aupr_out == pytest.approx(1 / 3 + 2 / 3 * 3 / 6)
    assert found.fpr95_id == 2 / 3  # threshold 1
    assert found.fpr95_ood == 3 / 4  # threshold 2
    assert (found.n_id, found.n_ood) == (4, 3)


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "expected"),
    [
        ([5, 6], [1, 2], {"auroc": 1.0, "aupr_in": 1.0, "aupr_out": 1.0, "fpr95_id": 0.0, "fpr95_ood": 0.0}),
        ([1, 2], [5, 6], {"auroc": 0.0, "aupr_in": 5 / 12, "aupr_out": 5 / 12, "fpr95_id": 1.0, "fpr95_ood": 1.0}),
        ([7, 7, 7], [7], {"auroc": 0.5, "aupr_in": 0.75, "aupr_out": 0.25, "fpr95_id": 1.0, "fpr95_ood": 1.0}),
    ],
)
def test_degenerate_metrics_by_hand(id_scores: list[int], ood_scores: list[int], expected: dict[str, float]) -> None:
    assert ratios(id_scores, ood_scores) == pytest.approx(expected, abs=1e-15)


def test_ninety_five_percent_of_twenty_is_nineteen() -> None:
    id_scores = np.arange(1, 21)  # the threshold 2 accepts 19 of 20
    ood_scores = np.array([2, 1, 1, 1])
    assert fpr95_id(id_scores, ood_scores) == 1 / 4
    assert fpr95_ood(-ood_scores, -id_scores) == 1 / 4
    assert fpr95_id(id_scores, ood_scores, rule="nearest") == 1 / 4


@pytest.mark.parametrize("n", [20, 40, 60, 100, 220, 1000, 10_000, 26_020])
@pytest.mark.parametrize("percent", [5, 7, 14, 28, 55, 57, 58, 90, 95, 99, 100])
def test_the_accepted_share_is_compared_exactly(n: int, percent: int) -> None:
    ranks = np.arange(n, 0, -1)
    needed = -(-percent * n // 100)
    assert fpr_at_tpr_id(ranks, ranks, percent / 100) == needed / n
    assert fpr_at_tpr_ood(ranks, ranks, percent / 100) == needed / n


def test_nearest_rule_computed_by_hand() -> None:
    # Of 18 ID rows the thresholds 20 and 15 accept 17 (0.944), which is closer to 0.95 than 18 for threshold 10.
    id_scores, ood_scores = np.arange(180, 0, -10), np.array([1000, 15, 10, 5])
    assert fpr95_id(id_scores, ood_scores, rule="first") == 3 / 4
    assert fpr95_id(id_scores, ood_scores, rule="nearest") == 2 / 4
    assert fpr95_ood(-ood_scores, -id_scores, rule="nearest") == 2 / 4


def test_nearest_rule_takes_the_higher_of_two_equally_close_shares() -> None:
    id_scores = np.arange(10, 0, -1)  # 9/10 and 10/10 are equally close to 0.95
    assert fpr95_id(id_scores, [1.5, 0.5], rule="nearest") == 1 / 2
    assert fpr95_id(id_scores, [1.0, 0.5], rule="nearest") == 1 / 2


def test_trapezoid_computed_by_hand() -> None:
    # Points (recall, precision): (0, 1), (1/2, 1), (1/2, 1/2), (1, 2/3).
    assert aupr_in([3, 1], [2], interpolation="trapezoid") == pytest.approx(1 / 2 + 1 / 2 * (1 / 2 + 2 / 3) / 2)
    assert aupr_in([3, 1], [2]) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    # OoD positive: (0, 1), (0, 0), (1, 1/2), (1, 1/3).
    assert aupr_out([3, 1], [2], interpolation="trapezoid") == pytest.approx((0 + 1 / 2) / 2)
    assert aupr_out([3, 1], [2]) == pytest.approx(1 / 2)


# --- properties -----------------------------------------------------------------------------------------------------

few_values = st.lists(st.integers(-6, 6), min_size=1, max_size=60)
many_values = st.lists(st.floats(allow_nan=False, width=32), min_size=1, max_size=60)
either = st.one_of(st.tuples(few_values, few_values), st.tuples(many_values, many_values))
rules = st.sampled_from(["first", "nearest"])
interpolations = st.sampled_from(["step", "trapezoid"])


@given(either, rules)
def test_random_metrics_equal_brute_force(sides: Any, rule: str) -> None:
    id_scores, ood_scores = (np.array(side, dtype=np.float64) for side in sides)
    assert ratios(id_scores, ood_scores, rule=rule) == pytest.approx(
        brute_force(id_scores, ood_scores, rule), abs=1e-12
    )


@given(either, st.randoms(use_true_random=False), rules, interpolations)
def test_metrics_ignore_the_order_of_rows(sides: Any, random: Any, rule: str, interpolation: str) -> None:
    shuffled = [random.sample(side, len(side)) for side in sides]
    options = {"rule": rule, "interpolation": interpolation}
    assert ratios(*shuffled, **options) == ratios(*sides, **options)


@given(st.tuples(few_values, few_values), rules, interpolations)
def test_metrics_ignore_strictly_increasing_transforms(sides: Any, rule: str, interpolation: str) -> None:
    id_scores, ood_scores = (np.array(side, dtype=np.float64) for side in sides)
    options = {"rule": rule, "interpolation": interpolation}
    expected = ratios(id_scores, ood_scores, **options)
    transforms: list[Callable[[Any], Any]] = [np.exp, np.tanh, lambda x: x**3, lambda x: x + 0.375, lambda x: 1e-9 * x]
    for transform in transforms:
        assert ratios(transform(id_scores), transform(ood_scores), **options) == expected


@given(either, rules, interpolations)
def test_negating_and_swapping_exchanges_the_positive_class(sides: Any, rule: str, interpolation: str) -> None:
    id_scores, ood_scores = (np.array(side, dtype=np.float64) for side in sides)
    options = {"rule": rule, "interpolation": interpolation}
    here, there = ratios(id_scores, ood_scores, **options), ratios(-ood_scores, -id_scores, **options)
    assert here["auroc"] == there["auroc"]
    assert (here["aupr_in"], here["aupr_out"]) == (there["aupr_out"], there["aupr_in"])
    assert (here["fpr95_id"], here["fpr95_ood"]) == (there["fpr95_ood"], there["fpr95_id"])
    assert auroc(ood_scores, id_scores) == pytest.approx(1 - here["auroc"], abs=1e-15)


@given(either)
def test_rows_repeated_on_one_side_keep_the_auroc_and_its_fpr(sides: Any) -> None:
    id_scores, ood_scores = sides
    assert auroc(id_scores * 3, ood_scores) == pytest.approx(auroc(id_scores, ood_scores), abs=1e-15)
    assert fpr95_id(id_scores * 3, ood_scores) == fpr95_id(id_scores, ood_scores)


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8]
)
def test_metrics_of_tensors_arrays_and_lists_agree(dtype: torch.dtype) -> None:
    id_scores, ood_scores = [3, 1, 2, 2], [2, 0, 2]
    tensors = torch.tensor(id_scores, dtype=dtype), torch.tensor(ood_scores, dtype=dtype)
    arrays = tensors[0].double().numpy(), tensors[1].double().numpy()
    assert compare(*tensors) == compare(*arrays) == compare(id_scores, ood_scores)


def test_metrics_of_tensors_that_require_gradients() -> None:
    assert auroc(torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.0], requires_grad=True)) == 1.0


def test_float32_scores_are_not_rounded_further() -> None:
    id_scores = torch.tensor([1.0, 1.0 + 2**-23])
    assert auroc(id_scores, torch.tensor([1.0])) == 0.75


@pytest.mark.gpu
def test_metrics_of_tensors_on_a_gpu() -> None:
    id_scores, ood_scores = map(torch.from_numpy, FINITE_CASES["heavily tied"])
    assert compare(id_scores.cuda(), ood_scores.cuda()) == compare(id_scores, ood_scores)


def test_metrics_do_not_change_their_inputs() -> None:
    id_scores, ood_scores = np.array([3.0, 1.0, 2.0]), np.array([2.0, 0.0])
    compare(id_scores, ood_scores)
    np.testing.assert_array_equal(id_scores, [3, 1, 2])
    np.testing.assert_array_equal(ood_scores, [2, 0])


@pytest.mark.parametrize("metric", [*METRICS.values(), compare, roc_counts])
def test_metrics_refuse_bad_scores(metric: Callable[[Any, Any], Any]) -> None:
    nan = float("nan")
    with pytest.raises(NotFinite, match="2 of 3 ID scores are NaN"):
        metric([nan, 1.0, nan], [0.0])
    with pytest.raises(NotFinite, match="1 of 2 OoD scores are NaN"):
        metric([1.0], torch.tensor([nan, INF]))
    with pytest.raises(EmptyInput, match="no ID scores"):
        metric([], [0.0])
    with pytest.raises(EmptyInput, match="no OoD scores"):
        metric([0.0], torch.zeros(0))
    with pytest.raises(ShapeMismatch, match=r"ID scores have shape \[2, 1\]"):
        metric(np.zeros((2, 1)), [0.0])
    with pytest.raises(ShapeMismatch, match=r"OoD scores have shape \[\]"):
        metric([0.0], np.float64(1))
    with pytest.raises(BadInput, match="ID scores have dtype complex128"):
        metric(torch.zeros(2, dtype=torch.complex64), [0.0])
    with pytest.raises(BadInput, match="OoD scores have dtype <U1"):
        metric([0.0], ["a"])


def test_unknown_options_list_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="choose from first, nearest"):
        fpr95_id([1], [0], rule="closest")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="choose from step, trapezoid"):
        aupr_out([1], [0], interpolation="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize("tpr", [0, -0.1, 1.01, float("nan")])
def test_tpr_out_of_range(tpr: float) -> None:
    with pytest.raises(BadInput, match=r"tpr must be in \(0, 1\]"):
        fpr_at_tpr_id([1], [0], tpr)


def test_metrics_are_importable_by_their_short_path() -> None:
    from ood_scores.metrics import auroc as short

    assert package.metrics.auroc is short
    assert short([1.0, 2.0], [0.0]) == 1.0
