"""Entropy: entropies of the softmax and other measures of how spread out it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.features import Block
from ood_scores.features.block import CERTAIN, NEARLY_UNIFORM
from ood_scores.features.row_reductions import exp_minus_tangent, odds_of, others_of
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.papers import HUANG_2021
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("entropy")
@dataclass
class Entropy(Scorer):
    """Negative entropy of the softmax, ``sum_c p_c log p_c`` (in nats, at most 0).

    Source: Shannon 1948 for the entropy; Hendrycks et al. 2019, "Deep Anomaly Detection with Outlier Exposure", and
    others use it as a score.

    Fails as ``msp`` does, from which it differs in the weight of the smaller probabilities.

    Cost: one softmax for each row.
    """

    tags = Tags(
        formula=r"s(x) = \sum_c p_c \log p_c",
        paper=Paper(
            "Deep Anomaly Detection with Outlier Exposure",
            "Dan Hendrycks, Mantas Mazeika, Thomas Dietterich",
            "ICLR",
            2019,
            "https://arxiv.org/abs/1812.04606",
            "https://github.com/hendrycks/outlier-exposure",
        ),
    )
    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return -block.entropy()


@register_scorer("kl_uniform")
@dataclass
class KLUniform(Scorer):
    """KL divergence from the uniform distribution to the softmax, ``-(1/C) sum_c log p_c - log C`` (in nats).

    Source: Huang et al. 2021 (GradNorm), Eq. 3, used directly as a score in their Fig. 6.

    Fails where the smallest probabilities, which weigh as much as the largest, carry no information.

    Cost: one softmax for each row.
    """

    tags = Tags(formula=r"s(x) = -\frac{1}{C} \sum_c \log p_c - \log C", paper=HUANG_2021)
    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        below = block.native_below_max().mean(dim=1, dtype=torch.float64)
        divergence = block.total_odds().log() - below - math.log(block.logits.shape[1])
        return block.refined(divergence, divergence < math.log(NEARLY_UNIFORM), _divergence_from_uniform)


def _divergence_from_uniform(logits: Tensor) -> Tensor:
    """``log mean_c exp(d_c)`` of the deviations d of logits from their mean: nothing cancels, however small they are.

    The mean of d is 0, so it is taken out of the exponential: ``exp(d) - 1 - d`` is its power series.
    """
    deviations = logits - logits.mean(dim=1, keepdim=True)
    terms = torch.where(deviations.abs() < 0.1, exp_minus_tangent(deviations), torch.expm1(deviations) - deviations)
    return torch.log1p(terms.mean(dim=1))


@register_scorer("gen")
@dataclass
class GEN(Scorer):
    """Generalized entropy, ``-sum p^gamma (1 - p)^gamma`` over the M largest probabilities.

    Source: Liu et al. 2023, "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection"; gamma is 0.1, and
    M is 100 of the 1,000 classes of ImageNet; models with fewer classes than M use all of them.

    Fails as ``msp`` does; also on the noise of the smallest probabilities, if there are many classes and all of them
    count.

    Args:
        gamma: The exponent; smaller values give small probabilities more weight.
        top: The number M of probabilities.

    Cost: one softmax and a partial sort of each row.
    """

    tags = Tags(
        formula=r"s(x) = -\sum_{c \in \text{top } M} p_c^\gamma (1 - p_c)^\gamma",
        paper=Paper(
            "GEN: Pushing the Limits of Softmax-Based Out-of-Distribution Detection",
            "Xixi Liu, Yaroslava Lochman, Christopher Zach",
            "CVPR",
            2023,
            "https://openaccess.thecvf.com/content/CVPR2023/html/Liu_GEN_Pushing_the_Limits_of_Softmax-Based_Out-of-Distribution_Detection_CVPR_2023_paper.html",
            "https://github.com/XixiLiu95/GEN",
        ),
        search_space={"gamma": (0.01, 0.1, 0.5, 1.0), "top": (10, 50, 100, 200)},
    )
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


@register_scorer("doctor")
@dataclass
class Doctor(Scorer):
    """Negative odds of an error, ``-(1 - g) / g`` with ``g = sum_c p_c^2``, where p is the softmax at temperature T.

    The sum g is the probability that a class drawn from p is right; 1 - g is the Gini impurity of p.

    Source: Granese et al. 2021, "DOCTOR: A Simple Method for Detecting Misclassification Errors", D_alpha without its
    input perturbation, T = 1. Their D_beta, the odds of ``1 - max_c p_c``, ranks rows as ``msp`` does. Departure: 1 - g
    is summed over the classes other than the predicted one, so that it does not become 0 for all confident rows.

    Fails where the softmax is confident: the score was designed to find errors on known classes, not inputs of other
    classes.

    Args:
        temperature: The divisor T of the logits.

    Cost: one softmax for each row.
    """

    tags = Tags(
        formula=r"s(x) = -\frac{1 - g}{g}, \quad g = \sum_c p_c^2, \; p = \operatorname{softmax}(f / T)",
        paper=Paper(
            "DOCTOR: A Simple Method for Detecting Misclassification Errors",
            "Federica Granese, Marco Romanelli, Daniele Gorla, Catuscia Palamidessi, Pablo Piantanida",
            "NeurIPS",
            2021,
            "https://arxiv.org/abs/2106.02395",
            "https://github.com/doctor-public-submission/DOCTOR",
        ),
    )
    temperature: float = 1.0
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        temperature = self.temperature
        found = block.reduced(lambda logits: _odds_of_an_error(logits, temperature))
        extreme = (found < CERTAIN) | (found > block.logits.shape[1] / NEARLY_UNIFORM - 1)
        return -block.refined(found, extreme, _odds_of_an_error, temperature)


def _odds_of_an_error(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``(1 - g) / g`` of Doctor from the odds o of all classes but the predicted one; nothing cancels.

    With ``r = sum o``, it is ``((1 + r)^2 - 1 - sum o^2) / (1 + sum o^2)``.
    """
    odds = odds_of(logits, temperature)
    squares, others = others_of(odds.square()), others_of(odds)
    return (others * (2 + others) - squares) / (1 + squares)


