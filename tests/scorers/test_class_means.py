"""Scorers of prototypes.py and nnguide, each held to a plain float64 reference and to pytorch-ood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_ood import detector as peer
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax
from scipy.stats import spearmanr, weibull_min
from torch import Tensor, nn

from ood_scores import FeatureSet, Head, create_scorer, score
from ood_scores.errors import BadInput
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import Means
from ood_scores.features.statistics.row_samples import Logits, Rows
from ood_scores.scorers.openmax import TRANSLATION, largest_by_class, weibull_fit

Array = NDArray[np.float64]
CLASSES, WIDTH = 5, 8


def rows(count: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """Features around class means, some predicted wrongly, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    return MEANS[labels] + rng.normal(size=(count, WIDTH)), labels


MEANS = 1.5 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
WEIGHT, BIAS = MEANS / 3, np.linspace(-0.2, 0.2, CLASSES)
FIT, labels_of_fit = rows(300, seed=0)
ROWS = np.concatenate([rows(40, seed=1)[0], 3 * np.random.default_rng(2).normal(size=(20, WIDTH))])
FIT_LOGITS, LOGITS = FIT @ WEIGHT.T + BIAS, ROWS @ WEIGHT.T + BIAS
PREDICTED, predicted_of_fit = LOGITS.argmax(axis=1), FIT_LOGITS.argmax(axis=1)
HEAD = Head(WEIGHT, BIAS)
TRAIN = FeatureSet(FIT, FIT_LOGITS, labels_of_fit, HEAD)
FEATS = FeatureSet(ROWS, LOGITS, head=HEAD)


def ours(name: str, feats: FeatureSet = FEATS, fit: FeatureSet = TRAIN, **params: Any) -> Array:
    return score(name, feats, fit=fit, **params).numpy()


def layer() -> nn.Linear:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(torch.tensor(WEIGHT))
    head.bias.copy_(torch.tensor(BIAS))
    return head


