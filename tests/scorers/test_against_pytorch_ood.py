"""Scorers compared with those of pytorch-ood 0.4 on the same tensors; its scores are higher for OoD rows.

Where the definitions agree, the values agree up to the sign. Where they differ, the difference is described and undone
here. In both cases, the two rank the rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_ood import detector as peer
from scipy.stats import spearmanr
from torch import Tensor, nn

from ood_scores import FeatureSet, Head, list_scorers, score

CLASSES, WIDTH, ROWS = 5, 8, 30


def data(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, nn.Linear, Tensor]:
    """Return features around class means, a linear head, and labels; all classes have the same number of rows."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    means = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    features = (means[labels] + torch.randn(rows, WIDTH, generator=generator)).double()
    layer = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(means / 20)  # no probability below 1e-7, where pytorch-ood clips
        layer.bias.zero_()
    return features, layer, labels


FIT_FEATURES, LAYER, FIT_LABELS = data(seed=0, rows=200)
FEATURES = torch.cat([data(seed=1)[0], 3 * torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2)).double()])
LOGITS = LAYER(FEATURES).detach()
FIT = FeatureSet(FIT_FEATURES, LAYER(FIT_FEATURES), FIT_LABELS, Head(LAYER.weight, LAYER.bias))
FEATS = FeatureSet(FEATURES, LOGITS, head=Head(LAYER.weight, LAYER.bias))


@dataclass
class Pair:
    """A scorer in both packages. ``undo`` maps minus their score to ours; ``why`` describes the undone difference."""

    name: str
    params: dict[str, Any]
    theirs: Callable[[], Tensor]
    undo: Callable[[Tensor], Tensor] = lambda score: score
    why: str = ""
    rtol: float = 1e-9

    def __str__(self) -> str:
        return f"{self.name} {self.params}"


