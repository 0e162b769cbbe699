"""From a recipe to a network and images, with every check that needs no training."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.data.transforms import str_to_pil_interp
from torch import Generator, Tensor, nn
from torchvision import transforms

from ood_scores.data.images import ImageDataset
from ood_scores.data.long_tail import labels_of, long_tail
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, BadLabels, MissingInput
from ood_scores.models.networks.classifier import batchnorms, linear_classifier
from ood_scores.models.opening import fill, make, preprocessing, read_checkpoint
from ood_scores.training.augment import Augmentation, augmentation, random_resized_crop, seed_of
from ood_scores.training.distributed import Processes
from ood_scores.training.objectives import Objective, create_objective, objective_class
from ood_scores.training.recipe import ModelTable, Recipe, Stage
from ood_scores.training.step import leaves_some_unread
from ood_scores.training.streams import Images, OpenedImages, make_images, validation_split

TRAINING_IMAGES = "train"
"""As `data` in `[auxiliary]`: the training images themselves."""


@dataclass(frozen=True)
class ToInput:
    """How PIL images become the input of a network: what evaluation does, in two parts.

    Attributes:
        geometry: from a PIL image to one of the network's size and channels.
        channels: 3, or 1 for grey.
        size: height and width.
        resample: of a random crop.
        mean, std: of the channels, `[C, 1, 1]`.
    """

    geometry: transforms.Compose
    channels: int
    size: tuple[int, int]
    resample: Image.Resampling
    mean: Tensor
    std: Tensor

    def open(self, image: Image.Image, seed: int) -> Image.Image:
        """The image as evaluation sees it, before it becomes numbers."""
        return self.geometry(image)

    def open_crop(self, image: Image.Image, seed: int) -> Image.Image:
        """A random part of the image, at the network's size."""
        cropped = random_resized_crop(image, self.size, self.resample, seed)
        return cropped.convert("L") if self.channels == 1 else cropped

    def standardized(self, images: Tensor) -> Tensor:
        """Images from 0 to 1 minus mean, by standard deviation."""
        return (images - self.mean) / self.std

    def to(self, device: torch.device) -> ToInput:
        """The same for images on a device."""
        return replace(self, mean=self.mean.to(device), std=self.std.to(device))

    def augmented(self, images: Tensor, by: Augmentation, generator: Generator, channels_last: bool) -> Tensor:
        """uint8 images as the network's input."""
        ready = self.standardized(by(images, generator))
        return ready.contiguous(memory_format=torch.channels_last) if channels_last else ready.contiguous()


@dataclass(frozen=True)
class Prepared:
    """What a training needs.

    Attributes:
        model: on the device, in training mode.
        arguments: of `timm.create_model`, beside the name.
        to_input: images to its input.
        train, validation, test, auxiliary: the images, where there are any.
        augment: of the training images.
        augment_auxiliary: of the auxiliary ones.
        class_counts: training images of each class.
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

    def facts(self) -> dict[str, Any]:
        """By which other data of the same name are noticed."""
        return {
            "images of each class": self.class_counts,
            "auxiliary images": 0 if self.auxiliary is None else len(self.auxiliary),
        }


@dataclass(frozen=True)
class Rows:
    """Rows of a labelled dataset."""

    dataset: ImageDataset
    rows: np.ndarray
    labels: np.ndarray


def prepare(recipe: Recipe, who: Processes) -> Prepared:
    """The network and the images of a recipe.

    Raises:
        UnknownName: a model, objective, augmentation or dataset that does not exist.
        MissingInput: an objective wants OoD images, and there is no `[auxiliary]`.
        BadInput: the parts of the recipe do not fit each other, or the data cannot be read.
        BadLabels: training images without labels, classes without images, labels that the model does not have.
        CheckpointError: the weights to start from are missing or of another architecture.
    """
    for stage in recipe.stages:
        objective_class(stage.objective.name)
    _check_processes(recipe, who)
    train, validation = _training_rows(recipe)
    test = None if recipe.data.test is None else _labelled(open_dataset(recipe.data.test))
    auxiliary = _auxiliary_rows(recipe, train)
    counts = np.bincount(train.labels)
    arguments = {"num_classes": len(counts), **recipe.model.arguments}
    model = make_model(recipe.model, arguments, recipe.seed)
    _check_classes(recipe.data.train, counts, linear_classifier(model).out_features)
    if test is not None:
        _check_known(recipe.data.test or "", test.labels, len(counts))
    for stage in recipe.stages:
        objective = _tried_objective(stage, model, counts.tolist())
        if objective.auxiliary and recipe.auxiliary is None:
            raise MissingInput(
                f"objective {objective.name!r} needs OoD images in each step: add [auxiliary] with data = … to the "
                "recipe."
            )
        trainable_parameters(model, stage.trainable)
    to_input = input_of(model).to(who.device)
    augment = augmentation(recipe.data.augmentation, to_input.channels)
    aux_name = (recipe.auxiliary and recipe.auxiliary.augmentation) or recipe.data.augmentation
    augment_auxiliary = augmentation(aux_name, to_input.channels)

    def images(rows: Rows | None, by: Augmentation | None = None) -> Images | None:
        if rows is None or not len(rows.rows):
            return None
        cropped = by is not None and by.opening_crop
        opened = OpenedImages(rows.dataset, rows.rows, to_input.open_crop if cropped else to_input.open)
        labels = torch.from_numpy(rows.labels)
        return make_images(opened, labels, who.device, hold=not cropped, workers=recipe.workers)

    own = images(train, augment)
    assert own is not None
    shared = auxiliary is train and augment.opening_crop == augment_auxiliary.opening_crop
    if recipe.sync_batchnorm:
        model = who.with_sync_batchnorm(model)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return Prepared(
        model=model.to(who.device).to(memory_format=layout).train(),
        arguments=arguments,
        to_input=to_input,
        train=own,
        validation=images(validation),
        test=images(test),
        auxiliary=own if shared else images(auxiliary, augment_auxiliary),
        augment=augment,
        augment_auxiliary=augment_auxiliary,
        class_counts=counts.tolist(),
    )


def make_model(table: ModelTable, arguments: dict[str, Any], seed: int) -> nn.Module:
    """A new network of timm, its weights drawn with the seed or taken from the checkpoint.

    Raises:
        UnknownName: timm has no such model.
        BadInput: the model does not take an argument.
        HeadNotFound: it has no linear classifier.
        CheckpointError: the checkpoint is missing or of another architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "model"))
        model = make(table.name, **arguments)
    head = linear_classifier(model)
    if table.checkpoint is not None:
        fill(model, read_checkpoint(table.checkpoint), table.checkpoint, new_head=head)
    return model


