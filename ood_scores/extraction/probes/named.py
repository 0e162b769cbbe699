"""Probes, and parameters of a class, from the short texts of command lines and benchmark files."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable
from typing import Any

from ood_scores.errors import BadInput, UnknownName
from ood_scores.extraction.probes.base import PROBES, Probe


def probe_from(text: str) -> Probe:
    """``name`` or ``name:key=value,key=value`` as a probe.

    Raises UnknownName, listing those that exist, for a probe or a parameter that does not.
    """
    name, _, rest = text.partition(":")
    if name not in PROBES:
        raise UnknownName(f"there is no probe {name!r}; there are: {', '.join(sorted(PROBES))}.")
    texts = re.split(r",(?![^(]*\))", rest) if rest else []
    params = parameters_from(PROBES[name], texts, f"{name}:key=value,key=value")
    unknown = params.keys() - inspect.signature(PROBES[name]).parameters.keys()
    if unknown:
        has = ", ".join(inspect.signature(PROBES[name]).parameters)
        raise UnknownName(f"probe {name!r} has no parameter {min(unknown)!r}; it has: {has}.")
    return PROBES[name](**params)


def parameters_from(cls: type, texts: Iterable[str], usage: str) -> dict[str, Any]:
    """``key=value`` texts as arguments of a class, each of the type of its default."""
    defaults = {name: known.default for name, known in inspect.signature(cls).parameters.items()}
    params = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"cannot read the parameter {text!r}: write {usage}.")
        params[key] = _as_type_of(defaults.get(key), key, value)
    return params


def _as_type_of(default: Any, key: str, value: str) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(default)(value) if isinstance(default, (int, float, str)) else _literal(value)
    except (KeyError, ValueError) as error:
        raise BadInput(f"{key} is a value such as {str(default).lower()}, got {value!r}.") from error


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
