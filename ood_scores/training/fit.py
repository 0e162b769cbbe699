"""A small trainer: SGD, one objective, one record per epoch."""

import math
from collections.abc import Iterable, Sequence

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from ood_scores.errors import BadLabels, EmptyInput, NotFinite, ShapeMismatch
from ood_scores.models.networks.classifier import linear_classifier
from ood_scores.training.objectives import CrossEntropy, Objective
from ood_scores.training.step import EpochRecord, TrainingStep, record, train_step

Batches = Iterable[Sequence[Tensor]]


def fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Batches,
    *,
    epochs: int,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    milestones: Sequence[int] = (),
    gamma: float = 0.1,
    objective: Objective | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> list[EpochRecord]:
    """Train a timm-style `model` with SGD where its parameters are, and leave it in eval mode.

    Args:
        model: A classifier with `forward_features`, `forward_head` and a linear `get_classifier()`.
        data: Either `(images, labels)`, images `[N, C, H, W]` ready for the model and labels `[N]`, drawn in a new
            order every epoch; or a loader of such pairs.
        epochs: Passes over the data.
        lr: Learning rate, multiplied by `gamma` at each of the `milestones`.
        momentum: Of SGD.
        weight_decay: Of SGD, on all parameters.
        milestones: Numbers of finished epochs.
        gamma: Factor at each milestone.
        objective: Cross-entropy by default.
        batch_size: For `(images, labels)`; a loader has its own.
        seed: Fixes the order of the samples and any dropout. On a CPU equal seeds give equal weights. The global
            random state is left as it was.
        progress: Show a progress bar.

    Returns:
        One record per epoch: mean loss, accuracy, mean ‖z‖₂ of the penultimate features, learning rate.
    """
    head = linear_classifier(model)
    step = TrainingStep(model, (objective or CrossEntropy()).to(head.weight.device))
    optimizer = torch.optim.SGD(step.parameters(), lr, momentum, weight_decay=weight_decay)
    schedule = MultiStepLR(optimizer, list(milestones), gamma)
    history: list[EpochRecord] = []
    with torch.random.fork_rng(), Progress(disable=not progress) as bar:
        torch.manual_seed(seed)
        task = bar.add_task("training", total=epochs)
        model.train()
        for _ in range(epochs):
            history.append(_epoch(step, head, _batches(data, batch_size), optimizer))
            schedule.step()
            bar.update(task, advance=1, description=_describe(history))
    model.eval()
    return history


def _batches(data: tuple[Tensor, Tensor] | Batches, batch_size: int) -> Batches:
    if not isinstance(data, tuple):
        return data
    images, labels = data
    if len(images) != len(labels):
        raise ShapeMismatch(f"There are {len(images)} images but {len(labels)} labels; give one label per image.")
    if not len(images):
        raise EmptyInput("There are no images to train on; give at least one.")
    return ((images[rows], labels[rows]) for rows in torch.randperm(len(images)).split(batch_size))


def _epoch(step: TrainingStep, head: nn.Linear, batches: Batches, optimizer: torch.optim.Optimizer) -> EpochRecord:
    sums: list[Tensor] = []
    samples = 0
    for images, labels in batches:
        _check_labels(labels, head.out_features)
        device = head.weight.device
        sums.append(train_step(step, head, optimizer, images.to(device), labels.to(device)))
        samples += len(labels)
    if not samples:
        raise EmptyInput(
            "The loader gave no samples; give one that is not empty and can be gone through once per epoch."
        )
    epoch = record(torch.stack(sums).cpu().double().sum(0), samples, optimizer.param_groups[0]["lr"])
    if not math.isfinite(epoch["loss"]):
        raise NotFinite(f"The training loss became {epoch['loss']}; lower the learning rate or check the images.")
    return epoch


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise BadLabels(f"Labels are {labels.dtype} of shape {tuple(labels.shape)}; give class indices, int64 of [N].")
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise BadLabels(
            f"Labels reach from {labels.min()} to {labels.max()}, but the model has classes 0 to {classes - 1}."
        )


def _describe(history: list[EpochRecord]) -> str:
    last = history[-1]
    return f"loss {last['loss']:.3f}  accuracy {last['accuracy']:.1%}  ‖z‖ {last['feature_norm']:.2f}"
