"""Objectives that prescribe the outputs for OoD images: outlier exposure and its relatives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.training.objectives.base import Objective, as_base, register_objective
from ood_scores.training.objectives.priors import checked_counts, class_prior, require_classes


def outlier_exposure(ood_logits: Tensor) -> Tensor:
    """Return the mean cross-entropy to the uniform distribution, ``logsumexp f - mean_c f_c``, of logits ``[M, C]``.

    Its minimum is log C. Source: Hendrycks et al. 2019, "Deep Anomaly Detection with Outlier Exposure".
    """
    return (ood_logits.logsumexp(dim=1) - ood_logits.mean(dim=1)).mean()


def energy_hinge(logits: Tensor, ood_logits: Tensor, m_in: float = -23.0, m_out: float = -5.0) -> Tensor:
    """Return ``mean relu(E_in - m_in)^2 + mean relu(m_out - E_out)^2`` with ``E = -logsumexp f``.

    Source: Liu et al. 2020, "Energy-based Out-of-distribution Detection", Eq. 8 and 9.

    Args:
        logits: Logits of ID images ``[N, C]``.
        ood_logits: Logits of OoD images ``[M, C]``.
        m_in: Energy below which ID images have no loss.
        m_out: Energy above which OoD images have no loss.
    """
    id_excess = F.relu(-logits.logsumexp(dim=1) - m_in)
    ood_lack = F.relu(m_out + ood_logits.logsumexp(dim=1))
    return id_excess.square().mean() + ood_lack.square().mean()


def balanced_energy_hinge(
    logits: Tensor,
    ood_logits: Tensor,
    class_weight: Tensor,
    m_in: float = -23.0,
    m_out: float = -5.0,
    shift: float = 10.0,
) -> Tensor:
    """Return an ``energy_hinge`` that is stricter with OoD images that look like common classes.

    With ``Z = sum_c softmax(f)_c class_weight_c``, the margin of an OoD image is ``m_out + shift Z``, and the OoD term
    is the mean weighted by Z, ``sum Z relu(m_out + shift Z - E_out)^2 / sum Z``. Both Z have a gradient.

    Source: Choi et al. 2023, "Balanced Energy Regularization Loss for Out-of-distribution Detection", and their code.

    Args:
        logits: Logits of ID images ``[N, C]``.
        ood_logits: Logits of OoD images ``[M, C]``.
        class_weight: Weights ``[C]``, large for classes that the model predicts for many OoD images.
        m_in: Energy below which ID images have no loss.
        m_out: Energy above which OoD images with Z = 0 have no loss.
        shift: Shift of the margin per unit of Z.
    """
    id_excess = F.relu(-logits.logsumexp(dim=1) - m_in)
    share = ood_logits.softmax(dim=1) @ class_weight
    ood_lack = F.relu(m_out + shift * share + ood_logits.logsumexp(dim=1))
    return id_excess.square().mean() + (share * ood_lack.square()).sum() / share.sum()


def confidence_control(logits: Tensor, train_accuracy: float, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Return ``(mean_i max_c p_ic - A)^2`` of ID logits ``[N, C]``; with ``"sum"``, ``sum_i (max_c p_ic - A)^2``.

    Source: Papadopoulos et al. 2021, "Outlier exposure with confidence control for out-of-distribution detection".
    """
    confidence = logits.softmax(dim=1).amax(dim=1)
    if reduction == "mean":
        return (confidence.mean() - train_accuracy).square()
    return (confidence - train_accuracy).square().sum()


