"""Datasets named by a short text, ``kind:target?option=value&option=value``, for command lines and benchmark files."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import ood_scores.data.kinds  # noqa: F401  registers every kind
from ood_scores.data.dataset_spec import expanded, parse
from ood_scores.data.images import ImageDataset, Transform
from ood_scores.data.kinds.base import DATASET_KINDS
from ood_scores.data.subsets import VIEWS, seen_through
from ood_scores.errors import MissingData
from ood_scores.registry import unknown


def open_dataset(
    spec: str, transform: Transform | None = None, root: str | PathLike[str] | None = None
) -> ImageDataset:
    """Open the dataset that a text names.

    The kinds and their options are those of the modules of ``ood_scores.data.kinds``. Options of every kind, applied
    in this order whatever the order in which they are written:

    - ``scramble=SEED``: each image's pixels in a random order of its own, by the seed and its row in the whole set.
    - ``rows=0:5000``: a slice as in Python.
    - ``long_tail=100``: as in ``ood_scores.data.long_tail``; the number is the ratio.
    - ``take=500``: evenly spaced rows, the first 500 of every (N // 500)-th; all where there are less.

    The name of the dataset tells these options. In paths and other values, ``$NAME`` and ``${NAME}`` are variables of
    the environment and ``$$`` is a dollar sign.

    Args:
        spec: the text.
        transform: applied to the PIL image of every item; may be set later, too.
        root: where relative paths start, by default the current folder.

    Raises:
        UnknownName: a kind, option, column or torchvision dataset that does not exist.
        MissingData: files that are not there, or a variable that is not set; the message says how to get them, where
            ``remedy`` knows.
        BadInput: contents or options that cannot be read.
        BadLabels: ``long_tail`` of a dataset without labels.
        EmptyInput: no images.
    """
    name, target, options = parse(spec)
    kind = DATASET_KINDS[name]
    known = [*kind.options, *VIEWS]
    for option in options:
        if option not in known:
            raise unknown(f"{name} has no option", option, known)
    base = Path("" if root is None else root).expanduser()
    try:
        values = {option: expanded(value) for option, value in options.items()}
        own = {option: value for option, value in values.items() if option in kind.options}
        dataset = kind.open(expanded(target), base, **own)
    except MissingData as error:
        raise MissingData(error.reason, remedy(spec, root)) from error
    dataset = seen_through(dataset, values)
    dataset.transform = transform
    return dataset


def remedy(spec: str, root: str | PathLike[str] | None = None) -> str:
    """How to get the data that a text names: a command, an address, or "" where none is known.

    Args:
        spec: as ``open_dataset`` takes it; nothing is opened, no variable is expanded.
        root: where its relative paths start.
    """
    kind = DATASET_KINDS.get(parse(spec).kind)
    return kind.remedy(spec, root) if kind else ""


def offline(spec: str) -> str | None:
    """The text that opens the same dataset without network access; None if it cannot be opened without."""
    kind = DATASET_KINDS.get(parse(spec).kind)
    return kind.offline(spec) if kind else spec
