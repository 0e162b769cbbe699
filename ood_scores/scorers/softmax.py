"""Softmax: its largest value, at a fitted temperature or with scaled features, and its margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.row_samples import Logits
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.papers import HAAS_2024
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.user_warnings import warn_user

COOLEST, HOTTEST = 0.01, 100.0
"""The range of temperatures that the fit searches."""


FIT_ELEMENTS = 2**20
"""How many logits are converted to float64 at a time."""


@register_scorer("msp")
@dataclass
class MSP(Scorer):
    """Maximum softmax probability, ``max_c softmax(f / T)_c``.

    Source: Hendrycks & Gimpel 2017, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural
    Networks".

    Fails where a network is confident on every input: the softmax depends on the differences between logits, not on
    their size.

    Args:
        temperature: The divisor T of the logits.
        double: Compute in float64 whatever the dtype of the logits. By default, the softmax has the precision of the
            logits, as in published numbers: in float32, every confidence above 1 - 6e-8 becomes the same 1. This
            matters: a DenseNet-BC-100 assigns exactly 1 to 2,760 of the 10,000 test images of CIFAR-10, and the AUROC
            against CIFAR-100 is .88438 with these ties and .88449 without them.

    Cost: one softmax for each row.
    """

    tags = Tags(
        formula=r"s(x) = \max_c \operatorname{softmax}(f / T)_c",
        aliases=("max_softmax", "maxsoftmax", "mcp"),
        paper=Paper(
            "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks",
            "Dan Hendrycks, Kevin Gimpel",
            "ICLR",
            2017,
            "https://arxiv.org/abs/1610.02136",
            "https://github.com/hendrycks/error-detection",
        ),
    )
    temperature: float = 1.0
    double: bool = False
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        if self.double:
            return block.confidence(self.temperature)
        return block.from_native_softmax(self.temperature, lambda softmax: softmax.amax(dim=1))


@register_scorer("scaled_msp")
@dataclass
class ScaledMSP(Scorer):
    """Maximum softmax probability after scaling the features: MSP of ``W (s z) + b``.

    Source: Haas et al. 2024, Table 2 and A.2: the large features of models trained with L2 normalization saturate the
    softmax. The paper tunes s on its test sets and prints no value. The default of 0.1 is not tuned on anything: choose
    ``scale`` on validation data, never on the sets you report.

    Fails where the scale leaves the softmax nearly uniform or saturated.

    Args:
        scale: The factor s.

    Cost: one product with the head for each block.
    """

    tags = Tags(
        formula=r"s(x) = \max_c \operatorname{softmax}\bigl( W (\text{scale} \cdot z) + b \bigr)_c", paper=HAAS_2024
    )
    scale: float = 0.1
    needs = ("features", "head")

    def __post_init__(self) -> None:
        self.require_positive("scale")

    def score_block(self, block: Block) -> Tensor:
        return block.head(block.features * self.scale).double().softmax(dim=1).amax(dim=1)


@register_scorer("temperature")
@dataclass
class Temperature(Scorer):
    """Maximum softmax probability at a fitted temperature, ``max_c softmax(f / T)_c``.

    Fits the T that minimizes the mean negative log-likelihood ``-log softmax(f / T)_y`` of the labels. This function is
    convex in 1/T: Newton steps that stay within a shrinking bracket find its single minimum, in float64.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks". Departure: the authors' code takes at most 50
    steps of L-BFGS from T = 1.5 and may stop before the minimum; this implementation reaches it.

    Fails on the training set of a model that classifies it without error: the likelihood then grows as T approaches 0,
    and all rows whose other probabilities sum to less than 1e-16 score 1. If no T between ``COOLEST`` and ``HOTTEST``
    is best, T stays 1, with a warning. Fit on held-out rows.

    Cost: one softmax of the fit set in each of about ten steps; the fit keeps the logits of the fit set ``[N, C]``.
    """

    tags = Tags(
        formula=(
            r"s(x) = \max_c \operatorname{softmax}(f / T)_c, \quad T = \arg\min_T \, -\sum_i \log "
            r"\operatorname{softmax}(f_i / T)_{y_i}"
        ),
        aliases=("temp_scaling", "temperature_scaling", "temperaturescaling"),
        paper=Paper(
            "On Calibration of Modern Neural Networks",
            "Chuan Guo, Geoff Pleiss, Yu Sun, Kilian Q. Weinberger",
            "ICML",
            2017,
            "https://arxiv.org/abs/1706.04599",
            "https://github.com/gpleiss/temperature_scaling",
        ),
    )
    temperature_: float = fitted()
    needs = ("logits",)
    fit_needs = ("logits", "labels")

    def statistics(self) -> Sequence[Statistic]:
        return (Logits(),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        best = best_inverse_temperature(found[Logits()], feats.class_labels())
        if best is None:
            warn_user(
                f"temperature: no T between {COOLEST} and {HOTTEST} minimizes the loss on these rows, so T stays 1: "
                "fit on rows that the model was not trained on.",
            )
        self.temperature_ = 1.0 if best is None else 1 / best

    def score_block(self, block: Block) -> Tensor:
        return block.confidence(self.temperature_)


@register_scorer("margin")
@dataclass
class Margin(Scorer):
    """The gap between the largest and the second largest logit or softmax probability.

    Source: the margin of the logits is from Liang, Peng & Sun 2024, "Selective Classification Under Distribution
    Shifts" (RL_conf-M); that of the softmax is from Scheffer, Decomain & Wrobel 2001, "Active Hidden Markov Models for
    Information Extraction". The margin of the logits is the log of the ratio of the two probabilities and does not
    saturate; that of the softmax saturates where the model is confident.

    Fails for models with classes that are near-duplicates: the margin of a known input is then small.

    Args:
        space: ``"logits"`` or ``"softmax"``.

    Cost: the two largest of C values for each row.
    """

    tags = Tags(
        formula=r"s(x) = f_{(1)} - f_{(2)}",
        paper=Paper(
            "Selective Classification Under Distribution Shifts",
            "Hengyue Liang, Le Peng, Ju Sun",
            "TMLR",
            2024,
            "https://arxiv.org/abs/2405.05160",
        ),
    )
    space: Literal["logits", "softmax"] = "logits"
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_choices()

    def score_block(self, block: Block) -> Tensor:
        values = block.logits64() if self.space == "logits" else block.softmax()
        largest, second = values.topk(2, dim=1).values.T
        return largest - second


def best_inverse_temperature(logits: Tensor, labels: Tensor) -> float | None:
    """Return the b that minimizes the mean of ``-log softmax(b f)_y``, or None if it is outside the search range."""
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
    """First and second derivative, with respect to b, of the mean negative log-likelihood at b."""
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