def total_variation(ood_logits: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Return ``sum_c |p_c - 1/C|`` of logits ``[M, C]``, mean or sum over rows; source: see ``confidence_control``."""
    distances = (ood_logits.softmax(dim=1) - 1 / ood_logits.shape[1]).abs().sum(dim=1)
    return distances.mean() if reduction == "mean" else distances.sum()


class Exposure(Objective):
    """A classification loss of the ID images plus a term of all logits.

    The base is the name of an objective, such as ``"logit_adjustment"`` for the LA+OE of Shin et al. (2024), or an
    ``Objective`` with its own settings.
    """

    auxiliary = True
    term_names = ("base", "exposure")

    def __init__(self, base: str | Objective, class_counts: Sequence[int] | Tensor | None) -> None:
        super().__init__()
        self.base = as_base(base, class_counts)

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        base, exposure = self.base(features, head, labels), self.exposure(head(features), head(ood_features))
        self.terms = {"base": base.detach(), "exposure": exposure.detach()}
        return base + exposure

    @abstractmethod
    def exposure(self, logits: Tensor, ood_logits: Tensor) -> Tensor:
        """Return the weighted term of ID logits ``[N, C]`` and OoD logits ``[M, C]``."""


@register_objective("oe")
class OE(Exposure):
    """``base + weight outlier_exposure``; Hendrycks et al. (2019) use cross-entropy and 0.5 on images.

    Args:
        weight: Weight of the OoD term.
        base: Loss of the ID images.
        class_counts: Number of ID training images of each class ``[C]``, for bases with a class prior.
    """

    def __init__(
        self,
        weight: float = 0.5,
        base: str | Objective = "cross_entropy",
        class_counts: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(base, class_counts)
        self.weight = weight

    def exposure(self, logits: Tensor, ood_logits: Tensor) -> Tensor:
        return self.weight * outlier_exposure(ood_logits)


@register_objective("energy_oe")
class EnergyOE(Exposure):
    """``base + weight energy_hinge``; the defaults are those of Liu et al. (2020).

    Args:
        weight: Weight of both hinges.
        m_in: Energy below which ID images have no loss; -23 for CIFAR-10, -27 for CIFAR-100.
        m_out: Energy above which OoD images have no loss; -5 for both.
        base: Loss of the ID images.
        class_counts: Number of ID training images of each class ``[C]``, for bases with a class prior.
    """

    def __init__(
        self,
        weight: float = 0.1,
        m_in: float = -23.0,
        m_out: float = -5.0,
        base: str | Objective = "cross_entropy",
        class_counts: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(base, class_counts)
        self.weight = weight
        self.m_in = m_in
        self.m_out = m_out

    def exposure(self, logits: Tensor, ood_logits: Tensor) -> Tensor:
        return self.weight * energy_hinge(logits, ood_logits, self.m_in, self.m_out)


@register_objective("balanced_energy")
class BalancedEnergy(Exposure):
    """``base + weight balanced_energy_hinge`` with class weights ``prior_c^gamma``, scaled to sum 1.

    Source: Choi et al. (2023). The prior is that of the *OoD* images: the share of the auxiliary images that a
    previously trained network assigns to each class. The authors' code contains such counts as constants. Without
    ``ood_counts`` the ID counts replace them, because a network trained on a long tail assigns OoD images to common
    classes too. The code scales the powers to sum 1 before use, which keeps ``shift Z`` near 1 for a shift of C.

    Args:
        class_counts: Number of ID training images of each class ``[C]``.
        weight: Weight of both hinges.
        m_in: Energy below which ID images have no loss; -23 for CIFAR-10, -27 for CIFAR-100.
        m_out: Energy above which OoD images with Z = 0 have no loss; -5 for both.
        shift: Shift of the margin, the paper's alpha (lambda in its code): 10 for CIFAR-10, 100 for CIFAR-100.
        gamma: Power of the prior, 0.75 for long tails; the authors' script for balanced CIFAR-10 and CIFAR-100 uses
            0.05 and 0.005.
        ood_counts: Number of OoD images that a trained network predicts for each class ``[C]``.
        base: Loss of the ID images.
    """

    ood_counts: Tensor

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        weight: float = 0.1,
        m_in: float = -23.0,
        m_out: float = -5.0,
        shift: float = 10.0,
        gamma: float = 0.75,
        ood_counts: Sequence[int] | Tensor | None = None,
        base: str | Objective = "cross_entropy",
    ) -> None:
        super().__init__(base, class_counts)
        counts = checked_counts(class_counts) if ood_counts is None else checked_counts(ood_counts, smallest=0)
        self.register_buffer("ood_counts", counts, persistent=False)
        self.weight = weight
        self.m_in = m_in
        self.m_out = m_out
        self.shift = shift
        self.gamma = gamma

    def exposure(self, logits: Tensor, ood_logits: Tensor) -> Tensor:
        require_classes(self.name, self.ood_counts, logits)
        powers = class_prior(self.ood_counts, ood_logits) ** self.gamma
        class_weight = (powers / powers.sum()).to(ood_logits.dtype)
        return self.weight * balanced_energy_hinge(logits, ood_logits, class_weight, self.m_in, self.m_out, self.shift)


@register_objective("oecc")
class OECC(Exposure):
    """``base + id_weight confidence_control + ood_weight total_variation``.

    Source: Papadopoulos et al. (2021); the weights are those of their notebook that tunes a trained CIFAR network. The
    notebook uses *sums* over the batch, and the squared difference of each ID image (``reduction="sum"``); the paper
    uses the square of the mean difference, which is the default here. The weights were chosen for sums and have little
    effect with means.

    Args:
        train_accuracy: Accuracy A on the training set, the target of the confidence; the notebook uses 0.9486 for
            CIFAR-10 and 0.7573 for CIFAR-100.
        id_weight: Weight lambda_1 of the confidence control.
        ood_weight: Weight lambda_2 of the total variation.
        reduction: Reduction over the rows of the batch, ``"mean"`` or ``"sum"``.
        base: Loss of the ID images.
        class_counts: Number of ID training images of each class ``[C]``, for bases with a class prior.
    """

    test_settings = {"train_accuracy": 0.95}  # noqa: RUF012

    def __init__(
        self,
        train_accuracy: float,
        id_weight: float = 0.07,
        ood_weight: float = 0.05,
        reduction: Literal["mean", "sum"] = "mean",
        base: str | Objective = "cross_entropy",
        class_counts: Sequence[int] | Tensor | None = None,
    ) -> None:
        super().__init__(base, class_counts)
        self.require(0 <= train_accuracy <= 1, f"train_accuracy must be in [0, 1], got {train_accuracy}")
        self.require(reduction in ("mean", "sum"), f"reduction is 'mean' or 'sum', got {reduction!r}")
        self.train_accuracy = train_accuracy
        self.id_weight = id_weight
        self.ood_weight = ood_weight
        self.reduction = reduction

    def exposure(self, logits: Tensor, ood_logits: Tensor) -> Tensor:
        control = confidence_control(logits, self.train_accuracy, self.reduction)
        return self.id_weight * control + self.ood_weight * total_variation(ood_logits, self.reduction)
