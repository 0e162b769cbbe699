"""Recipes: the network to train, its images, and how to train it. ``recipe_file`` reads them from TOML files."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ood_scores.atomic import user_path
from ood_scores.errors import BadInput
from ood_scores.parameters import check_choices
from ood_scores.runtime import MOST_WORKERS


@dataclass(frozen=True)
class ModelTable:
    """``[model]``: a network.

    Attributes:
        name: Name of a model of any kind, as ``ood_scores.models.opening.load_model`` takes it: timm's, that of a CIFAR
            network of this package, ``torchvision:NAME``, ``hf:NAME``, or ``FILE.py:FUNCTION`` of imported code.
        checkpoint: Weights to start from instead of random ones; a classifier of another size is left out. ``{seed}``
            stands for the seed of the recipe and ``{out}`` for the output folder, so that
            ``{out}/../ce_seed{seed}/last.safetensors`` is a run next to this one.
        arguments: Arguments of the network itself: every other key of the table. ``num_classes`` defaults to the
            number of classes of the data.
    """

    name: str
    checkpoint: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def checkpoint_for(self, seed: int, out: Path) -> Path | None:
        """Return the path of the weights to start from, with ``{seed}`` and ``{out}`` replaced."""
        if self.checkpoint is None:
            return None
        return user_path(os.path.normpath(self.checkpoint.replace("{seed}", str(seed)).replace("{out}", str(out))))


@dataclass(frozen=True)
class DataTable:
    """``[data]``: in-distribution images, as texts that ``ood_scores.data.sources.open_dataset`` opens.

    Attributes:
        train: Training images with labels.
        test: Test images with labels, on which the finished network is evaluated.
        validation: Share of the training images of every class that is held out and evaluated after each epoch. The
            split is the same for all seeds.
        long_tail: Ratio of the largest class to the smallest; 1 leaves the data unchanged.
        augmentation: Name in ``ood_scores.training.augment.AUGMENTATIONS``.
    """

    train: str
    test: str | None = None
    validation: float = 0.0
    long_tail: float = 1.0
    augmentation: str = "none"

    def __post_init__(self) -> None:
        _require(0 <= self.validation < 1, "data.validation", self.validation, "a share in [0, 1)")
        _require(self.long_tail >= 1, "data.long_tail", self.long_tail, "a ratio of at least 1")


@dataclass(frozen=True)
class AuxiliaryTable:
    """``[auxiliary]``: OoD images for objectives that need them in each step.

    Attributes:
        data: Images, whose labels are ignored; or ``train`` for the training images themselves with another
            augmentation.
        augmentation: Name of the augmentation; defaults to that of the training images.
        batch_size: Number of OoD images in each step; defaults to the number of ID images.
        repeat: Whether the images are repeated as long as there are ID images. Otherwise an epoch ends when they are
            used up, as in the code of Shin et al. (2024), which zips the two loaders.
    """

    data: str
    augmentation: str | None = None
    batch_size: int | None = None
    repeat: bool = True

    def __post_init__(self) -> None:
        _require(self.batch_size is None or self.batch_size >= 1, "auxiliary.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class ObjectiveTable:
    """``[objective]``: the name of a training objective; every other key of the table is a setting of it."""

    name: str = "cross_entropy"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerTable:
    """``[optimizer]``: ``sgd``, ``adam`` (weight decay in the gradient) or ``adamw`` (decoupled weight decay).

    Attributes:
        lr: Initial learning rate.
        name: Name of the optimizer.
        weight_decay: Weight decay of all parameters.
        momentum: Momentum of SGD; defaults to 0.9.
        nesterov: Whether SGD uses Nesterov momentum.
    """

    lr: float
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    weight_decay: float = 0.0
    momentum: float | None = None
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "optimizer")
        _require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "a positive number")
        _require(0 <= self.weight_decay < math.inf, "optimizer.weight_decay", self.weight_decay, "finite, at least 0")
        _require(0 <= (self.momentum or 0) < 1, "optimizer.momentum", self.momentum, "a number in [0, 1)")
        if self.name != "sgd" and (self.momentum is not None or self.nesterov):
            raise BadInput(f"{self.name} has neither momentum nor nesterov: remove them from [optimizer].")
        if self.nesterov and self.momentum == 0:
            raise BadInput("nesterov = true needs a momentum above 0: raise optimizer.momentum, or remove nesterov.")


@dataclass(frozen=True)
class ScheduleTable:
    """``[schedule]``: the learning rate of each epoch of a stage.

    Attributes:
        name: ``constant``; ``steps``, which multiplies by ``gamma`` at each milestone; or ``cosine``, from lr to 0.
        milestones: Numbers of completed epochs of the stage.
        gamma: Factor at each milestone.
        per_step: Whether ``cosine`` changes the learning rate in every step instead of every epoch.
    """

    name: Literal["constant", "steps", "cosine"] = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    per_step: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "schedule")
        _require(0 < self.gamma < math.inf, "schedule.gamma", self.gamma, "a positive number")
        first = min(self.milestones, default=1)
        _require(first >= 1, "schedule.milestones", list(self.milestones), "numbers of epochs of at least 1")
        if self.per_step and self.name != "cosine":
            raise BadInput('per_step belongs to [schedule] name = "cosine": remove it.')
        if (self.name == "steps") != bool(self.milestones):
            raise BadInput('milestones and [schedule] name = "steps" belong together: set both or neither.')

    def factor(self, epoch: float, epochs: int) -> float:
        """Return the factor of the learning rate after ``epoch`` of the ``epochs`` epochs of a stage."""
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Stage:
    """The part of a recipe that a ``[[stage]]`` table may change.

    Attributes:
        epochs: Passes over the training images.
        optimizer: The optimizer, which is created anew for each stage.
        objective: The training objective, which is created anew for each stage.
        schedule: The learning rate schedule, over the epochs of the stage.
        batch_size: Number of ID images in each step, summed over all processes.
        drop_last: Whether to drop a last batch that is not full.
        trainable: What to train: ``batchnorm``, ``head``, or patterns of parameter names such as ``layer4.*``; a
            leading ``!`` freezes the parameters instead. Empty trains everything.
    """

    epochs: int
    optimizer: OptimizerTable
    objective: ObjectiveTable = field(default_factory=ObjectiveTable)
    schedule: ScheduleTable = field(default_factory=ScheduleTable)
    batch_size: int = 128
    drop_last: bool = False
    trainable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")

    def lr(self, epoch: int, step: int = 0, steps: int = 1) -> float:
        """Return the learning rate of a step, of ``steps`` steps, of an epoch of this stage, all counted from 0."""
        done = step / steps if self.schedule.per_step else 0
        return self.optimizer.lr * self.schedule.factor(epoch + done, self.epochs)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result of a training run.

    Attributes:
        model: The network.
        data: In-distribution images.
        auxiliary: OoD images, for objectives that need them.
        stages: Stages that train the same weights one after the other. In TOML the first is the recipe itself, and
            each ``[[stage]]`` table lists what differs in the next one.
        seed: Seed of the weights, the order of the images, their augmentation, and dropout.
        amp: ``bf16`` for mixed precision, or ``none``.
        channels_last: Whether to use the channels-last memory layout, which is faster on GPUs.
        compile: Whether to use ``torch.compile``.
        sync_batchnorm: Whether BatchNorm statistics are shared by all processes; GPUs only.
        workers: Number of processes that load images that do not fit in memory.
        checkpoint_every: Number of epochs after which a checkpoint is kept; 0 keeps only the last.
        state_every: Number of steps after which the state is saved within an epoch.
        tensorboard: Whether to write TensorBoard logs too.
        name: Name of the run, which is that of the file.
    """

    model: ModelTable
    data: DataTable
    stages: tuple[Stage, ...]
    auxiliary: AuxiliaryTable | None = None
    seed: int = 0
    amp: Literal["none", "bf16"] = "none"
    channels_last: bool = False
    compile: bool = False
    sync_batchnorm: bool = False
    workers: int = 4
    checkpoint_every: int = 0
    state_every: int = 1000
    tensorboard: bool = False
    name: str = "recipe"

    def __post_init__(self) -> None:
        check_choices(self, "recipe")
        for key in ("seed", "workers", "checkpoint_every"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "at least 0")
        _require(self.workers <= MOST_WORKERS, "workers", self.workers, f"at most {MOST_WORKERS}")
        _require(self.state_every >= 1, "state_every", self.state_every, "at least 1")

    @property
    def epochs(self) -> int:
        """The number of epochs of all stages."""
        return sum(stage.epochs for stage in self.stages)

    def stage_of(self, epoch: int) -> tuple[int, int]:
        """Return the stage that an epoch belongs to and the epoch's number in that stage, all counted from 0."""
        for number, stage in enumerate(self.stages):
            if epoch < stage.epochs:
                return number, epoch
            epoch -= stage.epochs
        raise BadInput(f"the recipe has no epoch {epoch + self.epochs}: it has {self.epochs} epochs, counted from 0.")

    def to_dict(self) -> dict[str, Any]:
        """Return the tables of the recipe with every default and without the name, as ``recipe_from`` reads them."""
        whole = dataclasses.asdict(self)
        del whole["name"]
        first, *others = whole.pop("stages")
        whole |= first
        if others:
            whole["stage"] = others
        return _flat(whole)


def flat_tables(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``; the tables of a list are numbered from 1."""
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(number): table for number, table in enumerate(value, start=1)}
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": leaf for inner, leaf in flat_tables(value).items()}
        else:
            flat[key] = value
    return flat


def _flat(tables: Any) -> Any:
    """Remove None, and merge ``arguments`` and ``settings`` into the table that holds them."""
    if isinstance(tables, (list, tuple)):
        return [_flat(table) for table in tables]
    if not isinstance(tables, Mapping):
        return tables
    merged = dict(tables)
    for open_key in ("arguments", "settings"):
        merged |= merged.pop(open_key, {})
    return {key: _flat(value) for key, value in merged.items() if value is not None}


def _require(condition: bool, key: str, value: object, wanted: str) -> None:
    if not condition:
        raise BadInput(f"{key} = {value} is out of range: it must be {wanted}.")
