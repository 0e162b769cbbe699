"""The base class of training objectives, and their registry."""

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
"""Constructor arguments that describe the data and the model; all others are settings."""


class Objective(nn.Module, ABC):
    """The loss that a trainer minimizes, called once per step with the penultimate features of the batch.

    A subclass implements ``loss`` and describes its batches in class attributes. It is a module because some objectives
    have parameters (a projector) or buffers (class counts): the trainer moves it to the model's device and passes
    ``objective.parameters()`` to the optimizer.

    Attributes:
        auxiliary: Whether each step needs OoD images. The trainer passes ``cat(ID images, OoD images)`` through the
            model at once, so that the statistics of BatchNorm include both, and then splits the features.
        views: Number of augmented views of each ID image. With 2, the features are ``cat(first views, second views)``
            and the labels are repeated in the same way.
        through_batchnorm: Whether OoD images affect the loss only through the statistics of BatchNorm, so that a
            network without BatchNorm cannot be trained with the objective.
        test_settings: Values, for tests, of settings without a default.
        term_names: Names of the terms of the loss that the trainer logs as ``loss_NAME``.
        terms: Their values in the last call of ``loss``, detached scalars by name.
    """

    name: str
    auxiliary: bool = False
    views: int = 1
    through_batchnorm: bool = False
    test_settings: ClassVar[Mapping[str, Any]] = {}
    term_names: tuple[str, ...] = ()
    terms: Mapping[str, Tensor] = {}

    def __init__(self) -> None:
        super().__init__()

    def __init_subclass__(cls) -> None:
        """Name an objective that is not registered after its class."""
        cls.name = cls.__dict__.get("name", cls.__name__)

    def forward(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor | None = None) -> Tensor:
        """Return the mean loss, a scalar.

        Args:
            features: Features z ``[N, D]`` of the ID images, before any normalization.
            head: Classifier with weight ``[C, D]``; an ``L2Head`` in training mode normalizes z itself.
            labels: Class indices ``[N]``.
            ood_features: Features z ``[M, D]`` of the OoD images; ignored without ``auxiliary``.

        Raises:
            EmptyInput: if there are no ID features, or no OoD features although they are needed.
            MissingInput: if OoD features are needed and missing.
            ShapeMismatch: if features, labels, head or OoD features do not fit each other.
        """
        self._check_id(features, head, labels)
        ood = self._checked_ood(features, ood_features) if self.auxiliary else features[:0]
        return self.loss(features, head, labels, ood)

    @abstractmethod
    def loss(self, features: Tensor, head: nn.Linear, labels: Tensor, ood_features: Tensor) -> Tensor:
        """Return the scalar loss of a checked batch; ``ood_features`` is ``[0, D]`` without ``auxiliary``."""

    def require(self, condition: bool, message: str) -> None:
        """Raise BadInput with the name of the objective unless the condition holds; for checks of settings."""
        if not condition:
            raise BadInput(f"{self.name}: {message}.")

    def _check_id(self, features: Tensor, head: nn.Linear, labels: Tensor) -> None:
        if features.ndim != 2 or features.shape[1] != head.in_features:
            raise ShapeMismatch(
                f"{self.name!r} got features {tuple(features.shape)} for a head of {head.in_features} features: pass "
                "the head's input [N, D]."
            )
        if not len(features):
            raise EmptyInput(f"{self.name!r} got a batch without ID images: pass at least one.")
        if labels.shape != features.shape[:1]:
            raise ShapeMismatch(
                f"{self.name!r} got {len(features)} features and labels {tuple(labels.shape)}: pass one label per "
                "feature."
            )
        if len(features) % self.views:
            raise ShapeMismatch(
                f"{self.name!r} needs {self.views} views of each image, got {len(features)} features: pass a multiple "
                f"of {self.views}."
            )

    def _checked_ood(self, features: Tensor, ood_features: Tensor | None) -> Tensor:
        if ood_features is None:
            raise MissingInput(
                f"{self.name!r} needs OoD images in each step: train with auxiliary images, or pass ood_features."
            )
        if ood_features.ndim != 2 or ood_features.shape[1] != features.shape[1]:
            raise ShapeMismatch(
                f"{self.name!r} got OoD features {tuple(ood_features.shape)} with ID features "
                f"{tuple(features.shape)}: pass [M, D] of the same model."
            )
        if not len(ood_features):
            raise EmptyInput(f"{self.name!r} got an empty batch of OoD images: pass at least one in each step.")
        return ood_features


def register_objective(name: str) -> Callable[[Registered], Registered]:
    """Return a class decorator that registers an objective under a name."""
    return OBJECTIVES.register(name)


def list_objectives(pattern: str = "*") -> list[str]:
    """Return the sorted names of the objectives that match a shell pattern, such as ``"*energy*"``."""
    return OBJECTIVES.matching(pattern)


def objective_class(name: str) -> type[Objective]:
    """Return the objective class of a name.

    Raises:
        UnknownName: if there is none; the message lists the names.
    """
    return OBJECTIVES[name]


def create_objective(
    name: str,
    *,
    class_counts: Sequence[int] | Tensor | None = None,
    num_features: int | None = None,
    **settings: Any,
) -> Objective:
    """Create an objective by name.

    Args:
        name: Name in ``list_objectives()``.
        class_counts: Number of ID training images of each class ``[C]``. The trainer always passes it; objectives that
            do not use it ignore it.
        num_features: Number D of penultimate features, which is treated in the same way.
        **settings: Settings of the objective.

    Raises:
        UnknownName: if there is no such objective or setting; the message lists the existing ones.
        MissingInput: if an argument without a default is missing.
        BadInput: if a setting is out of range.
    """
    cls = objective_class(name)
    parameters = inspect.signature(cls).parameters
    require_known(cls, settings, f"objective {name!r}", "setting", exclude=FROM_TRAINER)
    given = {"class_counts": class_counts, "num_features": num_features}
    settings |= {key: value for key, value in given.items() if key in parameters and value is not None}
    required = [key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    missing = [key for key in required if key not in settings]
    if missing:
        raise MissingInput(f"objective {name!r} needs {', '.join(missing)}: set them, because they have no default.")
    return cls(**settings)


def as_base(base: str | Objective, class_counts: Sequence[int] | Tensor | None) -> Objective:
    """Return the classification loss that another objective extends, given by name or as an object.

    Raises:
        BadInput: if it is neither, or needs OoD images or several views itself.
    """
    objective = create_objective(base, class_counts=class_counts) if isinstance(base, str) else base
    if not isinstance(objective, Objective):
        raise BadInput(f"base must be the name of an objective or an Objective, got {base!r}.")
    if objective.auxiliary or objective.views > 1:
        raise BadInput(f"{objective.name!r} cannot be a base, it needs OoD images or several views: choose another.")
    return objective
