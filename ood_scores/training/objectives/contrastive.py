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
    """Return a loss that pulls rows of one class together and pushes them away from other classes and OoD rows.

    For each anchor i, it is the mean of ``-log( exp(u_i u_j / T) / sum_{k != i} exp(u_i u_k / T) )`` over the other
    rows j of its class, where k runs over all other rows and the OoD rows; the loss is the mean over anchors.
    *Partial*: the caller passes only tail classes. *Asymmetric*: OoD rows are not anchors and are not pulled together.
    A row that is alone in its class contributes 0; without rows the loss is 0.

    Source: Wang et al. 2022, "Partial and Asymmetric Contrastive Learning for Out-of-Distribution Detection in
    Long-Tailed Recognition", Eq. 5.

    Args:
        unit: Rows of length 1 ``[N, P]``, with all views of each image.
        labels: Class indices ``[N]``.
        ood_unit: Rows of length 1 ``[M, P]``, at least one.
        temperature: Temperature T.
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
    """Mark the tail classes ``[C]``: the ``C - round((1 - tail_share) C)`` smallest, of equal ones the later."""
    head = round((1 - tail_share) * len(class_counts))
    order = class_counts.argsort(descending=True, stable=True)
    tail = torch.zeros(len(class_counts), dtype=torch.bool, device=class_counts.device)
    tail[order[head:]] = True
    return tail


@register_objective("pascl")
class PASCL(Objective):
    """``CE + ood_weight outlier_exposure + contrast_weight partial_asymmetric_contrast`` of projected features.

    Source: Wang et al. (2022) and their code, which use two views of each ID image and one of each OoD image. The
    contrast compares tail images and OoD images, in features that pass through Linear(D, D)-ReLU-Linear(D, 128) and are
    scaled to length 1. The code uses the last classes as the tail, because its classes are sorted by count; here the
    tail consists of the classes with the smallest counts.

    This is the first of two stages, and its network is used for detection. The second stage produces the network for
    classification: ``logit_adjustment`` on ID images only, Adam with 5e-4 for 10 epochs on
    ``second_stage_parameters``.

    Args:
        class_counts: Number of ID training images of each class ``[C]``.
        num_features: Number D of features.
        ood_weight: Weight of the outlier exposure; 0.5 in the paper.
        contrast_weight: Weight of the contrast; 0.1 for CIFAR-10, 0.02 for CIFAR-100.
        temperature: Temperature of the contrast; 0.07 for CIFAR-10, 0.2 for CIFAR-100.
        tail_share: Share of the classes that are the tail.
        width: Width of the projection.
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
        self.require(0 <= tail_share <= 1, f"tail_share must be in [0, 1], got {tail_share}")
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
    """Return the parameters of every BatchNorm and of the classifier of a timm-style model, for PASCL's second stage.

    Source: Wang et al. (2022), §3.3; the authors' code calls it ``layer="both"``. Their code keeps all modules except
    BatchNorm in eval mode during this stage, which affects only dropout. A BatchNorm without parameters only updates
    its statistics.

    Raises:
        HeadNotFound: if the model has no single linear classifier.
    """
    return [parameter for module in (*batchnorms(model), linear_classifier(model)) for parameter in module.parameters()]
