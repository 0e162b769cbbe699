"""Conformal e-values, e-BH, and p-values under covariate shift: by hand, and their promises in simulations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ood_scores.detector.conformal import benjamini_hochberg, p_values
from ood_scores.detector.e_values import density_ratios, e_benjamini_hochberg, e_values, weighted_p_values
from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch


def test_the_mean_e_value_over_all_ranks_is_one() -> None:
    calibration = np.arange(50.0)
    one_of_each_rank = np.arange(51) - 0.5
    found = e_values(calibration, one_of_each_rank)
    assert found.mean() == pytest.approx(1, rel=1e-12)
    assert (np.diff(found) < 0).all()
    p = p_values(calibration, one_of_each_rank)[:-1]
    formula = (1 - p + p * np.log(p)) / (p * np.log(p) ** 2)
    assert found[:-1] / found[0] == pytest.approx(formula / formula[0], rel=1e-9)


@pytest.mark.parametrize("n", [20, 100, 1000])
def test_e_values_of_id_rows_have_a_mean_of_at_most_one(n: int) -> None:
    rng = np.random.default_rng(n)
    continuous = [e_values(rng.normal(size=n), rng.normal(size=50)).mean() for _ in range(1000)]
    tied = [e_values(rng.integers(0, 5, n), rng.integers(0, 5, 50)).mean() for _ in range(1000)]
    assert np.mean(continuous) == pytest.approx(1, abs=4 * np.std(continuous) / 1000**0.5)
    assert np.mean(tied) < 1


def test_e_benjamini_hochberg_by_hand() -> None:
    assert e_benjamini_hochberg([45.0, 1.0, 19.0, 0.0], rate=0.1).tolist() == [True, False, False, False]
    assert e_benjamini_hochberg([45.0, 1.0, 20.0, 0.0], rate=0.1).tolist() == [True, False, True, False]
    assert not e_benjamini_hochberg([9.0, 1.0], rate=0.1).any()


def false_discoveries(rng: np.random.Generator, procedure: str) -> tuple[float, float]:
    """Share of ID rows among the rows declared OoD, and share of OoD rows found, in a batch of near-copies."""
    calibration = rng.normal(size=5000)
    inside = np.repeat(rng.normal(size=4), 20)  # four videos of 20 equal frames
    outside = rng.normal(-6, 1, 20)
    scores = np.append(inside, outside)
    if procedure == "e":
        found = e_benjamini_hochberg(e_values(calibration, scores), 0.2)
    else:
        found = benjamini_hochberg(p_values(calibration, scores), 0.2)
    return found[:80].sum() / max(1, found.sum()), found[80:].mean()


def test_e_values_bound_false_discoveries_among_dependent_rows() -> None:
    rng = np.random.default_rng(0)
    rate, power = np.mean([false_discoveries(rng, "e") for _ in range(1000)], axis=0)
    assert rate < 0.2
    assert power > 0.9


def test_equal_weights_give_ordinary_p_values() -> None:
    rng = np.random.default_rng(1)
    calibration, scores = rng.integers(0, 9, 40), rng.integers(-1, 10, 30)
    found = weighted_p_values(calibration, scores, np.full(40, 2.0), torch.full((30,), 2.0))
    assert found == pytest.approx(p_values(calibration, scores), rel=1e-12)


def test_weighted_p_values_by_hand() -> None:
    found = weighted_p_values([3.0, 1.0, 2.0], [1.5, 3.0], [1.0, 4.0, 5.0], [2.0, 0.0])
    assert found == pytest.approx([(4 + 2) / 12, 1.0])


def test_weights_mend_the_false_alarms_of_a_covariate_shift() -> None:
    """Scores fall with x; new ID rows have larger x. Plain p-values reject too many, weighted ones as promised."""
    rng, plain, weighted = np.random.default_rng(2), [], []
    for _ in range(1000):
        x, new = rng.normal(0, 1, 200), rng.normal(1, 1, 20)
        scores, of_new = -x + rng.normal(0, 1, 200), -new + rng.normal(0, 1, 20)
        plain.append((p_values(scores, of_new) <= 0.1).mean())
        weighted.append((weighted_p_values(scores, of_new, np.exp(x - 0.5), np.exp(new - 0.5)) <= 0.1).mean())
    assert np.mean(plain) > 0.2
    assert np.mean(weighted) < 0.1 + 3 * np.std(weighted) / 1000**0.5


def test_density_ratios_estimate_the_shift() -> None:
    rng = np.random.default_rng(3)
    known, new = rng.normal(0, 1, (3000, 3)), rng.normal([0.7, 0, 0], 1, (1500, 3))
    of_known, of_new = density_ratios(torch.from_numpy(known), new)
    assert np.log(of_known) == pytest.approx(0.7 * known[:, 0] - 0.245, abs=0.4)
    assert of_known.mean() == pytest.approx(1, abs=0.1)
    assert of_new.mean() > 1.3


def test_input_that_cannot_be_right_is_refused() -> None:
    with pytest.raises(BadInput, match="e-values must not be negative"):
        e_benjamini_hochberg([1.0, -0.5], 0.1)
    with pytest.raises(BadInput, match=r"rate must be in \(0, 1\)"):
        e_benjamini_hochberg([1.0], 0)
    with pytest.raises(ShapeMismatch, match="1 weights for 2 scores"):
        weighted_p_values([1.0, 2.0], [1.0], [1.0], [1.0])
    with pytest.raises(BadInput, match="weights must be finite and not negative"):
        weighted_p_values([1.0, 2.0], [1.0], [1.0, -1.0], [1.0])
    with pytest.raises(BadInput, match="all weights of the calibration rows are 0"):
        weighted_p_values([1.0, 2.0], [1.0], [0.0, 0.0], [0.0])
    with pytest.raises(EmptyInput, match="there are 4 new rows: pass at least 5"):
        density_ratios(np.zeros((9, 2)), np.zeros((4, 2)))
    with pytest.raises(ShapeMismatch, match="calibration rows have 2 features and new rows 3"):
        density_ratios(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(NotFinite, match="a new feature is NaN"):
        density_ratios(np.zeros((9, 1)), np.full((9, 1), np.nan))
