"""One step of training, and passes over a set for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.models.networks.classifier import linear_classifier
from ood_scores.training.recipe import OptimizerTable

Forward = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class EpochRecord(TypedDict):
    """One epoch in training mode: means over its samples, and the learning rate used."""

    loss: float
    accuracy: float
    feature_norm: float
    lr: float


class TrainingStep(nn.Module):
    """From images to the loss: one forward pass of ID and OoD images together, then the objective on their features.

    The OoD images are thus in the statistics of every BatchNorm. The objective is computed in full precision.

    Args:
        model: a timm-style classifier with `forward_features`, `forward_head` and a linear `get_classifier()`.
        objective: called with features, head, labels and, if there are any, OoD features.
        amp: mixed precision (bf16) in the model.
    """

    def __init__(self, model: nn.Module, objective: Callable[..., Tensor], amp: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.objective = objective
        self.amp = amp

    def forward(self, images: Tensor, labels: Tensor, ood: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean loss, a scalar, and the ID features `[N, D]`."""
        head = linear_classifier(self.model)
        together = images if ood is None else torch.cat([images, ood])
        features = pre_logits(self.model, together, self.amp)
        id_features = features[: len(images)]
        if ood is None:
            return self.objective(id_features, head, labels), id_features
        return self.objective(id_features, head, labels, features[len(images) :]), id_features


def leaves_some_unread(objective: Any, head: nn.Linear) -> bool:
    """Whether an objective does not depend on all of its own parameters and the head's; the NC loss reads no bias."""
    generator = torch.Generator().manual_seed(0)
    rows = 2 * head.out_features
    features, ood = torch.randn((2, rows, head.in_features), generator=generator).to(head.weight.device)
    labels = torch.arange(head.out_features, device=head.weight.device).repeat(2)
    parameters = [p for part in (head, objective) for p in part.parameters() if p.requires_grad]
    loss = objective(features, head, labels, ood)
    return None in torch.autograd.grad(loss, parameters, allow_unused=True)


def pre_logits(model: Any, images: Tensor, amp: bool = False) -> Tensor:
    """What the linear classifier of a timm-style model gets, `[N, D]`."""
    with torch.autocast(images.device.type, torch.bfloat16) if amp else nullcontext():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
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
    """One update of the weights.

    Args:
        step: a `TrainingStep`, or what wraps one.
        head: the classifier.
        optimizer: is stepped.
        images: ready for the model `[N, C, H, W]`.
        labels: class indices `[N]`.
        ood: OoD images `[M, C, H, W]`.
        weight: factor of the loss in the gradient.

    Returns:
        Sums over the samples `[3]`: loss, right predictions, ‖z‖₂.
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
    """The record of an epoch from the sums over its samples `[3]`."""
    loss, accuracy, feature_norm = (sums / samples).tolist()
    return {"loss": loss, "accuracy": accuracy, "feature_norm": feature_norm, "lr": lr}


@torch.no_grad()
def count_correct(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], amp: bool = False) -> Tensor:
    """How many images `[N, C, H, W]` are classified right in eval mode, and how many if z were z/‖z‖: `[2]`."""
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
    """A new optimiser of these parameters."""
    decay = table.weight_decay
    if table.name == "sgd":
        momentum = 0.9 if table.momentum is None else table.momentum
        return torch.optim.SGD(parameters, table.lr, momentum, weight_decay=decay, nesterov=table.nesterov)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[table.name](parameters, table.lr, weight_decay=decay)
