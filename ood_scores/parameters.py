"""Parameters of classes: their names, their values from ``key=value`` texts, and the choices their types allow."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ood_scores.errors import BadInput
from ood_scores.registry import unknown


def require_known(
    cls: type, names: Iterable[str], owner: str, noun: str = "parameter", exclude: Iterable[str] = ()
) -> None:
    """Check that a class has parameters of these names.

    Args:
        cls: The class.
        names: The names to check.
        owner: The object that has the parameters, such as ``scorer 'energy'``, for the error message.
        noun: The word for a parameter in the error message.
        exclude: Parameters that count as unknown.

    Raises:
        UnknownName: if there is no such parameter.
    """
    known = [name for name in inspect.signature(cls).parameters if name not in exclude]
    for name in names:
        if name not in known:
            raise unknown(f"{owner} has no {noun}", name, known)


def from_texts(cls: type, texts: Iterable[str], usage: str) -> dict[str, Any]:
    """Return ``key=value`` texts as arguments of a class, each of the type of its default.

    Raises:
        BadInput: if a text has no ``=``, or a value of another type than the default.
    """
    defaults = {name: known.default for name, known in inspect.signature(cls).parameters.items()}
    params = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"cannot read the parameter {text!r}: write {usage}.")
        params[key] = _as_type_of(defaults.get(key), key, value)
    return params


def check_choices(owner: Any, title: str) -> None:
    """Check the attributes of an object whose class annotates them as ``Literal``.

    Raises:
        BadInput: if one has a value that its annotation does not list; ``title`` names the object.
    """
    for name, hint in get_type_hints(type(owner)).items():
        if get_origin(hint) is Literal and getattr(owner, name) not in get_args(hint):
            allowed = " or ".join(map(repr, get_args(hint)))
            raise BadInput(f"{title}: {name} must be {allowed}, got {getattr(owner, name)!r}.")


def _as_type_of(default: Any, key: str, value: str) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, str) and not value.startswith("("):
            return value
        return type(default)(value) if isinstance(default, (int, float)) else _literal(value)
    except (KeyError, ValueError) as error:
        raise BadInput(f"{key} is a value such as {str(default).lower()}, got {value!r}.") from error


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
