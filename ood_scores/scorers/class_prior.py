"""Class prior: softmax and energy relative to the class frequencies of the training set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Found
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags

JIANG_2023 = Paper(
    "Detecting Out-of-distribution Data through In-distribution Class Prior",
    "Xue Jiang, Feng Liu, Zhen Fang, Hong Chen, Tongliang Liu, Feng Zheng, Bo Han",
    "ICML",
    2023,
    "https://proceedings.mlr.press/v202/jiang23f.html",
    "https://github.com/tmlr-group/class_prior",
)


class _PriorScorer(Scorer):
    """Base class of the prior scores: fits the class frequencies of the fit set."""

    prior_: Tensor
    needs = ("logits",)
    fit_needs = ("logits", "labels")

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.prior_ = torch.bincount(feats.class_labels(), minlength=feats.num_classes or 0).double() / len(feats)


@register_scorer("prior_msp")
@dataclass
class PriorMSP(_PriorScorer):
    """MSP relative to the class prior of the training data, ``max_c (p_c - pi_c)``: "RP+MSP".

    Source: Jiang et al. 2023, "Detecting Out-of-distribution Data through In-distribution Class Prior", for long-tailed
    training data; the class frequencies pi of the labels of the fit set replace the uniform reference distribution.
    With a uniform prior, it ranks rows as MSP does.

    Fails where the labels of the fit set are not distributed as those of the training set.

    Cost: one softmax for each row.
    """

    tags = Tags(formula=r"s(x) = \max_c \, (p_c - \pi_c)", paper=JIANG_2023)

    def score_block(self, block: Block) -> Tensor:
        return (block.softmax() - self.prior_.to(block.logits.device)).amax(dim=1)


@register_scorer("prior_energy")
@dataclass
class PriorEnergy(_PriorScorer):
    """Energy times the dissimilarity of softmax and class prior, ``T logsumexp(f / T) (1 - cos(p, pi))``.

    Source: Jiang et al. 2023, "Detecting Out-of-distribution Data through In-distribution Class Prior", "RW+Energy":
    the softmax of an OoD input resembles the class prior pi (the class frequencies of the labels of the fit set), so
    that their cosine is near 1.

    Fails as ``prior_msp`` does; also where energies are negative, because the factor then reverses their order.

    Args:
        temperature: The divisor T of the logits.

    Cost: one softmax, one logsumexp, and one product with the prior for each row.
    """

    tags = Tags(
        formula=r"s(x) = \Bigl( T \log \sum_c e^{f_c / T} \Bigr) \bigl( 1 - \cos(p, \pi) \bigr)", paper=JIANG_2023
    )
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        prior = self.prior_.to(block.logits.device)
        cosine = block.softmax() @ prior / (row_norm(block.softmax(), 2.0) * prior.norm())
        return self.temperature * block.logsumexp(self.temperature) * (1 - cosine)
