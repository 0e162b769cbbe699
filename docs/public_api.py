"""The public face of the package as text: every public name with its signature, one for each line."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Iterator
from importlib import import_module
from typing import Any

MODULES = (
    "ood_scores",
    "ood_scores.benchmark",
    "ood_scores.detector",
    "ood_scores.evaluation",
    "ood_scores.features",
    "ood_scores.metrics",
    "ood_scores.probes",
    "ood_scores.scorers",
    "ood_scores.sklearn",
    "ood_scores.testing",
    "ood_scores.training",
)
"""The modules whose names users import; names of ``__all__``, or all that the module defines."""


def public_api() -> str:
    """The lines of all modules, sorted by name within each."""
    modules = list(map(import_module, MODULES))
    public = {id(getattr(module, name)) for module in modules for name in names(module)}
    seen: set[int] = set()
    lines = ["# Public names and signatures. After a change that is meant, run: python docs/generate.py"]
    for module in modules:
        for name in sorted(names(module)):
            value = getattr(module, name)
            lines += described(
                f"{module.__name__}.{name}", value, set() if id(value) in seen else members(value, public)
            )
            seen.add(id(value))
    return "\n".join(lines) + "\n"


def names(module: Any) -> list[str]:
    """The names that users import from a module."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return getattr(module, "__all__", None) or own


def members(value: Any, public: Container[int]) -> set[str]:
    """The public members of a class, with those of its bases in the package that are not public themselves."""
    if not inspect.isclass(value):
        return set()
    own = [each for each in value.__mro__ if each is value or (is_ours(each) and id(each) not in public)]
    return {name for each in own for name in vars(each) if not name.startswith("_")}


def is_ours(cls: type) -> bool:
    """Whether a class belongs to the package."""
    return cls.__module__.partition(".")[0] == "ood_scores"


def described(name: str, value: Any, members: Iterable[str]) -> Iterator[str]:
    """The line of a name, and those of some members of a class."""
    if inspect.ismodule(value):
        yield f"{name}: module"
    elif inspect.isclass(value):
        yield f"{name}{signature(value)}"
        for member in sorted(members):
            found = inspect.getattr_static(value, member)
            if isinstance(found, property):
                yield f"{name}.{member}: property"
            elif callable(found) or isinstance(found, (classmethod, staticmethod)):
                yield f"{name}.{member}{signature(getattr(value, member))}"
    elif callable(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def signature(function: Any) -> str:
    """The signature as text; empty if the object has none."""
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return ""
