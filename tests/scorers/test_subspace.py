"""ViM, residual, NECO, and pNML against plain float64 references, scikit-learn, and pytorch-ood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_ood import detector as peer
from scipy import special
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import nn

from ood_scores import FeatureSet, Head, create_scorer, load_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import Means
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments
from ood_scores.features.statistics.row_hashes import RowHashes
from ood_scores.features.statistics.row_samples import SampledRows
from ood_scores.scorers.subspace import NECO, ViM, default_dimension, origin_of

Array = NDArray[np.float64]
CLASSES, WIDTH, ROWS = 4, 10, 200
NAMES = ["residual", "vim", "neco", "pnml"]


def head(width: int = WIDTH, seed: int = 7) -> Head:
    rng = np.random.default_rng(seed)
    return Head(rng.normal(size=(CLASSES, width)), rng.normal(size=CLASSES))


def feature_set(features: Array, given_head: Head | None = None, labels: Any = None) -> FeatureSet:
    chosen = given_head or head(features.shape[1])
    return FeatureSet(features, chosen(torch.from_numpy(features)), labels, chosen)


def train(rows: int = ROWS, width: int = WIDTH, offset: Any = 0.0) -> FeatureSet:
    """Features around class means with large logits, and noise of unequal variance."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % CLASSES
    noise = rng.normal(size=(rows, width)) * np.geomspace(2, 0.1, width)
    return feature_set(2 * head(width).weight.numpy()[labels] + noise + offset, labels=labels)


def to_score(rows: int = 30, width: int = WIDTH) -> FeatureSet:
    return feature_set(2 * np.random.default_rng(1).normal(size=(rows, width)))


def parts(feats: FeatureSet) -> tuple[Array, Array, Array, Array]:
    """Features, logits, and the head's weight and bias."""
    assert feats.logits is not None
    assert feats.head is not None
    return feats.features.numpy(), feats.logits.numpy(), feats.head.weight.numpy(), feats.head.bias.numpy()


def residuals(fit: FeatureSet, feats: FeatureSet, dimension: int) -> tuple[Array, Array]:
    """Norms outside the principal space, of the fit set and of the other set, by the SVD of the fit set itself."""
    fitted, _, weight, bias = parts(fit)
    origin = -np.linalg.pinv(weight) @ bias
    _, _, axes = np.linalg.svd(fitted - origin)
    first, second = (np.linalg.norm((part - origin) @ axes[dimension:].T, axis=1) for part in (fitted, parts(feats)[0]))
    return first, second


def vim(fit: FeatureSet, feats: FeatureSet, dimension: int) -> Array:
    fitted, found = residuals(fit, feats, dimension)
    alpha = parts(fit)[1].max(axis=1).mean() / fitted.mean()
    return special.logsumexp(parts(feats)[1], axis=1) - alpha * found


def pnml(fit: FeatureSet, feats: FeatureSet, ones: bool = True) -> Array:
    """As the authors' ``main_score.py``, which puts a column of ones before the normalized features."""
    fitted, rows = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (parts(fit)[0], parts(feats)[0]))
    _, _, weight, bias = parts(feats)
    p = special.softmax(rows @ weight.T + bias, axis=1)
    if ones:
        fitted, rows = (np.hstack([np.ones((len(part), 1)), part]) for part in (fitted, rows))
    inverse = np.linalg.pinv(fitted)
    q = (rows @ inverse @ inverse.T * rows).sum(axis=1, keepdims=True)
    return -np.log((p / (p + (1 - p) * p ** (q / (1 + q)))).sum(axis=1)) / np.log(p.shape[1])


