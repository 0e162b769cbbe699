"""The arguments with which a network may be created: only what its own constructor takes, and only plain values.

Recipes, benchmark files, checkpoints, and detectors all store arguments of ``timm.create_model``, and any of them may
come from a stranger. ``timm.create_model`` itself also takes arguments that fetch files from any address and write them
to any folder. Those never pass.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import timm
from timm.models import build_model_with_cfg, model_entrypoint
from torch import nn

from ood_scores.errors import BadInput
from ood_scores.registry import did_you_mean

ALWAYS = frozenset({"num_classes", "in_chans"})
"""Arguments that every network takes."""

MOST_DIGITS = 9
"""An integer with more digits is no size of a network."""


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Check that a network may be created with the arguments.

    Args:
        name: Name of a network that timm knows.
        arguments: Arguments from any source.

    Raises:
        BadInput: if one is not an argument of the network's own constructor, or is not a plain value: a number, a
            boolean, a word, None, or a list of those.
    """
    check_plain(name, arguments, own_arguments(model_entrypoint(name)) | ALWAYS)


def check_plain(name: str, arguments: Mapping[str, Any], own: Collection[str]) -> None:
    """Check that arguments are among a network's own, and that their values are plain; see ``check_arguments``."""
    for key, value in arguments.items():
        if key not in own:
            raise BadInput(
                f"{key!r} is not an argument of the network {name!r}: remove it{did_you_mean(key, own)}. Only "
                "arguments of the network itself are accepted, because others can fetch and write files; to use "
                "weights of your own, set the checkpoint."
            )
        if key == "in_chans" and not (type(value) is int and value >= 1):
            raise BadInput(
                f"in_chans of the network {name!r} is {str(value)[:80]}: give the number of channels, from 1."
            )
        if not _is_plain(value):
            raise BadInput(
                f"the argument {key!r} of the network {name!r} is {str(value)[:80]!r}, which is not a plain value: use "
                "a number, a boolean, a word without slashes and colons, or a list of those."
            )


def own_arguments(entrypoint: Callable[..., Any]) -> set[str]:
    """Return the parameters of the networks and configurations in the module of a function that creates a network."""
    module = vars(sys.modules[entrypoint.__module__]).values()
    classes = (each for each in module if isinstance(each, type))
    networks = [each for each in classes if issubclass(each, nn.Module) or is_dataclass(each)]
    own = {key for each in (entrypoint, *networks) for key in _parameters(each)}
    return own.difference(_parameters(timm.create_model), _parameters(build_model_with_cfg), ("device", "dtype"))


def _parameters(function: Callable[..., Any]) -> Iterator[str]:
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            yield parameter.name


def _is_plain(value: Any) -> bool:
    match value:
        case None | bool() | float():
            return True
        case int():
            return abs(value) < 10**MOST_DIGITS
        case str():
            return re.fullmatch(r"[\w ,.+-]*", value) is not None
        case list() | tuple():
            return all(map(_is_plain, value))
    return False
