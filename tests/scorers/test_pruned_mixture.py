"""GMM without the classes that do not count for a row: the same densities as with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import Tensor

from ood_scores import FeatureSet, create_scorer
from ood_scores.scorers import mixture
from ood_scores.scorers.mixture import GMM
from ood_scores.scorers.numerics import pruned_mixture
from ood_scores.scorers.numerics.pruned_mixture import class_bounds

CLASSES, WIDTH = 12, 48


@pytest.fixture(autouse=True)
def small_sets_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "PRUNED_ROWS", 0)
    monkeypatch.setattr(mixture, "PRUNED_WIDTH", 1)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of distances that each product with a factor computed."""
    counts: list[int] = []
    for name in ("solved_squares", "squares_about"):
        original = getattr(mixture, name)

        def counted(factor: Iterator[tuple[Tensor, Tensor]], columns: Tensor, *means: Tensor, call=original) -> Tensor:
            counts.append(columns.shape[1])
            return call(factor, columns, *means)

        monkeypatch.setattr(mixture, name, counted)
    return counts


KINDS: dict[str, dict[str, Any]] = {
    "apart": {},
    "near": {"between": 0.3},
    "alike": {"between": 0.0},
    "collapsed": {"within": 1e-6},
    "few rows": {"rows": 30},
    "dead features": {"dead": True},
    "far from the origin": {"shift": 1e6},
    "large": {"scale": 1e150},
    "tiny": {"scale": 1e-5},
    "one class far away": {"far": 1e6},
}


