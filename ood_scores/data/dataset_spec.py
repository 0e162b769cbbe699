"""The grammar of the texts that name datasets: ``kind:target?option=value&option=value``."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template
from typing import NamedTuple

from ood_scores.atomic import user_path
from ood_scores.errors import BadInput, MissingData


class Spec(NamedTuple):
    """The three parts of a text, as written: environment variables are not expanded yet."""

    kind: str
    target: str
    options: dict[str, str]


def parse(text: str) -> Spec:
    """Split a text into its parts.

    Raises:
        BadInput: if an option has no name or no value.
    """
    address, _, query = text.partition("?")
    kind, _, target = address.partition(":")
    options = {}
    for pair in query.split("&") if query else []:
        name, _, value = pair.partition("=")
        if not (name and value):
            raise BadInput(f"cannot read the option {pair!r} of {text!r}: write ?name=value&name=value.")
        options[name] = value
    return Spec(kind, target, options)


def expanded(text: str) -> str:
    """Expand ``$NAME`` and ``${NAME}`` in a text to environment variables, and ``$$`` to a dollar sign.

    Raises:
        MissingData: if a variable is not set or empty.
        BadInput: if no name follows a dollar sign.
    """
    try:
        return Template(text).substitute({name: value for name, value in os.environ.items() if value})
    except KeyError as error:
        raise MissingData(f"the environment variable {error.args[0]} of {text!r} is not set") from None
    except ValueError as error:
        raise BadInput(f"cannot read {text!r}: write $NAME or ${{NAME}}, and $$ for a dollar sign.") from error


def located(target: str, base: Path) -> Path:
    """Return the path of a target; ``~`` is the user's folder, and relative paths start from ``base``."""
    return base / user_path(target)


def existing(kind: str, target: str, base: Path) -> Path:
    """Return the path of a target that exists.

    Raises:
        BadInput: if the target is empty.
        MissingData: if the path does not exist.
    """
    if not target:
        raise BadInput(f"{kind} needs a path: write {kind}:PATH.")
    path = located(target, base)
    if not path.exists():
        raise MissingData(f"there is no {path}")
    return path


def whole_number(name: str, value: str, least: int = 0, most: int = 2**31 - 1) -> int:
    """Return the value of an option as an integer from ``least`` to ``most``; raise BadInput if it is none."""
    if value.isdecimal() and len(value) <= len(str(most)) and least <= int(value) <= most:
        return int(value)
    raise BadInput(f"cannot read {name}={value[:30]}: write a whole number from {least} to {most}.")
