"""How ``load_model`` created a model, which provenances record and detectors store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ood_scores.models.arguments import ALWAYS

ATTRIBUTE = "ood_scores_origin"


@dataclass(frozen=True)
class Origin:
    """The origin of a model.

    Attributes:
        name: The name that was opened, such as ``hf-hub:OWNER/NAME``; None for a zero-shot classifier of another model.
        arguments: Arguments of the network that were given.
        network: The name that creates the same network without any other file; None if there is none.
        network_arguments: The arguments of this network.
        transform: The function from a PIL image to the model's input; None if timm's data configuration describes it.
        tokenizer: The function that opens the tokenizer of a model with a text encoder; None if it is unknown.
    """

    name: str | None
    arguments: Mapping[str, Any]
    network: str | None
    network_arguments: Mapping[str, Any]
    transform: Callable[[Any], Any] | None = None
    tokenizer: Callable[[], Any] | None = None

    @property
    def unseen_arguments(self) -> dict[str, Any]:
        """The given arguments that the shapes of the weights do not show."""
        return {key: value for key, value in self.arguments.items() if key not in ALWAYS}


def remember_origin(model: nn.Module, origin: Origin) -> None:
    """Attach its origin to a model."""
    setattr(model, ATTRIBUTE, origin)


def origin_of(model: nn.Module) -> Origin | None:
    """Return the origin of a model; None for one that ``load_model`` did not create."""
    return getattr(model, ATTRIBUTE, None)