class TestViMAndResidual:
    @pytest.mark.parametrize("dimension", [1, 3, 9])
    def test_equal_the_plain_definition(self, dimension: int) -> None:
        fit, feats = train(), to_score()
        np.testing.assert_allclose(
            score("residual", feats, fit=fit, dimension=dimension), -residuals(fit, feats, dimension)[1], rtol=1e-9
        )
        np.testing.assert_allclose(
            score("vim", feats, fit=fit, dimension=dimension), vim(fit, feats, dimension), rtol=1e-9
        )

    def test_half_of_few_features_by_default(self) -> None:
        fit, feats = train(), to_score()
        np.testing.assert_allclose(score("vim", feats, fit=fit), vim(fit, feats, WIDTH // 2), rtol=1e-9)
        widths = {64: 32, 512: 256, 767: 383, 768: 512, 2047: 512, 2048: 1000, 4096: 1000}
        assert {width: default_dimension(width) for width in widths} == widths

    def test_rank_as_pytorch_ood_does(self) -> None:
        """pytorch-ood computes the same score with the opposite sign, in float32."""
        fit, feats = train(), to_score()
        features, _, weight, bias = (torch.from_numpy(part) for part in parts(fit))
        detector: Any = peer.ViM(None, 4, weight, bias).fit_features(features, fit.labels)
        theirs = -detector.predict_features(feats.features).double()
        ours = score("vim", feats, fit=fit, dimension=4)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert spearmanr(ours, theirs).statistic > 1 - 1e-9

    def test_the_covariance_is_about_the_origin_and_not_about_the_mean(self) -> None:
        """The fit set is far from the origin, so the first principal direction points at its mean."""
        offset = 30 * head().weight.numpy()[0]
        fit, feats = train(offset=offset), to_score()
        np.testing.assert_allclose(score("vim", feats, fit=fit), vim(fit, feats, WIDTH // 2), rtol=1e-8)
        mean = fit.features.mean(dim=0, keepdim=True)
        assert score("residual", FeatureSet(mean), fit=fit, dimension=1).abs() < 0.01 * np.linalg.norm(offset)

    def test_the_origin_is_where_the_logits_are_zero(self) -> None:
        torch.testing.assert_close(head()(origin_of(head())[None]), torch.zeros(1, CLASSES).double())
        assert origin_of(Head(torch.randn(4, 3))).eq(0).all()

    @pytest.mark.parametrize("name", ["vim", "residual"])
    def test_rotations_of_feature_space_change_nothing(self, name: str) -> None:
        rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, WIDTH))).Q
        turned = Head(head().weight.numpy() @ rotation, head().bias)
        fit, feats = (feature_set(parts(part)[0] @ rotation, turned) for part in (train(), to_score()))
        torch.testing.assert_close(score(name, feats, fit=fit), score(name, to_score(), fit=train()))

    def test_the_principal_space_does_not_count(self) -> None:
        fit, feats = train(), to_score()
        scorer = create_scorer("residual").fit(fit)
        space = scorer.residual_space_  # type: ignore[attr-defined]
        moved = feats.features + torch.randn_like(feats.features) @ (torch.eye(WIDTH).double() - space @ space.T)
        torch.testing.assert_close(scorer.score(FeatureSet(moved)), scorer.score(feats))

    def test_alpha_is_exact_in_any_blocks(self) -> None:
        expected = ViM().fit(train()).alpha_  # type: ignore[attr-defined]
        assert ViM().fit(train(), block_rows=7).alpha_ == pytest.approx(expected, rel=1e-12)  # type: ignore[attr-defined]

    def test_alpha_of_a_large_set_is_that_of_evenly_spaced_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ood_scores.scorers.subspace.SampledRows", lambda: SampledRows(50 * WIDTH))
        every_fourth = residuals(train(), train()[::4], WIDTH // 2)[1]
        found = ViM().fit(train()).alpha_  # type: ignore[attr-defined]
        assert found == pytest.approx(parts(train())[1].max(axis=1).mean() / every_fourth.mean(), rel=1e-10)

    def test_dead_features_and_more_features_than_rows(self) -> None:
        features = parts(train())[0].copy()
        features[:, :4] = 0.0
        dead = feature_set(features)
        np.testing.assert_allclose(score("vim", to_score(), fit=dead), vim(dead, to_score(), 5), rtol=1e-8)
        few, feats = train(rows=20, width=50), to_score(width=50)
        np.testing.assert_allclose(
            score("vim", feats, fit=few, dimension=12), vim(few, feats, 12), rtol=1e-8
        )  # 20 rows span 20 dimensions about the origin

    @pytest.mark.parametrize("name", ["vim", "residual"])
    @pytest.mark.parametrize(("rows", "dimension"), [(8, 8), (8, 9), (ROWS, WIDTH), (3, None)])
    def test_a_fit_set_without_a_residual_is_refused(self, name: str, rows: int, dimension: int | None) -> None:
        rank, space = min(rows, WIDTH), dimension or WIDTH // 2
        with pytest.raises(BadInput, match=f"{name}: the fit rows span {rank} dimensions.* space of {space} leaves no"):
            create_scorer(name, dimension=dimension).fit(train(rows=rows))

    def test_negative_logits_warn(self) -> None:
        fit = train()
        assert fit.logits is not None
        low = FeatureSet(fit.features, fit.logits - 100, fit.labels, fit.head)
        with pytest.warns(UserWarning, match=r"largest logits of the fit set are -.* on average"):
            ViM().fit(low)

    def test_rows_outside_the_principal_space_score_lower(self) -> None:
        fit = train()
        outside = feature_set(parts(fit)[0] + 5 * np.eye(WIDTH)[-1])
        for name in ("residual", "vim"):
            assert score(name, outside, fit=fit).max() < score(name, fit, fit=fit).median()


class TestNECO:
    @pytest.mark.parametrize("dimension", [1, 4, WIDTH])
    @pytest.mark.parametrize("max_logit", [False, True])
    def test_equals_scikit_learn(self, dimension: int, max_logit: bool) -> None:
        """The reference is StandardScaler and PCA, as in the authors' code."""
        fit, feats = train(), to_score()
        scaler = StandardScaler().fit(parts(fit)[0])
        rows = scaler.transform(parts(feats)[0])
        principal = PCA().fit(scaler.transform(parts(fit)[0])).transform(rows)[:, :dimension]
        ratio = np.linalg.norm(principal, axis=1) / np.linalg.norm(rows, axis=1)
        factor = parts(feats)[1].max(axis=1) if max_logit else 1.0
        found = score("neco", feats, fit=fit, dimension=dimension, max_logit=max_logit)
        np.testing.assert_allclose(found, ratio * factor, rtol=1e-9)
        raw = score("neco", feats, fit=fit, dimension=dimension, max_logit=max_logit, raw_norm=True)
        by_raw = np.linalg.norm(principal, axis=1) / np.linalg.norm(parts(feats)[0], axis=1)
        np.testing.assert_allclose(raw, by_raw * factor, rtol=1e-9)

    def test_without_the_scaler(self) -> None:
        fit, feats = train(), to_score()
        principal = PCA(3).fit(parts(fit)[0]).transform(parts(feats)[0])
        ratio = np.linalg.norm(principal, axis=1) / np.linalg.norm(parts(feats)[0], axis=1)
        found = score("neco", feats, fit=fit, dimension=3, standardize=False, max_logit=False)
        np.testing.assert_allclose(found, ratio, rtol=1e-9)

    @pytest.mark.parametrize("variance", [0.05, 0.5, 0.9, 1.0])
    def test_the_dimension_holds_the_variance(self, variance: float) -> None:
        scorer = NECO(variance=variance)
        scorer.fit(train())
        held = PCA().fit(StandardScaler().fit_transform(parts(train())[0])).explained_variance_ratio_.cumsum()
        dimension = scorer.principal_space_.shape[1]
        assert held[dimension - 1] > variance - 1e-12
        assert dimension == 1 or held[dimension - 2] < variance

    def test_the_ratio_is_between_0_and_1(self) -> None:
        shares = score("neco", to_score(), fit=train(), max_logit=False)
        assert ((shares > 0) & (shares < 1)).all()
        whole = score("neco", to_score(), fit=train(), max_logit=False, dimension=WIDTH)
        torch.testing.assert_close(whole, torch.ones(30).double())

    def test_units_of_the_features_do_not_matter(self) -> None:
        units = 10.0 ** np.arange(WIDTH)
        fit, feats = (FeatureSet(parts(part)[0] * units + 3, part.logits) for part in (train(), to_score()))
        torch.testing.assert_close(
            score("neco", feats, fit=fit), score("neco", to_score(), fit=train()), rtol=1e-6, atol=0
        )

    def test_a_dead_feature_is_only_centered(self) -> None:
        features = parts(train())[0].copy()
        features[:, 2] = 0.1
        scaler = StandardScaler().fit(features)
        rows = scaler.transform(parts(to_score())[0])
        principal = PCA().fit(scaler.transform(features)).transform(rows)[:, :3]
        ratio = np.linalg.norm(principal, axis=1) / np.linalg.norm(rows, axis=1)
        found = score("neco", to_score(), fit=feature_set(features), dimension=3, max_logit=False)
        np.testing.assert_allclose(found, ratio, rtol=1e-9)

    def test_the_mean_itself_scores_zero(self) -> None:
        mean = train().features.mean(dim=0, keepdim=True)
        center = FeatureSet(NECO().fit(train()).mean_[None], torch.ones(1, CLASSES))  # type: ignore[attr-defined]
        assert score("neco", center, fit=train()).tolist() == [0.0]
        assert score("neco", FeatureSet(mean, torch.ones(1, CLASSES)), fit=train()).isfinite().all()

    def test_needs_no_logits_without_max_logit(self) -> None:
        bare = FeatureSet(to_score().features)
        assert torch.equal(
            score("neco", bare, fit=train(), max_logit=False), score("neco", to_score(), fit=train(), max_logit=False)
        )

    def test_more_features_than_rows(self) -> None:
        few, feats = train(rows=20, width=50), to_score(width=50)
        assert score("neco", feats, fit=few).isfinite().all()
        assert NECO(variance=1.0).fit(few).principal_space_.shape[1] == 19  # type: ignore[attr-defined]
        with pytest.raises(BadInput, match="neco: dimension must be at most 19, the rank of the features, got 20"):
            NECO(dimension=20).fit(few)

    def test_features_that_do_not_vary(self) -> None:
        with pytest.raises(BadInput, match="neco: the features do not vary"):
            NECO().fit(FeatureSet(torch.full((20, 3), 0.1)))


class TestPNML:
    @pytest.mark.parametrize("ones", [True, False])
    def test_equals_the_plain_definition(self, ones: bool) -> None:
        fit, feats = train(), to_score()
        np.testing.assert_allclose(score("pnml", feats, fit=fit, bias=ones), pnml(fit, feats, ones), rtol=1e-9)

    def test_has_the_column_of_ones_by_default(self) -> None:
        fit, feats = train(), to_score()
        np.testing.assert_allclose(score("pnml", feats, fit=fit), pnml(fit, feats), rtol=1e-9)

    def test_a_file_saved_before_the_column_of_ones_is_scored_without_it(self, tmp_path: Path) -> None:
        fit, feats = train(), to_score()
        create_scorer("pnml", bias=False).fit(fit).save(tmp_path / "pnml")
        with safetensors.safe_open(tmp_path / "pnml", "pt") as stored:
            described = json.loads(stored.metadata()["scorer"])
        del described["scorer"]["parameters"]["bias"]
        described["version"] = 1
        tensors = safetensors.torch.load_file(tmp_path / "pnml")
        safetensors.torch.save_file(tensors, tmp_path / "pnml", {"scorer": json.dumps(described)})
        scorer: Any = load_scorer(tmp_path / "pnml")
        assert scorer.bias is False
        np.testing.assert_allclose(scorer.score(feats), pnml(fit, feats, ones=False), rtol=1e-9)

    @pytest.mark.parametrize("rows", [ROWS, 20])
    def test_equals_pytorch_ood(self, rows: int) -> None:
        """The same regret without the column of ones, but in float32 with probabilities clipped at 1e-12, which none
        reaches here."""
        fit, feats = train(rows=rows), to_score()
        layer = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            layer.weight.copy_(head().weight)
            layer.bias.copy_(head().bias)
        detector: Any = peer.PNML(None, layer).fit_features(fit.features, torch.zeros(rows, dtype=torch.int64))
        theirs = -detector.predict_features(feats.features).double()
        ours = score("pnml", feats, fit=fit, bias=False)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert spearmanr(ours, theirs).statistic > 1 - 1e-9

    def test_more_features_than_rows(self) -> None:
        few, feats = train(rows=20, width=50), to_score(width=50)
        np.testing.assert_allclose(score("pnml", feats, fit=few), pnml(few, feats), rtol=1e-8)

    def test_the_length_of_a_feature_does_not_matter(self) -> None:
        fit, feats = train(), to_score()
        longer = FeatureSet(feats.features * 50, head=feats.head)
        torch.testing.assert_close(score("pnml", longer, fit=fit), score("pnml", feats, fit=fit))

    def test_rotations_of_feature_space_change_nothing(self) -> None:
        rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(WIDTH, WIDTH))).Q
        turned = Head(head().weight.numpy() @ rotation, head().bias)
        fit, feats = (feature_set(parts(part)[0] @ rotation, turned) for part in (train(), to_score()))
        torch.testing.assert_close(score("pnml", feats, fit=fit), score("pnml", to_score(), fit=train()))

    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e6])
    def test_the_regret_is_between_0_and_1_for_any_confidence(self, scale: float) -> None:
        confident = FeatureSet(to_score().features, head=Head(head().weight * scale, head().bias))
        regret = -score("pnml", confident, fit=train())
        assert regret.isfinite().all()
        assert ((regret >= -1e-12) & (regret <= 1)).all()

    def test_a_row_of_zeros(self) -> None:
        zero = FeatureSet(torch.zeros(1, WIDTH).double(), head=head())
        assert score("pnml", zero, fit=train()).isfinite().all()


