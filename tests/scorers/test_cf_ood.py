"""cf_ood against a plain reference that follows the authors' code one row at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from many_classes import FEATS, FIT, FIT_LOGITS, ROWS, TRAIN, WIDTH, Array

from ood_scores import FeatureSet, create_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.row_samples import drawn_numbers
from ood_scores.scorers import cf_ood
from ood_scores.scorers.cf_ood import UnitRows, first_with_enough, neighbor_shares


def unit(values: torch.Tensor) -> torch.Tensor:
    return values / values.norm(dim=1, keepdim=True)


def cfof(bank: Array, features: Array, rho: float) -> list[float]:
    """The score as the authors' postprocessor computes it."""
    count, grid = len(bank), [*np.linspace(0.001, 0.1, 100), *np.linspace(0.105, 0.5, 81), *np.linspace(0.51, 0.99, 49)]
    shares: list[float] = []
    positions: list[int] = []
    for share in grid:
        if not positions or int(share * count - 1) > positions[-1]:
            shares.append(share)
            positions.append(int(share * count - 1))
    neighbors = [np.sort([np.sum((b - other) ** 2) for other in bank]) for b in bank]
    found = []
    for z in features / np.linalg.norm(features, axis=1, keepdims=True):
        distances = [np.sum((z - b) ** 2) for b in bank]
        kappa = 1.0
        for share, position in zip(shares, positions, strict=True):
            near = [d <= ordered[position + 1] + 1e-12 for d, ordered in zip(distances, neighbors, strict=True)]
            if np.mean(near) >= rho - 1e-12:
                kappa = share
                break
        found.append(-kappa)
    return found


@pytest.mark.parametrize(("share", "rho"), [(0.1, 0.01), (0.25, 0.05), (1.0, 0.005), (0.25, 1.0), (0.25, 0.6)])
def test_cf_ood(share: float, rho: float) -> None:
    scorer: Any = create_scorer("cf_ood", share=share, rho=rho).fit(TRAIN)
    assert scorer.bank_.shape == (int(share * len(FIT)), WIDTH)
    np.testing.assert_allclose(scorer.score(FEATS), cfof(scorer.bank_.numpy(), ROWS, rho), rtol=1e-12)


def test_cf_ood_of_rows_of_the_bank() -> None:
    """The distances of bank rows equal those that the fit sorted, whatever block they are computed in."""
    scorer: Any = create_scorer("cf_ood", share=1.0, rho=0.02).fit(TRAIN)
    expected = cfof(scorer.bank_.numpy(), FIT, 0.02)
    for block_rows in (400, 7):
        np.testing.assert_allclose(scorer.score(TRAIN, block_rows=block_rows), expected, rtol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize("width", [3, 100])
def test_cf_ood_decides_in_float32_only_where_float64_agrees(spread: float, width: int) -> None:
    """This includes bank rows, some of whose distances equal those that they are compared with."""
    rng = np.random.default_rng(7)
    means = 1 + rng.normal(size=(4, width))
    fit = means[np.arange(800) % 4] + spread * rng.normal(size=(800, width))
    scorer: Any = create_scorer("cf_ood", share=0.5, rho=0.02).fit(FeatureSet(fit))
    new = unit(torch.from_numpy(means[np.arange(600) % 4] + spread * rng.normal(size=(600, width))))
    rows = torch.cat([new, scorer.bank_, torch.zeros(1, width, dtype=torch.float64)])
    found, sure = scorer._found_in_float32(rows)
    expected = scorer._found_in_float64(rows)
    assert torch.equal(found[sure], expected[sure])
    assert spread < 1 or sure[:600].double().mean() > 0.95
    assert torch.equal(scorer.score(FeatureSet(rows)), -torch.cat([scorer.shares_, torch.ones(1)])[expected])


def test_bisection_counts_reached_limits() -> None:
    values, limits = (
        torch.tensor([[1.0, 5.0, 3.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]),
        torch.tensor([8.0, 4.0, 3.0, 1.0]),
    )
    reached = [first_with_enough(values, limits[:, None].expand(4, 3), enough).tolist() for enough in (1, 2, 3)]
    assert reached == [[1, 4, 0], [2, 4, 0], [3, 4, 0]]


def test_far_rows_score_lower() -> None:
    inside, outside = score("cf_ood", FEATS, fit=TRAIN, share=1.0).split([40, 20])
    assert inside.mean() > outside.mean() / 2


@pytest.mark.parametrize("count", [2, 3, 10, 99, 1000, 5000])
def test_neighbor_shares(count: int) -> None:
    shares, positions = neighbor_shares(count)
    assert positions[0] == max(1, int(0.001 * count))
    assert (positions.diff() > 0).all()
    assert positions[-1] < count
    assert (shares.diff() > 0).all()
    assert len(shares) <= 230


def test_drawn_rows_are_a_fair_seeded_sample_of_the_row_numbers() -> None:
    unit = FIT / np.linalg.norm(FIT, axis=1, keepdims=True)
    samples = [
        collect(FeatureSet(FIT).in_blocks(rows), [UnitRows(0.25, seed)])[UnitRows(0.25, seed)]
        for rows, seed in ((None, 0), (7, 0), (None, 1))
    ]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    drawn = drawn_numbers(len(FIT), 0.25, 0)
    np.testing.assert_allclose(samples[0], unit[drawn], rtol=0, atol=1e-12)
    chosen = []
    for seed in range(40):
        bank = collect(FeatureSet(FIT), [UnitRows(0.25, seed)])[UnitRows(0.25, seed)].numpy()
        numbers = [int(np.flatnonzero((np.abs(unit - row) < 1e-12).all(axis=1))[0]) for row in bank]
        assert len(set(numbers)) == 100
        chosen.extend(numbers)
    times = np.bincount(chosen, minlength=len(FIT))
    assert times.mean() == 10
    assert 5 < times.var() < 10  # 7.5 for a binomial distribution
    assert abs(np.corrcoef(times, np.arange(len(FIT)))[0, 1]) < 0.2


def test_copies_of_a_row_are_drawn_independently() -> None:
    """Of 86 copies of each of 50 rows, a tenth of all rows contains some of nearly every row, not all of five rows."""
    scorer: Any = create_scorer("cf_ood").fit(FeatureSet(np.repeat(FIT[:50], 86, axis=0)))
    _, copies = torch.unique(scorer.bank_, dim=0, return_counts=True)
    assert copies.sum() == 430
    assert len(copies) == 50
    assert copies.max() <= 20


def test_cf_ood_needs_two_rows_and_valid_parameters() -> None:
    with pytest.raises(BadInput, match="at least two rows"):
        create_scorer("cf_ood").fit(FeatureSet(FIT[:1]))
    assert math.isfinite(score("cf_ood", FEATS, fit=FeatureSet(FIT[:2])).sum())
    for params in ({"share": 0.0}, {"share": 1.5}, {"rho": 0.0}, {"rho": 1.1}):
        with pytest.raises(BadInput, match=next(iter(params))):
            create_scorer("cf_ood", **params)


def test_the_size_of_pieces_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score("cf_ood", FEATS, fit=TRAIN)
    monkeypatch.setattr(cf_ood, "PIECE", 500)
    monkeypatch.setattr(cf_ood, "NARROW_PIECE", 300)
    assert torch.equal(score("cf_ood", FEATS, fit=FeatureSet(FIT, FIT_LOGITS)), whole)
