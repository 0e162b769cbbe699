"""Scorers by name."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ood_scores.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

SCORERS: dict[str, type[Scorer]] = {}
"""The registered classes by name."""

S = TypeVar("S", bound="type[Scorer]")


def register_scorer(name: str) -> Callable[[S], S]:
    """Class decorator that makes a scorer known by name, as timm does for models."""

    def register(cls: S) -> S:
        known = SCORERS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise BadInput(f"a scorer named {name!r} exists already: {known.__module__}.{known.__qualname__}.")
        cls.name = name
        SCORERS[name] = cls
        return cls

    return register


def list_scorers(pattern: str = "*") -> list[str]:
    """Names of the registered scorers, sorted; ``pattern`` as in a shell (``"*norm*"``)."""
    return sorted(fnmatch.filter(SCORERS, pattern))


def scorer_class(name: str) -> type[Scorer]:
    """The class registered under a name.

    Raises:
        UnknownName: there is none; the message lists the names.
    """
    if name not in SCORERS:
        raise UnknownName(f"there is no scorer {name!r}; there are: {', '.join(list_scorers())}.")
    return SCORERS[name]


def is_registered(cls: type) -> bool:
    """Return whether a scorer can be created by name as exactly this class."""
    return cls in SCORERS.values()


def create_scorer(name: str, **params: Any) -> Scorer:
    """A new scorer by name.

    Raises:
        UnknownName: no such scorer, or no such parameter; the message lists those that exist.
        BadInput: a parameter out of range.
    """
    cls = scorer_class(name)
    known = inspect.signature(cls).parameters
    unknown = [param for param in params if param not in known]
    if unknown:
        has = ", ".join(known) or "none"
        raise UnknownName(f"scorer {name!r} has no parameter {unknown[0]!r}; it has: {has}.")
    return cls(**params)
