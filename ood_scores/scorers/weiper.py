"""Perturbed weights: scores of a head whose weights are perturbed at random."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize, pad

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet, Head
from ood_scores.features.statistics.base import Accumulator, Found
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work

EDGE = 1e-8
"""How far beyond the largest value of the fit set the last bin extends."""

FLOOR, PERTURBED_FLOOR = 0.01, 0.025
"""The constants added to each share of a histogram before it is normalized, for features and for perturbed logits."""

ROUNDED = 64
"""How many float64 units in the last place a value may be beyond the limits: products depend on the block size."""

PIECE = 2**20
"""How many perturbed logits are computed at a time, at least those of one repeat: few enough for the CPU caches."""

WIDEST = 100
"""The largest width of the average over bins, as a multiple of their number; all bins are nearly equal long before."""


@register_scorer("weiper")
@dataclass
class WeiPer(Scorer):
    """Similarity of the histograms of a row's features and perturbed logits to those of the fit set: "WeiPer+KLD".

    ``-(KL(p, q(z)) + lambda_1 KL(p', q(W' z + b)) - lambda_2 MSP')``. W' are ``repeats`` copies of the head's weight,
    each with noise ``distance ||w_c|| e / ||e||`` added to its rows, where e is normal. q is the histogram of the D
    features of the row, or of its C ``repeats`` perturbed logits, smoothed by a moving average; p and p' are the mean
    histograms of the fit rows, not smoothed. KL is the sum of the divergences in both directions, and MSP' is the mean
    over the copies of the largest softmax probability.

    Fits, in a first pass, the range of all features and of all perturbed logits, which the bins divide, and, in a
    second pass, the mean histograms.

    Source: Granz, Heurich & Landgraf 2024, "WeiPer: OOD Detection using Weight Perturbations of Class Projections". The
    defaults are their values for ResNet-50 on ImageNet; for ResNet-18 on CIFAR-10, they list ``distance=1.8,
    lambda_1=2.5, lambda_2=0.1, smoothing=4, perturbed_smoothing=15``, on CIFAR-100 ``2.4, 0.1, 1, 4, 40``, and for
    ViT-B/16 ``2.0, 2.5, 0.1, 40, 15`` with 80 bins. As in their code, 0.01, or 0.025 for the perturbed logits, is added
    to the shares, and values outside the range are in no bin. Departures: the noise is drawn once, in the fit, while a
    version of their code draws it anew for each batch; the range is that of all rows (their ``exact_minmax``). The draw
    alone moves the AUROC by .006 to .020.

    Perturbed logits and their softmax are computed in the precision in which the features are stored, and everything
    else in float64: with float32 features, a logit within its rounding of an edge may be counted in the adjacent bin.

    Fails with few features, which leave most bins of a row empty: on a ResNet-20 for CIFAR-10, with 64 features, the
    divergences rank near-OoD rows hardly better than chance, and only MSP' separates them.

    Args:
        distance: The length of the noise relative to the weight; "delta" in the paper.
        repeats: The number of perturbed copies of the weight; "r".
        bins: The number of bins of both histograms.
        lambda_1: The weight of the divergence of the perturbed logits.
        lambda_2: The weight of the softmax probability.
        smoothing: The number of bins that are averaged in the histogram of features; "s_1".
        perturbed_smoothing: The same for the perturbed logits; "s_2".
        seed: The seed of the noise.

    Cost: that of ``repeats`` heads, in the score and in each of the two passes of the fit; keeps ``4 repeats C D``
    bytes.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\mathrm{KL}(\bar q, q(z)) - \lambda_1 \mathrm{KL}(\bar q', q(W' z + b)) + \lambda_2 "
            r"\mathrm{MSP}'"
        ),
        paper=Paper(
            "WeiPer: OOD Detection using Weight Perturbations of Class Projections",
            "Maximilian Granz, Manuel Heurich, Tim Landgraf",
            "NeurIPS",
            2024,
            "https://arxiv.org/abs/2405.17164",
            "https://github.com/mgranz/weiper",
        ),
        no_graph="it counts histograms in pieces that depend on the size of the batch",
        float32_tolerance=1e-3,
    )
    distance: float = 2.4
    repeats: int = 100
    bins: int = 100
    lambda_1: float = 2.5
    lambda_2: float = 0.25
    smoothing: int = 40
    perturbed_smoothing: int = 15
    seed: int = 0
    weight_: Tensor = fitted()
    bias_: Tensor = fitted()
    range_: list[float] = fitted()
    perturbed_range_: list[float] = fitted()
    density_: Tensor = fitted()
    perturbed_density_: Tensor = fitted()
    needs = ("features",)
    fit_needs = ("features", "head")

    def __post_init__(self) -> None:
        for count in ("repeats", "bins", "smoothing", "perturbed_smoothing"):
            self.require_count(count)
        for weight in ("distance", "lambda_1", "lambda_2"):
            value = getattr(self, weight)
            self.require(0 <= value < math.inf, f"{weight} must be at least 0 and finite, got {value}")
        widest = max(self.smoothing, self.perturbed_smoothing)
        self.require(widest <= WIDEST * self.bins, f"smoothing must be at most {WIDEST} times bins, got {widest}")

    def work(self, sizes: Sizes) -> Work:
        heads = float(self.repeats * sizes.classes * sizes.features)
        return Work(4 * heads * (sizes.rows + sizes.fit_rows), 4 * heads)

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.require(len(self.density_) == self.bins, f"bins={self.bins}, but {len(self.density_)} are stored")

    def statistics(self) -> tuple[PerturbedRange]:
        return (PerturbedRange(self.repeats, self.distance, self.seed),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        ranges = found[self.statistics()[0]]
        self.weight_, self.bias_ = ranges.weight, feats.head.bias.double()
        self.range_, self.perturbed_range_ = ranges.features, ranges.perturbed
        total = torch.zeros(2, self.bins, dtype=torch.float64)
        for block in feats.blocks(only=("features",)):
            own, perturbed, _ = self._histograms(block)
            total += torch.stack([own.sum(dim=0), perturbed.sum(dim=0)]).cpu()
        self.density_, self.perturbed_density_ = total / len(feats)

    def score_block(self, block: Block) -> Tensor:
        shares, perturbed, probability = self._histograms(block)
        own = divergence(self.density_.to(shares), smoothed(shares, self.smoothing), FLOOR)
        other = divergence(
            self.perturbed_density_.to(shares), smoothed(perturbed, self.perturbed_smoothing), PERTURBED_FLOOR
        )
        return self.lambda_2 * probability - own - self.lambda_1 * other

    def _histograms(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Histograms of features and of perturbed logits, ``[B, bins]``, and the mean largest probability, ``[B]``."""
        features = block.features
        own = histogram(features, self.range_, self.bins) / features.shape[1]
        perturbed, probability = torch.zeros_like(own), own.new_zeros(len(block))
        for logits in perturbed_logits(features, self.weight_, self.bias_):
            perturbed += histogram(logits.flatten(1), self.perturbed_range_, self.bins)
            probability += logits.softmax(dim=2).amax(dim=2).sum(dim=1)
        copies, classes, _ = self.weight_.shape
        return own, perturbed / (copies * classes), probability / copies


@dataclass(frozen=True)
class Ranges:
    """A head's perturbed weights, float32 ``[repeats, C, D]``, and the smallest and largest feature and logit."""

    weight: Tensor
    features: list[float]
    perturbed: list[float]


@dataclass(frozen=True)
class PerturbedRange:
    """Statistic: the ``Ranges`` of features and of their logits under perturbed copies of the set's head."""

    repeats: int
    distance: float
    seed: int
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator[Ranges]:
        assert feats.head is not None
        weight = perturbed_weight(feats.head, self.repeats, self.distance, self.seed)
        return _RangesAccumulator(weight, feats.head.bias.double())


class _RangesAccumulator:
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self._features, self._perturbed = [math.inf, -math.inf], [math.inf, -math.inf]

    def update(self, block: Block) -> None:
        features = block.features
        self._features = _wider(self._features, features)
        for logits in perturbed_logits(features, self._weight, self._bias):
            self._perturbed = _wider(self._perturbed, logits)

    def result(self) -> Ranges:
        if self._features[0] > self._features[1]:
            raise BadInput("no block was read.")
        return Ranges(self._weight, self._features, self._perturbed)


def perturbed_weight(head: Head, repeats: int, distance: float, seed: int) -> Tensor:
    """Copies of a head's weight, each with noise of ``distance`` times the length of its rows, ``[repeats, C, D]``."""
    weight = head.weight.double()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(repeats, *weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
    lengths = distance * weight.square().sum(dim=1, keepdim=True).sqrt()
    return weight.float() + lengths.float() * normalize(noise, dim=2)


def perturbed_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
    """Yield the logits of successive groups of copies, ``[B, copies, C]``."""
    classes, width = weight.shape[1:]
    for piece in weight.split(max(1, PIECE // (len(features) * classes))):
        copies = piece.reshape(-1, width).to(features)
        yield torch.addmm(bias.to(features).repeat(len(piece)), features, copies.T).view(len(features), -1, classes)


def histogram(values: Tensor, limits: Sequence[float], bins: int) -> Tensor:
    """Number of values of each row in each of the equal bins between the limits, float64 ``[B, bins]``.

    Values outside the limits, and NaN, are counted in a bin below or above, which are left out.
    """
    rounding = ROUNDED * torch.finfo(torch.float64).eps * max(map(abs, limits))
    low, high = limits[0] - rounding, limits[1] + max(EDGE, rounding)
    numbers = (values.double() - low).mul_(bins / (high - low)).add_(1).long().clamp_(0, bins + 1)
    counts = values.new_zeros(len(values), bins + 2).scatter_add_(1, numbers, torch.ones_like(values))
    return counts[:, 1:-1].double()


def smoothed(shares: Tensor, width: int) -> Tensor:
    """The mean of ``width`` adjacent bins, one more above than below if it is even; the end values are repeated."""
    below = (width - 1) // 2
    return avg_pool1d(pad(shares[:, None], (below, width - 1 - below), mode="replicate"), width, stride=1)[:, 0]


def divergence(usual: Tensor, shares: Tensor, floor: float) -> Tensor:
    """``KL(p || q) + KL(q || p)`` of one histogram and those of rows, with ``floor`` added to each bin, ``[B]``."""
    p, q = usual + floor, shares + floor
    p, q = p / p.sum(), q / q.sum(dim=1, keepdim=True)
    return ((p - q) * (p.log() - q.log())).sum(dim=1)


def _wider(limits: list[float], values: Tensor) -> list[float]:
    low, high = values.aminmax()
    return [min(limits[0], float(low)), max(limits[1], float(high))]
