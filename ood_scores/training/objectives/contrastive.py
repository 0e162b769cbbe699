"""Partial and asymmetric supervised contrastive learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.models.networks.classifier import batchnorms, linear_classifier
from ood_scores.training.objectives.base import Objective, register_objective
from ood_scores.training.objectives.classification import cross_entropy
from ood_scores.training.objectives.exposure import outlier_exposure
from ood_scores.training.objectives.priors import checked_counts, require_classes
from ood_scores.training.objectives.projectors import create_projector


def partial_asymmetric_contrast(unit: Tensor, labels: Tensor, ood_unit: Tensor, temperature: float = 0.07) -> Tensor:
    """Pull rows of one class together, push them from other classes and from OoD rows.

    For each anchor i the mean of ``-log( exp(u_i u_j / T) / sum_{k != i} exp(u_i u_k / T) )`` over the other rows j of
    its class, k going over all other rows and the OoD rows; then the mean over anchors. *Partial*: the caller gives
    tail classes only. *Asymmetric*: OoD rows are no anchors, and are not drawn together. A row that is alone in its
    class counts as 0; no rows at all give 0.

    Source: Wang et al. 2022, "Partial and Asymmetric Contrastive Learning for Out-of-Distribution Detection in
    Long-Tailed Recognition", Eq. 5.

    Args:
        unit: rows of length 1 ``[N, P]``, with all views of each image.
        labels: class indices ``[N]``.
        ood_unit: rows of length 1 ``[M, P]``, at least one.
        temperature: T.
    """
    if not len(unit):
        return ood_unit.sum() * 0
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    similarities = unit @ torch.cat([unit, ood_unit]).mT / temperature
    others = similarities.masked_fill(F.pad(itself, (0, len(ood_unit))), -torch.inf)
    log_shares = (similarities - others.logsumexp(dim=1, keepdim=True))[:, : len(unit)]
    positive = (labels[:, None] == labels) & ~itself
    return -(log_shares * positive).sum(dim=1).div(positive.sum(dim=1).clamp(min=1)).mean()


def tail_classes(class_counts: Tensor, tail_share: float = 0.4) -> Tensor:
    """Which classes ``[C]`` are the tail: the ``C - round((1 - tail_share) C)`` smallest, of equal ones the later."""
    head = round((1 - tail_share) * len(class_counts))
    order = class_counts.argsort(descending=True, stable=True)
    tail = torch.zeros(len(class_counts), dtype=torch.bool, device=class_counts.device)
    tail[order[head:]] = True
    return tail


@register_objective("pascl")
class PASCL(Objective):
    """``CE + ood_weight outlier_exposure + contrast_weight partial_asymmetric_contrast`` of projected features.

    Source: Wang et al. (2022) and their code: two views of each ID image and one of each OoD image; the contrast is
    between tail images and OoD images, of features through Linear(D, D)-ReLU-Linear(D, 128) and scaled to length 1.
    The code takes the last classes as the tail, counts being sorted there; here it is those with the smallest counts.

    This is the first of two stages, and gives the network that detects. The second gives the one that classifies:
    ``logit_adjustment`` on ID images alone, of ``second_stage_parameters``, Adam with 5e-4 for 10 epochs.

    Args:
        class_counts: ID training images of each class ``[C]``.
        num_features: D, the width of the features.
        ood_weight: 0.5.
        contrast_weight: 0.1 for CIFAR-10, 0.02 for CIFAR-100.
        temperature: 0.07 for CIFAR-10, 0.2 for CIFAR-100.
        tail_share: of the classes.
        width: of the projection.
    """

    auxiliary = True
    views = 2
    tail: Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        num_features: int,
        ood_weight: float = 0.5,
        contrast_weight: float = 0.1,
        temperature: float = 0.07,
        tail_share: float = 0.4,
        width: int = 128,
    ) -> None:
        super().__init__()
        self.require(temperature > 0, f"temperature must be positive, got {temperature}")
        self.require(0 <= tail_share <= 1, f"tail_share is a share from 0 to 1, got {tail_share}")
        self.register_buffer("tail", tail_classes(checked_counts(class_counts), tail_share), persistent=False)
        self.projector = create_projector("mlp", num_features, width)
        self.ood_weight = ood_weight
        self.contrast_weight = contrast_weight
        self.temperature = temperature

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        logits = head(features)
        require_classes(self.name, self.tail, logits)
        in_tail = self.tail[labels]
        unit = F.normalize(self.projector(torch.cat([features[in_tail], ood_features])), dim=1)
        anchors, ood_unit = unit.tensor_split([len(unit) - len(ood_features)])
        contrast = partial_asymmetric_contrast(anchors, labels[in_tail], ood_unit, self.temperature)
        exposure = outlier_exposure(head(ood_features))
        return cross_entropy(logits, labels) + self.ood_weight * exposure + self.contrast_weight * contrast


def second_stage_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of every BatchNorm, and of the classifier, of a timm-style model: what PASCL tunes at last.

    Source: Wang et al. (2022), §3.3; the authors' code calls it ``layer="both"``. It keeps all modules but BatchNorm
    in eval mode meanwhile, which matters to dropout only. A BatchNorm without parameters has only its statistics to
    change.

    Raises:
        HeadNotFound: the model has no single linear classifier.
    """
    return [parameter for module in (*batchnorms(model), linear_classifier(model)) for parameter in module.parameters()]
