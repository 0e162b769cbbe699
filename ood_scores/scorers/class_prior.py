"""Class prior: softmax and energy relative to the class frequencies of the training set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.block import row_norm
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
    """What both prior scores share: the class frequencies of the fit set."""

    prior_: Tensor
    needs = ("logits",)
    fit_needs = ("logits", "labels")

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
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

    tags = Tags(paper=JIANG_2023)

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

    tags = Tags(paper=JIANG_2023)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        prior = self.prior_.to(block.logits.device)
        cosine = block.softmax() @ prior / (row_norm(block.softmax(), 2.0) * prior.norm())
        return self.temperature * block.logsumexp(self.temperature) * (1 - cosine)
