"""A training step, and evaluation of a network on a dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.models.networks.classifier import linear_classifier, penultimate
from ood_scores.training.recipe import OptimizerTable

Forward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class EpochRecord(TypedDict):
    """Means over the samples of one epoch in training mode, and its learning rate."""

    loss: float
    accuracy: float
    feature_norm: float
    lr: float


class TrainingStep(nn.Module):
    """Compute the loss of images: one forward pass of ID and OoD images together, then the objective on the features.

    The statistics of every BatchNorm thus include the OoD images. The objective is computed in full precision.

    Args:
        model: A classifier that ``linear_classifier`` accepts.
        objective: Function of features, head, labels and, if there are any, OoD features.
        amp: Whether the model uses mixed precision (bf16).
    """

    def __init__(self, model: nn.Module, objective: Callable[..., Tensor], amp: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.objective = objective
        self.amp = amp

    def forward(self, images: Tensor, labels: Tensor, ood: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mean loss, a scalar, and the ID features ``[N, D]``."""
        head = linear_classifier(self.model)
        together = images if ood is None else torch.cat([images, ood])
        features = pre_logits(self.model, together, self.amp)
        id_features = features[: len(images)]
        if ood is None:
            return self.objective(id_features, head, labels), id_features
        return self.objective(id_features, head, labels, features[len(images) :]), id_features


def leaves_some_unread(objective: Any, head: nn.Linear) -> bool:
    """Whether the loss ignores some parameters of the objective or the head, as ``nc_loss`` ignores the bias."""
    generator = torch.Generator().manual_seed(0)
    rows = 2 * head.out_features
    features, ood = torch.randn((2, rows, head.in_features), generator=generator).to(head.weight.device)
    labels = torch.arange(head.out_features, device=head.weight.device).repeat(2)
    parameters = [p for part in (head, objective) for p in part.parameters() if p.requires_grad]
    loss = objective(features, head, labels, ood)
    return None in torch.autograd.grad(loss, parameters, allow_unused=True)


def ignores_some(model: nn.Module, images: Tensor) -> bool:
    """Whether the features of images do not depend on some trainable parameters of a model, such as a second head's."""
    head = {id(parameter) for parameter in linear_classifier(model).parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in head]
    if not parameters:
        return False
    training = model.training
    features = pre_logits(model.eval(), images)
    model.train(training)
    return None in torch.autograd.grad(features.sum(), parameters, allow_unused=True)


def pre_logits(model: Any, images: Tensor, amp: bool = False) -> Tensor:
    """Return the penultimate features ``[N, D]`` in full precision."""
    with torch.autocast(images.device.type, torch.bfloat16) if amp else nullcontext():
        features = penultimate(model, images)
    return features.float() if amp else features


def train_step(
    step: Forward,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    ood: Tensor | None = None,
    weight: float = 1.0,
) -> Tensor:
    """Update the weights once.

    Args:
        step: A ``TrainingStep``, or a module that wraps one.
        head: The classifier.
        optimizer: The optimizer.
        images: Model inputs ``[N, C, H, W]``.
        labels: Class indices ``[N]``.
        ood: OoD model inputs ``[M, C, H, W]``.
        weight: Factor of the loss in the gradient.

    Returns:
        Sums over the samples ``[3]``: loss, correct predictions, ``||z||_2``.
    """
    loss, features = step(images, labels, ood)
    optimizer.zero_grad()
    (loss if weight == 1 else loss * weight).backward()
    with torch.no_grad():
        correct = (head(features).argmax(1) == labels).sum()
        sums = torch.stack([loss * len(labels), correct, features.norm(dim=1).sum()])
    optimizer.step()
    return sums


def record(sums: Tensor, samples: float, lr: float) -> EpochRecord:
    """Return the record of an epoch from the sums over its samples ``[3]``."""
    loss, accuracy, feature_norm = (sums / samples).tolist()
    return {"loss": loss, "accuracy": accuracy, "feature_norm": feature_norm, "lr": lr}


@torch.no_grad()
def count_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], amp: bool = False) -> Tensor:
    """Count the correctly classified images in eval mode, with features z and with normalized z/‖z‖: ``[2]``."""
    head = linear_classifier(model)
    counts = torch.zeros(2, dtype=torch.int64, device=head.weight.device)
    model.eval()
    for images, labels in batches:
        features = pre_logits(model, images, amp)
        normalized = F.linear(F.normalize(features, dim=1), head.weight, head.bias)
        guesses = torch.stack([head(features).argmax(1), normalized.argmax(1)])
        counts += (guesses == labels).sum(dim=1)
    model.train()
    return counts


def make_optimizer(table: OptimizerTable, parameters: list[Any]) -> torch.optim.Optimizer:
    """Create an optimizer of these parameters."""
    decay = table.weight_decay
    if table.name == "sgd":
        momentum = 0.9 if table.momentum is None else table.momentum
        return torch.optim.SGD(parameters, table.lr, momentum, weight_decay=decay, nesterov=table.nesterov)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[table.name](parameters, table.lr, weight_decay=decay)
