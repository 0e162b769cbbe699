"""How much a nearest-prototype loss would change if what is out of distribution lay elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics.collect import Means, Statistic
from ood_scores.scorers.base import Scorer, register_scorer
from ood_scores.scorers.gaussian import classes_present, squared_distances
from ood_scores.scorers.neighbors import kth_neighbours


@register_scorer("grood")
@dataclass
class GROOD(Scorer):
    """Minus the size of a gradient with respect to a prototype of OoD inputs, ``-log ||g||_1``.

    ``g = q (z - o) / ||z - o||``. The loss is ``-log softmax(-||z - p_c||)_yhat`` over the prototypes p_c of the
    classes and one more, o, for all that is OoD; q is the softmax's share of o. Near a class prototype o hardly
    matters. No backward pass is run.

    Fits p_c, the mean feature of class c, and o, the mean of all p_c, unless it is given; for ``by="nearest"`` also the
    gradients of the fit rows that are predicted as their label.

    Source: ElAraby et al. 2025, "GROOD: GRadient-Aware Out-of-Distribution Detection". The paper's score is the
    distance to the nearest gradient of the training set, ``by="nearest"``; the authors' code comes configured for the
    norm, the default here, which needs no search. Their o is the mean feature of blurred noise images, of mixed inputs,
    or of the class prototypes: only the last is known from the features of the fit set. Departures: the logarithm of
    the norm, which ranks alike and does not underflow near a prototype; a row at o itself has no direction and counts
    as if g had one entry; the search is exact and in float64, and its distances are not squared; a class without rows
    is left out.

    Fails where OoD rows are far from o, and near a class prototype or beyond it; a single class is its own o, and all
    rows then score nearly alike.

    Args:
        by: ``"norm"``, or ``"nearest"``: minus the distance from g to the nearest of the fit set's gradients.
        prototype: o, one number for each feature; for the paper's, the mean features of noise images, extract these
            and give ``noise.features.mean(dim=0).tolist()``. None takes the mean of the class prototypes.

    Cost: distances to C + 1 prototypes; with ``by="nearest"`` an inner product with every row of the fit set, in
    float64, and ``4 D`` bytes for each of them.
    """

    by: Literal["norm", "nearest"] = "norm"
    prototype: Sequence[float] | None = None
    prototypes_: Tensor = field(init=False, repr=False, compare=False)
    bank_: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    needs = ("features",)

    def __post_init__(self) -> None:
        self.require(self.by in ("norm", "nearest"), f"by is 'norm' or 'nearest', got {self.by!r}")
        if self.prototype is not None:
            self.require(all(math.isfinite(value) for value in self.prototype), "prototype must be finite")
        self.fit_needs = ("features", "labels") if self.by == "norm" else ("features", "logits", "labels")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features", "label"),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (groups,) = (found[statistic] for statistic in self.statistics())
        means = groups.means[classes_present(groups.counts)]
        self.prototypes_ = torch.cat([means, self._of_ood(means)[None]])
        self.bank_ = self._gradients_of_correct(feats) if self.by == "nearest" else None

    def score_block(self, block: Block) -> Tensor:
        log_share, direction = self._gradient(block)
        if self.bank_ is None:
            return -log_share - direction.abs().sum(dim=1).clamp_min(1).log()
        return -self._nearest(log_share.exp()[:, None] * direction, self.bank_)

    def _gradient(self, block: Block) -> tuple[Tensor, Tensor]:
        """The logarithm of q ``[B]`` and the direction of z - o ``[B, D]``, float64."""
        prototypes = self.prototypes_.to(block.features.device)
        rows = block.space("features") - prototypes[-1]
        scores = -squared_distances(rows, prototypes - prototypes[-1]).sqrt()
        return scores.log_softmax(dim=1)[:, -1], normalize(rows, dim=1)

    def _nearest(self, gradients: Tensor, bank: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return squared_distances(gradients, bank.to(gradients)).amin(dim=1).sqrt()
        numbers = kth_neighbours(gradients, bank.to(gradients.device), 1)
        return torch.linalg.vector_norm(gradients - bank.to(gradients.device)[numbers], dim=1)

    def _gradients_of_correct(self, feats: FeatureSet) -> Tensor:
        """Float32 ``[M, D]`` on the CPU."""
        labels, found = feats.class_labels(), []
        for block in feats.blocks(only=("features", "logits")):
            log_share, direction = self._gradient(block)
            correct = block.prediction().cpu() == labels[block.start : block.start + len(block)].cpu()
            found.append((log_share.exp()[:, None] * direction).float().cpu()[correct])
        bank = torch.cat(found)
        if not len(bank):
            raise BadInput("grood: no row of the fit set is predicted as its label.")
        return bank

    def _of_ood(self, means: Tensor) -> Tensor:
        if self.prototype is None:
            return means.mean(dim=0)
        self.require(
            len(self.prototype) == means.shape[1],
            f"prototype has {len(self.prototype)} numbers for {means.shape[1]} features",
        )
        return means.new_tensor([float(value) for value in self.prototype])
