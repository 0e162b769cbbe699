"""Relative Mahalanobis and Mahalanobis++ against plain float64 references and pytorch-ood."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_ood import detector as peer
from scipy.stats import spearmanr
from sklearn.covariance import EmpiricalCovariance

from ood_scores import FeatureSet, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.moments import ClassMoments
from ood_scores.scorers.gaussian import Mahalanobis, MahalanobisPP, RelativeMahalanobis

Array = NDArray[np.float64]
CLASSES, WIDTH = 4, 6


def train(rows: int = 200, width: int = WIDTH, classes: int = CLASSES) -> FeatureSet:
    """Correlated features around class means; larger class indices have fewer rows."""
    rng = np.random.default_rng(0)
    labels = np.minimum(rng.geometric(0.4, size=rows) - 1, classes - 1)
    labels[:classes] = np.arange(classes)
    noise = rng.normal(size=(rows, width)) @ rng.normal(size=(width, width))
    return FeatureSet(3 * rng.normal(size=(classes, width))[labels] + noise + 1, labels=labels)


def to_score(width: int = WIDTH, rows: int = 40) -> FeatureSet:
    return FeatureSet(3 * np.random.default_rng(1).normal(size=(rows, width)))


def unit(values: Array) -> Array:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def relative(fitted: Array, labels: Array, rows: Array) -> Array:
    """-min_c (d_c - d_0), both covariances divided by N; a singular one is restricted to the range within classes."""
    means = {c: fitted[labels == c].mean(axis=0) for c in np.unique(labels)}
    within = fitted - np.stack([means[c] for c in labels])
    sizes, axes = np.linalg.eigh(within.T @ within / len(fitted))
    axes = axes[:, sizes > 1e-12 * sizes.max()]
    fitted, within, rows = fitted @ axes, within @ axes, rows @ axes
    tied = np.linalg.inv(within.T @ within / len(fitted))
    whole = np.linalg.inv(np.cov(fitted, rowvar=False, ddof=0).reshape(axes.shape[1], -1))
    background = [(row - fitted.mean(axis=0)) @ whole @ (row - fitted.mean(axis=0)) for row in rows]
    nearest = [min((row - mean @ axes) @ tied @ (row - mean @ axes) for mean in means.values()) for row in rows]
    return -(np.array(nearest) - background)


def labels_of(feats: FeatureSet) -> Array:
    assert feats.labels is not None
    return feats.labels.numpy()


class TestRelativeMahalanobis:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("classes", [2, 4, 12])
    def test_equals_the_plain_definition(self, normalize: bool, classes: int) -> None:
        """Twelve classes are more than the features can separate linearly."""
        fit, feats = train(classes=classes), to_score()
        fitted, rows = fit.features.numpy(), feats.features.numpy()
        if normalize:
            fitted, rows = unit(fitted), unit(rows)
        expected = relative(fitted, labels_of(fit), rows)
        found = score("relative_mahalanobis", feats, fit=fit, normalize=normalize)
        np.testing.assert_allclose(found, expected, rtol=1e-8)

    def test_is_mahalanobis_minus_the_background(self) -> None:
        fit, feats = train(), to_score()
        background = EmpiricalCovariance().fit(fit.features.numpy()).mahalanobis(feats.features.numpy())
        expected = score("mahalanobis", feats, fit=fit).numpy() + background
        np.testing.assert_allclose(score("relative_mahalanobis", feats, fit=fit), expected, rtol=1e-8)

    def test_equals_pytorch_ood(self) -> None:
        """pytorch-ood divides neither scatter by N and adds a ridge of 1e-6 to both, all in float32."""
        fit, feats = train(), to_score()
        detector: Any = peer.RMD(None).fit_features(fit.features.float(), fit.labels)
        theirs = -detector.predict_features(feats.features.float()).double()
        ours = score("relative_mahalanobis", feats, fit=fit)
        torch.testing.assert_close(ours, len(fit) * theirs, rtol=1e-3, atol=1e-3)
        assert spearmanr(ours, theirs).statistic > 1 - 1e-9

    def test_needs_only_the_statistics_of_mahalanobis(self) -> None:
        assert RelativeMahalanobis().statistics() == Mahalanobis().statistics() == (ClassMoments("features"),)

    def test_affine_maps_of_feature_space_change_nothing(self) -> None:
        rng = np.random.default_rng(3)
        matrix, offset = rng.normal(size=(WIDTH, WIDTH)), 100 * rng.normal(size=WIDTH)
        fit, feats = train(), to_score()
        moved = FeatureSet(fit.features.numpy() @ matrix + offset, labels=fit.labels)
        found = score("relative_mahalanobis", FeatureSet(feats.features.numpy() @ matrix + offset), fit=moved)
        torch.testing.assert_close(found, score("relative_mahalanobis", feats, fit=fit), rtol=1e-7, atol=1e-7)

    def test_directions_that_do_not_separate_classes_do_not_count(self) -> None:
        fit, feats = train(), to_score()
        rng = np.random.default_rng(4)
        noise = [rng.normal(size=(len(part), 3)) for part in (fit, feats)]
        noise[0] -= np.stack([noise[0][labels_of(fit) == c].mean(axis=0) for c in range(CLASSES)])[labels_of(fit)]
        means = np.stack([fit.features.numpy()[labels_of(fit) == c].mean(axis=0) for c in range(CLASSES)])
        within = fit.features.numpy() - means[labels_of(fit)]
        noise[0] -= within @ np.linalg.lstsq(within, noise[0], rcond=None)[0]  # uncorrelated with the features
        wider = [np.hstack([part.features.numpy(), extra]) for part, extra in zip((fit, feats), noise, strict=True)]
        found = score("relative_mahalanobis", FeatureSet(wider[1]), fit=FeatureSet(wider[0], labels=fit.labels))
        torch.testing.assert_close(found, score("relative_mahalanobis", feats, fit=fit), rtol=1e-7, atol=1e-7)

    def test_far_from_the_data_no_digits_are_lost(self) -> None:
        """d_c and d_0 grow with the square of a common direction, but their difference does not."""
        scorer = RelativeMahalanobis()
        scorer.fit(train())
        unseen = torch.linalg.svd(scorer.directions_.T).Vh[-1]  # C - 1 of the directions kept exceed rounding
        assert (unseen @ scorer.directions_).abs().max() < 1e-12
        near = to_score().features
        torch.testing.assert_close(
            scorer.score(FeatureSet(near + 1e6 * unseen)), scorer.score(FeatureSet(near)), rtol=1e-6, atol=1e-6
        )

    @pytest.mark.parametrize("kind", ["dead feature", "copied feature", "between classes only", "more features"])
    def test_a_singular_covariance(self, kind: str) -> None:
        fit = train(rows=30, width=50) if kind == "more features" else train()
        features = fit.features.numpy().copy()
        if kind != "more features":
            features[:, 2] = {
                "dead feature": np.full(len(features), 0.1),
                "copied feature": features[:, 1],
                "between classes only": labels_of(fit).astype(float),
            }[kind]
        feats = to_score(width=features.shape[1])
        found = score("relative_mahalanobis", feats, fit=FeatureSet(features, labels=fit.labels))
        np.testing.assert_allclose(found, relative(features, labels_of(fit), feats.features.numpy()), rtol=1e-7)

    def test_a_class_without_rows_is_left_out(self) -> None:
        fit, feats = train(), to_score()
        kept = fit[torch.from_numpy(labels_of(fit) != 1)]
        expected = relative(kept.features.numpy(), labels_of(kept), feats.features.numpy())
        with pytest.warns(UserWarning, match="1 of 4 classes have no fit row and are left out"):
            found = score("relative_mahalanobis", feats, fit=kept)
        np.testing.assert_allclose(found, expected, rtol=1e-8)

    def test_a_single_class_scores_zero(self) -> None:
        fit = train()
        one = FeatureSet(fit.features, labels=torch.zeros(len(fit), dtype=torch.int64))
        assert score("relative_mahalanobis", to_score(), fit=one).abs().max() < 1e-12

    def test_features_that_do_not_vary_within_classes(self) -> None:
        fit = FeatureSet(torch.eye(3)[[0, 1, 2, 0, 1]], labels=torch.tensor([0, 1, 2, 0, 1]))
        with pytest.raises(BadInput, match="do not vary within any class"):
            score("relative_mahalanobis", fit, fit=fit)


class TestMahalanobisPP:
    def test_is_mahalanobis_of_normalized_features(self) -> None:
        fit, feats = train(), to_score()
        by_hand = FeatureSet(unit(fit.features.numpy()), labels=fit.labels)
        expected = score("mahalanobis", FeatureSet(unit(feats.features.numpy())), fit=by_hand)
        torch.testing.assert_close(score("mahalanobis_pp", feats, fit=fit), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(
            score("mahalanobis_pp", feats, fit=fit), score("mahalanobis", feats, fit=fit, normalize=True)
        )

    def test_equals_pytorch_ood_on_normalized_features(self) -> None:
        """Its score is half the squared distance under a scatter not divided by N, with a ridge, in float32."""
        fit, feats = train(), to_score()
        features, rows = (torch.from_numpy(unit(part.features.numpy())).float() for part in (fit, feats))
        detector: Any = peer.Mahalanobis(None).fit_features(features, fit.labels)
        theirs = -detector.predict_features(rows).double()
        ours = score("mahalanobis_pp", feats, fit=fit)
        torch.testing.assert_close(ours, 2 * len(fit) * theirs, rtol=1e-3, atol=1e-3)
        assert spearmanr(ours, theirs).statistic > 1 - 1e-9

    def test_the_length_of_a_feature_does_not_matter(self) -> None:
        fit, feats = train(), to_score()
        longer = FeatureSet(feats.features * 50)
        torch.testing.assert_close(score("mahalanobis_pp", longer, fit=fit), score("mahalanobis_pp", feats, fit=fit))

    def test_is_an_instance_of_mahalanobis(self) -> None:
        assert repr(MahalanobisPP()) == "MahalanobisPP(normalize=True, one_class=False)"
        assert isinstance(MahalanobisPP(), Mahalanobis)
