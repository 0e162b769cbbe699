"""Objectives on in-distribution images only: variants of the cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.training.objectives.base import Objective, register_objective
from ood_scores.training.objectives.priors import checked_counts, class_log_prior, require_classes


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits ``[N, C]`` and labels ``[N]``."""
    return F.cross_entropy(logits, labels)


def l2_norm(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, eps: float = 1e-12) -> Tensor:
    """Return the mean cross-entropy of ``W z/max(||z||_2, eps) + b``: the classifier sees only the direction of z.

    Source: Haas et al. (2022), Eq. 2, with one norm per sample; the paper's snippet uses one norm of the whole batch.

    Args:
        features: Features z ``[N, D]``.
        weight: Weight W ``[C, D]``.
        bias: Bias b ``[C]``.
        labels: Class indices ``[N]``.
        eps: Smallest norm to divide by.
    """
    return F.cross_entropy(F.linear(F.normalize(features, dim=1, eps=eps), weight, bias), labels)


def logit_norm(logits: Tensor, labels: Tensor, temperature: float = 0.04, eps: float = 1e-7) -> Tensor:
    """Return the mean cross-entropy of ``f / ((||f||_2 + eps) temperature)``, for logits f ``[N, C]``.

    Source: Wei et al. 2022, "Mitigating Neural Network Overconfidence with Logit Normalization", Eq. 5; eps is that of
    the authors' code.
    """
    lengths = logits.norm(dim=1, keepdim=True) + eps
    return F.cross_entropy(logits / (lengths * temperature), labels)


def logit_adjustment(logits: Tensor, labels: Tensor, log_prior: Tensor, tau: float = 1.0) -> Tensor:
    """Return the mean cross-entropy of ``f + tau log prior``, for logits f ``[N, C]`` and a log prior ``[C]``.

    Source: Menon et al. 2021, "Long-tail learning via logit adjustment", Eq. 10.
    """
    return F.cross_entropy(logits + tau * log_prior, labels)


@register_objective("cross_entropy")
class CrossEntropy(Objective):
    """``cross_entropy`` of the head's logits; with an ``L2Head`` in training mode this is ``l2_norm``."""

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        return cross_entropy(head(features), labels)


@register_objective("l2_norm")
class L2Norm(Objective):
    """``l2_norm`` with any linear head."""

    def __init__(self, eps: float = 1e-12) -> None:
        super().__init__()
        self.eps = eps

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        return l2_norm(features, head.weight, head.bias, labels, self.eps)


@register_objective("logit_norm")
class LogitNorm(Objective):
    """``logit_norm`` of the head's logits.

    The temperature 0.04 is that of OpenOOD for CIFAR-10; the authors' README uses 0.01.
    """

    def __init__(self, temperature: float = 0.04, eps: float = 1e-7) -> None:
        super().__init__()
        self.require(temperature > 0, f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        self.eps = eps

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        return logit_norm(head(features), labels, self.temperature, self.eps)


@register_objective("logit_adjustment")
class LogitAdjustment(Objective):
    """``logit_adjustment`` by the class frequencies of the training set, for balanced accuracy on a long tail.

    The logits are adjusted only in training; evaluation uses the head unchanged.
    """

    class_counts: Tensor

    def __init__(self, class_counts: Sequence[int] | Tensor, tau: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("class_counts", checked_counts(class_counts), persistent=False)
        self.tau = tau

    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        logits = head(features)
        require_classes(self.name, self.class_counts, logits)
        return logit_adjustment(logits, labels, class_log_prior(self.class_counts, logits), self.tau)
