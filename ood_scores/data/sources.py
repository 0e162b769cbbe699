"""Datasets named by a short text, ``kind:target?option=value&option=value``, for command lines and benchmark files."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

import ood_scores.data.kinds  # noqa: F401  registers every kind
from ood_scores.atomic import user_path
from ood_scores.data.dataset_spec import expanded, located, parse
from ood_scores.data.images import ImageDataset, Transform
from ood_scores.data.kinds.base import DATASET_KINDS, DatasetKind
from ood_scores.data.subsets import VIEWS, seen_through
from ood_scores.data.user_functions import user_kind
from ood_scores.errors import MissingData, UnknownName
from ood_scores.registry import unknown
from ood_scores.user_code import is_reference

_OPENED: set[tuple[str, str]] = set()
"""The texts, and the folders where their paths start, of the datasets that this process has opened."""


def open_dataset(
    spec: str, transform: Transform | None = None, root: str | PathLike[str] | None = None
) -> ImageDataset:
    """Open the dataset that a text names.

    Each module of ``ood_scores.data.kinds`` documents the options of a kind. Every kind also has the options below.
    They are applied in this order, regardless of the order in the text. All but the first and the last are part of the
    name of the dataset.

    - ``classes=FILE``: labels in the order of the names in a file, see ``ood_scores.data.class_names``; not for
      ``digits``, whose option of this name chooses classes.
    - ``scramble=SEED``: the pixels of each image in a random order, which depends on the seed and on the row in the
      whole dataset.
    - ``only=2,4,7-9``: the images of these classes, whose labels become 0, 1, … in this order.
    - ``rows=0:5000``: a slice as in Python.
    - ``long_tail=100``: a long tail with this ratio, see ``ood_scores.data.long_tail``.
    - ``validation=0.1``: the share of each class that a training recipe with ``validation = 0.1`` holds out;
      ``without_validation=0.1``: the other images, on which it trains.
    - ``take=500``: the first 500 of every (N // 500)-th row; all rows if there are fewer.
    - ``labels=none``: no labels, as for OoD images in folders that have names of some classes of the model.

    ``FILE.py:FUNCTION?option=value`` is the dataset that a function of imported code returns; see
    ``ood_scores.user_code``.

    In paths and other values, ``$NAME`` and ``${NAME}`` are environment variables and ``$$`` is a dollar sign.

    Args:
        spec: the text.
        transform: function that is applied to the PIL image of every item. It can also be set later.
        root: folder where relative paths start; defaults to the current folder.

    Raises:
        UnknownName: if a kind, option, column, or torchvision dataset does not exist.
        MissingData: if files do not exist or a variable is not set. The message includes the ``remedy``, if there is
            one.
        BadInput: if contents or options cannot be read.
        BadLabels: if ``long_tail`` is used with a dataset without labels.
        EmptyInput: if there are no images.
    """
    name, target, options = parse(spec)
    base = user_path("" if root is None else root)
    kind = _kind(spec, base)
    known = list(dict.fromkeys([*kind.options, *VIEWS]))
    for option in options:
        if option not in known:
            raise unknown(f"{name} has no option", option, known)
    try:
        values = {option: expanded(value) for option, value in options.items()}
        own = {option: value for option, value in values.items() if option in kind.options}
        dataset = kind.open(expanded(target), base, **own)
    except MissingData as error:
        raise MissingData(error.reason, remedy(spec, root)) from error
    dataset = seen_through(dataset, {name: value for name, value in values.items() if name not in own}, base)
    dataset.transform = transform
    dataset.text, dataset.root = spec, os.path.abspath(base)
    _OPENED.add((dataset.text, dataset.root))
    return dataset


def reopened(spec: str | None, root: str | None) -> ImageDataset | None:
    """Open the dataset that a file names, without a network, if this process has opened it itself; else return None.

    A file of somebody else, such as a cache, can name any path of this machine: such a name is only followed if it was
    opened here before.
    """
    if spec is None or root is None or (spec, root) not in _OPENED:
        return None
    known = offline(spec)
    return open_dataset(known, root=root) if known else None


def require_kind(spec: str) -> None:
    """Raise UnknownName if a text starts with a word and a colon, but there is no such kind of dataset."""
    kind, colon, _ = spec.partition(":")
    if colon and kind.isidentifier() and not is_reference(spec):
        _ = DATASET_KINDS[kind]


def _kind(spec: str, base: Path) -> DatasetKind:
    """Return the kind of dataset that a text names; the error for a path without a kind suggests one."""
    name = parse(spec).kind
    if name not in DATASET_KINDS and is_reference(spec):
        return user_kind(spec)
    if name not in DATASET_KINDS:
        path = located(spec.partition("?")[0], base)
        for suggested, kind in DATASET_KINDS.items():
            if kind.suggested_for and kind.suggested_for(path):
                raise UnknownName(
                    f"{spec!r} is a path without its kind (did you mean '{suggested}:{spec}'?): write KIND:PATH, where "
                    f"KIND is one of {', '.join(sorted(DATASET_KINDS))}."
                )
    return DATASET_KINDS[name]


def remedy(spec: str, root: str | PathLike[str] | None = None) -> str:
    """Return how to get the data that a text names: a command, an address, or "" if none is known.

    Args:
        spec: the text; nothing is opened, and environment variables are not expanded.
        root: folder where relative paths start.
    """
    kind = DATASET_KINDS.get(parse(spec).kind)
    return kind.remedy(spec, root) if kind else ""


def offline(spec: str) -> str | None:
    """Return the text that opens the same dataset without network access, or None if there is none."""
    kind = DATASET_KINDS.get(parse(spec).kind)
    return kind.offline(spec) if kind else spec
