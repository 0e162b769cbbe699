"""Clipping shapers: activations are clipped at quantiles of the fit set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ood_scores.features import FeatureSet
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.row_samples import SampledRows, quantiles
from ood_scores.scorers.base import fitted
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.shapers.base import FeatureShaper
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("react")
@dataclass
class ReAct(FeatureShaper):
    """Rectified activations, ``min(z, c)``, scored by ``base``; c is a quantile of all in-distribution activations.

    Fits c, the q-quantile of the N D activations of the fit set taken together, interpolated linearly as by
    ``numpy.quantile``; exact up to 2^26 activations, beyond that from evenly spaced rows (``SampledRows``).

    Source: Sun, Guo & Li 2021, "ReAct: Out-of-distribution Detection With Rectified Activations"; q = 0.90 and energy
    are theirs for ImageNet and CIFAR. ``base="gradnorm"`` is the "RG" of later tables.

    Fails where OoD rows have small activations, which clipping does not change; a low q also costs accuracy.

    Args:
        q: The quantile, in [0, 1]; 1 changes no row of the fit set.
        base: The scorer of the clipped rows.

    Cost: one product with the head for each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = \operatorname{base}\bigl( \min(z, c) \bigr), \quad c = \text{the } q\text{-quantile of all "
            r"fit activations}"
        ),
        paper=Paper(
            "ReAct: Out-of-distribution Detection With Rectified Activations",
            "Yiyou Sun, Chuan Guo, Yixuan Li",
            "NeurIPS",
            2021,
            "https://arxiv.org/abs/2111.12797",
            "https://github.com/deeplearning-wisc/react",
        ),
        search_space={"q": (0.85, 0.9, 0.95, 0.99)},
    )
    q: float = 0.90
    threshold_: float = fitted()
    fit_reads = ("features",)

    def __post_init__(self) -> None:
        self.require(0 <= self.q <= 1, f"q must be in [0, 1], got {self.q}")
        super().__post_init__()

    def statistics(self) -> Sequence[Statistic]:
        return (SampledRows(),)

    def fit_shape(self, found: Found, feats: FeatureSet) -> None:
        self.threshold_ = float(quantiles(found[SampledRows()].flatten(), [self.q]))

    def shape_features(self, features: Tensor) -> Tensor:
        return features.clamp(max=self.threshold_)


@register_scorer("vra")
@dataclass
class VRA(FeatureShaper):
    """Activations rectified on both sides, scored by ``base``: 0 where ``z < low``, ``high`` where ``z > high``.

    Fits, for each unit, its ``low`` and ``high`` quantiles over the rows of the fit set, or with ``below="clip_all"``
    those of the activations of all units taken together, interpolated linearly; exact up to 2^26 activations, beyond
    that from evenly spaced rows (``SampledRows``).

    Source: Xu, Lian, Liu & Tao 2023, "VRA: Variational Rectified Activation for Out-of-distribution Detection", whose
    code sets low activations to zero; 0.6 and 0.95 are its values for CIFAR-100 (0.9 for CIFAR-10; for ImageNet, it
    prints absolute thresholds). Two other versions raise low activations to the low quantile: ``below="clip"`` is that
    of pytorch-ood, with 0.01 and 0.99; ``below="clip_all"`` is that of OpenOOD, with 0.10 and 0.90.

    Fails with ``below="zero"`` on features that do not come from a ReLU: for negative features, zero is not low.

    Args:
        low: The low quantile, in [0, 1].
        high: The high quantile, in [low, 1].
        below: What activations below the low quantile become: ``"zero"`` as the authors, ``"clip"`` for the quantile of
            the unit as pytorch-ood, ``"clip_all"`` for that of all units, with both quantiles fitted on all units, as
            OpenOOD.
        base: The scorer of the rectified rows.

    Cost: one product with the head for each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = \operatorname{base}(\tilde z), \quad \tilde z_d = \begin{cases} 0 & z_d < \text{low}_d \\ "
            r"\text{high}_d & z_d > \text{high}_d \\ z_d & \text{otherwise} \end{cases}"
        ),
        paper=Paper(
            "VRA: Variational Rectified Activation for Out-of-distribution Detection",
            "Mingyu Xu, Zheng Lian, Bin Liu, Jianhua Tao",
            "NeurIPS",
            2023,
            "https://arxiv.org/abs/2302.11716",
            "https://github.com/zeroQiaoba/VRA",
        ),
        search_space={"low": (0.5, 0.6, 0.7), "high": (0.9, 0.95, 0.99)},
    )
    low: float = 0.60
    high: float = 0.95
    below: Literal["zero", "clip", "clip_all"] = "zero"
    low_: Tensor = fitted()
    high_: Tensor = fitted()
    fit_reads = ("features",)

    def __post_init__(self) -> None:
        ordered = 0 <= self.low <= self.high <= 1
        self.require(ordered, f"low and high must satisfy 0 <= low <= high <= 1, got low={self.low}, high={self.high}")
        self.require_choices()
        super().__post_init__()

    def statistics(self) -> Sequence[Statistic]:
        return (SampledRows(),)

    def fit_shape(self, found: Found, feats: FeatureSet) -> None:
        sample = found[SampledRows()]
        self.low_, self.high_ = quantiles(
            sample.flatten() if self.below == "clip_all" else sample, [self.low, self.high]
        )

    def shape_features(self, features: Tensor) -> Tensor:
        low, high = self.low_.to(features), self.high_.to(features)
        if self.below == "zero":
            return torch.minimum(features, high).mul_(features >= low)
        return features.clamp(low, high)
