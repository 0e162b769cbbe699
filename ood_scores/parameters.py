"""Parameters of classes: their names, their values from ``key=value`` texts, and the choices their types allow."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ood_scores.errors import BadInput
from ood_scores.registry import unknown


def require_known(
    cls: Callable[..., Any], names: Iterable[str], owner: str, noun: str = "parameter", exclude: Iterable[str] = ()
) -> None:
    """Check that a class or a function has parameters of these names.

    Args:
        cls: The class or the function.
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


def between_commas(text: str) -> list[str]:
    """Return the ``key=value`` texts of ``key=value,key=(value,value)``; "" has none."""
    return re.split(r",(?![^(]*\))", text) if text else []


def plain_values(texts: Iterable[str], usage: str) -> dict[str, Any]:
    """Return ``key=value`` texts as names and values: numbers, booleans, None, lists, and other texts.

    Raises:
        BadInput: if a text has no ``=``.
    """
    pairs = [text.partition("=") for text in texts]
    for key, equals, value in pairs:
        if not (key and equals):
            raise BadInput(f"cannot read the parameter {key + equals + value!r}: write {usage}.")
    return {key: _literal(value) for key, _, value in pairs}


def check_choices(owner: Any, title: str) -> None:
    """Check the attributes of an object whose class annotates them as ``Literal``.

    Raises:
        BadInput: if one has a value that its annotation does not list; ``title`` names the object.
    """
    for name, hint in get_type_hints(type(owner)).items():
        if get_origin(hint) is Literal and getattr(owner, name) not in get_args(hint):
            allowed = " or ".join(map(repr, get_args(hint)))
            raise BadInput(f"{title}: {name} must be {allowed}, got {getattr(owner, name)!r}.")


def check_types(cls: type, values: Mapping[str, Any], title: str) -> None:
    """Check that values are of the types with which a class annotates its attributes of the same names.

    Raises:
        BadInput: if one is not; ``title`` names the object. Attributes without an annotation are not checked, and
            items only those of lists.
    """
    try:
        hints = get_type_hints(cls)
    except NameError:  # an annotation is only known to type checkers
        return
    for name, value in values.items():
        if name in hints and not _is_of(value, hints[name]):
            raise BadInput(f"{title}: {name} must be {hints[name]}, got {type(value).__name__}.")


def _is_of(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_of(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_is_of(item, parts[0]) for item in value)
    if kind or hint is Any or not isinstance(hint, type):
        return True
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


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
    value = {"true": "True", "false": "False", "none": "None"}.get(value.lower(), value)
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
