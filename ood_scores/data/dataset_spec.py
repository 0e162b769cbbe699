"""The grammar of the short texts that name datasets: `kind:target?option=value&option=value`."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template
from typing import NamedTuple

from ood_scores.errors import BadInput, MissingData


class Spec(NamedTuple):
    """The three parts of a text, as written: variables of the environment are not expanded yet."""

    kind: str
    target: str
    options: dict[str, str]


def parse(text: str) -> Spec:
    """The parts of `text`. Raises BadInput where an option has no name or no value."""
    address, _, query = text.partition("?")
    kind, _, target = address.partition(":")
    options = {}
    for pair in query.split("&") if query else []:
        name, _, value = pair.partition("=")
        if not (name and value):
            raise BadInput(f"cannot read the option {pair!r} of {text!r}; write ?name=value&name=value")
        options[name] = value
    return Spec(kind, target, options)


def expanded(text: str) -> str:
    """`text` with `$NAME` and `${NAME}` taken from the environment; `$$` is a dollar sign.

    Raises:
        MissingData: a variable that is not set, or empty.
        BadInput: a dollar sign that no name follows.
    """
    try:
        return Template(text).substitute({name: value for name, value in os.environ.items() if value})
    except KeyError as error:
        raise MissingData(f"the environment variable {error.args[0]} of {text!r} is not set") from None
    except ValueError as error:
        raise BadInput(f"cannot read {text!r}: write $NAME or ${{NAME}}, and $$ for a dollar sign") from error


def located(target: str, base: Path) -> Path:
    """The path that `target` means: `~` is the user's folder, and relative paths start from `base`."""
    return base / Path(target).expanduser()


def existing(kind: str, target: str, base: Path) -> Path:
    """`located`, where something is. Raises BadInput without a target, MissingData where nothing is."""
    if not target:
        raise BadInput(f"{kind} needs a path; write {kind}:PATH")
    path = located(target, base)
    if not path.exists():
        raise MissingData(f"there is no {path}")
    return path


def whole_number(name: str, value: str, least: int = 0) -> int:
    """The option `name=value` as an integer from `least`. Raises BadInput."""
    if value.isdecimal() and int(value) >= least:
        return int(value)
    raise BadInput(f"cannot read {name}={value}; write a whole number from {least}")
