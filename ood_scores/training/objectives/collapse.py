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
    """Return the terms of neural collapse of a batch, differentiable, from its own class means and scatter.

    The terms are those of ``ood_scores.features.statistics.collapse``: ``variability`` (nc1), ``equinormality`` and
    ``equiangularity`` of the centered class means and of W (en, ea), and ``self_duality`` (nc3).

    Source: Haas et al. (2022), §3.2, after Papyan et al. (2020). In nc3 the paper's text uses columns of unit length
    (``normalize_columns=True``), Papyan one Frobenius norm per matrix. Papyan's code has no ``/ C`` in nc1.

    A class that is not in the batch has no mean. The terms of means then cover only the classes present, which form a
    simplex again if all classes do, and nc3 shifts the rows of W so that their mean stays that of all classes.

    Args:
        features: Features z ``[N, D]``.
        weight: Weight W ``[C, D]`` of the classifier.
        labels: Class indices ``[N]``.
        normalize_columns: Whether nc3 is that of the paper's text.

    Raises:
        BadLabels: if the batch has fewer than two classes.
    """
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, weight = features.to(dtype), weight.to(dtype)
        present, members = labels.unique(return_inverse=True)
        if len(present) < 2:
            raise BadLabels(f"neural collapse compares classes, and the batch has {len(present)}: use larger batches.")
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
    """Return the unweighted sum of the ``collapse_terms``; Haas et al. (2022), Eq. 3."""
    return torch.stack(collapse_terms(features, weight, labels, normalize_columns)).sum()


@register_objective("nc_loss")
class NCLoss(Objective):
    """``nc_loss`` alone, for a network that already classifies.

    Source: Haas et al. (2022), §4.2.1: from epoch 50 on this loss *replaces* the cross-entropy, which "is excluded",
    with a learning rate one order of magnitude lower and batches of 2048, which were more stable. No term contains the
    bias of the head, which gets no gradient.

    Fails from random weights, where there is no accuracy to preserve; and after many epochs, when OoD features collapse
    onto class means too (Fig. 4).
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
