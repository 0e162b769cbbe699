"""Recipes: which network is trained, on which images, and how. ``recipe_file`` reads them from TOML files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ood_scores.errors import BadInput
from ood_scores.parameters import check_choices


@dataclass(frozen=True)
class ModelTable:
    """`[model]`: a timm architecture.

    Attributes:
        name: timm's name, or that of a CIFAR network of this package.
        checkpoint: start from these weights instead of random ones; a classifier of another size is left out.
        arguments: every other key of the table goes to `timm.create_model`. `num_classes` is by default that of the
            data.
    """

    name: str
    checkpoint: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataTable:
    """`[data]`: in-distribution images, named as `ood_scores.data.sources.open_dataset` has it.

    Attributes:
        train: training images with labels.
        test: test images with labels; the finished network is tried on them.
        validation: share of the training images, of every class, that is kept aside and tried after each epoch. The
            split is the same for all seeds.
        long_tail: ratio of the largest class to the smallest; 1 leaves the data as they are.
        augmentation: a name of `ood_scores.training.augment.AUGMENTATIONS`.
    """

    train: str
    test: str | None = None
    validation: float = 0.0
    long_tail: float = 1.0
    augmentation: str = "none"

    def __post_init__(self) -> None:
        _require(0 <= self.validation < 1, "data.validation", self.validation, "a share from 0 to below 1")
        _require(self.long_tail >= 1, "data.long_tail", self.long_tail, "a ratio of at least 1")


@dataclass(frozen=True)
class AuxiliaryTable:
    """`[auxiliary]`: OoD images, for objectives that want them in each step.

    Attributes:
        data: the images, whose labels are not read; or `train` for the training images themselves, augmented
            otherwise.
        augmentation: that of the training images by default.
        batch_size: OoD images in each step; as many as ID images by default.
    """

    data: str
    augmentation: str | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        _require(self.batch_size is None or self.batch_size >= 1, "auxiliary.batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True)
class ObjectiveTable:
    """`[objective]`: a name of `ood_scores.training.objectives`; every other key of the table is a setting of it."""

    name: str = "cross_entropy"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerTable:
    """`[optimizer]`: `sgd`, `adam` (weight decay in the gradient) or `adamw` (apart from it).

    Attributes:
        lr: learning rate at the start.
        name: of the optimiser.
        weight_decay: on all parameters.
        momentum: of SGD, 0.9 by default.
        nesterov: of SGD.
    """

    lr: float
    name: Literal["sgd", "adam", "adamw"] = "sgd"
    weight_decay: float = 0.0
    momentum: float | None = None
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_choices(self, "optimizer")
        _require(0 < self.lr < math.inf, "optimizer.lr", self.lr, "a positive number")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0")
        _require(0 <= (self.momentum or 0) < 1, "optimizer.momentum", self.momentum, "from 0 to below 1")
        if self.name != "sgd" and (self.momentum is not None or self.nesterov):
            raise BadInput(f"momentum and nesterov are of sgd; leave them out of [optimizer] with {self.name}.")


@dataclass(frozen=True)
class ScheduleTable:
    """`[schedule]`: the learning rate of each epoch of a stage.

    Attributes:
        name: `constant`; `steps`, times `gamma` at each of the milestones; `cosine`, from lr towards 0.
        milestones: numbers of finished epochs of the stage.
        gamma: the factor.
    """

    name: Literal["constant", "steps", "cosine"] = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_choices(self, "schedule")
        if (self.name == "steps") != bool(self.milestones):
            raise BadInput('milestones go with [schedule] name = "steps"; give both or neither.')

    def factor(self, epoch: int, epochs: int) -> float:
        """What the learning rate is multiplied with in an epoch, counted from 0, of a stage of so many."""
        if self.name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Stage:
    """The part of a recipe that a `[[stage]]` table may change.

    Attributes:
        epochs: passes over the training images.
        optimizer: starts afresh with each stage.
        objective: likewise.
        schedule: its epochs are those of the stage.
        batch_size: ID images in each step, of all processes together.
        drop_last: leave out a last batch that is not full.
        trainable: what is trained: `batchnorm`, `head`, or patterns of parameter names such as `layer4.*`; those with
            a `!` in front are left as they are. Empty: everything.
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

    def lr(self, epoch: int) -> float:
        """The learning rate of an epoch of this stage, counted from 0."""
        return self.optimizer.lr * self.schedule.factor(epoch, self.epochs)


@dataclass(frozen=True)
class Recipe:
    """All that decides what comes out of a training.

    Attributes:
        model: the network.
        data: what it learns.
        auxiliary: OoD images, where an objective wants them.
        stages: one after the other on the same weights. In TOML the first is the recipe itself, and each `[[stage]]`
            table says what is different in a further one.
        seed: of the weights, the order of the images, their augmentation and dropout.
        amp: `bf16` for mixed precision, or `none`.
        channels_last: memory layout that GPUs are faster with.
        compile: through `torch.compile`.
        sync_batchnorm: BatchNorm statistics of all processes together; GPUs only.
        workers: processes that load images which do not fit in memory.
        checkpoint_every: keep the weights of every so many epochs; 0 keeps only the last.
        state_every: in long epochs, steps after which the state is saved for a later continuation.
        tensorboard: write TensorBoard logs too.
        name: of the run; the file's.
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
        _require(self.state_every >= 1, "state_every", self.state_every, "at least 1")

    @property
    def epochs(self) -> int:
        """Of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    def stage_of(self, epoch: int) -> tuple[int, int]:
        """The number of the stage that an epoch is in, and of the epoch in its stage; all are counted from 0."""
        for number, stage in enumerate(self.stages):
            if epoch < stage.epochs:
                return number, epoch
            epoch -= stage.epochs
        raise BadInput(f"the recipe has {self.epochs} epochs, and epoch {epoch + self.epochs} is asked for.")

    def to_dict(self) -> dict[str, Any]:
        """As TOML has it, with every default written out and without the name; `recipe_from` takes it back."""
        whole = dataclasses.asdict(self)
        del whole["name"]
        first, *others = whole.pop("stages")
        whole |= first
        if others:
            whole["stage"] = others
        return _flat(whole)


def flat_tables(tables: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; the tables of a list are numbered from 1."""
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
    """Without what is None; `arguments` and `settings` are keys of the table they are in."""
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
        raise BadInput(f"{key} = {value} is out of range; give {wanted}.")
