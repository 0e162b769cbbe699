"""The registry of scorers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from ood_scores.errors import BadInput
from ood_scores.parameters import require_known
from ood_scores.registry import Registry
from ood_scores.user_code import is_reference, referenced
from ood_scores.user_warnings import warn_user

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer


class ScorerRegistry(Registry["type[Scorer]"]):
    """The registered scorer classes by name; a class is also found by its names in other packages, with a warning."""

    def __missing__(self, name: str) -> type[Scorer]:
        known = registered_name(name)
        if known is None:
            return super().__missing__(name)
        tell_alias(name, known)
        return self[known]


SCORERS = ScorerRegistry("scorer", listing="ood-scores list")
"""The registered scorer classes by name."""

S = TypeVar("S", bound="type[Scorer]")


def register_scorer(name: str) -> Callable[[S], S]:
    """Return a class decorator that registers a scorer under a name."""
    return SCORERS.register(name)


def list_scorers(pattern: str = "*") -> list[str]:
    """Return the sorted names of the registered scorers that match a shell pattern, such as ``"*norm*"``."""
    return SCORERS.matching(pattern)


def scorer_class(name: str) -> type[Scorer]:
    """Return the class registered under a name or an alias (see ``registered_name``), which a warning then translates.

    ``FILE.py:CLASS`` is a class in code that has been imported. It is registered under this text, unless it has a name.

    Raises:
        UnknownName: if no scorer has this name; the message suggests close names, or else lists all.
        BadInput: if the text names code that has not been imported, or something other than a scorer.
    """
    if name in SCORERS or not is_reference(name):
        return SCORERS[name]
    cls = referenced(name)
    if not isinstance(cls, type) or not hasattr(cls, "score_block"):
        raise BadInput(f"{name} is not a scorer: name a class that inherits ood_scores.Scorer.")
    return cls if is_registered(cls) else SCORERS.register(name)(cls)


def registered_name(name: str) -> str | None:
    """Return the registered name of the scorer of a name or alias, or None if there is none.

    Aliases are names of scorers in other packages (see ``Tags.aliases``), and names in another case or with hyphens.
    """
    if name in SCORERS:
        return name
    plain = str(name).casefold().replace("-", "_")
    return next((each for each, cls in SCORERS.items() if plain in (each, *cls.tags.aliases)), None)


@cache
def tell_alias(alias: str, name: str) -> None:
    """Say what an alias stands for, once in a process."""
    warn_user(f"{alias} is {name} here.")


def is_registered(cls: type) -> bool:
    """Return whether a scorer can be created by name as exactly this class."""
    return cls in SCORERS.values()


def why_experimental(described: Any) -> str | None:
    """Return why the scores of a scorer, or of one inside it, may not be those of its paper; None if they are.

    Args:
        described: its name, or its name and parameters as plain data.
    """
    if isinstance(described, (Mapping, list)):
        parts = described.values() if isinstance(described, Mapping) else described
        return next(filter(None, map(why_experimental, parts)), None)
    return SCORERS[described].tags.experimental if described in SCORERS else None


def create_scorer(name: str, **params: Any) -> Scorer:
    """Create a scorer by its name or an alias (see ``registered_name``), which a warning then translates.

    ``space="layers.MODULE"`` creates the scorer ``layers`` with this one at that layer, unless the scorer itself reads
    any space that it is given.

    Raises:
        UnknownName: if there is no such scorer or parameter; the message lists the existing ones.
        BadInput: if a parameter is out of range.
    """
    cls = scorer_class(name)
    space = str(params.get("space", ""))
    if space.startswith("layers.") and get_type_hints(cls).get("space") is not str:
        base = create_scorer(name, **{key: value for key, value in params.items() if key != "space"})
        return create_scorer("layers", base=base, layers=(space.removeprefix("layers."),))
    require_known(cls, params, f"scorer {name!r}")
    return cls(**params)
