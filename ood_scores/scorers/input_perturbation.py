"""Input perturbation: a second forward pass with perturbed inputs or feature maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ood_scores.features import Block
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("odin")
@dataclass
class ODIN(Scorer):
    """Maximum softmax probability of perturbed inputs, ``max_c softmax(f(x') / T)_c``, in float64.

    Reads ``odin`` ``[N, C]``, the logits that the probe of that name keeps: ``extract(..., probes=["odin"])``.

    Source: Liang et al. 2018, "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks"; T
    = 1000 there and in GradNorm's comparison, whose epsilon of 0 on ImageNet leaves only the temperature.

    Fails where the perturbation does not suit the data: epsilon is a parameter of the probe, and its authors tune it on
    OoD data.

    Args:
        temperature: The divisor T of the logits.

    Cost: one softmax for each row.
    """

    tags = Tags(
        formula=(
            r"s(x) = \max_c \operatorname{softmax}(f(x') / T)_c, \quad x' = x + \varepsilon \operatorname{sign} "
            r"\nabla_x \log \max_c \operatorname{softmax}(f(x) / T)_c"
        ),
        paper=Paper(
            "Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks",
            "Shiyu Liang, Yixuan Li, R. Srikant",
            "ICLR",
            2018,
            "https://arxiv.org/abs/1706.02690",
            "https://github.com/facebookresearch/odin",
        ),
        search_space={"temperature": (1.0, 10.0, 100.0, 1000.0)},
        small_extras={
            "odin": lambda features, logits: 1.1 * logits,
        },
    )
    temperature: float = 1000.0
    needs = ("odin",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        return (read_extra(block, self.needs[0], self.name).double() / self.temperature).softmax(dim=1).amax(dim=1)


@register_scorer("iodin")
@dataclass
class IODIN(ODIN):
    """``odin`` with a single value of each input perturbed, ``max_c softmax(f(x') / T)_c``, in float64.

    Reads ``iodin`` ``[N, C]``, the logits that the probe of that name keeps: ``extract(..., probes=["iodin"])``. The
    probe moves only the value of the input with the largest gradient.

    Source: OpenOOD v1.5 (``iodin``), after Liang et al. 2018; no other paper is named there.

    Fails as ``odin`` does; with OpenOOD's epsilon, a single value changes the logits little, and the score is nearly
    ``msp`` at temperature T (on a ResNet-20, both have an AUROC of 0.88 for CIFAR-10 against CIFAR-100).

    Args:
        temperature: The divisor T of the logits.

    Cost: one softmax for each row.
    """

    tags = Tags(
        formula=(
            r"s(x) = \max_c \operatorname{softmax}(f(x') / T)_c, \quad x' = x \text{ with the one value of "
            r"largest gradient moved}"
        ),
        paper=ODIN.tags.paper,
        search_space={"temperature": (1.0, 10.0, 100.0, 1000.0)},
        small_extras={
            "iodin": lambda features, logits: 1.1 * logits,
        },
    )
    needs = ("iodin",)


@register_scorer("rankfeat")
@dataclass
class RankFeat(Scorer):
    """Energy of the logits after removing the rank-1 part of the feature maps, ``T logsumexp(f / T)``.

    Reads ``rankfeat`` ``[N, C]``, the logits that the probe of that name keeps, averaged over its layers:
    ``extract(..., probes=["rankfeat"])``.

    Source: Song, Sebe & Wang 2022, "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection", T = 1; the
    logits are averaged before the energy, as in the authors' code.

    Fails where the largest singular value of the feature maps of an OoD input is no larger than that of other inputs.

    Args:
        temperature: The divisor T of the logits.

    Cost: one logsumexp for each row.
    """

    tags = Tags(
        formula=r"s(x) = T \log \sum_c e^{f_c(A - \sigma_1 u_1 v_1^\top) / T}",
        paper=Paper(
            "RankFeat: Rank-1 Feature Removal for Out-of-distribution Detection",
            "Yue Song, Nicu Sebe, Wei Wang",
            "NeurIPS",
            2022,
            "https://arxiv.org/abs/2209.08590",
            "https://github.com/KingJamesSong/RankFeat",
        ),
        small_extras={
            "rankfeat": lambda features, logits: 0.5 * logits,
        },
    )
    temperature: float = 1.0
    needs = ("rankfeat",)

    def __post_init__(self) -> None:
        self.require_positive("temperature")

    def score_block(self, block: Block) -> Tensor:
        logits = read_extra(block, "rankfeat", self.name).double()
        return self.temperature * (logits / self.temperature).logsumexp(dim=1)
