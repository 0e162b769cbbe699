"""Scores read off the logits with a fitted temperature, given weights, or another measure of how spread they are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ood_scores.errors import BadInput, ShapeMismatch
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.collect import Logits, Statistic
from ood_scores.scorers.base import Scorer, register_scorer

COOLEST, HOTTEST = 0.01, 100.0
"""Temperatures between which the fit looks for the best one."""

FIT_ELEMENTS = 2**20
"""Logits that are widened to float64 at a time."""


@register_scorer("temperature")
@dataclass
class Temperature(Scorer):
    """Maximum softmax probability at a fitted temperature, ``max_c softmax(f / T)_c``.

    Fits the T that minimises the mean negative log-likelihood ``-log softmax(f / T)_y`` of the labels. It is convex in
    1/T: Newton steps that stay within a shrinking bracket find its one minimum, in float64.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks". Departure: the authors' code takes at most 50
    steps of L-BFGS from T = 1.5 and may stop short of the minimum; here it is reached.

    Fails on the training set of a model that classifies it without error: the likelihood then grows as T falls to 0,
    and rows whose other probabilities together are below 1e-16 all score 1. Where no T between ``COOLEST`` and
    ``HOTTEST`` is best, T stays 1, with a warning. Fit on held-out rows.

    Cost: one softmax of the fit set for each of about ten steps; keeps the fit set's logits ``[N, C]``.
    """

    temperature_: float = field(init=False, repr=False, compare=False)
    needs = ("logits",)
    fit_needs = ("logits", "labels")

    def statistics(self) -> Sequence[Statistic]:
        return (Logits(),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        best = best_inverse_temperature(found[Logits()], feats.class_labels())
        if best is None:
            warnings.warn(
                f"temperature: no T between {COOLEST} and {HOTTEST} fits these rows best, so T stays 1; fit on rows "
                "that the model was not trained on.",
                stacklevel=3,
            )
        self.temperature_ = 1.0 if best is None else 1 / best

    def score_block(self, block: Block) -> Tensor:
        return block.confidence(self.temperature_)


@register_scorer("weighted_energy")
@dataclass
class WeightedEnergy(Scorer):
    """Energy with a weight for each class, ``T log sum_c w_c exp(f_c / T)``.

    Source: Du et al. 2022, "VOS: Learning What You Don't Know by Virtual Outlier Synthesis", where the weights are
    learnt with the network, and T is 1. As in the authors' code a negative weight counts as 0. Departure: computed as
    ``T logsumexp(f_c / T + log w_c)``, which does not overflow.

    Fails when the weights belong to another model: they say how large each class's logits are.

    Args:
        weights: one number for each class; None gives every class 1, which is ``energy``.
        temperature: the divisor T of the logits.

    Cost: one logsumexp.
    """

    weights: Sequence[float] | None = None
    temperature: float = 1.0
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")
        if self.weights is not None:
            self.require(all(math.isfinite(weight) for weight in self.weights), "weights must be finite")
            self.require(any(weight > 0 for weight in self.weights), "at least one weight must be positive")

    def score_block(self, block: Block) -> Tensor:
        if self.weights is None:
            return self.temperature * block.logsumexp(self.temperature)
        logits = block.logits64()
        if len(self.weights) != logits.shape[1]:
            raise ShapeMismatch(
                f"weighted_energy: {len(self.weights)} weights for logits of {logits.shape[1]} classes."
            )
        log_weights = logits.new_tensor([float(weight) for weight in self.weights]).clamp_min(0).log()
        return self.temperature * (logits / self.temperature + log_weights).logsumexp(dim=1)


@register_scorer("doctor")
@dataclass
class Doctor(Scorer):
    """Minus the odds of an error, ``-(1 - g) / g`` with ``g = sum_c p_c^2``; p the softmax at temperature T.

    g is the chance that a class drawn from p is right, 1 - g the Gini impurity of p.

    Source: Granese et al. 2021, "DOCTOR: A Simple Method for Detecting Misclassification Errors", D_alpha without its
    input perturbation, T = 1. Their D_beta, the odds of ``1 - max_c p_c``, ranks as ``msp`` does. Departure: 1 - g is
    summed as ``sum_c p_c (1 - p_c)``, so that confident rows do not all become 0.

    Fails where the softmax is confident: it is made to find errors on known classes, not inputs of others.

    Args:
        temperature: the divisor T of the logits.

    Cost: one softmax.
    """

    temperature: float = 1.0
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        p = block.softmax(self.temperature)
        others = p.scatter(1, block.prediction()[:, None], 0.0)
        largest, rest = p.amax(dim=1), others.sum(dim=1)  # rest is 1 - largest, which would cancel
        impurity = largest * rest + (others * (1 - others)).sum(dim=1)
        return -impurity / p.square().sum(dim=1)


@register_scorer("renyi")
@dataclass
class Renyi(Scorer):
    """Negative Renyi entropy of the softmax, ``log(sum_c p_c^alpha) / (alpha - 1)`` (nats; 0 at most).

    Up to the constant log C it is the Renyi divergence of p from the uniform distribution. alpha = 1 is ``entropy``,
    alpha = 2 ranks as ``doctor``, infinity as ``msp``; a small alpha looks at the small probabilities.

    Source: Renyi 1961, "On Measures of Entropy and Information". No paper sets the default 0.5, and it is tuned on
    nothing.

    Fails where the softmax is confident whatever the input.

    Args:
        alpha: the order, positive; may be infinite.

    Cost: one log softmax and one logsumexp.
    """

    alpha: float = 0.5
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require(self.alpha > 0, f"alpha must be positive, got {self.alpha}")

    def score_block(self, block: Block) -> Tensor:
        if self.alpha == 1:
            return -block.entropy()
        if self.alpha == math.inf:
            return block.log_softmax().amax(dim=1)
        return (self.alpha * block.log_softmax()).logsumexp(dim=1) / (self.alpha - 1)


@register_scorer("margin")
@dataclass
class Margin(Scorer):
    """How far the largest is ahead of the second largest, of the logits or of the softmax.

    Source: the logits' margin is Liang, Peng & Sun 2024, "Selective Classification Under Distribution Shifts"
    (RL_conf-M); the softmax's is Scheffer, Decomain & Wrobel 2001, "Active Hidden Markov Models for Information
    Extraction". The logits' margin is the log of the ratio of the two probabilities and does not saturate; the
    softmax's does where the model is confident.

    Fails for models whose classes come in near-duplicates: there the margin of a known input is small. A single class
    has no margin.

    Args:
        space: ``"logits"`` or ``"softmax"``.

    Cost: the two largest of C values a row.
    """

    space: Literal["logits", "softmax"] = "logits"
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require(self.space in ("logits", "softmax"), f"space is 'logits' or 'softmax', got {self.space!r}")

    def score_block(self, block: Block) -> Tensor:
        values = block.logits64() if self.space == "logits" else block.softmax()
        if values.shape[1] < 2:
            raise BadInput("margin: a model with a single class has no margin.")
        largest, second = values.topk(2, dim=1).values.T
        return largest - second


def best_inverse_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """The b that minimises the mean of ``-log softmax(b f)_y``; None if it does not lie within the bounds."""
    low, high = 1 / HOTTEST, 1 / COOLEST
    labels = labels.to(logits.device)
    if _slope(logits, labels, low)[0] >= 0 or _slope(logits, labels, high)[0] <= 0:
        return None
    best = 1.0
    for _ in range(100):
        slope, curvature = _slope(logits, labels, best)
        low, high = (low, best) if slope > 0 else (best, high)
        step = best - slope / curvature if curvature > 0 else math.nan
        step = step if low < step < high else math.sqrt(low * high)
        best, last = step, best
        if abs(best - last) <= 1e-13 * best:
            break
    return best


def _slope(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative by b of the mean negative log-likelihood at b."""
    slope, curvature = 0.0, 0.0
    rows = max(1, FIT_ELEMENTS // logits.shape[1])
    for part, label in zip(logits.split(rows), labels.split(rows), strict=True):
        values = part.double()
        gaps = values - values.gather(1, label[:, None])
        p = (inverse * values).softmax(dim=1)
        mean = (p * gaps).sum(dim=1)
        slope += float(mean.sum())
        curvature += float(((p * gaps.square()).sum(dim=1) - mean.square()).clamp_min(0).sum())
    return slope / len(logits), curvature / len(logits)
