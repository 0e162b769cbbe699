"""Datasets of the user's own code: ``FILE.py:FUNCTION?option=value`` or ``MODULE:FUNCTION?option=value``."""

from __future__ import annotations

import inspect
from pathlib import Path

from ood_scores.data.images import ImageDataset, TorchvisionImages
from ood_scores.data.kinds.base import DatasetKind
from ood_scores.errors import BadInput
from ood_scores.user_code import referenced


def user_kind(text: str) -> DatasetKind:
    """Return the kind of dataset of a function that returns a dataset of PIL images and their classes.

    The options are the parameters of the function, whose values are text.

    Raises:
        BadInput: if the text names code that has not been imported, or something other than a function.
    """
    function = referenced(text.partition("?")[0])
    if not callable(function):
        raise BadInput(f"{text} is not a function: name a function or a class that returns a dataset.")

    def open(target: str, base: Path, **options: str) -> ImageDataset:
        dataset = function(**options)
        if isinstance(dataset, ImageDataset):
            return dataset
        return TorchvisionImages(dataset, None, getattr(function, "__name__", "dataset"))

    first = list(inspect.signature(open).parameters.values())[:2]
    own = inspect.signature(function).parameters.values()
    options = [
        each.replace(kind=each.KEYWORD_ONLY) for each in own if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]
    open.__signature__ = inspect.Signature([*first, *options])  # type: ignore[attr-defined]
    return DatasetKind(open, lambda text, root: "", lambda text: text, lambda path: False)
