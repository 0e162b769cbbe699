"""Scorers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ood_scores.parameters import require_known
from ood_scores.registry import Registry

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

SCORERS: Registry[type[Scorer]] = Registry("scorer")
"""The registered classes by name."""

S = TypeVar("S", bound="type[Scorer]")


def register_scorer(name: str) -> Callable[[S], S]:
    """Class decorator that makes a scorer known by name, as timm does for models."""
    return SCORERS.register(name)


def list_scorers(pattern: str = "*") -> list[str]:
    """Names of the registered scorers, sorted; ``pattern`` as in a shell (``"*norm*"``)."""
    return SCORERS.matching(pattern)


def scorer_class(name: str) -> type[Scorer]:
    """The class registered under a name.

    Raises:
        UnknownName: there is none; the message lists the names.
    """
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
    require_known(cls, params, f"scorer {name!r}")
    return cls(**params)