def problem(
    between: float = 2.0,
    within: float = 1.0,
    rows: int = 120,
    dead: bool = False,
    shift: float = 0.0,
    scale: float = 1.0,
    far: float = 0.0,
    seed: int = 0,
) -> tuple[FeatureSet, Tensor]:
    """A set to fit, and rows to score: near all classes, on class means, elsewhere, at 0, and outliers."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), rows)
    means, mix = between * rng.normal(size=(CLASSES, WIDTH)), rng.normal(size=(CLASSES, WIDTH, WIDTH)) / WIDTH**0.5
    means[0] += far
    mix = mix if between else mix[:1].repeat(CLASSES, axis=0)
    noise = np.einsum("nd,nde->ne", rng.normal(size=(len(labels), WIDTH)), mix[labels])
    features = means[labels] + within * noise
    if dead:
        features[:, :4] = np.where(labels[:, None] < 6, 0.0, features[:, :4])
    more = rng.normal(size=(20, WIDTH))
    near = features[::40] + within * rng.normal(size=(len(features[::40]), WIDTH)) / 2
    tests = np.concatenate([near, features[::60], means, 3 * more, more * 0, 1e6 * more[:3]])
    fit = FeatureSet(scale * (features + shift), labels=labels)
    return fit, torch.from_numpy(scale * (tests + shift))


def reference(scorer: GMM, rows: Tensor) -> np.ndarray:
    """The plain log densities of all classes, in float64."""
    centered = rows[None] - scorer.means_[:, None]
    factors = scorer.cholesky_ if scorer.factors_ is None else scorer.cholesky_[scorer.factors_]
    solved = torch.linalg.solve_triangular(factors, centered.mT, upper=False)
    return (scorer.log_weights_[:, None] - 0.5 * solved.square().sum(dim=1)).T.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_formula_with_all_classes(kind: str) -> None:
    fit, rows = problem(**KINDS[kind])
    scorer = GMM()
    scorer.fit(fit)
    expected = reference(scorer, rows)
    found = scorer.score(FeatureSet(rows))
    exact = {"few rows": 1e-5, "dead features": 1e-7, "tiny": 1e-7, "collapsed": 1e-5}  # rounding of null directions
    np.testing.assert_allclose(found, special.logsumexp(expected, axis=1), rtol=exact.get(kind, 1e-11))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["density", "entropy"])
def test_equals_the_scores_of_all_classes(kind: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, rows = problem(**KINDS[kind])
    scorer: Any = create_scorer("gmm", output=output, prior="empirical")
    scorer.fit(fit)
    found = scorer.score(FeatureSet(rows))
    monkeypatch.setattr(mixture, "PRUNED_ROWS", 10**9)
    expected = scorer.score(FeatureSet(rows))
    torch.testing.assert_close(found, expected, rtol=1e-9 if output == "entropy" else 1e-12, atol=0)


def test_computes_one_class_for_rows_that_lie_in_one(computed: list[int]) -> None:
    fit, _ = problem(between=20.0)
    scorer = GMM()
    scorer.fit(fit)
    scorer.score(FeatureSet(fit.features))
    assert sum(computed) == len(fit)


def test_computes_all_classes_at_once_if_most_of_them_count(computed: list[int]) -> None:
    fit, _ = problem(between=0.0)
    scorer = GMM()
    scorer.fit(fit)
    scorer.score(FeatureSet(fit.features))
    assert sum(computed) == (1 + CLASSES) * len(fit)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    between=st.sampled_from([0.0, 0.1, 1.0, 5.0, 100.0]),
    within=st.sampled_from([1e-4, 1.0]),
    shift=st.sampled_from([0.0, 1e3, 1e6]),
    rows=st.sampled_from([20, 60]),
    dead=st.booleans(),
    rank=st.sampled_from([1 / 48, 1 / 16, 1 / 2, 1.0]),
)
def test_a_bound_never_exceeds_the_distance(
    seed: int, between: float, within: float, shift: float, rows: int, dead: bool, rank: float
) -> None:
    fit, tests = problem(between, within, rows, dead, shift, seed=seed)
    scorer = GMM()
    scorer.fit(fit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruned_mixture, "RANK", rank)
        bounds = class_bounds(scorer.means_, scorer.cholesky_, range(CLASSES)).squares(tests).T
    distances = 2 * (scorer.log_weights_ - torch.from_numpy(reference(scorer, tests)))
    assert (bounds <= distances).all()
    assert (bounds >= 0).all()


def test_a_bound_of_full_rank_is_nearly_the_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, tests = problem()
    scorer = GMM()
    scorer.fit(fit)
    monkeypatch.setattr(pruned_mixture, "RANK", 1.0)
    bounds = class_bounds(scorer.means_, scorer.cholesky_, range(CLASSES)).squares(tests).T
    distances = 2 * (scorer.log_weights_ - torch.from_numpy(reference(scorer, tests)))
    torch.testing.assert_close(bounds, distances, rtol=3e-3, atol=2)


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 100), kind=st.sampled_from(["apart", "near", "alike", "dead features"]))
def test_neither_blocks_nor_the_order_of_rows_matter(rows: int, kind: str) -> None:
    fit, tests = problem(**KINDS[kind])
    scorer = GMM()
    scorer.fit(fit)
    expected = scorer.score(FeatureSet(tests))
    order = torch.randperm(len(tests), generator=torch.Generator().manual_seed(rows))
    found = scorer.score(FeatureSet(tests[order]), block_rows=rows)
    torch.testing.assert_close(found, expected[order], rtol=1e-9 if kind == "dead features" else 1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:gmm")
@pytest.mark.parametrize("single", [[3], [3, 7]])
def test_classes_with_a_single_row(single: list[int]) -> None:
    """One has the last factor; two share it, and no class is then left out."""
    fit, tests = problem()
    assert fit.labels is not None
    kept = torch.ones(len(fit), dtype=torch.bool)
    for label in single:
        kept[(fit.labels == label).nonzero()[1:]] = False
    scorer = GMM()
    scorer.fit(fit[kept])
    np.testing.assert_allclose(
        scorer.score(FeatureSet(tests)), special.logsumexp(reference(scorer, tests), axis=1), rtol=1e-11
    )


def test_a_refit_renews_the_bounds() -> None:
    fit, tests = problem()
    other, _ = problem(seed=1)
    scorer = GMM()
    scorer.fit(other).score(FeatureSet(tests))
    found = scorer.fit(fit).score(FeatureSet(tests))
    assert torch.equal(found, GMM().fit(fit).score(FeatureSet(tests)))


def test_a_single_class() -> None:
    fit, tests = problem()
    assert fit.labels is not None
    scorer = GMM()
    scorer.fit(fit[fit.labels == 0])
    np.testing.assert_allclose(scorer.score(FeatureSet(tests)), reference(scorer, tests)[:, 0], rtol=1e-11)
