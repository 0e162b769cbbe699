"""Coverage: whether the states of neurons are among those seen on the fit set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.base import Found
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work

BASE = 1000.0
"""The base of the logarithm that spaces the intervals, as in the authors' code."""


@register_scorer("nac")
@dataclass
class NAC(Scorer):
    """Mean coverage of the neurons' states by the fit set, ``mean_i min(count_i(s_i) / (full N), 1)``.

    The state of neuron i is ``s_i = sigmoid(alpha z_i g_i)`` with ``g = dKL(u || softmax(f)) / dz = W^T (softmax(f) -
    u)``: its activation times its influence on the prediction. ``count_i(s)`` is the number of the N fit rows whose
    state lies in the same interval as s; the intervals are narrow near 1/2. The mean is over the neurons of a layer,
    then over layers.

    Fits the counts, in one pass over the fit set; it does not read labels.

    Source: Liu et al. 2024, "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization"
    (NAC-UE), and their code, from which intervals and defaults are taken: those of the last layer on CIFAR-10. There,
    the counts are those of 1,000 rows, and an interval is covered from O = 50 on, which is ``full=0.05``. On ImageNet,
    they use ``alpha=3000`` and ``full=0.01``. Departures: counts are those of all fit rows; a class balance is not
    enforced; the mean over layers is that of the layers given, while the authors also choose layers on OoD data.

    Fails where alpha does not suit the size of activations and gradients: all states are then near 1/2, or near 0 and
    1, and every row is covered. Confident rows have small gradients in every layer, whatever they show (AUROC 0.54
    of a ResNet-20 with 1,000 fit rows, CIFAR-10 against CIFAR-100, where the energy reaches 0.88; 0.82 against
    textures). On ImageNet, fitted on 500 rows, the penultimate features have 0.30 and two inner layers 0.68.

    Args:
        layers: What to read: ``"features"`` for the penultimate features, for which no probe is needed, and names of
            modules, whose extras ``nac.<module>`` the probe ``nac`` computes.
        alpha: The steepness of the sigmoid: one for all layers, or one for each.
        full: The share of the fit rows from which on an interval is fully covered: one for all layers, or one for each.
        bins: The number of ends of intervals, an even number: one for all layers, or one for each.

    Cost: one product with the head's weight for each block and a lookup for each neuron; ``8 D bins`` bytes.
    """

    tags = Tags(
        formula=(
            r"s(x) = \operatorname{mean}_i \min \Bigl( \frac{\operatorname{count}_i(s_i)}{\text{full} \cdot N}, 1 "
            r"\Bigr), \quad s_i = \operatorname{sigmoid}(\alpha z_i g_i), \; g = W^\top (p - u)"
        ),
        aliases=("nacue", "nac_ue"),
        paper=Paper(
            "Neuron Activation Coverage: Rethinking Out-of-distribution Detection and Generalization",
            "Yibing Liu, Chris Xing Tian, Haoliang Li, Lei Ma, Shiqi Wang",
            "ICLR",
            2024,
            "https://arxiv.org/abs/2306.02879",
            "https://github.com/BierOne/ood_coverage",
        ),
        no_graph="it looks activations up in intervals, for which ONNX has no operation",
        waits=2,
        search_space={"alpha": ((10.0,), (100.0,), (1000.0,), (3000.0,)), "full": ((0.01,), (0.05,), (0.5,))},
    )
    layers: Sequence[str] = ("features",)
    alpha: float | Sequence[float] = (100.0,)
    full: float | Sequence[float] = (0.05,)
    bins: int | Sequence[int] = (50,)
    coverage_: list[Tensor] = fitted()

    def __post_init__(self) -> None:
        given = not isinstance(self.layers, str) and len(self.layers) > 0
        self.require(given, f"layers must be a list of 'features' and names of modules, got {self.layers!r}")
        alphas, shares, counts = (self._for_each(name) for name in ("alpha", "full", "bins"))
        self.require(all(0 < alpha < math.inf for alpha in alphas), f"alpha must be positive, got {self.alpha}")
        self.require(all(0 < share <= 1 for share in shares), f"full must be in (0, 1], got {self.full}")
        even = all(isinstance(bins, int) and bins >= 4 and bins % 2 == 0 for bins in counts)
        self.require(even, f"bins must be an even number of at least 4, got {self.bins}")
        extras = [f"nac.{layer}" for layer in self.layers if layer != "features"]
        self.needs = (*(("features", "logits", "head") if "features" in self.layers else ()), *extras)
        self.fit_needs = self.needs

    def work(self, sizes: Sizes) -> Work:
        values = sum(sizes.width(name) for name in self.needs if name not in ("logits", "head"))
        looking = 2500.0  # measured, per value
        return Work(looking * values * (sizes.fit_rows + sizes.rows))

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        counts: list[Tensor] | None = None
        for block in feats.blocks(only=self.needs):
            block.require_finite()
            places = self._places(block)
            here = [
                torch.bincount(cells.flatten(), minlength=cells.shape[1] * (intervals - 1))
                for cells, intervals in zip(places, self._for_each("bins"), strict=True)
            ]
            counts = here if counts is None else [old + new for old, new in zip(counts, here, strict=True)]
        assert counts is not None
        shares = self._for_each("full")
        self.coverage_ = [
            (n.double() / (share * len(feats))).clamp_max(1) for n, share in zip(counts, shares, strict=True)
        ]

    def score_block(self, block: Block) -> Tensor:
        layers = zip(self.coverage_, self._places(block), strict=True)
        return torch.stack([coverage.to(cells.device)[cells].mean(dim=1) for coverage, cells in layers]).mean(dim=0)

    def _places(self, block: Block) -> list[Tensor]:
        """For each layer, the place of every neuron's interval among all intervals of the layer, ``[B, K]``."""
        parameters = zip(self.layers, self._for_each("alpha"), self._for_each("bins"), strict=True)
        return [
            _cells((alpha * self._products(block, layer).double()).sigmoid(), bins) for layer, alpha, bins in parameters
        ]

    def _products(self, block: Block, layer: str) -> Tensor:
        """``z g`` of a layer, ``[B, K]``."""
        if layer != "features":
            return read_extra(block, f"nac.{layer}", self.name)
        features = block.features
        influence = (block.softmax() - 1 / block.logits.shape[1]).to(features)
        return features * (influence @ block.head.weight.to(features))

    def _for_each(self, parameter: str) -> Sequence[Any]:
        """The values of a parameter, one for each layer."""
        value = getattr(self, parameter)
        values = (value,) if isinstance(value, (int, float)) else tuple(value)
        self.require(
            len(values) in (1, len(self.layers)),
            f"{parameter} must be one number, or one for each of the {len(self.layers)} layers, got {value!r}",
        )
        return values * len(self.layers) if len(values) == 1 else values


def _cells(states: Tensor, bins: int) -> Tensor:
    """The place of each neuron's interval among the ``K (bins - 1)`` of all neurons, ``[B, K]``."""
    intervals = torch.bucketize(states, edges(bins).to(states.device), right=True) - 1
    return intervals + (bins - 1) * torch.arange(states.shape[1], device=states.device)


def edges(bins: int) -> Tensor:
    """The ends of the intervals in [0, 1], float64 ``[bins]``: spaced by a logarithm, symmetric about 1/2."""
    half = torch.linspace(1, math.sqrt(BASE), bins // 2, dtype=torch.float64).log() / math.log(BASE)
    ends = torch.cat([half[:-1], (1 - half).flip(0)])
    ends[-1] += 0.01
    return torch.cat([ends, ends.new_tensor([1.2])])
