"""Names of timm's registry, such as ``resnet50.a1_in1k``, and of the networks of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import Tensor, nn

import ood_scores.models.networks  # noqa: F401  registers the CIFAR networks
from ood_scores.errors import BadInput, CheckpointError, UnknownName
from ood_scores.models.arguments import check_arguments
from ood_scores.models.checkpoints import first_sentence
from ood_scores.models.kinds.base import ModelKind
from ood_scores.registry import did_you_mean


def require_known(name: str) -> None:
    """Raise UnknownName, with the closest name, if timm has no model of this name."""
    if name.endswith(".py"):
        raise UnknownName(
            f"{name!r} is a file without its function: write {name}:FUNCTION, a function that returns a model."
        )
    if not timm.is_model(name):
        raise UnknownName(
            f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}: see timm.list_models()."
        )


def make(name: str, arguments: Mapping[str, Any], pretrained: bool = False, **plain: Any) -> nn.Module:
    """Create a timm model.

    Args:
        name: Name that timm knows.
        arguments: Arguments of the network itself, which may come from a stranger's file.
        pretrained: Whether to fetch timm's weights of that name.
        **plain: Other arguments of ``timm.create_model``, which never come from a file.

    Raises:
        UnknownName: if timm has no model of this name.
        BadInput: if the network has no such argument, or does not accept its value.
    """
    require_known(name)
    check_arguments(name, arguments)
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments, **plain)
    except Exception as error:  # constructors check little, and raise errors of any kind
        if pretrained and isinstance(error, (OSError, RuntimeError)):
            raise
        raise BadInput(
            f"{name!r} cannot be created with {dict(arguments)} ({first_sentence(error)}): change its arguments."
        ) from error


def size_of(state: Mapping[str, Tensor], module: str | Sequence[str] | None, axis: int) -> int | None:
    """Return the size of a module's weight along an axis, or None; the first of several modules counts."""
    first = module if isinstance(module, str) else next(iter(module or ()), None)
    weight = state.get(f"{first}.weight")
    return None if weight is None or weight.ndim <= axis else weight.shape[axis]


class TimmNames(ModelKind):
    """A name without a colon: timm's, with or without a tag."""

    form = "NAME"

    def check(self, target: str, arguments: Mapping[str, Any]) -> None:
        require_known(target)
        check_arguments(target, arguments)

    def create(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        return make(target, arguments)

    def open(self, target: str, arguments: Mapping[str, Any]) -> nn.Module:
        config = self._config(target)
        if not (config and config.has_weights):
            raise CheckpointError(
                f"there are no pretrained weights of {target!r}: pass a checkpoint file, on the command line with "
                "--checkpoint."
            )
        try:
            return make(target, arguments, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(
                f"timm returned no pretrained weights for {target!r} ({first_sentence(error)}): try again where the "
                "network is reachable, or pass a checkpoint file."
            ) from error

    def sizes(self, target: str, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        config = self._config(target)
        classes = size_of(state, getattr(config, "classifier", None), axis=0)
        channels = size_of(state, getattr(config, "first_conv", None), axis=1)
        return ({"num_classes": classes} if classes else {}) | ({"in_chans": 1} if channels == 1 else {})

    def _config(self, name: str) -> Any:
        """Return timm's configuration of a model's weights, or None if it has none."""
        require_known(name)
        try:
            return timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            raise UnknownName(
                f"timm has no model {name!r} ({first_sentence(error)}): see timm.list_pretrained()."
            ) from error
