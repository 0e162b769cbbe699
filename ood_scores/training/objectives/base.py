"""Objective: the base class, and the registry of names."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ood_scores.errors import BadInput, EmptyInput, MissingInput, ShapeMismatch
from ood_scores.parameters import require_known
from ood_scores.registry import Registry

OBJECTIVES: Registry[type[Objective]] = Registry("objective")
Registered = TypeVar("Registered", bound="type[Objective]")

FROM_TRAINER = ("class_counts", "num_features")
"""Constructor arguments that say what the data and the model are like; all others are settings."""


class Objective(nn.Module, ABC):
    """What a trainer minimises, called once per step with the penultimate features of the batch.

    A new objective writes ``loss``, and says in class attributes what its steps are made of. It is a module because
    some have parameters of their own (a projector) and some class counts: a trainer moves it to the model's device, and
    gives the optimiser ``objective.parameters()`` too.

    Attributes:
        auxiliary: each step comes with OoD images. The trainer sends ``cat(ID images, OoD images)`` through the model
            in one forward pass, so that both enter the statistics of BatchNorm, and then splits the features.
        views: 2 if each ID image comes in two augmented views; features are then ``cat(first views, second views)``
            and the labels are repeated likewise.
        through_batchnorm: OoD images act on the loss through the statistics of BatchNorm alone, so that a network
            without BatchNorm cannot be trained with it.
        test_settings: settings without a default, for tests.
    """

    name: str
    auxiliary: bool = False
    views: int = 1
    through_batchnorm: bool = False
    test_settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()

    def __init_subclass__(cls) -> None:
        """An objective that is not registered goes by the name of its class."""
        cls.name = cls.__dict__.get("name", cls.__name__)

    def forward(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor | None = None) -> Tensor:
        """The mean loss, a scalar.

        Args:
            features: z ``[N, D]`` of the ID images, before any normalisation.
            head: the classifier, weight ``[C, D]``; an ``L2Head`` in training mode normalises z itself.
            labels: class indices ``[N]``.
            ood_features: z ``[M, D]`` of the OoD images; not read without ``auxiliary``.

        Raises:
            EmptyInput: there are no ID features, or no OoD features where they are needed.
            MissingInput: OoD features are needed and were not given.
            ShapeMismatch: features, labels, head or OoD features do not fit each other.
        """
        self._check_id(features, head, labels)
        ood = self._checked_ood(features, ood_features) if self.auxiliary else features[:0]
        return self.loss(features, head, labels, ood)

    @abstractmethod
    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        """The scalar loss of a batch that was checked; ``ood_features`` is ``[0, D]`` without ``auxiliary``."""

    def require(self, condition: bool, message: str) -> None:
        """Raises BadInput, naming the objective, unless the condition holds: for checks of settings."""
        if not condition:
            raise BadInput(f"{self.name}: {message}.")

    def _check_id(self, features: Tensor, head: nn.Linear, labels: Tensor) -> None:
        if features.ndim != 2 or features.shape[1] != head.in_features:
            raise ShapeMismatch(
                f"{self.name!r} got features {tuple(features.shape)} for a head of {head.in_features} features; give "
                "the head's input [N, D]."
            )
        if not len(features):
            raise EmptyInput(f"{self.name!r} got a batch without ID images; give at least one.")
        if labels.shape != features.shape[:1]:
            raise ShapeMismatch(
                f"{self.name!r} got {len(features)} features and labels {tuple(labels.shape)}; give one label per "
                "feature."
            )
        if len(features) % self.views:
            raise ShapeMismatch(
                f"{self.name!r} reads {self.views} views of each image, but {len(features)} features cannot be split "
                "into them."
            )

    def _checked_ood(self, features: Tensor, ood_features: Tensor | None) -> Tensor:
        if ood_features is None:
            raise MissingInput(
                f"{self.name!r} needs OoD images in each step: train with an auxiliary set, and pass ood_features."
            )
        if ood_features.ndim != 2 or ood_features.shape[1] != features.shape[1]:
            raise ShapeMismatch(
                f"{self.name!r} got OoD features {tuple(ood_features.shape)} beside ID features "
                f"{tuple(features.shape)}; give [M, D] of the same model."
            )
        if not len(ood_features):
            raise EmptyInput(f"{self.name!r} got an empty batch of OoD images; give at least one in each step.")
        return ood_features


def register_objective(name: str) -> Callable[[Registered], Registered]:
    """Class decorator that makes an objective known by name."""
    return OBJECTIVES.register(name)


def list_objectives(pattern: str = "*") -> list[str]:
    """Names of the registered objectives, sorted; ``pattern`` as in a shell (``"*energy*"``)."""
    return OBJECTIVES.matching(pattern)


def objective_class(name: str) -> type[Objective]:
    """The class registered under a name.

    Raises:
        UnknownName: there is none; the message lists the names.
    """
    return OBJECTIVES[name]


def create_objective(
    name: str,
    *,
    class_counts: Sequence[int] | Tensor | None = None,
    num_features: int | None = None,
    **settings: Any,
) -> Objective:
    """A new objective by name.

    Args:
        name: see ``list_objectives``.
        class_counts: ID training images of each class ``[C]``. A trainer passes it always; objectives without a class
            prior do not see it.
        num_features: width D of the penultimate features, likewise.
        **settings: of the objective.

    Raises:
        UnknownName: no such objective, or no such setting; the message lists those that exist.
        MissingInput: something without a default was not given.
        BadInput: a setting out of range.
    """
    cls = objective_class(name)
    parameters = inspect.signature(cls).parameters
    require_known(cls, settings, f"objective {name!r}", "setting", exclude=FROM_TRAINER)
    given = {"class_counts": class_counts, "num_features": num_features}
    settings |= {key: value for key, value in given.items() if key in parameters and value is not None}
    required = [key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    missing = [key for key in required if key not in settings]
    if missing:
        raise MissingInput(f"objective {name!r} needs {', '.join(missing)}, which have no default.")
    return cls(**settings)


def as_base(base: str | Objective, class_counts: Sequence[int] | Tensor | None) -> Objective:
    """The classification loss below another objective, from its name or as it is.

    Raises:
        BadInput: it is neither, or asks for OoD images or several views itself.
    """
    objective = create_objective(base, class_counts=class_counts) if isinstance(base, str) else base
    if not isinstance(objective, Objective):
        raise BadInput(f"a base is the name of an objective or an Objective, got {base!r}.")
    if objective.auxiliary or objective.views > 1:
        raise BadInput(f"{objective.name!r} cannot be a base: it asks for OoD images or several views itself.")
    return objective
