"""Marginal feature selection against a plain transcription of the authors' code, with SciPy and scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from classified import FIT, FIT_LOGITS, HEAD, LOGITS, ROWS, WIDTH, Array, labels_of_fit
from scipy.special import logsumexp
from scipy.stats import wasserstein_distance
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors

from ood_scores import FeatureSet, create_scorer, score
from ood_scores.errors import BadInput, MissingInput, ShapeMismatch
from ood_scores.features.statistics.row_samples import SampledRows

SHIFTS = np.random.default_rng(3).permutation(WIDTH) / 4
MIXED = 0.5 * FIT[::-1] + SHIFTS * np.random.default_rng(4).normal(size=FIT.shape)
FITTED = FeatureSet(FIT, FIT_LOGITS, labels_of_fit, HEAD, extras={"mixup": MIXED})
FEATS = FeatureSet(ROWS, LOGITS, head=HEAD)


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def selected(share: float, normalize: bool) -> Array:
    clean, mixed = (unit(FIT), unit(MIXED)) if normalize else (FIT, MIXED)
    low, high = (0.0, 1.0) if normalize else (clean.min(axis=0), clean.max(axis=0))
    pairs = zip(((clean - low) / (high - low)).T, ((mixed - low) / (high - low)).T, strict=True)
    shifts = [wasserstein_distance(*pair) for pair in pairs]
    return np.sort(np.argsort(shifts)[::-1][: max(int(WIDTH * share), 1)])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_mahalanobis_is_that_of_mds_mfs_and_mdspp_mfs(share: float, normalize: bool) -> None:
    columns = selected(share, normalize)
    fit, rows = ((unit(each) if normalize else each)[:, columns] for each in (FIT, ROWS))
    means = np.stack([fit[labels_of_fit == label].mean(axis=0) for label in range(5)])
    precision = EmpiricalCovariance().fit(fit - means[labels_of_fit]).precision_
    apart = rows[:, None] - means
    expected = -np.einsum("ncd,de,nce->nc", apart, precision, apart).min(axis=1)
    np.testing.assert_allclose(score("mfs", FEATS, FITTED, share=share, normalize=normalize), expected, rtol=1e-8)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_neighbors_are_those_of_knn_mfs(share: float) -> None:
    """Their score is minus the squared distance."""
    columns = selected(share, True)
    search = NearestNeighbors(n_neighbors=3).fit(unit(FIT)[:, columns].astype(np.float32))
    expected = -search.kneighbors(unit(ROWS)[:, columns])[0][:, -1]
    base = create_scorer("knn", k=3, normalize=False)
    found = score("mfs", FEATS, FITTED, share=share, normalize=True, base=base)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_head_reads_the_features_that_are_kept() -> None:
    columns = selected(0.4, False)
    expected = logsumexp(ROWS[:, columns] @ HEAD.weight.numpy()[:, columns].T + HEAD.bias.numpy(), axis=1)
    np.testing.assert_allclose(score("mfs", FEATS, FITTED, share=0.4, base="energy"), expected)


def test_constant_features_are_kept_last() -> None:
    constant, mixed = FIT.copy(), MIXED.copy()
    constant[:, 2], mixed[:, 2] = 0.0, 5.0
    fit = FeatureSet(constant, None, labels_of_fit, extras={"mixup": mixed})
    scorer: Any = create_scorer("mfs", share=0.99, base="feature_norm").fit(fit)
    assert scorer.kept_.tolist() == [column != 2 for column in range(WIDTH)]


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [SampledRows(100 * WIDTH), SampledRows(100 * WIDTH, "mixup")]
    for name, statistic in zip(("CLEAN", "MIXED"), few, strict=True):
        monkeypatch.setattr(f"ood_scores.scorers.shapers.selection.{name}", statistic)
    some = FeatureSet(FIT[::3], FIT_LOGITS[::3], labels_of_fit[::3], HEAD, extras={"mixup": MIXED[::3]})
    scorers: list[Any] = [create_scorer("mfs").fit(fit) for fit in (FITTED, some)]
    assert torch.equal(scorers[0].kept_, scorers[1].kept_)


def test_messages() -> None:
    with pytest.raises(BadInput, match=r"mfs: share must be in \(0, 1\], got 0"):
        create_scorer("mfs", share=0)
    with pytest.raises(BadInput, match="base='energy' reads logits, which normalized features do not have"):
        create_scorer("mfs", normalize=True, base="energy")
    with pytest.raises(MissingInput, match=r"'mfs' needs mixup to be fitted .*Mixup\(proxy='folder:photos'\)"):
        score("mfs", FEATS, fit=FeatureSet(FIT, None, labels_of_fit))
    wide = FeatureSet(FIT, None, labels_of_fit, extras={"mixup": FIT[:, :3]})
    with pytest.raises(ShapeMismatch, match=r"a row of mixup has shape \[3\] and one of the features \[8\]"):
        score("mfs", FEATS, fit=wide)
