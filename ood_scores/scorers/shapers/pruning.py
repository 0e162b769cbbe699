"""Pruning shapers: small activations or weights are set to zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet, Head
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.means import FeatureMean
from ood_scores.features.statistics.row_samples import quantiles
from ood_scores.scorers.base import fitted
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.shapers.base import FeatureShaper, Shaper
from ood_scores.scorers.tags import Paper, Tags

DJURISIC_2023 = Paper(
    "Extremely Simple Activation Shaping for Out-of-Distribution Detection",
    "Andrija Djurisic, Nebojsa Bozanic, Arjun Ashok, Rosanne Liu",
    "ICLR",
    2023,
    "https://arxiv.org/abs/2209.09858",
    "https://github.com/andrijazz/ash",
)
ASH = Tags(paper=DJURISIC_2023, search_space={"percentile": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)})

LARGEST_RATIO = 50
"""The exponential of a ratio up to this, times any activation, is within float32."""


@register_scorer("dice")
@dataclass
class DICE(Shaper):
    """Directed sparsification: ``base`` scores the logits of a head that keeps only its largest mean contributions.

    Fits the contributions ``W * mean(z)`` ``[C, D]`` of the fit set. Weights whose contribution is not greater than the
    ``sparsity``-quantile of all C D of them (linear interpolation, as by ``numpy.percentile``) become 0: a contribution
    equal to the threshold is removed, as in the authors' code. ``sparsity=0`` keeps every weight, while their code
    would still remove the smallest. The bias stays. Features are not changed; the base finds the sparse head in place
    of the model's.

    Source: Sun & Li 2022, "DICE: Leveraging Sparsification for Out-of-Distribution Detection"; 0.90 is theirs for
    CIFAR's DenseNet and the default of OpenOOD (after ReAct on ImageNet, their demo has 0.15).

    Fails where all units contribute about equally, and with features of both signs, whose mean is not informative.

    Args:
        sparsity: The share of weights set to 0, in [0, 1).
        base: The scorer of the sparse head's logits.

    Cost: one product with the sparse head, stored densely, for each block; no ``[B, C, D]`` tensor.
    """

    tags = Tags(
        formula=(
            r"s(x) = \operatorname{base}\bigl( (M \odot W) z + b \bigr), \quad M_{cd} = \mathbf{1} \bigl[ W_{cd} "
            r"\operatorname{mean}(z_d) > \text{quantile} \bigr]"
        ),
        paper=Paper(
            "DICE: Leveraging Sparsification for Out-of-Distribution Detection",
            "Yiyou Sun, Yixuan Li",
            "ECCV",
            2022,
            "https://arxiv.org/abs/2111.09805",
            "https://github.com/deeplearning-wisc/dice",
        ),
        search_space={"sparsity": (0.1, 0.3, 0.5, 0.7, 0.9)},
    )
    sparsity: float = 0.90
    head_: Head = fitted()
    shapes = ("logits", "head")
    fit_reads = ("features", "head")

    def __post_init__(self) -> None:
        self.require(0 <= self.sparsity < 1, f"sparsity must be in [0, 1), got {self.sparsity}")
        super().__post_init__()

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(["features", *(name for name in names if name not in self.shapes)]))

    def statistics(self) -> Sequence[Statistic]:
        return (FeatureMean(),)

    def fit_shape(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        weight = feats.head.weight
        contributions = weight.double() * found[FeatureMean()].to(weight.device)
        kept = contributions > quantiles(contributions.flatten(), [self.sparsity]).to(weight.device)
        self.head_ = Head(torch.where(kept, weight, 0), feats.head.bias) if self.sparsity > 0 else feats.head

    def shaped_head(self, head: Head | None) -> Head | None:
        return self.head_

    def shape(self, block: Block) -> Block:
        logits = self.head_(block.features) if self.makes_logits else None
        return block.replaced(logits=logits, head=self.head_)


@dataclass
class Pruner(FeatureShaper):
    """Base class of ASH and SCALE: the largest activations of each row."""

    percentile: float = 0.90

    def __post_init__(self) -> None:
        self.require(0 <= self.percentile < 1, f"percentile must be in [0, 1), got {self.percentile}")
        super().__post_init__()

    def kept(self, features: Tensor) -> Tensor:
        """Mask of the large activations, bool ``[B, D]``: D - round(D percentile) of each row, at least one."""
        return largest(features, 1 - self.percentile)

    def wide_enough(self, features: Tensor) -> Tensor:
        """The features in a precision that holds their product with ``exp(s1 / s2)``; the ratio is at most D / kept."""
        return features if 1 - self.percentile > 1 / LARGEST_RATIO else features.double()


@register_scorer("ash_p")
@dataclass
class ASHP(Pruner):
    """Activation shaping by pruning: ``base`` scores each row's largest activations, with the others set to 0.

    Of D activations, ``D - round(D percentile)`` are kept, at least one; of equal ones, the first.

    Source: Djurisic, Bozanic, Ashok & Liu 2023, "Extremely Simple Activation Shaping for Out-of-Distribution
    Detection", on pooled features, as in the authors' code and OpenOOD. 0.90 is the default of OpenOOD and of the
    authors' configurations (for ASH-S); the authors use 0.95 on CIFAR and for ViT, and 0.99 for the DenseNet on
    ImageNet; OpenOOD chooses among 0.65 to 0.95 on validation data.

    Fails on features without a natural zero (no ReLU), for which setting activations to 0 does not prune them.

    Args:
        percentile: The share of a row's activations that is pruned, in [0, 1).
        base: The scorer of the pruned rows.

    Cost: a partial sort of each row and one product with the head for each block.
    """

    tags = replace(
        ASH, formula=r"s(x) = \operatorname{base}(\tilde z), \quad \tilde z_d = z_d \, \mathbf{1}[d \in \text{top}]"
    )

    def shape_features(self, features: Tensor) -> Tensor:
        return torch.where(self.kept(features), features, 0)


@register_scorer("ash_b")
@dataclass
class ASHB(Pruner):
    """Activation shaping by binarization: a row's largest activations become ``sum(z) / kept``, the others 0.

    The result is scored by ``base``. The sum is over all activations, so that the sum of the row stays the same. The
    choice of activations and the default are those of ``ash_p``. If fewer of them are positive, zeros are raised too,
    as in the authors' code.

    Source: as ``ash_p``.

    Fails as ``ash_p`` does; also where the sizes of the largest activations, which are lost, separate rows.

    Args:
        percentile: The share of a row's activations that is pruned, in [0, 1).
        base: The scorer of the binarized rows.

    Cost: as ``ash_p``.
    """

    tags = replace(
        ASH,
        formula=(
            r"s(x) = \operatorname{base}(\tilde z), \quad \tilde z_d = \frac{\sum_i z_i}{|\text{top}|} \, "
            r"\mathbf{1}[d \in \text{top}]"
        ),
    )

    def shape_features(self, features: Tensor) -> Tensor:
        kept = self.kept(features)
        return torch.where(kept, features.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True), 0)


@register_scorer("ash_s")
@dataclass
class ASHS(Pruner):
    """Activation shaping by scaling: rows pruned as by ``ash_p``, times ``exp(s1 / s2)``, scored by ``base``.

    s1 is the sum of all activations of the row, and s2 that of those kept; the ratio of a row without positive
    activations counts as 1. ``percentile=0`` scales every row by e. The computation is in float64 where the ratio, at
    most D / kept, may be so large that float32 does not hold its exponential (``percentile`` of 0.98 and more).

    Source: as ``ash_p``, whose default is that of the authors' configurations for this one.

    Fails as ``ash_p`` does; also on features of both signs, for which s1 is not informative.

    Args:
        percentile: The share of a row's activations that is pruned, in [0, 1).
        base: The scorer of the pruned and scaled rows.

    Cost: as ``ash_p``.
    """

    tags = replace(
        ASH,
        formula=(
            r"s(x) = \operatorname{base}(\tilde z), \quad \tilde z_d = z_d \, e^{s_1 / s_2} \, \mathbf{1}[d \in "
            r"\text{top}], \; s_1 = \sum_d z_d, \; s_2 = \sum_{d \in \text{top}} z_d"
        ),
    )

    def shape_features(self, features: Tensor) -> Tensor:
        values, kept = self.wide_enough(features), self.kept(features)
        return torch.where(kept, values, 0) * ratio(values, kept).exp()


def largest(values: Tensor, share: float) -> Tensor:
    """Mask of the largest values of each row, bool ``[B, D]``: ``D - round(D (1 - share))`` of them, at least one.

    Of equal values, the first are chosen, so that the choice depends on neither the device nor the other rows.
    """
    width = values.shape[1]
    count = max(1, width - int(np.round(width * (1 - share))))
    last = kth_largest(values, count)
    kept = values >= last
    if torch.compiler.is_compiling() or values.device.type != "cpu":  # to pick the rows with ties, a GPU is waited for
        return _first_of_equals(values, last, count)
    tied = (kept.sum(dim=1) > count).nonzero()[:, 0]
    if len(tied):
        kept[tied] = _first_of_equals(values[tied], last[tied], count)
    return kept


def _first_of_equals(values: Tensor, last: Tensor, count: int) -> Tensor:
    """Mask of the values above the ``count``-th largest of their row and of the first values equal to it."""
    above, level = values > last, values == last
    return above | (level & (level.cumsum(dim=1) <= count - above.sum(dim=1, keepdim=True)))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, ``[B, 1]``; on the CPU by NumPy's partition, five times as fast as topk."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place : place + 1])


def ratio(values: Tensor, kept: Tensor) -> Tensor:
    """``s1 / s2``, ``[B, 1]``: each row's sum over that of its kept values, at most D / kept; 1 where s2 <= 0."""
    part = (values * kept).sum(dim=1, keepdim=True)
    return torch.where(part > 0, values.sum(dim=1, keepdim=True) / part.where(part > 0, 1), 1)
