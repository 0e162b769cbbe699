"""The kinds of names that a model can have: how a model is created, and how it is opened with its own weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ood_scores.errors import MissingInput
from ood_scores.models.filling import classes_in
from ood_scores.registry import Registry


class ModelKind(ABC):
    """A kind of model name: the word before the colon in ``kind:target``.

    Attributes:
        form: how such a name is written, for messages.
        offline: whether ``create`` needs nothing but the name and the arguments, which is what detectors store.
    """

    form: ClassVar[str]
    offline: ClassVar[bool] = True

    @abstractmethod
    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        """Check a name and arguments, which may come from a stranger's file, without network access.

        Raises:
            UnknownName: if there is no such model.
            BadInput: if the network has no such argument, or the value is not a plain one.
        """

    @abstractmethod
    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        """Create the network with random weights.

        Raises:
            BadInput: if the network does not accept a value of an argument.
            CheckpointError: if the description of the network is missing.
        """

    @abstractmethod
    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        """Create the network with its own weights.

        Raises:
            BadInput: if the network does not accept a value of an argument.
            CheckpointError: if the weights are missing, or cannot be fetched.
        """

    def takes_classes(self, target: str) -> bool:
        """Return whether the network has the argument ``num_classes``."""
        return True

    def sizes(self, target: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the network that the weights of a checkpoint determine."""
        found = classes_in(state, self.create(target, arguments))
        return {} if found is None else {"num_classes": found}

    def renamed(self, model: nn.Module, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the weights of a checkpoint under the names of the model, if the library saves them under others."""
        return state

    def transform(self, model: nn.Module, target: str) -> Callable[[Any], Any] | None:
        """Return the function from a PIL image to the model's input; None if timm's data configuration describes it."""
        return None

    def tokenizer(self, target: str) -> Any:
        """Return the tokenizer of a model with a text encoder.

        Raises:
            MissingInput: if there is none.
        """
        raise MissingInput(f"{self.form} has no tokenizer: pass tokenizer= to zero_shot_classifier.")

    def again(self, model: nn.Module, target: str, arguments: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Return the name and the arguments that create the same network without any other file, or no name."""
        return self.form.replace("NAME", target), dict(arguments)


MODEL_KINDS: Registry[ModelKind] = Registry("kind of model")
