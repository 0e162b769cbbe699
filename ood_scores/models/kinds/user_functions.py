"""Functions and classes of the user's own code that create a model: ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ood_scores.errors import BadInput
from ood_scores.models.kinds.base import ModelKind
from ood_scores.user_code import referenced


class UserFunction(ModelKind):
    """A function that returns a model, with its weights if there is no checkpoint. Its arguments are the model's.

    The model can have an attribute ``transform``, the function from a PIL image to its input, or ``pretrained_cfg``,
    timm's data configuration.
    """

    form = "FILE.py:FUNCTION"

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        if not callable(referenced(target)):
            raise BadInput(f"{target} is not a function: name a function or a class that returns a model.")

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        try:
            model = referenced(target)(**arguments)
        except TypeError as error:
            raise BadInput(
                f"{target} cannot be called with {dict(arguments)} ({error}): change its arguments."
            ) from error
        if not isinstance(model, nn.Module):
            raise BadInput(f"{target} returned {type(model).__name__}: it must return a torch.nn.Module.")
        return model

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        return self.create(target, arguments)

    def takes_classes(self, target: str) -> bool:
        parameters = inspect.signature(referenced(target)).parameters
        return "num_classes" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    def sizes(self, target: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def transform(self, model: nn.Module, target: str) -> Callable[[Any], Any] | None:
        return getattr(model, "transform", None)

    def again(self, model: nn.Module, target: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        return target, dict(arguments)
