"""Energy: the free energy of the logits, and the largest logit, which is its limit at temperature 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ood_scores.errors import ShapeMismatch
from ood_scores.features import Block
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.papers import HENDRYCKS_2022
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("max_logit")
@dataclass
class MaxLogit(Scorer):
    """The largest logit, ``max_c f_c``.

    Source: Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings".

    Fails where OoD rows have features of large norm, and therefore large logits.

    Cost: one maximum for each row.
    """

    tags = Tags(formula=r"s(x) = \max_c f_c", aliases=("mls", "maxlogit", "maxlogits"), paper=HENDRYCKS_2022)
    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return block.logits.amax(dim=1)


@register_scorer("energy")
@dataclass
class Energy(Scorer):
    """Negative free energy, ``T logsumexp(f / T)``.

    Source: Liu et al. 2020, "Energy-based Out-of-distribution Detection", with the sign for which in-distribution rows
    score high (GradNorm's supplement, Eq. 10, prints the opposite sign).

    Fails as ``max_logit`` does, from which it differs only where several classes are likely.

    Args:
        temperature: The divisor T of the logits.

    Cost: one logsumexp for each row.
    """

    tags = Tags(
        formula=r"s(x) = T \log \sum_c e^{f_c / T}",
        aliases=("ebo", "energybased", "energy_based"),
        paper=Paper(
            "Energy-based Out-of-distribution Detection",
            "Weitang Liu, Xiaoyun Wang, John D. Owens, Yixuan Li",
            "NeurIPS",
            2020,
            "https://arxiv.org/abs/2010.03759",
            "https://github.com/wetliu/energy_ood",
        ),
    )
    temperature: float = 1.0
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        return self.temperature * block.logsumexp(self.temperature)


@register_scorer("weighted_energy")
@dataclass
class WeightedEnergy(Scorer):
    """Energy with a weight for each class, ``T log sum_c w_c exp(f_c / T)``.

    Source: Du et al. 2022, "VOS: Learning What You Don't Know by Virtual Outlier Synthesis", where the weights are
    learned with the network, and T is 1. As in the authors' code, a negative weight counts as 0. Departure: the score
    is computed as ``T logsumexp(f_c / T + log w_c)``, which does not overflow.

    Fails when the weights belong to another model: they reflect the typical size of each class's logits.

    Args:
        weights: One number for each class; with None, every class has the weight 1, which is ``energy``.
        temperature: The divisor T of the logits.

    Cost: one logsumexp for each row.
    """

    tags = Tags(
        formula=r"s(x) = T \log \sum_c w_c \, e^{f_c / T}",
        aliases=("weightedebo",),
        paper=Paper(
            "VOS: Learning What You Don't Know by Virtual Outlier Synthesis",
            "Xuefeng Du, Zhaoning Wang, Mu Cai, Yixuan Li",
            "ICLR",
            2022,
            "https://arxiv.org/abs/2202.01197",
            "https://github.com/deeplearning-wisc/vos",
        ),
    )
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
                f"weighted_energy: {len(self.weights)} weights do not fit logits of {logits.shape[1]} classes."
            )
        log_weights = logits.new_tensor([float(weight) for weight in self.weights]).clamp_min(0).log()
        return self.temperature * (logits / self.temperature + log_weights).logsumexp(dim=1)


@register_scorer("joint_energy")
@dataclass
class JointEnergy(Scorer):
    """Sum of the free energies of all labels of a multi-label classifier, ``sum_c log(1 + exp(f_c))``.

    Source: Wang et al. 2021, "Can Multi-label Classification Networks Know What They Don't Know?", for models trained
    with one sigmoid for each label, in which several labels may apply to an input.

    Fails for models trained with a softmax, whose logits have no zero: a constant that is added to all logits changes
    the score, but not the prediction. On ImageNet, its AUROC is 0.32, that of ``energy`` 0.88; on a ResNet-20 for
    CIFAR-10, 0.77 and 0.88 against CIFAR-100.

    Args:
        combine: ``"sum"``, the paper's score, or ``"max"``: the largest free energy of a label, which ranks rows as
            ``max_logit`` does, except for rounding.

    Cost: one softplus for each logit.
    """

    tags = Tags(
        formula=r"s(x) = \sum_c \log(1 + e^{f_c})",
        paper=Paper(
            "Can Multi-label Classification Networks Know What They Don't Know?",
            "Haoran Wang, Weitang Liu, Alex Bocchieri, Yixuan Li",
            "NeurIPS",
            2021,
            "https://arxiv.org/abs/2109.14162",
            "https://github.com/deeplearning-wisc/multi-label-ood",
        ),
        search_space={"combine": ("sum", "max")},
    )
    combine: Literal["sum", "max"] = "sum"
    needs = ("logits",)

    def __post_init__(self) -> None:
        self.require_choices()

    def score_block(self, block: Block) -> Tensor:
        logits = block.logits64()
        energies = logits.relu() + (-logits.abs()).exp().log1p()
        return energies.sum(dim=1) if self.combine == "sum" else energies.amax(dim=1)
