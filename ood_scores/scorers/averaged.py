"""Averaged predictions: scores of the mean softmax over dropout passes or models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ood_scores.features import Block
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags

OUTPUTS = ("entropy", "msp", "mutual_information")


@dataclass
class _Averaged(Scorer):
    """Base class of scores of several predictions: their mean softmax ``[N, C]`` and mean entropy ``[N]``."""

    averaged: ClassVar[str]
    output: Literal["entropy", "msp", "mutual_information"] = "entropy"

    def __post_init__(self) -> None:
        self.require_choices()
        both = (f"{self.averaged}.mean", f"{self.averaged}.entropy")
        self.needs = both if self.output == "mutual_information" else both[:1]

    def score_block(self, block: Block) -> Tensor:
        mean = read_extra(block, f"{self.averaged}.mean", self.name).double()
        if self.output == "msp":
            return mean.amax(dim=1)
        entropy = -torch.special.xlogy(mean, mean).sum(dim=1)
        if self.output == "entropy":
            return -entropy
        return read_extra(block, f"{self.averaged}.entropy", self.name).double() - entropy


@register_scorer("mc_dropout")
@dataclass
class MCDropout(_Averaged):
    """Negative entropy of the mean prediction of several passes with dropout, ``sum_c m_c log m_c``.

    The mean softmax is m. Reads ``mc_dropout.mean`` ``[N, C]`` and, for the mutual information, ``mc_dropout.entropy``
    ``[N]``, which the probe of that name keeps: ``extract(..., probes=["mc_dropout"])``.

    Source: Gal & Ghahramani 2016, "Dropout as a Bayesian Approximation"; entropy and mutual information are measures
    from Gal's thesis of the same year. Departure: OpenOOD takes the largest probability of the softmax of the mean
    logits; ``output="msp"`` is the largest probability of the mean softmax.

    Fails where dropout has little effect: the entropy is then that of the model itself, and the mutual information is
    rounding error.

    Args:
        output: ``"entropy"``; ``"msp"``, the largest m_c; or ``"mutual_information"``, the negative mutual information
            between prediction and pass, ``-(H(m) - mean H)``, which measures only the disagreement of the passes.

    Cost: one pass over C numbers for each row.
    """

    tags = Tags(
        formula=r"s(x) = \sum_c m_c \log m_c, \quad m = \frac{1}{T} \sum_{t=1}^{T} \operatorname{softmax}(f^{(t)}(x))",
        aliases=("mcd", "dropout"),
        paper=Paper(
            "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning",
            "Yarin Gal, Zoubin Ghahramani",
            "ICML",
            2016,
            "https://arxiv.org/abs/1506.02142",
            "https://github.com/yaringal/DropoutUncertaintyExps",
        ),
        search_space={"output": OUTPUTS},
        small_extras={
            "mc_dropout.mean": lambda features, logits: (0.5 * logits).softmax(dim=1),
        },
    )
    averaged = "mc_dropout"
    needs = ("mc_dropout.mean",)


@register_scorer("ensemble")
@dataclass
class Ensemble(_Averaged):
    """Negative entropy of the mean prediction of several models, ``sum_c m_c log m_c``.

    The mean softmax of the models is m. Reads ``ensemble.mean`` ``[N, C]`` and, for the mutual information,
    ``ensemble.entropy`` ``[N]``, the mean of the models' entropies (in nats).

    Source: Lakshminarayanan et al. 2017, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles":
    the mean of probabilities. Departure: OpenOOD takes the softmax of the mean logits.

    Fails where the models are alike and all wrong in the same way.

    Args:
        output: ``"entropy"``; ``"msp"``, the largest m_c; or ``"mutual_information"``, the negative mutual information
            between prediction and model, ``-(H(m) - mean H)``, which measures only the disagreement of the models.

    Cost: one pass over C numbers for each row.
    """

    tags = Tags(
        formula=r"s(x) = \sum_c m_c \log m_c, \quad m = \frac{1}{M} \sum_{j=1}^{M} \operatorname{softmax}(f^{(j)}(x))",
        aliases=("deep_ensemble", "deep_ensembles"),
        paper=Paper(
            "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
            "Balaji Lakshminarayanan, Alexander Pritzel, Charles Blundell",
            "NeurIPS",
            2017,
            "https://arxiv.org/abs/1612.01474",
        ),
        search_space={"output": OUTPUTS},
        small_extras={
            "ensemble.mean": lambda features, logits: (0.7 * logits).softmax(dim=1),
        },
    )
    averaged = "ensemble"
    needs = ("ensemble.mean",)