def same(found: Array, theirs: Tensor, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(found, -theirs.detach().double().numpy(), rtol=rtol, atol=1e-12)
    assert spearmanr(found, -theirs.detach()).statistic > 1 - 1e-9


def float32(detector: Any) -> Any:
    """fDBD and NCI cast features to float32, so their head must be it too."""
    detector.head.float()
    return detector.fit_features(torch.tensor(FIT)).predict_features(torch.tensor(ROWS))


def test_the_fit_set_has_errors() -> None:
    assert 0.02 < (predicted_of_fit != labels_of_fit).mean() < 0.5


def kl_matching(logits: Array, fit_logits: Array) -> list[float]:
    fit, found = softmax(fit_logits, axis=1), []
    means = [fit[fit.argmax(axis=1) == k].mean(axis=0) for k in np.unique(fit.argmax(axis=1))]
    for p in softmax(logits, axis=1):
        found.append(-min(sum(p[c] * math.log(p[c] / d[c]) for c in range(len(p))) for d in means))
    return found


def test_kl_matching() -> None:
    np.testing.assert_allclose(ours("kl_matching"), kl_matching(LOGITS, FIT_LOGITS), rtol=1e-9)
    same(
        ours("kl_matching"),
        peer.KLMatching(None).fit_logits(torch.tensor(FIT_LOGITS)).predict_logits(torch.tensor(LOGITS)),
    )


def test_kl_matching_leaves_out_classes_never_predicted() -> None:
    kept = predicted_of_fit != 2
    found = ours("kl_matching", fit=TRAIN[kept])
    np.testing.assert_allclose(found, kl_matching(LOGITS, FIT_LOGITS[kept]), rtol=1e-9)
    assert create_scorer("kl_matching").fit(TRAIN[kept]).log_means_.shape == (CLASSES - 1, CLASSES)  # type: ignore[attr-defined]


def test_kl_matching_where_probabilities_underflow() -> None:
    steep = FeatureSet(FIT, 1e4 * FIT_LOGITS)
    assert np.isfinite(ours("kl_matching", steep[:50], steep)).all()


def test_she() -> None:
    means = [FIT[(labels_of_fit == c) & (predicted_of_fit == c)].mean(axis=0) for c in range(CLASSES)]
    np.testing.assert_allclose(
        ours("she"), [z @ means[c] for z, c in zip(ROWS, PREDICTED, strict=True)], rtol=1e-9, atol=1e-12
    )
    detector: Any = peer.SHE(None, layer())
    same(
        ours("she"),
        detector.fit_features(torch.tensor(FIT), torch.tensor(labels_of_fit)).predict_features(torch.tensor(ROWS)),
    )


def test_she_of_a_class_never_predicted_rightly_is_0() -> None:
    """pytorch-ood refuses such a fit set."""
    wrong = TRAIN[(labels_of_fit != 3) | (predicted_of_fit != 3)]
    with pytest.warns(UserWarning, match="she: 1 of 5 classes have no row to fit that is predicted as its label"):
        found = ours("she", fit=wrong)
    assert (found[PREDICTED == 3] == 0).all()
    np.testing.assert_allclose(found[PREDICTED != 3], ours("she")[PREDICTED != 3], rtol=1e-9, atol=1e-12)


def fdbd(weight: Array, logits: Array) -> list[float]:
    found, centre = [], FIT.mean(axis=0)
    for z, f in zip(ROWS, logits, strict=True):
        best = f.argmax()
        apart = [c for c in range(len(f)) if np.linalg.norm(weight[best] - weight[c]) > 1e-12]
        gaps = [abs(f[best] - f[c]) / np.linalg.norm(weight[best] - weight[c]) for c in apart]
        found.append(float(np.mean(gaps or [0.0]) / np.linalg.norm(z - centre)))
    return found


def test_fdbd() -> None:
    np.testing.assert_allclose(ours("fdbd"), fdbd(WEIGHT, LOGITS), rtol=1e-9)
    same(ours("fdbd"), float32(peer.fDBD(None, layer())), rtol=1e-4)  # theirs is float32


def test_fdbd_leaves_out_classes_with_equal_weights() -> None:
    """pytorch-ood divides by their distance, 0."""
    weight = WEIGHT.copy()
    weight[3] = weight[1]
    logits = ROWS @ weight.T + BIAS
    head = Head(weight, BIAS)
    found = ours("fdbd", FeatureSet(ROWS, logits), FeatureSet(FIT, head=head))
    np.testing.assert_allclose(found, fdbd(weight, logits), rtol=1e-9)
    level = Head(np.ones((CLASSES, WIDTH)), BIAS)
    assert (ours("fdbd", FeatureSet(ROWS, ROWS @ level.weight.numpy().T), FeatureSet(FIT, head=level)) == 0).all()


@pytest.mark.parametrize("name", ["fdbd", "nci"])
def test_a_row_at_the_mean(name: str) -> None:
    fit = np.array([[1.0, 0, 0, 0, 0, 0, 0, 0], [3.0, 0, 0, 0, 0, 0, 0, 0]])
    row = fit.mean(axis=0, keepdims=True)
    found = ours(name, FeatureSet(row, row @ WEIGHT.T), FeatureSet(fit, head=HEAD))
    assert np.isfinite(found).all()
    assert name == "fdbd" or found[0] == 0


def test_fdbd_of_a_single_class() -> None:
    with pytest.raises(BadInput, match="no decision boundary"):
        ours("fdbd", fit=FeatureSet(FIT, head=Head(WEIGHT[:1], BIAS[:1])))


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_nci(alpha: float) -> None:
    centre = FIT.mean(axis=0)
    expected = [
        (z - centre) @ WEIGHT[c] / np.linalg.norm(z - centre) + alpha * np.abs(z).sum()
        for z, c in zip(ROWS, PREDICTED, strict=True)
    ]
    np.testing.assert_allclose(ours("nci", alpha=alpha), expected, rtol=1e-9)
    same(ours("nci", alpha=alpha), float32(peer.NCI(None, layer(), alpha=alpha)), rtol=1e-4)


@pytest.mark.parametrize("k", [1, 10, 300])
def test_nnguide(k: int) -> None:
    def unit(z: Array) -> Array:
        return z / np.linalg.norm(z, axis=1, keepdims=True)

    bank = unit(FIT) * logsumexp(FIT_LOGITS, axis=1)[:, None]
    guidance = [np.sort(bank @ z)[-k:].mean() for z in unit(ROWS)]
    expected = logsumexp(LOGITS, axis=1) * guidance
    np.testing.assert_allclose(ours("nnguide", k=k), expected, rtol=1e-6, atol=1e-6)  # the bank is float32
    detector: Any = peer.NNGuide(None, layer().float(), k=k)
    detector.fit_features(torch.tensor(FIT), torch.tensor(labels_of_fit))
    theirs = detector.predict_features(torch.tensor(ROWS).float())
    np.testing.assert_allclose(ours("nnguide", k=k), -theirs, rtol=1e-4, atol=1e-5)
    assert spearmanr(ours("nnguide", k=k), -theirs).statistic > 1 - 1e-9


def test_nnguide_on_a_seeded_share() -> None:
    scorers: list[Any] = [create_scorer("nnguide", share=0.2, seed=seed).fit(TRAIN) for seed in (3, 3, 4)]
    banks = [scorer.bank_ for scorer in scorers]
    whole = create_scorer("nnguide").fit(TRAIN).bank_  # type: ignore[attr-defined]
    assert torch.equal(banks[0], banks[1])
    assert not torch.equal(banks[0], banks[2])
    chosen = [(whole == row).all(dim=1).nonzero().item() for row in banks[0]]
    assert len(set(chosen)) == 60
    shuffled = create_scorer("nnguide", share=0.2, seed=3).fit(TRAIN[torch.randperm(len(TRAIN))])
    assert torch.equal(vars(shuffled)["bank_"], banks[0])
    assert torch.equal(vars(shuffled)["energies_"], vars(scorers[0])["energies_"])
    with pytest.raises(BadInput, match="k=10 neighbours need as many bank rows, got 3: lower k"):
        create_scorer("nnguide", share=0.01).fit(TRAIN)


def test_nnguide_of_zeros_is_0_and_bad_parameters_are_named() -> None:
    assert ours("nnguide", FeatureSet(np.zeros((2, WIDTH)), LOGITS[:2])).tolist() == [0, 0]
    huge = FeatureSet(FIT, 1e39 * FIT_LOGITS)
    with pytest.raises(BadInput, match="beyond float32"):
        create_scorer("nnguide").fit(huge)
    for params in ({"k": 0}, {"share": 0.0}, {"share": 1.5}):
        with pytest.raises(BadInput, match=next(iter(params))):
            create_scorer("nnguide", **params)


def weibull(tail: Array) -> tuple[float, float]:
    """Shape and scale of greatest likelihood: a root of the derivative."""
    logs = np.log(tail)

    def derivative(shape: float) -> float:
        weights = softmax(shape * logs)
        return float(weights @ logs - logs.mean() - 1 / shape)

    typical = 1 / logs.std()
    shape = brentq(derivative, typical / 100, typical * 100, xtol=1e-12, rtol=1e-14)
    return shape, float(np.exp((logsumexp(shape * logs) - np.log(len(logs))) / shape))


def openmax(tail: int, alpha: int, euclidean: float, cosine: float) -> list[float]:
    """log(1 - p_unknown), one row and one class at a time."""

    def distance(f: Array, mean: Array) -> float:
        angle = 1 - f @ mean / (np.linalg.norm(f) * np.linalg.norm(mean))
        return float(euclidean * np.linalg.norm(f - mean) + cosine * angle)

    models = []
    for c in range(CLASSES):
        right = FIT_LOGITS[(labels_of_fit == c) & (predicted_of_fit == c)]
        mean = right.mean(axis=0)
        largest = np.sort([distance(f, mean) for f in right])[-tail:]
        models.append((mean, largest[0], *weibull(largest - largest[0] + TRANSLATION)))
    found = []
    for f in LOGITS:
        moved = f.copy()
        for i, c in enumerate(np.argsort(-f)[:alpha]):
            mean, nearest, shape, scale = models[c]
            probability = weibull_min.cdf(distance(f, mean) - nearest + TRANSLATION, shape, scale=scale)
            moved[c] = f[c] * (1 - probability * (alpha - i) / alpha)
        unknown = (f - moved).sum()
        found.append(float(logsumexp(moved) - np.logaddexp(logsumexp(moved), unknown)))
    return found


@pytest.mark.parametrize(
    ("tail", "alpha", "euclidean", "cosine"), [(20, 5, 1.0, 0.0), (7, 3, 0.005, 1.0), (20, 1, 0.0, 1.0)]
)
def test_openmax(tail: int, alpha: int, euclidean: float, cosine: float) -> None:
    found = ours("openmax", tail=tail, alpha=alpha, euclidean=euclidean, cosine=cosine)
    np.testing.assert_allclose(found, openmax(tail, alpha, euclidean, cosine), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("alpha", [3, 10])
def test_openmax_is_pytorch_oods_on_the_rows_that_are_right(alpha: int) -> None:
    """Theirs leaves the choice of rows to the caller, fits by a simplex search, and gives p_unknown itself."""
    right = predicted_of_fit == labels_of_fit
    detector: Any = peer.OpenMax(None, tailsize=20, alpha=alpha)
    detector.fit_logits(torch.tensor(FIT_LOGITS[right]), torch.tensor(labels_of_fit[right]))
    theirs = detector.predict_logits(torch.tensor(LOGITS))
    scorer: Any = create_scorer("openmax", alpha=alpha).fit(TRAIN)
    found = scorer.score(FEATS)
    assert spearmanr(found, -theirs).statistic > 0.999
    fitted = detector._openmax.distributions
    scorer.shape_ = torch.tensor([fitted[c].c for c in range(CLASSES)])
    scorer.log_scale_ = torch.tensor([math.log(fitted[c].scale / TRANSLATION) for c in range(CLASSES)])
    np.testing.assert_allclose(-torch.expm1(scorer.score(FEATS)), theirs, rtol=1e-6)


def test_openmax_of_classes_that_are_not_or_hardly_there() -> None:
    """A class without right rows is unknown altogether; one with a single row is a step at it."""
    right = np.flatnonzero((predicted_of_fit == labels_of_fit) & (labels_of_fit == 1))
    few = np.setdiff1d(np.arange(len(labels_of_fit)), np.concatenate([right[1:], np.flatnonzero(labels_of_fit == 3)]))
    with pytest.warns(UserWarning, match="openmax: 1 of 5 classes have no row"):
        scorer: Any = create_scorer("openmax", alpha=1).fit(TRAIN[few])
    found = scorer.score(FEATS).numpy()
    moved = LOGITS.copy()
    gone = np.isin(PREDICTED, [1, 3])
    moved[gone, PREDICTED[gone]] = 0
    unknown = LOGITS.max(axis=1)
    expected = logsumexp(moved, axis=1) - np.logaddexp(logsumexp(moved, axis=1), unknown)
    np.testing.assert_allclose(found[gone], expected[gone], rtol=1e-9)
    own = FeatureSet(FIT[right[:1]], FIT_LOGITS[right[:1]])
    assert np.isfinite(scorer.score(own).numpy()).all()


def test_openmax_needs_a_right_row_and_sound_parameters() -> None:
    with pytest.raises(BadInput, match="no row of the fit set is predicted as its label"):
        create_scorer("openmax").fit(TRAIN[predicted_of_fit != labels_of_fit])
    for params in ({"tail": 0}, {"alpha": 0}, {"euclidean": 0.0}, {"cosine": -1.0}, {"euclidean": math.inf}):
        with pytest.raises(BadInput, match=r"tail|alpha|weights of the distances"):
            create_scorer("openmax", **params)


def test_weibull_fit_is_scipys() -> None:
    rng = np.random.default_rng(5)
    tails = [weibull_min.rvs(shape, scale=scale, size=40, random_state=rng) for shape, scale in ((0.7, 3), (9, 0.01))]
    tails.append(TRANSLATION + rng.exponential(size=25))
    logs = np.full((4, 40), np.nan)
    for row, tail in zip(logs, tails, strict=False):
        row[: len(tail)] = np.log(tail)
    shape, log_scale = weibull_fit(torch.tensor(logs))
    for found, scale, tail in zip(shape, log_scale, tails, strict=False):
        expected = weibull(tail)
        np.testing.assert_allclose([float(found), float(scale.exp())], expected, rtol=1e-6)
        theirs = weibull_min.fit(tail, floc=0)
        likelihood = [weibull_min.logpdf(tail, c, scale=s).sum() for c, s in (expected, theirs[::2])]
        assert likelihood[0] >= likelihood[1] - 1e-6
    assert shape.isfinite().all()
    assert log_scale.isfinite().all()


def test_largest_by_class() -> None:
    values, labels = torch.tensor([3.0, 1, 4, 1, 5, 9, 2]), torch.tensor([0, 0, 0, 2, 2, 0, 2])
    found = largest_by_class(values, labels, 4, 3)
    nan = math.nan
    np.testing.assert_array_equal(found, [[9, 4, 3], [nan] * 3, [5, 2, 1], [nan] * 3])


def test_statistics_in_any_blocks() -> None:
    wanted = [Means(s, g) for s in ("features", "logits", "softmax") for g in ("all", "predicted", "correct")]
    found = collect(TRAIN[:].in_blocks(17), [*wanted, Logits(), Rows(True, 0.5, 1)])
    spaces = {"features": FIT, "logits": FIT_LOGITS, "softmax": softmax(FIT_LOGITS, axis=1)}
    for statistic in wanted:
        right = predicted_of_fit == labels_of_fit
        groups = {
            "all": [np.ones(len(FIT), dtype=bool)],
            "predicted": [predicted_of_fit == c for c in range(CLASSES)],
            "correct": [right & (labels_of_fit == c) for c in range(CLASSES)],
        }[statistic.group]
        np.testing.assert_array_equal(found[statistic].counts, [group.sum() for group in groups])
        means = [spaces[statistic.space][group].mean(axis=0) for group in groups]
        np.testing.assert_allclose(found[statistic].means, means, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(found[Logits()], FIT_LOGITS)
    assert found[Rows(True, 0.5, 1)].shape == (150, WIDTH)
    assert torch.equal(found[Rows(True, 0.5, 1)], collect(TRAIN, [Rows(True, 0.5, 1)])[Rows(True, 0.5, 1)])
