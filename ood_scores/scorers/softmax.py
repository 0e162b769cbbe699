"""Scores read off the logits alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.block import row_norm
from ood_scores.features.statistics.collect import Statistic
from ood_scores.scorers.base import Scorer, register_scorer


@register_scorer("msp")
@dataclass
class MSP(Scorer):
    """Maximum softmax probability, ``max_c softmax(f / T)_c``.

    Source: Hendrycks & Gimpel 2017, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples".

    Fails where networks are confident in all they see: the softmax tells only how the logits compare with each other,
    not how large they are.

    Args:
        temperature: the divisor T of the logits.
        double: compute in float64 whatever the logits' dtype. By default the softmax has the logits' own precision, as
            in the published numbers: in float32 every confidence above 1 - 6e-8 becomes the same 1. That matters: of
            CIFAR-10's test images a DenseNet-BC-100 gives 2,760 of 10,000 exactly 1, and the AUROC against CIFAR-100
            is .88438 with these ties and .88449 without them.

    Cost: one softmax for each row.
    """

    temperature: float = 1.0
    double: bool = False
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        if self.double:
            return block.confidence(self.temperature)
        return block.from_native_softmax(self.temperature, lambda softmax: softmax.amax(dim=1))


@register_scorer("max_logit")
@dataclass
class MaxLogit(Scorer):
    """The largest logit, ``max_c f_c``.

    Source: Hendrycks et al. 2019, "Scaling Out-of-Distribution Detection for Real-World Settings".

    Fails where OoD rows have large norms, and logits with them.

    Cost: one maximum for each row.
    """

    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return block.logits.amax(dim=1)


@register_scorer("energy")
@dataclass
class Energy(Scorer):
    """Negative free energy, ``T logsumexp(f / T)``.

    Source: Liu et al. 2020, "Energy-based Out-of-distribution Detection", with the sign that makes in-distribution high
    (GradNorm's supplement, Eq. 10, prints the opposite sign).

    Fails as ``max_logit``, from which it differs only where several classes are likely.

    Args:
        temperature: the divisor T of the logits.

    Cost: one logsumexp for each row.
    """

    temperature: float = 1.0
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        return self.temperature * block.logsumexp(self.temperature)


@register_scorer("entropy")
@dataclass
class Entropy(Scorer):
    """Negative entropy of the softmax, ``sum_c p_c log p_c`` (nats; 0 at most).

    Source: Shannon 1948 for the entropy; Hendrycks et al. 2019, "Deep Anomaly Detection with Outlier Exposure", among
    others, rank by it.

    Fails as ``msp``, from which it differs in how it weighs the smaller probabilities.

    Cost: one softmax for each row.
    """

    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return -block.entropy()


@register_scorer("kl_uniform")
@dataclass
class KLUniform(Scorer):
    """KL divergence from the uniform distribution to the softmax, ``-(1/C) sum_c log p_c - log C`` (nats).

    Source: Huang et al. 2021 (GradNorm), Eq. 3, used directly as a score in their Fig. 6.

    Fails where the smallest probabilities, which it weighs as much as the largest, say nothing.

    Cost: one softmax for each row.
    """

    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        below = block.native_below_max().mean(dim=1, dtype=torch.float64)
        return block.total_odds().log() - below - math.log(block.logits.shape[1])


@register_scorer("gen")
@dataclass
class GEN(Scorer):
    """Generalised entropy, ``-sum p^gamma (1 - p)^gamma`` over the M largest probabilities.

    Source: Liu et al. 2023, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection"; gamma 0.1, and
    M 100 of ImageNet's 1,000 classes; with fewer classes than M all are used.

    Fails as ``msp``; and, with many classes and all of them counted, on the noise of the smallest probabilities.

    Args:
        gamma: the exponent; smaller ones weigh small probabilities more.
        top: M.

    Cost: one softmax and a partial sort of every row.
    """

    gamma: float = 0.1
    top: int = 100
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("gamma")
        self.require_count("top")

    def score_block(self, block: Block) -> Tensor:
        odds, predicted = block.below_max().exp(), block.prediction()[:, None]  # float64: small ones count
        others = odds.scatter(1, predicted, 0.0).sum(dim=1, keepdim=True)
        log_rest = torch.log1p(-odds / (1 + others)).scatter_(1, predicted, (others / (1 + others)).log())
        terms = log_rest.add_(block.log_softmax()).mul_(self.gamma).exp_()
        if self.top < terms.shape[1]:
            terms = terms.gather(1, block.logits.topk(self.top, dim=1).indices)
        return -terms.sum(dim=1)


@register_scorer("scaled_msp")
@dataclass
class ScaledMSP(Scorer):
    """Maximum softmax probability with the features scaled down first: MSP of ``W (s z) + b``.

    Source: Haas et al. 2024, Table 2 and A.2: the large features of models trained with L2 normalisation saturate the
    softmax. The paper tunes s on its test sets and prints no value. The default 0.1 is tuned on nothing: choose
    ``scale`` on validation data, never on the sets you report.

    Fails where the scale leaves the softmax nearly uniform or saturated.

    Args:
        scale: s.

    Cost: one product with the head for each block.
    """

    scale: float = 0.1
    needs = ("features", "head")

    def __post_init__(self) -> None:
        self.require_positive("scale")

    def score_block(self, block: Block) -> Tensor:
        return block.head(block.features * self.scale).double().softmax(dim=1).amax(dim=1)


class _PriorScorer(Scorer):
    """What both prior scores share: the class frequencies of the fit set."""

    prior_: Tensor
    needs = ("logits",)
    fit_needs = ("logits", "labels")

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        self.prior_ = torch.bincount(feats.class_labels(), minlength=feats.num_classes or 0).double() / len(feats)


@register_scorer("prior_msp")
@dataclass
class PriorMSP(_PriorScorer):
    """MSP against the class prior of the training data, ``max_c (p_c - pi_c)``: "RP+MSP".

    Source: Jiang et al. 2023, "Detecting Out-of-distribution Data through In-distribution Class Prior", for long-tailed
    training data; the uniform reference distribution is replaced by the class frequencies pi of the fit set's labels.
    With a uniform prior it ranks as MSP does.

    Fails where the fit set's labels are not distributed as the training set's.

    Cost: one softmax for each row.
    """

    def score_block(self, block: Block) -> Tensor:
        return (block.softmax() - self.prior_.to(block.logits.device)).amax(dim=1)


@register_scorer("prior_energy")
@dataclass
class PriorEnergy(_PriorScorer):
    """Energy reweighted by the dissimilarity of softmax and class prior, ``T logsumexp(f / T) (1 - cos(p, pi))``.

    Source: Jiang et al. 2023, "RW+Energy": an OoD input's softmax looks like the class prior pi (the class frequencies
    of the fit set's labels), which a cosine near 1 shows.

    Fails as ``prior_msp``; and where energies are negative, whose order the factor turns around.

    Args:
        temperature: the divisor T of the logits.

    Cost: one softmax, one logsumexp and one product with the prior for each row.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        prior = self.prior_.to(block.logits.device)
        cosine = block.softmax() @ prior / (row_norm(block.softmax(), 2.0) * prior.norm())
        return self.temperature * block.logsumexp(self.temperature) * (1 - cosine)