@pytest.mark.parametrize("name", ["vim", "residual", "neco"])
@pytest.mark.parametrize("dimension", [0, -1, 1.5])
def test_a_dimension_is_a_positive_whole_number(name: str, dimension: Any) -> None:
    with pytest.raises(BadInput, match=f"{name}: dimension must be a whole number of at least 1"):
        create_scorer(name, dimension=dimension)


@pytest.mark.parametrize("variance", [0.0, -0.5, 1.1, float("nan")])
def test_the_variance_is_between_0_and_1(variance: float) -> None:
    with pytest.raises(BadInput, match=r"neco: variance must be in \(0, 1\]"):
        create_scorer("neco", variance=variance)


@given(rows=st.integers(1, 60), offset=st.sampled_from([0.0, 1e3, 1e6]), normalize=st.booleans())
@settings(max_examples=15, deadline=None)
def test_global_moments_are_those_of_all_rows(rows: int, offset: float, normalize: bool) -> None:
    feats = train(rows=57, offset=offset)
    (found,) = collect(feats.in_blocks(rows), [GlobalMoments("features", normalize)]).values()
    values = parts(feats)[0]
    values = values / np.linalg.norm(values, axis=1, keepdims=True) if normalize else values
    assert found.counts.tolist() == [57]
    np.testing.assert_allclose(found.means[0], values.mean(axis=0), rtol=1e-12, atol=1e-12)
    centered = values - values.mean(axis=0)
    expected = centered.T @ centered
    np.testing.assert_allclose(found.scatter, expected, rtol=1e-6, atol=1e-10 * np.abs(expected).max())


def test_scorers_share_one_pass() -> None:
    fit = train()
    for name in ("residual", "vim", "neco"):
        create_scorer(name).fit(fit)
    expected = {ClassMoments(), GlobalMoments(), SampledRows(), Means("max_logit")}
    assert set(fit.statistics) == expected
    score("vim", to_score(), fit=fit)  # which looks for rows that the two sets share
    assert set(fit.statistics) == {*expected, RowHashes()}


def test_residual_about_the_mean_is_that_of_a_principal_component_analysis() -> None:
    fit, new = train(), train(60, offset=1.0)
    found = score("residual", FeatureSet(new.features), FeatureSet(fit.features), origin="mean", dimension=4)
    pca = PCA(4).fit(fit.features.double().numpy())
    rows = new.features.double().numpy()
    expected = -np.linalg.norm(rows - pca.inverse_transform(pca.transform(rows)), axis=1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    with pytest.raises(BadInput, match="origin"):
        create_scorer("residual", origin="zero")
