"""The public face of the package as text: every public name with its signature, one for each line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
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
    seen: set[int] = set()
    lines = ["# Public names and signatures. After a change that is meant, run: python docs/generate.py"]
    for module in map(import_module, MODULES):
        names = getattr(module, "__all__", None) or [
            name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
        ]
        for name in sorted(names):
            value = getattr(module, name)
            lines += described(f"{module.__name__}.{name}", value, members=id(value) not in seen)
            seen.add(id(value))
    return "\n".join(lines) + "\n"


def described(name: str, value: Any, members: bool) -> Iterator[str]:
    """The line of a name and, if they are wanted, those of the public members of a class."""
    if inspect.ismodule(value):
        yield f"{name}: module"
    elif inspect.isclass(value):
        yield f"{name}{signature(value)}"
        for member in sorted(each for each in vars(value) if members and not each.startswith("_")):
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
