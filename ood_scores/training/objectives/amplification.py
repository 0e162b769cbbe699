"""Representation norm amplification: long norms for ID images, with OoD images in BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ood_scores.models.networks.classifier import batchnorms
from ood_scores.training.objectives.base import Objective, register_objective
from ood_scores.training.objectives.classification import LogitAdjustment
from ood_scores.training.objectives.projectors import create_projector


def mean_log_norm(projected: Tensor) -> Tensor:
    """``mean_i log(1 + ||h_i||_2)`` of projected features h ``[N, P]``; of OoD images, the paper's attenuation loss."""
    return projected.norm(dim=1).log1p().mean()


def rna_loss(projected: Tensor) -> Tensor:
    """``-mean_i log(1 + ||h_i||_2)`` of projected features h ``[N, P]``. Source: Shin et al. (2024), Eq. 5.

    Its gradient has length ``1 / (N (1 + ||h_i||))`` for each row: the longer, the less.
    """
    return -mean_log_norm(projected)


@register_objective("rna")
class RNA(Objective):
    """``L_LA + weight L_RNA``: logit adjustment, and ``rna_loss`` of projected ID features.

    Source: Shin et al. (2024), "Representation Norm Amplification for Out-of-Distribution Detection in Long-Tail
    Learning", Eq. 8. The score that goes with it is ``feature_norm``, of the features and not of the projection.

    OoD images go through the network in the same forward pass and so into the statistics of BatchNorm; their features
    are in no term, and their gradient is exactly 0. It is *not* 0 at their pixels: batch statistics are
    differentiable, and through them the loss of the ID images does depend on the OoD images. The paper says that OoD
    images contribute to running statistics and do not provide gradients; the authors' code goes backward through the
    batch statistics, as PyTorch does by itself, and it made the published numbers. That is what happens here too;
    ``without_ood_gradient`` around the forward pass gives the paper's sentence to the letter.

    Args:
        class_counts: ID training images of each class ``[C]``.
        num_features: D, the width of the features.
        weight: the paper's lambda.
        tau: of the logit adjustment; 0 for plain cross-entropy.
        projector: ``"mlp"``, ``"linear"`` or ``"none"`` (Table 15). The linear one's width is not in the paper.
        width: of the projection; the authors' code has 128, also for ResNet-50.
        amplify: whether ``L_RNA`` is in the loss.
        attenuate: whether ``+weight mean log(1 + ||h||)`` of the OoD images is (Table 3).
        auxiliary: False for a training without OoD images (Table 7).
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        num_features: int,
        weight: float = 0.5,
        tau: float = 1.0,
        projector: str = "mlp",
        width: int = 128,
        amplify: bool = True,
        attenuate: bool = False,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        self.require(amplify or attenuate, "neither amplify nor attenuate is set; use 'logit_adjustment' for that")
        self.require(auxiliary or not attenuate, "attenuate is about OoD images; set auxiliary too")
        self.base = LogitAdjustment(class_counts, tau)
        self.projector = create_projector(projector, num_features, width)
        self.weight = weight
        self.amplify = amplify
        self.attenuate = attenuate
        self.auxiliary = self.through_batchnorm = auxiliary

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        loss = self.base(features, head, labels)
        if self.amplify:
            loss = loss + self.weight * rna_loss(self.projector(features))
        if self.attenuate:
            loss = loss + self.weight * mean_log_norm(self.projector(ood_features))
        return loss


@contextmanager
def without_ood_gradient(model: nn.Module, id_rows: int) -> Iterator[None]:
    """Inside, the rows from ``id_rows`` on are constants to every BatchNorm of the model.

    Values and running statistics are the same as outside. As long as the OoD features are in no loss, the gradient of
    the OoD images becomes exactly 0, and none of a parameter's gradient comes through them.
    """

    def detach_ood(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (rows,) = args
        return (torch.cat([rows[:id_rows], rows[id_rows:].detach()]),)

    hooks = [norm.register_forward_pre_hook(detach_ood) for norm in batchnorms(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
