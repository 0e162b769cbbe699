"""Neural collapse as an objective."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ood_scores.errors import BadLabels
from ood_scores.features.statistics.collapse import equiangularity, equinormality, self_duality, variability
from ood_scores.training.objectives.base import Objective, register_objective


class CollapseTerms(NamedTuple):
    """The six terms of Haas et al. (2022), Eq. 3; each is 0 on a collapsed simplex equiangular tight frame."""

    nc1: Tensor
    en_means: Tensor
    en_classifier: Tensor
    ea_means: Tensor
    ea_classifier: Tensor
    nc3: Tensor


def collapse_terms(features: Tensor, weight: Tensor, labels: Tensor, normalize_columns: bool = False) -> CollapseTerms:
    """Neural collapse of a batch: differentiable, from the batch's own class means and scatter.

    The terms are those of ``ood_scores.features.statistics.collapse``: ``variability`` (nc1), ``equinormality`` and
    ``equiangularity`` of the centered class means and of W (en, ea), and ``self_duality`` (nc3).

    Source: Haas et al. (2022), §3.2, after Papyan et al. (2020). The paper's text has columns of unit length in nc3
    (``normalize_columns=True``), Papyan one Frobenius norm each. Papyan's code has no ``/ C`` in nc1.

    A class that is not in the batch has no mean: the terms of means are then those of the classes present, which of a
    simplex are a simplex again, and W in nc3 is moved to keep its mean of all classes.

    Args:
        features: z ``[N, D]``.
        weight: W ``[C, D]``.
        labels: class indices ``[N]``.
        normalize_columns: the paper's nc3.

    Raises:
        BadLabels: the batch has fewer than two classes.
    """
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, weight = features.to(dtype), weight.to(dtype)
        present, members = labels.unique(return_inverse=True)
        if len(present) < 2:
            raise BadLabels(f"Neural collapse is between classes; the batch has {len(present)}. Give larger batches.")
        means = _class_means(features, members, len(present))
        centered = means - means.mean(dim=0)
        return CollapseTerms(
            nc1=variability(features - means[members], centered),
            en_means=equinormality(centered),
            en_classifier=equinormality(weight),
            ea_means=equiangularity(centered),
            ea_classifier=equiangularity(weight),
            nc3=self_duality(_at_mean_of(weight[present], weight), centered, normalize_columns),
        )


def nc_loss(features: Tensor, weight: Tensor, labels: Tensor, normalize_columns: bool = False) -> Tensor:
    """Unweighted sum of the ``collapse_terms``; Haas et al. (2022), Eq. 3."""
    return torch.stack(collapse_terms(features, weight, labels, normalize_columns)).sum()


@register_objective("nc_loss")
class NCLoss(Objective):
    """``nc_loss`` by itself, for a network that classifies already.

    Source: Haas et al. (2022), §4.2.1: from epoch 50 on this loss *replaces* the cross-entropy, which "is excluded",
    with the learning rate one order lower, and batches of 2048, which were more stable. The bias of the head is in no
    term and gets no gradient.

    Fails from random weights, where accuracy is not yet there to keep; and after many epochs, when OoD features
    collapse onto class means too (Fig. 4).
    """

    def __init__(self, normalize_columns: bool = False) -> None:
        super().__init__()
        self.normalize_columns = normalize_columns

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        return nc_loss(features, head.weight, labels, self.normalize_columns)


def _class_means(features: Tensor, members: Tensor, classes: int) -> Tensor:
    sums = features.new_zeros(classes, features.shape[1]).index_add(0, members, features)
    return sums / members.bincount(minlength=classes).to(features.dtype)[:, None]


def _at_mean_of(rows: Tensor, everything: Tensor) -> Tensor:
    return rows - rows.mean(dim=0) + everything.mean(dim=0)
