"""Entropy: entropies of the softmax and other measures of how spread out it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.features import Block
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.papers import HUANG_2021
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("entropy")
@dataclass
class Entropy(Scorer):
    """Negative entropy of the softmax, ``sum_c p_c log p_c`` (nats; 0 at most).

    Source: Shannon 1948 for the entropy; Hendrycks et al. 2019, "Deep Anomaly Detection with Outlier Exposure", among
    others, rank by it.

    Fails as ``msp``, from which it differs in how it weighs the smaller probabilities.

    Cost: one softmax for each row.
    """

    tags = Tags(
        paper=Paper(
            "Deep Anomaly Detection with Outlier Exposure",
            "Dan Hendrycks, Mantas Mazeika, Thomas Dietterich",
            "ICLR",
            2019,
            "https://arxiv.org/abs/1812.04606",
            "https://github.com/hendrycks/outlier-exposure",
        )
    )
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

    tags = Tags(paper=HUANG_2021)
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

    tags = Tags(
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

    tags = Tags(
        paper=Paper(
            "DOCTOR: A Simple Method for Detecting Misclassification Errors",
            "Federica Granese, Marco Romanelli, Daniele Gorla, Catuscia Palamidessi, Pablo Piantanida",
            "NeurIPS",
            2021,
            "https://arxiv.org/abs/2106.02395",
            "https://github.com/doctor-public-submission/DOCTOR",
        )
    )
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

    tags = Tags(
        paper=Paper(
            "On Measures of Entropy and Information",
            "Alfréd Rényi",
            "Berkeley Symposium on Mathematical Statistics and Probability",
            1961,
            "https://projecteuclid.org/euclid.bsmsp/1200512181",
        )
    )
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