@register_scorer("renyi")
@dataclass
class Renyi(Scorer):
    """Negative Renyi entropy of the softmax, ``log(sum_c p_c^alpha) / (alpha - 1)`` (in nats, at most 0).

    Up to the constant log C, it is the Renyi divergence of p from the uniform distribution. With alpha = 1 it is
    ``entropy``; with alpha = 2 it ranks rows as ``doctor`` does, with infinity as ``msp``; a small alpha emphasizes the
    small probabilities.

    Source: Renyi 1961, "On Measures of Entropy and Information". The default of 0.5 is from no paper and is not tuned
    on anything.

    Fails where the softmax is confident whatever the input.

    Args:
        alpha: The order, positive; may be infinite.

    Cost: two exponentials for each logit.
    """

    tags = Tags(
        formula=r"s(x) = \frac{1}{\alpha - 1} \log \sum_c p_c^\alpha",
        paper=Paper(
            "On Measures of Entropy and Information",
            "Alfréd Rényi",
            "Berkeley Symposium on Mathematical Statistics and Probability",
            1961,
            "https://projecteuclid.org/euclid.bsmsp/1200512181",
        ),
    )
    alpha: float = 0.5
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require(self.alpha > 0, f"alpha must be positive, got {self.alpha}")

    def score_block(self, block: Block) -> Tensor:
        if self.alpha == 1:
            return -block.entropy()
        predicted, others = block.odds_of_others()
        log_total = others[:, 0].log1p()
        if self.alpha == math.inf:
            return -log_total
        powers = (self.alpha * block.below_max()).exp_().scatter_(1, predicted, 0.0)
        return (powers.sum(dim=1).log1p() - self.alpha * log_total) / (self.alpha - 1)
