"""KNN against a brute-force search in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from ood_scores import FeatureSet, create_scorer, score
from ood_scores.errors import BadInput, NotFinite
from ood_scores.scorers.numerics.exact_search import Wanted, search_unit_rows
from ood_scores.scorers.numerics.nearest import exact_neighbors
from ood_scores.scorers.one_pass import score_all

Array = NDArray[np.float64]


def rows(count: int, width: int = 8, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, width))


def unit(values: Array) -> Array:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def brute_force(bank: Array, values: Array, k: int, normalize: bool = True) -> Array:
    """The negative distance to the k-th neighbor."""
    if normalize:
        bank, values = unit(bank), unit(values)
    return -np.sort(cdist(values, bank), axis=1)[:, k - 1]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 5, 50, 200])
@pytest.mark.parametrize("width", [1, 8, 100])
def test_equals_brute_force(k: int, normalize: bool, width: int) -> None:
    """The tolerance is for the bank, which is float32."""
    bank, values = rows(200, width), rows(60, width, seed=1)
    found = score("knn", FeatureSet(values), fit=FeatureSet(bank), k=k, normalize=normalize)
    np.testing.assert_allclose(found, brute_force(bank, values, k, normalize), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6, 1e-9])
def test_tiny_distances(distance: float) -> None:
    """The expanded distances of faiss are noise here: |x|^2 + |y|^2 - 2xy has a float32 error of 1e-5."""
    bank = np.round(rows(50) * 8)  # exact in float32
    values = bank[:30] + distance * unit(rows(30, seed=2))
    found = score("knn", FeatureSet(values), fit=FeatureSet(bank), k=1, normalize=False)
    np.testing.assert_allclose(found, -distance, rtol=1e-5)


def test_tiny_angles() -> None:
    """With normalized rows, only the rounding of the bank to float32 remains, 3e-8 in each coordinate."""
    bank = rows(50)
    values = bank[:30] * 7 + 1e-4 * rows(30, seed=2)
    found = score("knn", FeatureSet(values), fit=FeatureSet(bank), k=1)
    np.testing.assert_allclose(found, brute_force(bank, values, 1), atol=1e-7)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3, 1e-5])
def test_collapsed_classes(spread: float) -> None:
    """Many neighbors are too close for float32 to separate: the right one is found, in blocks of any size."""
    means, labels = unit(rows(4, 64)), np.arange(400) % 4
    bank = unit(means[labels] + spread / 8 * rows(400, 64, seed=1)).astype(np.float32)
    values = FeatureSet(means[labels[:40]] + spread / 8 * rows(40, 64, seed=2))
    scorer = create_scorer("knn", k=20, normalize=False).fit(FeatureSet(bank))
    expected = brute_force(bank.astype(np.float64), values.features.numpy(), 20, normalize=False)
    np.testing.assert_allclose(scorer.score(values), expected, rtol=1e-5)
    np.testing.assert_allclose(scorer.score(values, block_rows=7), scorer.score(values), rtol=1e-5)


@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("piece", [13, 64, 4096])
def test_exact_neighbors_in_pieces_of_the_bank(k: int, piece: int) -> None:
    bank, values = torch.from_numpy(rows(400, 8)), torch.from_numpy(rows(30, 8, seed=1))
    expected = np.argsort(cdist(values, bank), axis=1)[:, :k]
    np.testing.assert_array_equal(exact_neighbors(values, bank, k, piece), expected)


def test_a_row_of_the_bank_is_its_own_first_neighbor() -> None:
    bank = FeatureSet(rows(40).astype(np.float32))
    assert score("knn", bank, fit=bank, k=1, normalize=False).count_nonzero() == 0
    assert (score("knn", bank, fit=bank, k=2, normalize=False) < -0.1).all()


def test_zero_vectors_stay_zero() -> None:
    bank, values = rows(30), rows(5)
    bank[3], values[2] = 0, 0
    found = score("knn", FeatureSet(values), fit=FeatureSet(bank), k=1)
    np.testing.assert_allclose(found, brute_force(bank, values, 1), atol=1e-6)
    assert found[2] == 0
    without = score("knn", FeatureSet(values), fit=FeatureSet(rows(30)), k=1)
    np.testing.assert_allclose(without[2], -1)


def test_only_directions_count_when_normalized() -> None:
    bank, values = rows(30), rows(10, seed=1)
    factors = np.random.default_rng(0).uniform(0.01, 100, size=(10, 1))
    found = score("knn", FeatureSet(values * factors), fit=FeatureSet(bank), k=3)
    np.testing.assert_allclose(found, score("knn", FeatureSet(values), fit=FeatureSet(bank), k=3), rtol=1e-6)


@pytest.mark.parametrize("index", ["Flat", "IVF1,Flat", "HNSW16"])
def test_indexes_that_find_the_exact_neighbors_here(index: str) -> None:
    bank, values = rows(100), rows(20, seed=1)
    found = score("knn", FeatureSet(values), fit=FeatureSet(bank), k=5, index=index)
    np.testing.assert_allclose(found, brute_force(bank, values, 5), rtol=1e-5)


def test_an_approximate_index_never_finds_nearer_neighbors() -> None:
    bank, values = rows(400), rows(50, seed=1)
    found = score("knn", FeatureSet(values), fit=FeatureSet(bank), k=3, index="IVF4,Flat").numpy()
    exact = brute_force(bank, values, 3)
    assert (found <= exact + 1e-6).all()
    assert (np.abs(found - exact) < 1e-6).mean() > 0.3


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"index": "Nonsense"}, "cannot create the index 'Nonsense'"),
        ({"index": ""}, "cannot create the index ''"),
        ({"index": "IVF64,Flat"}, "cannot create the index 'IVF64,Flat' for 40 rows"),
        ({"k": 41}, "k=41 needs at least as many bank rows, got 40: lower k"),
        ({"k": 30, "index": "IVF8,Flat"}, "found fewer than k=30 neighbors"),
        ({"k": 0}, "k must be a whole number of at least 1"),
        ({"k": -3}, "k must be a whole number of at least 1"),
        ({"k": 2.5}, "k must be a whole number of at least 1"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    feats = FeatureSet(rows(40))
    with pytest.raises(BadInput, match=f"knn: .*{message}"):
        score("knn", feats, fit=feats, **({"k": 2} | params))


def test_float64_features_beyond_float32_are_refused() -> None:
    feats = FeatureSet(rows(10) * 1e39)
    assert score("knn", feats, fit=feats, k=1).isfinite().all()
    with pytest.raises(BadInput, match="exceed the range of float32"):
        score("knn", feats, fit=feats, k=1, normalize=False)


def test_rows_that_are_not_finite_are_named() -> None:
    bank, values = FeatureSet(rows(10)), rows(5)
    values[3, 1] = np.nan
    with pytest.raises(NotFinite, match="row 3"):
        score("knn", FeatureSet(values), fit=bank, k=1)


def test_a_failed_refit_leaves_nothing_half_fitted() -> None:
    scorer = create_scorer("knn", k=5)
    scorer.fit(FeatureSet(rows(10)))
    with pytest.raises(BadInput, match="lower k"):
        scorer.fit(FeatureSet(rows(3)))
    assert not scorer.is_fitted


def test_labels_and_logits_are_not_needed() -> None:
    assert score("knn", FeatureSet(torch.eye(3)), fit=FeatureSet(torch.eye(3)), k=1).tolist() == [0, 0, 0]


def banked(bank: Array, values: Array, energies: Array) -> tuple[FeatureSet, FeatureSet]:
    """Sets whose logits have these energies (a single class), or 1."""
    return FeatureSet(bank, energies[:, None]), FeatureSet(values, np.ones((len(values), 1)))


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_scorers_of_one_bank_score_the_same_together_as_alone(spread: float) -> None:
    means = rows(5, 16)
    bank, values = means[np.arange(700) % 5] + spread * rows(700, 16), means[np.arange(60) % 5] + rows(60, 16, seed=1)
    bank[3] = values[2] = 0
    fit, feats = banked(bank, values, np.random.default_rng(2).uniform(-1, 9, size=700))
    together = [
        create_scorer("knn", k=1),
        create_scorer("nnguide"),
        create_scorer("knn", k=700),
        create_scorer("nnguide", k=700),
        create_scorer("nnguide", share=0.5),
        create_scorer("knn", k=20),
        create_scorer("knn", k=20, normalize=False),
    ]
    alone = [scorer.fit(fit).score(feats) for scorer in together]
    for found, expected in zip(score_all(together, feats), alone, strict=True):
        torch.testing.assert_close(found[2], expected[2], rtol=1e-7, atol=0)  # zeros are equally near to all unit rows
        assert torch.equal(found[3:], expected[3:])
        assert torch.equal(found[:2], expected[:2])
    assert len({scorer.scored_with() for scorer in together}) == 3  # the shared bank, the bank of one half, None
    np.testing.assert_allclose(alone[5], brute_force(bank, values, 20), atol=1e-6)


@pytest.mark.parametrize("count", [1, 10, 63, 64, 65, 200, 333])
@pytest.mark.parametrize("size", [333, 4096])
@pytest.mark.parametrize("rows_at_a_time", [7, 512])
@pytest.mark.parametrize("bank_at_a_time", [64, 192, 2**16])
def test_the_shared_search_is_exact_with_ties(count: int, size: int, rows_at_a_time: int, bank_at_a_time: int) -> None:
    """Small whole numbers have many equal products, which are exact."""
    bank = torch.from_numpy(np.round(rows(size, 6))).float()
    values = torch.from_numpy(np.round(rows(40, 6, seed=1))).float()
    weights = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, size=size)).double()
    products = values.double() @ bank.T.double()
    wanted = [Wanted(bank, count), Wanted(bank, count, weights), Wanted(bank, count // 2 + 1)]
    assert wanted[0].order == wanted[2].order != wanted[1].order  # one search for the first and the last
    nearest, weighted, fewer = search_unit_rows(values, wanted, rows_at_a_time, bank_at_a_time)
    assert torch.equal(fewer, nearest[:, : count // 2 + 1])
    added = (1 - bank.double().square().sum(dim=1)) / 2
    for numbers, ranked in ((nearest, products + added), (weighted, products * weights)):
        assert all(len(set(row)) == count for row in numbers.tolist())
        assert torch.equal(ranked.gather(1, numbers), ranked.sort(dim=1, descending=True).values[:, :count])


def test_a_search_index_is_built_only_if_needed_and_again_after_a_refit() -> None:
    first, second, values = FeatureSet(rows(40)), FeatureSet(rows(50, seed=3)), FeatureSet(rows(6, seed=1))
    scorer = create_scorer("knn", k=3).fit(first)
    before = scorer.score(values)
    np.testing.assert_allclose(
        scorer.fit(second).score(values), brute_force(rows(50, seed=3), rows(6, seed=1), 3), 1e-5
    )
    assert torch.equal(scorer.fit(first).score(values), before)
