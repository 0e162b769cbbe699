"""The kinds of datasets that a text can name: how each is opened, and how data that is missing is obtained."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeAlias, TypeVar

from ood_scores.data.images import ImageDataset
from ood_scores.registry import Registry

Root: TypeAlias = str | PathLike[str] | None
OpenT = TypeVar("OpenT", bound=Callable[..., ImageDataset])


@dataclass(frozen=True)
class DatasetKind:
    """A kind of dataset: the word before the colon in ``kind:target?option=value``.

    Attributes:
        open: opens a dataset, called as ``open(target, base, **options)`` with the folder where relative paths start;
            its keyword-only parameters are the options of the kind, whose values are text.
        remedy: returns how to get the data that a text names, called as ``remedy(text, root)``; "" where nothing is
            known.
        offline: returns the text that opens the same dataset without network access, or None if there is none.
        suggested_for: whether to suggest this kind for a path that was written without a kind; None if it opens none.
    """

    open: Callable[..., ImageDataset]
    remedy: Callable[[str, Root], str]
    offline: Callable[[str], str | None]
    suggested_for: Callable[[Path], bool] | None

    @property
    def options(self) -> list[str]:
        """The names of the options of this kind alone."""
        return inspect.getfullargspec(self.open).kwonlyargs


DATASET_KINDS: Registry[DatasetKind] = Registry("kind of dataset")


def register_dataset_kind(
    name: str,
    remedy: Callable[[str, Root], str] = lambda text, root: "",
    offline: Callable[[str], str | None] = lambda text: text,
    suggested_for: Callable[[Path], bool] | None = None,
) -> Callable[[OpenT], OpenT]:
    """Register the decorated function as the one that opens datasets of a kind; see ``DatasetKind``.

    A function replaces one of the same module and name, so that a module can be reloaded.

    Raises:
        BadInput: if the kind belongs to another function.
    """

    def register(open: OpenT) -> OpenT:
        known = DATASET_KINDS.get(name)
        DATASET_KINDS.require_free(name, open, known.open if known else None)
        DATASET_KINDS[name] = DatasetKind(open, remedy, offline, suggested_for)
        return open

    return register