def fitted(detector: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return detector.fit_features(FIT_FEATURES.to(dtype), FIT_LABELS).predict_features(FEATURES.to(dtype))


def gradnorm(*parameters: str, temperature: float = 1.0) -> Tensor:
    detector = peer.GradNorm(LAYER, param_filter=lambda name: name in parameters, temperature=temperature)
    return detector.to("cpu").predict(FEATURES)


PAIRS = [
    Pair("msp", {}, lambda: peer.MaxSoftmax.score(LOGITS)),
    Pair("msp", {"temperature": 3.0}, lambda: peer.MaxSoftmax.score(LOGITS, t=3.0)),
    Pair("max_logit", {}, lambda: peer.MaxLogit.score(LOGITS)),
    Pair("energy", {}, lambda: peer.EnergyBased.score(LOGITS)),
    Pair("energy", {"temperature": 2.0}, lambda: peer.EnergyBased.score(LOGITS, t=2.0)),
    Pair(
        "entropy",
        {},
        lambda: peer.Entropy.score(LOGITS),
        why="pytorch-ood clips probabilities at 1e-7, which these rows do not reach",
    ),
    Pair(
        "gen",
        {"gamma": 0.5, "top": 100},
        lambda: peer.GEN.score(LOGITS, gamma=0.5),
        lambda score: score * CLASSES,
        why="pytorch-ood averages the terms, ours and the paper sum them; it clips probabilities at 1e-7",
    ),
    Pair(
        "gen",
        {"gamma": 1.0, "top": 3},
        lambda: peer.GEN.score(LOGITS, gamma=1.0, M=3),
        lambda score: score * 3,
        why="pytorch-ood averages M terms",
    ),
    Pair(
        "gradnorm",
        {},
        lambda: gradnorm("weight"),
        why="the score of pytorch-ood is minus the norm; ours has the sign of the paper",
    ),
    Pair("gradnorm", {"temperature": 4.0}, lambda: gradnorm("weight", temperature=4.0)),
    Pair(
        "gradnorm", {"bias": True}, lambda: gradnorm("weight", "bias"), why="pytorch-ood includes the bias by default"
    ),
    Pair("knn", {"k": 1}, lambda: fitted(peer.KNN(None, k=1)), why="our bank is float32", rtol=1e-5),
    Pair("knn", {"k": 50}, lambda: fitted(peer.KNN(None, k=50)), why="our bank is float32", rtol=1e-5),
    Pair(
        "knn",
        {"k": 5, "normalize": False},
        lambda: fitted(peer.KNN(None, k=5, normalize=False)),
        why="our bank is float32",
        rtol=1e-5,
    ),
    Pair(
        "mahalanobis",
        {},
        lambda: fitted(peer.Mahalanobis(None), torch.float32),
        lambda score: 2 * len(FIT) * score,
        why="pytorch-ood computes half the squared distance under a scatter not divided by N (plus a ridge of 1e-6), "
        "all in float32",
        rtol=1e-4,
    ),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_equals_pytorch_ood(pair: Pair) -> None:
    ours, theirs = score(pair.name, FEATS, fit=FIT, **pair.params), -pair.theirs()
    torch.testing.assert_close(ours, pair.undo(theirs).double(), rtol=pair.rtol, atol=1e-9)
    assert spearmanr(ours, theirs).statistic > 1 - 1e-9


def test_gmm_agrees_once_three_differences_are_undone() -> None:
    """pytorch-ood divides covariances by n_c (ours, as DDU's code, by n_c - 1), always adds a ridge (ours only as much
    jitter as a class needs), and always weights classes by frequency (ours with ``prior="empirical"``)."""
    count = len(FIT) // CLASSES
    shrink = ((count - 1) / count) ** 0.5  # features spread by this much around each class mean undo the divisor
    means = torch.stack([FIT_FEATURES[FIT_LABELS.eq(c)].mean(dim=0) for c in range(CLASSES)])[FIT_LABELS]
    undone = FeatureSet(means + shrink * (FIT_FEATURES - means), labels=FIT_LABELS)
    theirs = -fitted(peer.GMM(None, reg=0.0))
    ours = score("gmm", FEATS, fit=undone, prior="empirical")
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    as_it_comes = score("gmm", FEATS, fit=FIT)
    assert spearmanr(as_it_comes, -fitted(peer.GMM(None))).statistic > 0.999


def test_gmm_with_the_same_jitter_on_singular_classes() -> None:
    """For a dead feature, pytorch-ood adds ``reg``, and ours the smallest jitter that suffices."""
    features, rows = FIT_FEATURES.clone(), FEATURES.clone()
    features[:, 0] = rows[:, 0] = 0.5
    detector: Any = peer.GMM(None, reg=np.finfo(float).eps).fit_features(features, FIT_LABELS)
    ours = score("gmm", FeatureSet(rows), fit=FeatureSet(features, labels=FIT_LABELS))
    assert spearmanr(ours, -detector.predict_features(rows)).statistic > 0.999


@pytest.mark.parametrize("name", ["entropy", "gen"])
def test_clipping_in_pytorch_ood_levels_confident_rows(name: str) -> None:
    """pytorch-ood clips at 1e-7, so that more confident rows are practically equal; ours keep their order."""
    logits = torch.tensor([[20.0, 0, 0], [25.0, 0, 0], [30.0, 0, 0]], dtype=torch.float64)
    theirs = {"entropy": peer.Entropy.score, "gen": peer.GEN.score}[name](logits)
    ours = score(name, FeatureSet(torch.ones(3, 1), logits))
    assert theirs.max() / theirs.min() < 1.01
    assert (ours[:-1] / ours[1:] > 1.5).all()  # both negative: the entropy falls


def test_zero_vectors_stay_zero_in_both() -> None:
    rows = torch.zeros(1, WIDTH, dtype=torch.float64)
    theirs: Any = peer.KNN(None, k=3).fit_features(FIT_FEATURES, FIT_LABELS)
    torch.testing.assert_close(score("knn", FeatureSet(rows), fit=FIT, k=3), -theirs.predict_features(rows))


def test_scorers_without_a_counterpart() -> None:
    """pytorch-ood has none of these scorers; a scorer that gains a counterpart belongs in PAIRS."""
    without = {
        "activation_ratio",
        "doctor",
        "feature_norm",
        "kl_uniform",
        "logit_norm",
        "margin",
        "prior_energy",
        "prior_msp",
        "renyi",
        "scaled_msp",
    }
    assert without <= set(list_scorers())
    theirs = {name.lower() for name in dir(peer)}
    assert not theirs & {name.replace("_", "") for name in without}