def make_objective(stage: Stage, model: nn.Module, class_counts: list[int], seed: int) -> Objective:
    """The objective of a stage, any parameters of its own drawn with the seed."""
    head = linear_classifier(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = create_objective(
            stage.objective.name,
            class_counts=class_counts,
            num_features=head.in_features,
            **stage.objective.settings,
        )
    if objective.through_batchnorm and not batchnorms(model):
        raise BadInput(
            f"objective {objective.name!r} works through BatchNorm, and {type(model).__name__} has none: OoD images "
            "would have no effect. Choose a model with BatchNorm, or set objective.auxiliary = false."
        )
    return objective


def _tried_objective(stage: Stage, model: nn.Module, class_counts: list[int]) -> Objective:
    """The objective of a stage, after it has given a loss of random features: not all check what they are set to."""
    try:
        objective = make_objective(stage, model, class_counts, seed=0)
        leaves_some_unread(objective, linear_classifier(model))
    except TypeError as error:
        settings = dict(stage.objective.settings)
        raise BadInput(f"objective {stage.objective.name!r} does not work with {settings}: {error}.") from error
    return objective


def trainable_parameters(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that patterns of `Stage.trainable` choose.

    Raises:
        BadInput: a pattern fits no parameter, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")]
    chosen = {name for pattern in wanted for name in _matching(model, names, pattern)} if wanted else set(names)
    for pattern in patterns:
        if pattern.startswith("!"):
            chosen -= set(_matching(model, names, pattern[1:]))
    if not chosen:
        raise BadInput(f"trainable = {list(patterns)} leaves no parameter to train.")
    return [name for name in names if name in chosen]


def _matching(model: nn.Module, names: list[str], pattern: str) -> list[str]:
    if pattern == "batchnorm":  # may have no parameters: its statistics follow the data anyway
        norms = {id(p) for norm in batchnorms(model) for p in norm.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in norms]
    if pattern == "head":
        head = {id(parameter) for parameter in linear_classifier(model).parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in head]
    found = fnmatch.filter(names, pattern)
    if not found:
        raise BadInput(
            f"trainable: no parameter fits {pattern!r}; write batchnorm, head or a pattern such as {names[0]!r}."
        )
    return found


def input_of(model: nn.Module) -> ToInput:
    """What evaluation does with images for this model, in two parts."""
    steps = _steps(preprocessing(model))
    norm = next(step for step in steps if isinstance(step, transforms.Normalize))
    config = resolve_model_data_config(model)
    geometry = [step for step in steps if not isinstance(step, (transforms.ToTensor, transforms.Normalize))]
    mean, std = (torch.as_tensor(values, dtype=torch.float32).reshape(-1, 1, 1) for values in (norm.mean, norm.std))
    resample = str_to_pil_interp(config["interpolation"])
    return ToInput(transforms.Compose(geometry), len(mean), config["input_size"][1:], resample, mean, std)


def _steps(transform: Any) -> list[Any]:
    if not isinstance(transform, transforms.Compose):
        return [transform]
    return [step for part in transform.transforms for step in _steps(part)]


def _check_processes(recipe: Recipe, who: Processes) -> None:
    if recipe.sync_batchnorm and who.count > 1 and who.device.type != "cuda":
        raise BadInput("sync_batchnorm needs GPUs; set it to false on a CPU.")
    sizes = [stage.batch_size for stage in recipe.stages]
    if recipe.auxiliary and recipe.auxiliary.batch_size:
        sizes.append(recipe.auxiliary.batch_size)
    for size in sizes:
        if size % who.count:
            raise BadInput(f"a batch of {size} cannot be shared by {who.count} processes; give a multiple of them.")


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
        raise BadLabels(f"{dataset.name} has images without a label; name a dataset with one class for each image.")
    return Rows(dataset, np.arange(len(dataset)), labels.astype(np.int64))


def _check_classes(name: str, counts: np.ndarray, outputs: int) -> None:
    if len(counts) > outputs:
        raise BadLabels(f"{name} has labels up to {len(counts) - 1}, but num_classes of [model] is {outputs}.")
    empty = [*np.flatnonzero(counts == 0).tolist(), *range(len(counts), outputs)]
    if empty:
        raise BadLabels(
            f"{name} has no training images of {len(empty)} of {outputs} classes, such as class {empty[0]}; number the "
            "classes without gaps, or set num_classes of [model]."
        )


def _check_known(name: str, labels: np.ndarray, classes: int) -> None:
    if labels.max() >= classes:
        raise BadLabels(f"{name} has labels up to {labels.max()}, but the training images have {classes} classes.")
