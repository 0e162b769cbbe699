"""Families of scorers: the registered classes grouped by module, as lists and reference pages show them."""

from __future__ import annotations

import inspect
import sys

from ood_scores.scorers.base import Scorer
from ood_scores.scorers.registry import list_scorers, scorer_class


def families(pattern: str = "*") -> dict[str, list[type[Scorer]]]:
    """The registered scorers by the title of their family, both sorted by name."""
    found: dict[str, list[type[Scorer]]] = {}
    for name in list_scorers(pattern):
        cls = scorer_class(name)
        found.setdefault(family_of(cls)[0], []).append(cls)
    return dict(sorted(found.items()))


def family_of(cls: type[Scorer]) -> tuple[str, str]:
    """Title and description of a scorer's family: the docstring of its module, before and after the first colon."""
    first_line = (inspect.getdoc(sys.modules[cls.__module__]) or cls.__module__).splitlines()[0]
    title, _, description = first_line.rstrip(".").partition(": ")
    return title, description


def summary_of(cls: type[Scorer]) -> str:
    """The first paragraph of a scorer's docstring on one line, without the backticks of code."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].replace("``", "").split())
