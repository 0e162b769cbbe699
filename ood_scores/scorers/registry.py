"""The registry of scorers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ood_scores.parameters import require_known
from ood_scores.registry import Registry

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

SCORERS: Registry[type[Scorer]] = Registry("scorer")
"""The registered scorer classes by name."""

S = TypeVar("S", bound="type[Scorer]")


def register_scorer(name: str) -> Callable[[S], S]:
    """Return a class decorator that registers a scorer under a name."""
    return SCORERS.register(name)


def list_scorers(pattern: str = "*") -> list[str]:
    """Return the sorted names of the registered scorers that match a shell pattern, such as ``"*norm*"``."""
    return SCORERS.matching(pattern)


def scorer_class(name: str) -> type[Scorer]:
    """Return the class registered under a name.

    Raises:
        UnknownName: if no scorer has this name; the message lists all names.
    """
    return SCORERS[name]


def is_registered(cls: type) -> bool:
    """Return whether a scorer can be created by name as exactly this class."""
    return cls in SCORERS.values()


def create_scorer(name: str, **params: Any) -> Scorer:
    """Create a scorer by name.

    Raises:
        UnknownName: if there is no such scorer or parameter; the message lists the existing ones.
        BadInput: if a parameter is out of range.
    """
    cls = scorer_class(name)
    require_known(cls, params, f"scorer {name!r}")
    return cls(**params)
