"""Objects by name, and errors for names that do not exist."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from ood_scores.errors import BadInput, UnknownName

T = TypeVar("T")
Class = TypeVar("Class", bound=type)


class Registry(dict[str, T]):
    """Objects of one kind by name; looking up a name that is not registered raises UnknownName.

    Args:
        noun: The kind of the objects, such as ``scorer``, for error messages.
        entries: The first objects.
        listing: The command that lists all names; "" if there is none.
    """

    def __init__(self, noun: str, entries: Mapping[str, T] | None = None, listing: str = "") -> None:
        super().__init__(entries or {})
        self.noun = noun
        self.listing = listing

    def __missing__(self, name: str) -> T:
        raise unknown(f"there is no {self.noun}", name, sorted(self), listing=self.listing)

    def register(self, name: str) -> Callable[[Class], Class]:
        """Return a class decorator that adds a class under a name and sets its attribute ``name``.

        A class replaces one of the same module and qualified name, so that a module can be reloaded.

        Raises:
            BadInput: if the name belongs to another class.
        """

        def add(cls: Class) -> Class:
            self.require_free(name, cls, self.get(name))
            cls.name = name  # type: ignore[attr-defined]
            self[name] = cls  # type: ignore[assignment]
            return cls

        return add

    def require_free(self, name: str, new: object, known: object) -> None:
        """Raise BadInput if a name belongs to an object of another module or qualified name than those of ``new``."""
        if known is not None and _qualified(known) != _qualified(new):
            raise BadInput(f"the {self.noun} {name!r} exists already: {_qualified(known)}.")

    def matching(self, pattern: str = "*") -> list[str]:
        """The sorted names that match a shell pattern, such as ``"*norm*"``."""
        return sorted(fnmatch.filter(self, pattern))


def unknown(what: str, name: str, known: Iterable[str], meant: Iterable[str] = (), *, listing: str = "") -> UnknownName:
    """Create the error for a name that does not exist.

    Args:
        what: The beginning of the message, such as ``there is no scorer``.
        name: The name.
        known: All names, which the message lists.
        meant: The names that it suggests; defaults to the closest known one.
        listing: The command that lists all names; the message then has it and up to three close names, if there are
            any, instead of the list.
    """
    names = list(known)
    question = _question(meant) or did_you_mean(name, names, at_most=3 if listing else 1)
    choice = f"choose from {', '.join(names)}" if names else "there are none"
    return UnknownName(f"{what} {name!r}{question}: {f'{listing} shows all' if listing and question else choice}.")


def did_you_mean(name: str, known: Iterable[str], at_most: int = 1) -> str:
    """`` (did you mean 'x'?)``, or an empty text if no known name is close."""
    as_written = {_plain(each): each for each in known}
    close = difflib.get_close_matches(_plain(str(name)), as_written, n=at_most)
    return _question(as_written[each] for each in close)


def _question(names: Iterable[str]) -> str:
    *others, last = [*map(repr, names)] or [""]
    return f" (did you mean {' or '.join(filter(None, (', '.join(others), last)))}?)" if last else ""


def _plain(name: str) -> str:
    """Return a name in lower case with one kind of separator."""
    return name.casefold().replace("-", "_").replace(" ", "_")


def _qualified(entry: object) -> str:
    return f"{entry.__module__}.{getattr(entry, '__qualname__', entry)}"
