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
    """

    def __init__(self, noun: str, entries: Mapping[str, T] | None = None) -> None:
        super().__init__(entries or {})
        self.noun = noun

    def __missing__(self, name: str) -> T:
        raise unknown(f"there is no {self.noun}", name, sorted(self))

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


def unknown(what: str, name: str, known: Iterable[str], meant: Iterable[str] = ()) -> UnknownName:
    """Create the error for a name that does not exist: it suggests ``meant``, or else the closest known name, and lists
    all of them."""
    names = list(known)
    choice = f"choose from {', '.join(names)}" if names else "there are none"
    suggestion = " or ".join(map(repr, meant))
    question = f" (did you mean {suggestion}?)" if suggestion else did_you_mean(name, names)
    return UnknownName(f"{what} {name!r}{question}: {choice}.")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or an empty text if no known name is close."""
    as_written = {_plain(each): each for each in known}
    close = difflib.get_close_matches(_plain(str(name)), as_written, n=1)
    return f" (did you mean {as_written[close[0]]!r}?)" if close else ""


def _plain(name: str) -> str:
    """Return a name in lower case with one kind of separator."""
    return name.casefold().replace("-", "_").replace(" ", "_")


def _qualified(entry: object) -> str:
    return f"{entry.__module__}.{getattr(entry, '__qualname__', entry)}"
