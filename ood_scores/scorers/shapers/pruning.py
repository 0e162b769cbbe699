"""Pruning shapers: small activations or weights are set to zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

LARGEST_RATIO = 50
"""The exponential of a ratio up to this, times any activation there is, is within float32."""


@register_scorer("dice")
@dataclass
class DICE(Shaper):
    """Directed sparsification: logits of a head that keeps only its largest mean contributions, then ``base``.

    Fits the contributions ``W * mean(z)`` ``[C, D]`` of the fit set. Weights whose contribution is not greater than the
    ``sparsity``-quantile of all C D of them (linear interpolation, as by ``numpy.percentile``) become 0: a contribution
    equal to the threshold goes, as in the authors' code. ``sparsity=0`` keeps every weight, where their code would
    still drop the smallest. The bias stays. Features are left alone; the base finds the sparse head in place of the
    model's.

    Source: Sun & Li 2022, "DICE: Leveraging Sparsification for Out-of-Distribution Detection"; 0.90 is theirs for
    CIFAR's DenseNet and the default of OpenOOD (after ReAct on ImageNet their demo has 0.15).

    Fails where every unit contributes about alike, and with features of both signs, whose mean says little.

    Args:
        sparsity: the share of weights set to 0, in [0, 1).
        base: what scores the sparse head's logits.

    Cost: one product with the sparse head, stored densely, for each block; no ``[B, C, D]`` tensor.
    """

    tags = Tags(
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
        self.require(0 <= self.sparsity < 1, f"sparsity is a share in [0, 1), got {self.sparsity}")
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
    """What ASH and SCALE share: each row's largest activations."""

    percentile: float = 0.90

    def __post_init__(self) -> None:
        self.require(0 <= self.percentile < 1, f"percentile is a share in [0, 1), got {self.percentile}")
        super().__post_init__()

    def kept(self, features: Tensor) -> Tensor:
        """Which activations count as large, bool ``[B, D]``: D - round(D percentile) of each row, at least one."""
        return largest(features, 1 - self.percentile)

    def wide_enough(self, features: Tensor) -> Tensor:
        """The features in a precision that holds them times ``exp(s1 / s2)``: the ratio is D / kept at most."""
        return features if 1 - self.percentile > 1 / LARGEST_RATIO else features.double()


@register_scorer("ash_p")
@dataclass
class ASHP(Pruner):
    """Activation shaping by pruning: each row keeps its largest activations, the others become 0; then ``base``.

    Of D activations ``D - round(D percentile)`` are kept, at least one; of equal ones the first.

    Source: Djurisic, Bozanic, Ashok & Liu 2023, "Extremely Simple Activation Shaping for Out-of-Distribution
    Detection", on pooled features, as the authors' code and OpenOOD do. 0.90 is OpenOOD's default and that of the
    authors' configurations (for ASH-S); OpenOOD chooses among 0.65 to 0.95 on validation data.

    Fails on features without a zero of their own (no ReLU): pruning to 0 is then no pruning.

    Args:
        percentile: the share of a row's activations that is pruned, in [0, 1).
        base: what scores the pruned rows.

    Cost: a partial sort of every row and one product with the head for each block.
    """

    tags = Tags(paper=DJURISIC_2023, search_space={"percentile": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)})

    def shape_features(self, features: Tensor) -> Tensor:
        return torch.where(self.kept(features), features, 0)


@register_scorer("ash_b")
@dataclass
class ASHB(Pruner):
    """Activation shaping by binarising: a row's largest activations all become ``sum(z) / kept``, the others 0.

    Then ``base``. The sum is over all activations, so a row keeps its sum. Which are kept, and the default: as
    ``ash_p``. Where fewer than that are positive, zeros are raised too, as in the authors' code.

    Source: as ``ash_p``.

    Fails as ``ash_p``; and where the sizes of the largest activations, which it forgets, tell rows apart.

    Args:
        percentile: the share of a row's activations that is pruned, in [0, 1).
        base: what scores the binarised rows.

    Cost: as ``ash_p``.
    """

    tags = Tags(paper=DJURISIC_2023, search_space={"percentile": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)})

    def shape_features(self, features: Tensor) -> Tensor:
        kept = self.kept(features)
        return torch.where(kept, features.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True), 0)


@register_scorer("ash_s")
@dataclass
class ASHS(Pruner):
    """Activation shaping by scaling: pruned as by ``ash_p``, then times ``exp(s1 / s2)``; then ``base``.

    s1 is the sum of all activations of the row, s2 of those kept; the ratio of a row without positive activations is
    taken as 1. ``percentile=0`` scales every row by e. Computed in float64 where the ratio, D / kept at most, may be so
    large that float32 does not hold its exponential (``percentile`` of 0.98 and more).

    Source: as ``ash_p``, whose default is that of the authors' configurations for this one.

    Fails, besides as ``ash_p`` does, on features of both signs, where s1 says little.

    Args:
        percentile: the share of a row's activations that is pruned, in [0, 1).
        base: what scores the pruned and scaled rows.

    Cost: as ``ash_p``.
    """

    tags = Tags(paper=DJURISIC_2023, search_space={"percentile": (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)})

    def shape_features(self, features: Tensor) -> Tensor:
        values, kept = self.wide_enough(features), self.kept(features)
        return torch.where(kept, values, 0) * ratio(values, kept).exp()


def largest(values: Tensor, share: float) -> Tensor:
    """Which values are among the largest of their row, bool ``[B, D]``: ``D - round(D (1 - share))``, at least one.

    Of equal values the first ones, so that the choice depends on neither the device nor the other rows.
    """
    width = values.shape[1]
    count = max(1, width - int(np.round(width * (1 - share))))
    last = kth_largest(values, count)
    kept = values >= last
    if torch.compiler.is_compiling():  # a graph cannot pick the rows with ties
        return _first_of_equals(values, last, count)
    tied = (kept.sum(dim=1) > count).nonzero()[:, 0]
    if len(tied):
        kept[tied] = _first_of_equals(values[tied], last[tied], count)
    return kept


def _first_of_equals(values: Tensor, last: Tensor, count: int) -> Tensor:
    """Which values are above the ``count``-th largest of their row, or among the first that equal it."""
    above, level = values > last, values == last
    return above | (level & (level.cumsum(dim=1) <= count - above.sum(dim=1, keepdim=True)))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest value of each row, ``[B, 1]``. On the CPU by NumPy's partition, five times as fast as topk."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place : place + 1])


def ratio(values: Tensor, kept: Tensor) -> Tensor:
    """``s1 / s2``, ``[B, 1]``: each row's sum over that of its kept values, at most D / kept; 1 where s2 <= 0."""
    part = (values * kept).sum(dim=1, keepdim=True)
    return torch.where(part > 0, values.sum(dim=1, keepdim=True) / part.where(part > 0, 1), 1)
