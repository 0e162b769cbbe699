"""Representation norm amplification: large norms for ID images, with OoD images in the statistics of BatchNorm."""

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
    """Return ``mean_i log(1 + ||h_i||_2)`` of projections h ``[N, P]``; of OoD images, the attenuation loss."""
    return projected.norm(dim=1).log1p().mean()


def rna_loss(projected: Tensor) -> Tensor:
    """Return ``-mean_i log(1 + ||h_i||_2)`` of projections h ``[N, P]``. Source: Shin et al. (2024), Eq. 5.

    The gradient of each row has the norm ``1 / (N (1 + ||h_i||))``, which decreases as the row grows.
    """
    return -mean_log_norm(projected)


@register_objective("rna")
class RNA(Objective):
    """``L_LA + weight L_RNA``: logit adjustment, and ``rna_loss`` of projected ID features.

    Source: Shin et al. (2024), "Representation Norm Amplification for Out-of-Distribution Detection in Long-Tail
    Learning", Eq. 8. The matching score is ``feature_norm`` of the features, not of the projection.

    OoD images pass through the network in the same forward pass, so the statistics of BatchNorm include them. No term
    contains their features, whose gradient is exactly 0. The gradient at their pixels is *not* 0: batch statistics are
    differentiable, and the loss of the ID images depends on the OoD images through them. According to the paper, OoD
    images contribute to running statistics and provide no gradients. The authors' code, which produced the published
    numbers, propagates gradients through the batch statistics as PyTorch does by default, and so does this objective.
    ``without_ood_gradient`` around the forward pass implements the paper's statement literally.

    Args:
        class_counts: Number of ID training images of each class ``[C]``.
        num_features: Number D of features.
        weight: Weight of ``L_RNA``, the paper's lambda.
        tau: Temperature of the logit adjustment; 0 for plain cross-entropy.
        projector: ``"mlp"``, ``"linear"`` or ``"none"`` (Table 15). The paper does not state the linear one's width.
        width: Width of the projection; the authors' code uses 128, also for ResNet-50.
        amplify: Whether the loss contains ``L_RNA``.
        attenuate: Whether the loss contains ``+weight mean log(1 + ||h||)`` of the OoD images (Table 3).
        auxiliary: Whether each step has OoD images; Table 6 has a training without them.
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
        self.require(amplify or attenuate, "neither amplify nor attenuate is set: use 'logit_adjustment' instead")
        self.require(auxiliary or not attenuate, "attenuate needs OoD images: set auxiliary = true")
        self.base = LogitAdjustment(class_counts, tau)
        self.projector = create_projector(projector, num_features, width)
        self.weight = weight
        self.amplify = amplify
        self.attenuate = attenuate
        self.auxiliary = self.through_batchnorm = auxiliary
        self.term_names = ("base", *(["rna"] if amplify else []), *(["attenuation"] if attenuate else []))

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        terms = {"base": self.base(features, head, labels)}
        if self.amplify:
            terms["rna"] = rna_loss(self.projector(features))
        if self.attenuate:
            terms["attenuation"] = mean_log_norm(self.projector(ood_features))
        self.terms = {name: term.detach() for name, term in terms.items()}
        loss = terms.pop("base")
        for term in terms.values():
            loss = loss + self.weight * term
        return loss


@contextmanager
def without_ood_gradient(model: nn.Module, id_rows: int) -> Iterator[None]:
    """Treat the rows from ``id_rows`` on as constants in every BatchNorm of the model.

    Values and running statistics do not change. If no loss contains the OoD features, the gradient of the OoD images
    becomes exactly 0, and they contribute nothing to the gradient of any parameter.
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
