"""How ``load_model`` created a model, which provenances record and detectors store."""

from __future__ import annotations

import json
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


def network_of(model: nn.Module) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the arguments that create the network of a model without any other file.

    They are those of its origin, or, for a model of transformers, its class and configuration. The name is None if they
    are unknown.
    """
    origin = origin_of(model)
    if origin:
        return origin.network, dict(origin.network_arguments)
    config: Any = getattr(model, "config", None)
    if not type(model).__module__.startswith("transformers.") or not hasattr(config, "to_json_string"):
        return None, {}
    return f"transformers:{type(model).__name__}", {"config": json.loads(config.to_json_string(use_diff=False))}
