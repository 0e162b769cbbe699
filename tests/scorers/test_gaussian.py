"""Mahalanobis and GMM against plain float64 references, SciPy's normal density, and scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from sklearn.covariance import EmpiricalCovariance

from ood_scores import FeatureSet, create_scorer, score
from ood_scores.errors import BadInput
from ood_scores.scorers.gaussian import Mahalanobis
from ood_scores.scorers.mixture import GMM
from ood_scores.scorers.numerics.cholesky import (
    JITTERS,
    block_rows,
    cholesky_with_jitter,
    inverted_diagonal,
    solved_squares,
)
from ood_scores.scorers.numerics.whitening import whitened, whitening

Array = NDArray[np.float64]
CLASSES, WIDTH = 4, 6


def train(seed: int = 0, rows: int = 200, width: int = WIDTH) -> FeatureSet:
    """Correlated features around class means, and logits of another width."""
    rng = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    features = 3 * rng.normal(size=(CLASSES, width))[labels] + rng.normal(size=(rows, width)) @ rng.normal(
        size=(width, width)
    )
    return FeatureSet(features, features[:, :CLASSES] + rng.normal(size=(rows, CLASSES)), labels)


def rows_to_score(seed: int = 1) -> FeatureSet:
    rng = np.random.default_rng(seed)
    return FeatureSet(3 * rng.normal(size=(30, WIDTH)), rng.normal(size=(30, CLASSES)))


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def values(feats: FeatureSet, space: str = "features", normalize: bool = False) -> Array:
    found = getattr(feats, space).double().numpy()
    return unit(found) if normalize else found


def groups(rows: Array, feats: FeatureSet) -> list[Array]:
    assert feats.labels is not None
    return [rows[feats.labels.numpy() == c] for c in feats.labels.unique().tolist()]


def mahalanobis(fitted: list[Array], rows: Array) -> Array:
    """-min_c (z - mu_c)^T pinv(Sigma) (z - mu_c), Sigma pooled within the classes and divided by N."""
    means = [group.mean(axis=0) for group in fitted]
    centered = np.concatenate([group - mean for group, mean in zip(fitted, means, strict=True)])
    precision = np.linalg.pinv(centered.T @ centered / len(centered), hermitian=True)
    distances = [[(row - mean) @ precision @ (row - mean) for mean in means] for row in rows]
    return -np.min(distances, axis=1)


def log_densities(fitted: list[Array], rows: Array, prior: str = "none", jitter: float = 0.0) -> Array:
    """log N(z; mu_c, Sigma_c), Sigma_c divided by n_c - 1; ``[rows, classes]``."""
    columns = []
    for group in fitted:
        covariance = np.cov(group, rowvar=False, ddof=1) + jitter * np.eye(group.shape[1])
        centered = rows - group.mean(axis=0)
        distances = (centered * np.linalg.solve(covariance, centered.T).T).sum(axis=1)
        columns.append(-0.5 * (distances + np.linalg.slogdet(2 * np.pi * covariance).logabsdet))
    weights = np.log([len(group) / sum(map(len, fitted)) for group in fitted]) if prior == "empirical" else 0
    return np.stack(columns, axis=1) + weights


class TestMahalanobis:
    @pytest.mark.parametrize("normalize", [False, True])
    def test_equals_the_plain_definition(self, normalize: bool) -> None:
        fit, feats = train(), rows_to_score()
        expected = mahalanobis(groups(values(fit, normalize=normalize), fit), values(feats, normalize=normalize))
        np.testing.assert_allclose(score("mahalanobis", feats, fit=fit, normalize=normalize), expected, rtol=1e-10)

    def test_equals_scikit_learn(self) -> None:
        """EmpiricalCovariance also divides by N."""
        fit, feats = train(), rows_to_score()
        fitted = groups(values(fit), fit)
        centered = np.concatenate([group - group.mean(axis=0) for group in fitted])
        covariance = EmpiricalCovariance(assume_centered=True).fit(centered)
        distances = [covariance.mahalanobis(values(feats) - group.mean(axis=0)) for group in fitted]
        np.testing.assert_allclose(score("mahalanobis", feats, fit=fit), -np.min(distances, axis=0), rtol=1e-9)

    @pytest.mark.parametrize("kind", ["dead feature", "copied feature", "sum of features", "fewer rows than features"])
    def test_a_singular_covariance_is_pseudo_inverted(self, kind: str) -> None:
        fit = train(rows=8) if kind == "fewer rows than features" else train()
        features = values(fit)
        features[:, 2] = {
            "dead feature": np.full(len(features), 0.1),
            "copied feature": features[:, 1],
            "sum of features": features[:, 0] + 2 * features[:, 1],
            "fewer rows than features": features[:, 2],
        }[kind]
        fit, feats = FeatureSet(features, labels=fit.labels), rows_to_score()
        expected = mahalanobis(groups(features, fit), values(feats))
        np.testing.assert_allclose(score("mahalanobis", feats, fit=fit), expected, rtol=1e-8)

    def test_features_of_very_different_scale(self) -> None:
        fit, feats = train(), rows_to_score()
        scale = 10.0 ** np.arange(-3, WIDTH - 3)
        scaled = FeatureSet(values(fit) * scale, labels=fit.labels)
        found = score("mahalanobis", FeatureSet(values(feats) * scale), fit=scaled)
        np.testing.assert_allclose(found, score("mahalanobis", feats, fit=fit), rtol=1e-7)

    def test_a_class_without_rows_is_left_out(self) -> None:
        fit, feats = train(), rows_to_score()
        assert fit.labels is not None
        kept = fit[fit.labels != 2]
        with pytest.warns(UserWarning, match="1 of 4 classes have no fit row and are left out"):
            found = score("mahalanobis", feats, fit=kept)
        np.testing.assert_allclose(found, mahalanobis(groups(values(kept), kept), values(feats)), rtol=1e-10)

    def test_features_that_do_not_vary_within_classes(self) -> None:
        fit = FeatureSet(torch.eye(3)[[0, 1, 2, 0, 1]], labels=torch.tensor([0, 1, 2, 0, 1]))
        with pytest.raises(BadInput, match="do not vary within any class"):
            score("mahalanobis", fit, fit=fit)

    def test_nearly_collapsed_classes(self) -> None:
        """The within-class variance is 1e-8 of the variance between classes."""
        rng = np.random.default_rng(2)
        labels = np.arange(200) % CLASSES
        features = rng.normal(size=(CLASSES, WIDTH))[labels] + 1e-4 * rng.normal(size=(200, WIDTH))
        fit = FeatureSet(features, labels=labels)
        near = features[:20] + 1e-4 * rng.normal(size=(20, WIDTH))
        found = score("mahalanobis", FeatureSet(near), fit=fit)
        np.testing.assert_allclose(found, mahalanobis(groups(features, fit), near), rtol=1e-6)

    def test_a_refit_that_fails_leaves_nothing_half_fitted(self) -> None:
        scorer = Mahalanobis()
        scorer.fit(train())
        with pytest.raises(BadInput):
            scorer.fit(FeatureSet(torch.ones(4, WIDTH), labels=torch.zeros(4, dtype=torch.int64)))
        assert not scorer.is_fitted


class TestGMM:
    @pytest.mark.parametrize("space", ["features", "logits"])
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("prior", ["none", "empirical"])
    def test_equals_the_plain_definition(self, space: str, normalize: bool, prior: str) -> None:
        fit, feats = train()[:151], rows_to_score()  # 38, 38, 38, and 37 rows
        fitted, rows = groups(values(fit, space, normalize), fit), values(feats, space, normalize)
        expected = log_densities(fitted, rows, prior)
        params = {"space": space, "normalize": normalize, "prior": prior}
        density = score("gmm", feats, fit=fit, **params)
        np.testing.assert_allclose(density, special.logsumexp(expected, axis=1), rtol=1e-9)
        scipy = [stats.multivariate_normal(g.mean(axis=0), np.cov(g, rowvar=False)).logpdf(rows) for g in fitted]
        if prior == "none":
            np.testing.assert_allclose(density, special.logsumexp(scipy, axis=0), rtol=1e-9)
        entropy = score("gmm", feats, fit=fit, output="entropy", **params)
        responsibilities = special.softmax(expected, axis=1)
        np.testing.assert_allclose(entropy, -stats.entropy(responsibilities, axis=1), rtol=1e-7, atol=1e-12)

    def test_the_prior_is_the_class_frequency(self) -> None:
        fit = train()
        assert fit.labels is not None
        rare = fit[(fit.labels != 0) | (torch.arange(len(fit)) < 60)]
        fitted = groups(values(rare), rare)
        feats = rows_to_score()
        for prior in ("none", "empirical"):
            expected = special.logsumexp(log_densities(fitted, values(feats), prior), axis=1)
            np.testing.assert_allclose(score("gmm", feats, fit=rare, prior=prior), expected, rtol=1e-9)

    def test_densities_too_small_to_exponentiate(self) -> None:
        fit = train()
        far = FeatureSet(values(rows_to_score()) * 1e4)
        expected = special.logsumexp(log_densities(groups(values(fit), fit), values(far)), axis=1)
        assert expected.max() < -1e4
        np.testing.assert_allclose(score("gmm", far, fit=fit), expected, rtol=1e-9)
        assert score("gmm", far, fit=fit, output="entropy").isfinite().all()

    def test_full_rank_needs_no_jitter(self) -> None:
        assert fitted_gmm(train()).jitter_.tolist() == [0.0] * CLASSES

    @pytest.mark.parametrize(
        ("kind", "jitter"),
        [("dead feature", JITTERS[1]), ("copied feature", 1e-10), ("sum of features", 1e-10), ("few rows", 1e-10)],
    )
    def test_the_smallest_sufficient_jitter_is_chosen_for_each_class(self, kind: str, jitter: float) -> None:
        """A dead feature leaves an exact zero, which any jitter fixes.

        Other singular matrices need a jitter above their rounding error: a factorization that succeeds by chance has a
        random determinant.
        """
        fit = train()
        assert fit.labels is not None
        features, first = values(fit), fit.labels.numpy() == 0
        features[first, 2] = {
            "dead feature": 0.1,
            "copied feature": features[first, 1],
            "sum of features": features[first, 0] + 2 * features[first, 1],
            "few rows": features[first, 2],
        }[kind]
        broken = FeatureSet(features, labels=fit.labels)
        if kind == "few rows":
            broken = broken[~torch.from_numpy(first) | (torch.arange(len(fit)) < 4 * (WIDTH - 1))]
        assert fitted_gmm(broken).jitter_.tolist() == [jitter, 0.0, 0.0, 0.0]

    def test_density_with_jitter(self) -> None:
        fit, feats = train(), rows_to_score()
        features = values(fit)
        features[:, 2] = features[:, 1]
        broken = FeatureSet(features, labels=fit.labels)
        expected = special.logsumexp(log_densities(groups(features, broken), values(feats), jitter=1e-10), axis=1)
        np.testing.assert_allclose(score("gmm", feats, fit=broken), expected, rtol=1e-4)  # 1e-16 / 1e-10

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
    def test_whether_jitter_is_needed_does_not_depend_on_units(self, scale: float) -> None:
        units = scale * 10.0 ** np.arange(-3, WIDTH - 3)
        fit = train()
        assert fitted_gmm(FeatureSet(values(fit) * units, labels=fit.labels)).jitter_.tolist() == [0.0] * CLASSES

    @pytest.mark.parametrize("rows", [3, 5, 17, 1000])
    def test_singular_classes_score_the_same_in_any_blocks(self, rows: int) -> None:
        """Five rows of six features in each class: the score must not depend on the rounding of a null direction."""
        fit, feats = train(rows=20), rows_to_score()
        expected = score("gmm", feats, fit=fit)
        anew = FeatureSet(fit.features, labels=fit.labels)
        found = create_scorer("gmm").fit(anew, block_rows=rows).score(feats, block_rows=rows)
        np.testing.assert_allclose(found, expected, 1e-4)

    def test_a_class_with_one_row_gets_the_tied_covariance(self) -> None:
        fit, feats = train(), rows_to_score()
        assert fit.labels is not None
        single = fit[(fit.labels != 1) | (torch.arange(len(fit)) == 1)]
        with pytest.warns(UserWarning, match="1 classes have a single fit row and get the tied covariance"):
            found = score("gmm", feats, fit=single)
        fitted = groups(values(single), single)
        tied = sum((group - group.mean(axis=0)).T @ (group - group.mean(axis=0)) for group in fitted) / len(single)
        others = log_densities([fitted[0], fitted[2], fitted[3]], values(feats))
        alone = stats.multivariate_normal(fitted[1][0], tied).logpdf(values(feats))
        expected = special.logsumexp(np.column_stack([others, alone]), axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_a_class_without_rows_is_left_out(self) -> None:
        fit, feats = train(), rows_to_score()
        assert fit.labels is not None
        kept = fit[fit.labels != 2]
        with pytest.warns(UserWarning, match="1 of 4 classes have no fit row and are left out"):
            found = score("gmm", feats, fit=kept, prior="empirical")
        expected = log_densities(groups(values(kept), kept), values(feats), "empirical")
        np.testing.assert_allclose(found, special.logsumexp(expected, axis=1), rtol=1e-9)

    def test_a_sound_fit_warns_of_nothing(self) -> None:
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            score("gmm", rows_to_score(), fit=train())
            score("mahalanobis", rows_to_score(), fit=train())
        assert not given

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"space": "pixels"}, "space must be 'features' or 'logits'"),
            ({"prior": "uniform"}, "prior must be 'none' or 'empirical'"),
            ({"output": "both"}, "output must be 'density' or 'entropy'"),
        ],
    )
    def test_bad_parameters(self, params: dict[str, Any], message: str) -> None:
        with pytest.raises(BadInput, match=f"gmm: {message}"):
            create_scorer("gmm", **params)

    def test_memory_is_bounded_by_taking_some_classes_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fit, feats = train(), rows_to_score()
        expected = score("gmm", feats, fit=fit)
        monkeypatch.setattr("ood_scores.scorers.mixture.DENSITY_BYTES", 1)
        torch.testing.assert_close(score("gmm", feats, fit=fit), expected, rtol=1e-12, atol=0)


def fitted_gmm(fit: FeatureSet) -> GMM:
    scorer = GMM()
    scorer.fit(fit)
    return scorer


def test_whitening_is_a_root_of_the_inverse() -> None:
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = root @ root.T
    torch.testing.assert_close(whitening(covariance) @ whitening(covariance).T, torch.linalg.inv(covariance))
    covariance = root[:, :3] @ root[:, :3].T
    singular = whitening(covariance)
    assert singular.shape == (5, 3)
    torch.testing.assert_close(singular @ singular.T, torch.linalg.pinv(covariance, hermitian=True))


def normalized_rows(rows: int, seed: int) -> torch.Tensor:
    """What a LayerNorm returns: rows in a hyperplane, up to rounding."""
    norm = torch.nn.LayerNorm(24)
    rng = torch.Generator().manual_seed(0)
    norm.weight.data, norm.bias.data = 1 + 0.3 * torch.randn(24, generator=rng), torch.randn(24, generator=rng)
    values = 2 * torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed))
    found: torch.Tensor = norm(values).detach()
    return found


@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_pp", "relative_mahalanobis", "wdiscood"])
def test_the_rounding_of_a_layer_norm_does_not_count(name: str) -> None:
    rows, labels = normalized_rows(400, 1), torch.arange(400) % CLASSES
    fit = FeatureSet(rows, torch.eye(CLASSES)[labels], labels)
    test = normalized_rows(50, 2)
    moved = torch.nextafter(test, torch.full_like(test, torch.inf))  # as another device may round
    found, again = (score(name, FeatureSet(each, torch.zeros(50, CLASSES)), fit=fit) for each in (test, moved))
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-5)


def fitted_whitening(fit: FeatureSet) -> torch.Tensor:
    scorer = Mahalanobis()
    scorer.fit(fit)
    return scorer.whitening_


def test_tied_whitening_leaves_out_rounding_alone() -> None:
    rows, labels = normalized_rows(400, 1), torch.arange(400) % CLASSES
    logits = torch.eye(CLASSES)[labels]
    assert fitted_whitening(FeatureSet(rows, logits, labels)).shape == (24, 23)
    exact = rows.double()
    exact[:, 0] += 1e-6 * torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert fitted_whitening(FeatureSet(exact, logits, labels)).shape == (24, 24)
    ordinary = train(width=24)
    pooled = fitted_whitening(ordinary)
    centered = np.concatenate([each - each.mean(axis=0) for each in groups(values(ordinary), ordinary)])
    covariance = centered.T @ centered / len(ordinary)
    torch.testing.assert_close(pooled @ pooled.T, torch.from_numpy(np.linalg.inv(covariance)))
    assert not pooled.tril(-1).any()  # the Cholesky factor, as without the limit


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("rank", [5, 3])
def test_whitened_is_the_product_with_the_root(size: int, rank: int) -> None:
    rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = whitening(rows[:rank].T @ rows[:rank])
    torch.testing.assert_close(whitened(rows, root, size), rows @ root)


def test_cholesky_with_jitter() -> None:
    eye = torch.eye(3, dtype=torch.float64)
    matrices = torch.stack([eye, torch.zeros(3, 3).double(), torch.diag(torch.tensor([1, 1, -0.001])).double()])
    factors, jitter = cholesky_with_jitter(matrices)
    assert jitter.tolist() == [0.0, JITTERS[1], 1e-2]
    torch.testing.assert_close(factors @ factors.mT, matrices + jitter[:, None, None] * eye)
    with pytest.raises(BadInput, match=r"class covariance 1 is not positive definite even with 0\.1"):
        cholesky_with_jitter(torch.stack([eye, -eye]))


@pytest.mark.parametrize("condition", [1e2, 1e10])
@pytest.mark.parametrize("size", [1, 7, 16, 100])
def test_solved_squares_are_as_accurate_as_substitution(condition: float, size: int) -> None:
    """The reference is substitution in long double, for vectors that are likely under the covariance and for arbitrary
    ones.
    """
    rng = np.random.default_rng(0)
    width = 40
    axes = np.linalg.qr(rng.normal(size=(width, width))).Q
    covariance = axes * np.geomspace(1, 1 / condition, width) @ axes.T
    factor = np.linalg.cholesky((covariance + covariance.T) / 2)
    columns = np.concatenate([factor @ rng.normal(size=(width, 20)), rng.normal(size=(width, 20))], axis=1)
    exact, wide = np.zeros(columns.shape, np.longdouble), factor.astype(np.longdouble)
    for i in range(width):
        exact[i] = (columns[i] - wide[i, :i] @ exact[:i]) / wide[i, i]
    lower = torch.from_numpy(factor)
    found = solved_squares(block_rows(lower, inverted_diagonal(lower[None], size)[0]), torch.from_numpy(columns.copy()))
    np.testing.assert_allclose(found, np.square(exact).sum(axis=0).astype(float), rtol=1e-16 * condition**0.5 * width)


@pytest.mark.parametrize("name", ["mahalanobis", "relative_mahalanobis"])
def test_a_nearly_singular_covariance_is_whitened_in_float64(name: str) -> None:
    """One direction is 3e-6 times as wide as the others: in float32, rounding would fill it with noise."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(400) % 4
    rows = torch.randn(400, 12, generator=generator, dtype=torch.float64) + labels[:, None]
    turned = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    features = ((rows * torch.tensor([3e-6, *[1.0] * 11])) @ turned).float()
    feats = FeatureSet(features, labels=labels)
    scorer = create_scorer(name).fit(feats)
    in_double = (
        create_scorer(name).fit(FeatureSet(features.double(), labels=labels)).score(FeatureSet(features.double()))
    )
    torch.testing.assert_close(scorer.score(feats), in_double, rtol=1e-9, atol=1e-9)
    alone = torch.cat([scorer.score(feats[row : row + 1]) for row in range(5)])
    torch.testing.assert_close(alone, in_double[:5], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mahalanobis", "mahalanobis_pp"])
def test_one_class_needs_no_labels(name: str) -> None:
    rng = np.random.default_rng(0)
    fit, new = rng.normal(size=(90, 5)) @ rng.normal(size=(5, 5)) + 2, rng.normal(size=(20, 5)) * 3
    found = score(name, FeatureSet(new), FeatureSet(fit), one_class=True)
    labelled = score(name, FeatureSet(new), FeatureSet(fit, labels=np.zeros(90, int)))
    rows, reference = (x / np.linalg.norm(x, axis=1, keepdims=True) if "pp" in name else x for x in (new, fit))
    deviations = rows - reference.mean(0)
    inverse = np.linalg.pinv(np.cov(reference.T, bias=True))
    np.testing.assert_allclose(found.numpy(), -np.einsum("nd,de,ne->n", deviations, inverse, deviations), rtol=1e-6)
    torch.testing.assert_close(found, labelled)
