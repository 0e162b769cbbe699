"""The detectors of pytorch-ood 0.4 that correspond to our scorers, fitted and scored on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ood_scores


class _Detectors:
    """The module ``pytorch_ood.detector``, imported when a detector is created: other measurements do without it."""

    def __getattr__(self, name: str) -> Any:
        from pytorch_ood import detector

        return getattr(detector, name)


peer = _Detectors()


@dataclass(frozen=True)
class Problem:
    """Features to fit on, features to score, and the head of both as a layer."""

    train: ood_scores.FeatureSet
    test: ood_scores.FeatureSet
    layer: nn.Linear


@dataclass(frozen=True)
class Peer:
    """A detector: ``make`` creates it, ``fit`` and ``score`` call it, and ``share`` of the rows is scored."""

    make: Callable[[nn.Linear], Any]
    score: Callable[[Any, Tensor, Tensor], Any]
    fit: Callable[[Any, Tensor, Tensor, Tensor], Any] | None = None
    share: float = 1.0

    def fitted(self, problem: Problem) -> Any:
        detector = self.make(problem.layer)
        if self.fit is not None:
            train: Any = problem.train
            self.fit(detector, train.features, train.logits, train.labels)
        return detector

    def scored(self, detector: Any, problem: Problem) -> None:
        test: Any = problem.test
        rows = max(1, int(self.share * len(test)))
        with torch.no_grad():
            self.score(detector, test.features[:rows], test.logits[:rows])


def _of_features(make: Callable[[nn.Linear], Any], share: float = 1.0) -> Peer:
    return Peer(make, lambda d, z, f: d.predict_features(z), lambda d, z, f, y: d.fit_features(z, y), share)


def _of_logits(make: Callable[[nn.Linear], Any]) -> Peer:
    return Peer(make, lambda d, z, f: d.predict_logits(f))


def _fitted_on_logits(make: Callable[[nn.Linear], Any], share: float = 1.0) -> Peer:
    return Peer(make, lambda d, z, f: d.predict_logits(f), lambda d, z, f, y: d.fit_logits(f, y), share)


def _of_maps(make: Callable[[Callable[[Tensor], Tensor]], Any], fitted: bool = False) -> Peer:
    """Pass maps of a single pixel to detectors of feature maps ``[B, C, H, W]``."""
    return Peer(
        lambda layer: make(lambda maps: layer(maps.flatten(1))),
        lambda d, z, f: d.predict_feature_maps(z[:, :, None, None]),
        (lambda d, z, f, y: d.fit_feature_maps(z[:, :, None, None], y)) if fitted else None,
    )


def _weight_only(name: str) -> bool:
    return name == "weight"


PEERS: dict[str, Peer] = {
    "ash_b": _of_maps(lambda head: peer.ASH(None, head, variant="ash-b", percentile=0.90)),
    "ash_p": _of_maps(lambda head: peer.ASH(None, head, variant="ash-p", percentile=0.90)),
    "ash_s": _of_maps(lambda head: peer.ASH(None, head, variant="ash-s", percentile=0.90)),
    "dice": _of_features(lambda layer: peer.DICE(None, layer.weight.detach(), layer.bias.detach(), 0.9)),
    "energy": _of_logits(lambda layer: peer.EnergyBased(None)),
    "entropy": _of_logits(lambda layer: peer.Entropy(None)),
    "fdbd": _of_features(lambda layer: peer.fDBD(None, layer)),
    "gen": _of_logits(lambda layer: peer.GEN(None, gamma=0.1, M=100)),
    "gmm": _of_features(lambda layer: peer.GMM(None)),
    "gradnorm": Peer(
        lambda layer: peer.GradNorm(layer, _weight_only).to("cpu"), lambda d, z, f: d.predict(z), share=0.1
    ),
    "kl_matching": _fitted_on_logits(lambda layer: peer.KLMatching(None)),
    "knn": _of_features(lambda layer: peer.KNN(None, k=50)),
    "lts": Peer(lambda layer: peer.LTS(None, layer), lambda d, z, f: d.predict_features(z)),
    "mahalanobis": _of_features(lambda layer: peer.Mahalanobis(None)),
    "max_logit": _of_logits(lambda layer: peer.MaxLogit(None)),
    "msp": _of_logits(lambda layer: peer.MaxSoftmax(None)),
    "nci": _of_features(lambda layer: peer.NCI(None, layer)),
    "nnguide": _of_features(lambda layer: peer.NNGuide(None, layer, k=10), share=0.2),
    "openmax": _fitted_on_logits(lambda layer: peer.OpenMax(None, tailsize=20), share=0.2),
    "pnml": _of_features(lambda layer: peer.PNML(None, layer)),
    "react": _of_maps(lambda head: peer.ReAct(None, head), fitted=True),
    "relative_mahalanobis": _of_features(lambda layer: peer.RMD(None)),
    "scale": _of_maps(lambda head: peer.SCALE(None, head, percentile=0.85)),
    "she": _of_features(lambda layer: peer.SHE(None, layer)),
    "temperature": _fitted_on_logits(lambda layer: peer.TemperatureScaling(None)),
    "vim": _of_features(
        lambda layer: peer.ViM(None, layer.in_features // 2, layer.weight.detach(), layer.bias.detach())
    ),
    "vra": _of_maps(lambda head: peer.VRA(None, head, 0.60, 0.95), fitted=True),
    "weighted_energy": _of_logits(lambda layer: peer.WeightedEBO(None, torch.ones(layer.out_features))),
}
