"""Creation of a recipe's network and images, with every check that needs no training."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ood_scores.data.fingerprint import fingerprint
from ood_scores.data.images import ImageDataset
from ood_scores.data.long_tail import labels_of, long_tail
from ood_scores.data.sources import open_dataset
from ood_scores.data.subsets import validation_split
from ood_scores.errors import BadInput, BadLabels, MissingInput
from ood_scores.models.networks.classifier import CLASSIFIER, batchnorms, linear_classifier
from ood_scores.models.running import weights_sha256
from ood_scores.training.augment import Augmentation, augmentation
from ood_scores.training.distributed import Processes
from ood_scores.training.networks import ToInput, input_of, make_model, network_arguments
from ood_scores.training.objectives import Objective, objective_class
from ood_scores.training.recipe import Recipe, Stage
from ood_scores.training.stages import trainable_parameters, tried_objective
from ood_scores.training.step import pre_logits
from ood_scores.training.streams import Images, OpenedImages, make_images
from ood_scores.user_warnings import warn_user

CHECKSUM_DIGITS = 16
TRAINING_IMAGES = "train"
"""Value of ``data`` in ``[auxiliary]`` for the training images themselves."""


@dataclass(frozen=True)
class Prepared:
    """The network and the images of a training run.

    Attributes:
        model: The network, on the device and in training mode.
        arguments: Arguments of the network.
        to_input: The transform from images to model inputs.
        train, validation, test, auxiliary: The images, or None.
        augment: Augmentation of the training images.
        augment_auxiliary: Augmentation of the auxiliary images.
        class_counts: Number of training images of each class.
        checksums: Checksums of the images, and of the weights of the checkpoint that the training starts from.
    """

    model: nn.Module
    arguments: dict[str, Any]
    to_input: ToInput
    train: Images
    validation: Images | None
    test: Images | None
    auxiliary: Images | None
    augment: Augmentation
    augment_auxiliary: Augmentation
    class_counts: list[int]
    checksums: dict[str, str | None]

    def facts(self) -> dict[str, Any]:
        """Return facts that distinguish these data from other data of the same name."""
        return {
            "images of each class": self.class_counts,
            "auxiliary images": 0 if self.auxiliary is None else len(self.auxiliary),
            **{f"checksum of the {name}": checksum for name, checksum in self.checksums.items()},
        }


@dataclass(frozen=True)
class Rows:
    """Rows of a labelled dataset."""

    dataset: ImageDataset
    rows: np.ndarray
    labels: np.ndarray


def prepare(recipe: Recipe, who: Processes, out: Path) -> Prepared:
    """Create the network and open the images of a recipe whose output folder is ``out``.

    Raises:
        UnknownName: if a model, objective, augmentation or dataset does not exist.
        MissingInput: if an objective needs OoD images, and there is no ``[auxiliary]``.
        BadInput: if parts of the recipe do not fit each other, or the data cannot be read.
        BadLabels: if training images have no labels, labels exceed the model's classes, or classes have no images and
            the recipe does not set their number.
        CheckpointError: if the initial weights are missing or those of another architecture.
    """
    for stage in recipe.stages:
        objective_class(stage.objective.name)
    _check_processes(recipe, who)
    train, validation = _training_rows(recipe)
    test = None if recipe.data.test is None else _labelled(open_dataset(recipe.data.test))
    auxiliary = _auxiliary_rows(recipe, train)
    arguments = network_arguments(recipe.model, int(train.labels.max()) + 1)
    model = make_model(recipe.model, arguments, recipe.seed, out)
    if recipe.compile and hasattr(model, CLASSIFIER):
        raise BadInput(f"compile = true is for timm's models, and {recipe.model.name} is not one: set it to false.")
    started = None if recipe.model.checkpoint is None else weights_sha256(model)[:CHECKSUM_DIGITS]
    to_input = input_of(model)
    counts = _class_counts(recipe, train.labels, linear_classifier(model).out_features)
    if test is not None:
        _check_known(recipe.data.test or "", test.labels, len(counts))
    for stage in recipe.stages:
        objective = _checked_objective(recipe, stage, model, counts.tolist())
        _check_smallest_batch(stage, objective, model, to_input, len(train.rows), who.count)
    to_input = to_input.to(who.device)
    augment = augmentation(recipe.data.augmentation, to_input.channels)
    aux_name = (recipe.auxiliary and recipe.auxiliary.augmentation) or recipe.data.augmentation
    augment_auxiliary = augmentation(aux_name, to_input.channels)
    images = partial(_open_images, to_input, who.device, recipe.workers)
    own = images(train, augment.opening_crop)
    shared = auxiliary is train and augment.opening_crop == augment_auxiliary.opening_crop
    if recipe.sync_batchnorm:
        model = who.with_sync_batchnorm(model)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return Prepared(
        model=model.to(who.device).to(memory_format=layout).train(),
        arguments=arguments,
        to_input=to_input,
        train=own,
        validation=images(validation) if len(validation.rows) else None,
        test=images(test) if test else None,
        auxiliary=own if shared else images(auxiliary, augment_auxiliary.opening_crop) if auxiliary else None,
        augment=augment,
        augment_auxiliary=augment_auxiliary,
        class_counts=counts.tolist(),
        checksums={
            "training images": _checksum(train),
            "validation images": _checksum(validation if len(validation.rows) else None),
            "test images": _checksum(test),
            "auxiliary images": _checksum(auxiliary),
            "initial weights": started,
        },
    )


def _checksum(rows: Rows | None) -> str | None:
    return None if rows is None else fingerprint(rows.dataset, rows.rows, rows.labels)[:CHECKSUM_DIGITS]


def _checked_objective(recipe: Recipe, stage: Stage, model: nn.Module, class_counts: list[int]) -> Objective:
    objective = tried_objective(stage, model, class_counts)
    if objective.auxiliary and recipe.auxiliary is None:
        raise MissingInput(
            f"objective {objective.name!r} needs OoD images in each step: add [auxiliary] with data = … to the recipe."
        )
    trainable_parameters(model, stage.trainable)
    return objective


def _check_smallest_batch(
    stage: Stage, objective: Objective, model: nn.Module, to_input: ToInput, images: int, processes: int
) -> None:
    """Refuse a step in which a BatchNorm of the model would see one value per channel."""
    rest = 0 if stage.drop_last else images % stage.batch_size
    smallest = rest if rest >= processes else stage.batch_size
    several = objective.auxiliary or smallest // processes * objective.views > 1
    if several or not _normalizes_single_values(model, to_input):
        return
    where = (
        f"{images} training images leave a last batch of {rest}" if smallest == rest else f"batch_size is {smallest}"
    )
    raise BadInput(
        f"{where}, so that a process sees 1 image, and {type(model).__name__} has a BatchNorm that needs at least 2: "
        f"{'set drop_last = true, or ' if smallest == rest else ''}choose another batch_size."
    )


def _normalizes_single_values(model: nn.Module, to_input: ToInput) -> bool:
    """Whether a BatchNorm of the model sees one value per channel of an image."""
    found: list[bool] = []
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].numel() == inputs[0].shape[1]))
        for norm in batchnorms(model)
    ]
    training = model.training
    try:
        with torch.no_grad():
            pre_logits(model.eval(), torch.zeros(1, to_input.channels, *to_input.size))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return any(found)


def _open_images(
    to_input: ToInput, device: torch.device, workers: int, rows: Rows, crop: float | None = None
) -> Images:
    opening = to_input.open if crop is None else partial(to_input.open_crop, smallest=crop)
    opened = OpenedImages(rows.dataset, rows.rows, opening)
    return make_images(opened, torch.from_numpy(rows.labels), device, hold=crop is None, workers=workers)


def _check_processes(recipe: Recipe, who: Processes) -> None:
    if recipe.sync_batchnorm and who.count > 1 and who.device.type != "cuda":
        raise BadInput("sync_batchnorm needs GPUs: set it to false on a CPU.")
    sizes = [stage.batch_size for stage in recipe.stages]
    if recipe.auxiliary and recipe.auxiliary.batch_size:
        sizes.append(recipe.auxiliary.batch_size)
    for size in sizes:
        if size % who.count:
            raise BadInput(f"a batch of {size} cannot be split among {who.count} processes: choose a multiple of them.")


def _training_rows(recipe: Recipe) -> tuple[Rows, Rows]:
    dataset = open_dataset(recipe.data.train)
    whole = _labelled(dataset)
    if recipe.data.long_tail > 1:
        tail = long_tail(dataset, recipe.data.long_tail, labels=whole.labels)
        whole = Rows(dataset, np.asarray(tail.indices), tail.labels)
    kept, aside = validation_split(whole.labels, recipe.data.validation)
    return tuple(Rows(dataset, whole.rows[part], whole.labels[part]) for part in (kept, aside))  # type: ignore[return-value]


def _auxiliary_rows(recipe: Recipe, train: Rows) -> Rows | None:
    if recipe.auxiliary is None:
        return None
    if recipe.auxiliary.data == TRAINING_IMAGES:
        return train
    dataset = open_dataset(recipe.auxiliary.data)
    rows = np.arange(len(dataset))
    return Rows(dataset, rows, np.zeros_like(rows))


def _labelled(dataset: ImageDataset) -> Rows:
    try:
        labels = labels_of(dataset)
    except BadLabels:
        found = [dataset.load(index)[1] for index in range(len(dataset))]
        labels = np.array([-1 if label is None else label for label in found])
    if labels.min() < 0:
        raise BadLabels(f"{dataset.name} has images without a label: choose a dataset with one class for each image.")
    return Rows(dataset, np.arange(len(dataset)), labels.astype(np.int64))


def _class_counts(recipe: Recipe, labels: np.ndarray, outputs: int) -> np.ndarray:
    """Return the number of training images of each class; 0 is an error unless the recipe sets the classes."""
    name, counts = recipe.data.train, np.bincount(labels, minlength=outputs)
    if len(counts) > outputs:
        raise BadLabels(
            f"{name} has labels up to {len(counts) - 1}, but num_classes of [model] is {outputs}: raise num_classes."
        )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        lacking = f"{name} has no training images of {len(empty)} of {outputs} classes, such as class {empty[0]}"
        if "num_classes" not in recipe.model.arguments:
            raise BadLabels(f"{lacking}: number the classes without gaps, or set num_classes of [model].")
        warn_user(f"{lacking}: the network learns never to predict them.")
    return counts


def _check_known(name: str, labels: np.ndarray, classes: int) -> None:
    if labels.max() >= classes:
        raise BadLabels(
            f"{name} has labels up to {labels.max()}, but the training images have {classes} classes: choose test "
            "images of the same classes."
        )
