"""Adaptive shapers: how much a row is scaled depends on what a perturbation of its input does to its features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.base import Found
from ood_scores.scorers.base import fitted
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.shapers.base import Shaper
from ood_scores.scorers.tags import Paper, Tags

LARGEST_PERCENTILE = 0.98
"""Up to this percentile, the exponential of a ratio times any activation is within float32."""

ADASCALE = Tags(
    paper=Paper(
        "AdaSCALE: Adaptive Scaling for OOD Detection",
        "Sudarshan Regmi",
        "arXiv",
        2025,
        "https://arxiv.org/abs/2503.08023",
        "https://github.com/sudarshanregmi/AdaSCALE",
    ),
    small_parameters={"k1": 0.5, "k2": 0.25},
    small_extras={"adascale": lambda features, logits: features.flip(1) * 0.2 + features * 0.7},
    search_space={"low": (0.6, 0.65, 0.7, 0.75, 0.8, 0.85), "high": (0.85, 0.9, 0.95, 0.99)},
)


@dataclass
class _AdaSCALE(Shaper):
    """Base class of ``adascale_a`` and ``adascale_l``: the ratio by which a row is scaled."""

    low: float = 0.75
    high: float = 0.85
    k1: float = 0.05
    k2: float = 0.01
    weight: float = 10.0
    shifts_: Tensor = fitted()
    fit_reads = ("features", "adascale")

    def __post_init__(self) -> None:
        self.require(0 <= self.low <= self.high < 1, f"0 <= low <= high < 1 is required, got {self.low}, {self.high}")
        self.require(0 < self.k1 <= 1, f"k1 must be in (0, 1], got {self.k1}")
        self.require(0 < self.k2 <= 1, f"k2 must be in (0, 1], got {self.k2}")
        super().__post_init__()

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        return (*super().reads(names), "adascale")

    def fit_shape(self, found: Found, feats: FeatureSet) -> None:
        shifts = []
        for block in feats.blocks(only=self.fit_reads):
            block.require_finite()
            shifts.append(self._shift(block))
        self.shifts_ = torch.cat(shifts).sort().values

    def _shift(self, block: Block) -> Tensor:
        """Q' ``[B]``."""
        features, perturbed = block.space("features"), read_extra(block, "adascale", self.name).double()
        order = features.argsort(dim=1, descending=True, stable=True)
        first, second = (order[:, : max(1, int(features.shape[1] * share))] for share in (self.k1, self.k2))
        moved = (features - perturbed).abs().gather(1, second).sum(dim=1)
        return perturbed.relu().gather(1, first).sum(dim=1) + self.weight * moved

    def ratio(self, block: Block) -> Tensor:
        """``s1 / s2``, float64 ``[B, 1]``; 1 for a row without positive activations."""
        shifts = self.shifts_.to(block.features.device)
        rank = torch.searchsorted(shifts, self._shift(block), right=True).double() / len(shifts)
        percentile = self.low + (1 - rank) * (self.high - self.low)
        positive = block.space("features").relu().sort(dim=1, descending=True).values
        width = positive.shape[1]
        count = (width - (width * percentile).round()).long().clamp_min(1)
        sums = positive.cumsum(dim=1)
        part = sums.gather(1, count[:, None] - 1)
        return torch.where(part > 0, sums[:, -1:] / part.where(part > 0, 1), 1)


@register_scorer("adascale_a")
@dataclass
class AdaSCALEA(_AdaSCALE):
    """Activations times ``exp(s1 / s2)``, with fewer activations in s2 the less a perturbation moves them.

    s1 is the sum of the positive activations of the row, s2 that of its largest ``D - round(D p)``, with ``p = low + (1
    - F(Q')) (high - low)``. ``Q' = C + weight Q``: Q is how far the ``k2`` share of the largest activations move when
    the input is perturbed, and C is the sum of the ``k1`` share after the perturbation. F is the distribution of Q' on
    the fit set. OoD rows move more, and are scaled less. The result is scored by ``base``.

    Reads ``adascale`` ``[N, D]``, which the probe of that name computes for both sets: ``extract(...,
    probes=["adascale"])``.

    Fits F: Q' of all fit rows. The authors fit it on 5,000 rows of the ID validation set.

    Source: Regmi 2025, "AdaSCALE: Adaptive Scaling for OOD Detection" (AdaSCALE-A), and OpenOOD's version by its
    author, whose defaults are these; there, low and high are chosen on validation data. Departures: a row without
    positive activations is scaled by e; at least one activation is taken of each share.

    Fails where the fit set is the training set and perturbations move its features less than those of unseen ID rows,
    and on features of both signs, for which s1 is not informative. With 1,000 fit rows on a ResNet-20, its AUROC is
    0.64 for CIFAR-10 against CIFAR-100, and that of ``adascale_l`` 0.70, where the energy reaches 0.88; on ImageNet,
    they lead the scores that run the model again with 0.94 and 0.95.

    Args:
        low: The percentile of a row that moves more than all fit rows, in [0, 1).
        high: The percentile of a row that moves less than all fit rows.
        k1: The share of activations whose sum after the perturbation is C.
        k2: The share of activations whose movement is Q.
        weight: The weight of Q.
        base: The scorer of the scaled rows.

    Cost: two sorts of each row in float64, and one product with the head for each block.
    """

    tags = replace(
        ADASCALE,
        formula=(
            r"s(x) = \operatorname{base}\bigl( z \, e^{s_1 / s_2} \bigr), \quad s_1 = \sum_d (z_d)_+, \; s_2 = "
            r"\sum_{d \in \text{top}(Q')} (z_d)_+"
        ),
    )

    def shape(self, block: Block) -> Block:
        wide = block.features if self.high < LARGEST_PERCENTILE else block.features.double()
        features = wide * self.ratio(block).exp().to(wide)
        return block.replaced(features=features, logits=block.head(features) if self.makes_logits else None)


@register_scorer("adascale_l")
@dataclass
class AdaSCALEL(_AdaSCALE):
    """Logits times ``(s1 / s2)^2``, with fewer activations in s2 the less a perturbation moves them.

    The ratio and its parameters are those of ``adascale_a``. The model's own logits are scaled, so no head is needed;
    the features are not changed. The result is scored by ``base``.

    Source: Regmi 2025, "AdaSCALE: Adaptive Scaling for OOD Detection" (AdaSCALE-L), and OpenOOD's version by its
    author. Departures: those of ``adascale_a``.

    Fails as ``adascale_a`` does; also for a base that ignores the scale of the logits.

    Args:
        low: The percentile of a row that moves more than all fit rows, in [0, 1).
        high: The percentile of a row that moves less than all fit rows.
        k1: The share of activations whose sum after the perturbation is C.
        k2: The share of activations whose movement is Q.
        weight: The weight of Q.
        base: The scorer of the scaled logits.

    Cost: two sorts of each row in float64.
    """

    tags = replace(
        ADASCALE,
        formula=(
            r"s(x) = \operatorname{base}\Bigl( f \cdot \frac{s_1^2}{s_2^2} \Bigr), \quad s_1 = \sum_d (z_d)_+, \; "
            r"s_2 = \sum_{d \in \text{top}(Q')} (z_d)_+"
        ),
    )
    shapes = ("logits",)

    def reads(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(["features", *names, "adascale"]))

    def shape(self, block: Block) -> Block:
        return block.replaced(logits=block.logits * self.ratio(block).square().to(block.logits))
