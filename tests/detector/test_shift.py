"""Two-sample tests: statistics by hand, false alarms in simulations, power, and rows that moved."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, ks_2samp
from sklearn.neighbors import NearestNeighbors

import ood_scores
from ood_scores.detector.shift import Test, median_distance, shift
from ood_scores.errors import BadInput, EmptyInput, NotFinite, ShapeMismatch, UnknownName

TESTS: tuple[Test, ...] = ("mmd", "energy", "knn", "classifier", "ks")


def sides(seed: int = 0, moved: float = 0.5, n: int = 60, m: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 3)), rng.normal(moved, 1, size=(m, 3))


def unbiased(kernel: np.ndarray, n: int) -> float:
    """Unbiased estimate of the difference within and between the sides, from the matrix of a kernel."""
    m = len(kernel) - n
    off_diagonal = kernel - np.diag(np.diag(kernel))
    within = off_diagonal[:n, :n].sum() / (n * (n - 1)) + off_diagonal[n:, n:].sum() / (m * (m - 1))
    return float(within - 2 * kernel[:n, n:].mean())


def distances(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows[:, None] - rows, axis=2)


def test_kernel_statistics_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_scores.detector.shift.BLOCK", 7)
    known, new = sides()
    pairs = distances(np.concatenate([known, new]))
    assert shift(known, new, "energy", permutations=9).statistic == pytest.approx(unbiased(-pairs, 60), rel=1e-9)


def test_mmd_of_several_widths_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_scores.detector.shift.BLOCK", 7)
    known, new = sides()
    pairs = distances(np.concatenate([known, new]))
    upper = np.sort(pairs[np.triu_indices(100, 1)])
    median = upper[(len(upper) - 1) // 2]
    orders = [np.concatenate([np.flatnonzero(side), np.flatnonzero(~side)]) for side in permuted_sides(100, 60, 9, 3)]
    scaled, kernels = [], [np.exp(-(pairs**2) / (2 * (2.0**octave * median) ** 2)) for octave in range(-2, 3)]
    for kernel in kernels:
        estimates = np.array([unbiased(kernel[np.ix_(order, order)], 60) for order in orders])
        scaled.append(estimates / estimates.std())
    largest = np.max(scaled, axis=0)
    found = shift(torch.from_numpy(known), new, "mmd", permutations=9, seed=3)
    assert found.statistic == pytest.approx(largest[0], rel=1e-9)
    assert found.p_value == (largest >= largest[0]).mean()
    chosen = kernels[int(np.argmax([of_kernel[0] for of_kernel in scaled]))]
    witness = (chosen[60:, 60:].sum(axis=1) - 1) / 39 - chosen[60:, :60].mean(axis=1)
    assert found.outlyingness == pytest.approx(witness, rel=1e-9)


def test_the_median_distance_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = torch.randn(1500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shuffled = rows[torch.randperm(1500, generator=torch.Generator().manual_seed(1))]
    assert median_distance(shuffled, 0) == median_distance(rows, 0) != median_distance(rows, 1)


def permuted_sides(rows: int, n: int, permutations: int, seed: int) -> np.ndarray:
    """The same draws as those of the package: which rows are on the reference side."""
    sides = np.tile(np.arange(rows) < n, (permutations + 1, 1))
    sides[1:] = np.random.default_rng(seed).permuted(sides[1:], axis=1)
    return sides


def test_mmd_finds_changes_of_any_scale() -> None:
    rng = np.random.default_rng(3)
    known, moved = rng.normal(size=(200, 2)), rng.normal(0.3, 1, size=(200, 2))
    tight, loose = (sd * rng.normal(size=(200, 2)) + rng.choice([-2.0, 2.0], (200, 2)) for sd in (0.3, 0.9))
    assert shift(known, moved, "mmd", permutations=199).p_value == 0.005
    assert shift(tight, loose, "mmd", permutations=199).p_value == 0.005
    assert shift(tight, loose, "energy", permutations=199).p_value > 0.05


def test_neighbors_and_kolmogorov_smirnov_by_hand() -> None:
    known, new = sides()
    rows = np.concatenate([known, new])
    _, neighbors = NearestNeighbors(n_neighbors=6).fit(rows).kneighbors(rows)
    same = (neighbors[:, 1:] < 60) == (np.arange(100) < 60)[:, None]
    assert shift(known, new, "knn", permutations=9).statistic == pytest.approx(same.mean())
    rounded = known.round(1), new.round(1)
    columns = [ks_2samp(one, other, method="asymp") for one, other in zip(rounded[0].T, rounded[1].T, strict=True)]
    found = shift(*rounded, "ks")
    assert found.statistic == pytest.approx(max(column.statistic for column in columns))
    assert found.p_value == pytest.approx(min(1, 3 * min(column.pvalue for column in columns)), rel=1e-6)


@pytest.mark.parametrize("test", TESTS)
def test_false_alarms_stay_within_their_binomial_band(test: Test) -> None:
    repeats = 100 if test == "classifier" else 250
    p = np.array([shift(*sides(seed, 0, 40, 30), test, permutations=99, seed=seed).p_value for seed in range(repeats)])
    for level in (0.01, 0.05):
        assert (p <= level).sum() <= binom.ppf(0.999, repeats, level)
    assert (p <= 0.3).mean() > 0.1


@pytest.mark.parametrize("test", TESTS)
def test_a_shift_is_found_and_its_rows_are_named(test: Test) -> None:
    known, new = sides(1, 0.0, 200, 150)
    new[:60] += 4
    found = shift(known, new, test, permutations=199)
    assert found.p_value <= 0.005 + 1e-9
    assert (found.most_moved(20) < 60).mean() > 0.9


def test_the_p_value_does_not_depend_on_ties_or_the_order_of_rows() -> None:
    same = np.ones((20, 2))
    assert all(shift(same, same, test, permutations=19).p_value == 1 for test in ("mmd", "energy", "ks"))
    known, new = sides(2)
    again = shift(known[::-1], new[::-1], "energy", permutations=199)
    assert again.statistic == pytest.approx(shift(known, new, "energy", permutations=199).statistic, rel=1e-9)


def test_neighbors_at_the_same_distance_favor_no_side() -> None:
    rows = [np.random.default_rng(seed).integers(0, 2, (60, 1)) for seed in range(100)]
    p = np.array([shift(each[:45], each[45:], "knn", permutations=99, seed=7).p_value for each in rows])
    assert (p <= 0.05).sum() <= binom.ppf(0.999, len(p), 0.05)


@pytest.mark.skipif("OOD_SCORES_DATA" not in os.environ, reason="OOD_SCORES_DATA names no folder")
def test_cifar100_among_cifar10_is_found() -> None:
    from torch.utils.data import DataLoader

    from ood_scores.data.sources import open_dataset
    from ood_scores.models.opening import load_model, preprocessing

    data = Path(os.environ["OOD_SCORES_DATA"])
    model = load_model("cifar_resnet20", next((data / "checkpoints").glob("cifar10_resnet20*")))
    transform = preprocessing(model)
    feats = {
        name: ood_scores.extract(
            model,
            DataLoader(open_dataset(f"sheets:{data}/images/{name}_test?rows=0:600", transform), 200),
            progress=False,
        ).features
        for name in ("cifar10", "cifar100")
    }
    known, other = (torch.as_tensor(feats[name]) for name in ("cifar10", "cifar100"))
    clean = shift(known[:300], known[300:], "energy")
    mixed = shift(known[:300], torch.cat([known[300:450], other[:150]]), "energy")
    assert clean.p_value > 0.02
    assert mixed.p_value < 0.01
    assert (mixed.most_moved(40) >= 150).mean() > 0.6


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("exponent", [-1060, -530, 530, 1000])
def test_the_scale_of_the_features_does_not_matter(test: Test, exponent: int) -> None:
    """At 2^530 squares of features exceed float64, and at 2^-530 they vanish."""
    known, new = (np.round(side * 8) for side in sides(3, 0.5))
    found = shift(np.ldexp(known, exponent), np.ldexp(new, exponent), test, permutations=99)
    expected = shift(known, new, test, permutations=99)
    assert found.p_value == expected.p_value
    assert found.most_moved(5).tolist() == expected.most_moved(5).tolist()
    statistic = np.ldexp(expected.statistic, exponent) if test == "energy" else expected.statistic
    assert found.statistic == pytest.approx(statistic, rel=1e-9)


def test_input_that_cannot_be_right_is_refused() -> None:
    known, new = sides()
    with pytest.raises(UnknownName, match="there is no test of shift 'mmdd'"):
        shift(known, new, "mmdd")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="permutations must be at least 1"):
        shift(known, new, permutations=0)
    with pytest.raises(ShapeMismatch, match="the reference rows have 3 features and the window 2"):
        shift(known, new[:, :2])
    with pytest.raises(EmptyInput, match="there are 9 window rows"):
        shift(known, new[:9])
    with pytest.raises(NotFinite, match="a reference feature is NaN"):
        shift(np.full((20, 3), np.nan), new)
