"""Ids of rows: the names by which a dataset knows its rows, such as the files of its images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from ood_scores.errors import BadInput

FILES_ATTRIBUTES = ("samples", "imgs", "_samples", "_image_files")
"""Attributes in which datasets such as torchvision's, or their readers, keep files, or pairs of a file and a label."""


def ids_of(dataset: Any, unique: bool = False) -> Sequence[Any] | None:
    """Return the id of each row of a dataset, a text or an integer, without reading images; None if there are none.

    They are the ``ids`` of a dataset, such as those of this package, or else the files in its ``samples`` or ``imgs``,
    as torchvision has them, or in those of its ``reader``, as timm has them, relative to the ``root`` beside them, if
    the first one exists: other texts, such as sentences, are no names. Those of a ``Subset`` or ``ConcatDataset`` are
    those of its datasets.

    Args:
        dataset: the dataset.
        unique: whether rows of one dataset must have different ``ids``; rows without one have "" or None.

    Raises:
        BadInput: if a dataset has ``ids``, but not one for each row, or two rows have the same.
    """
    own = getattr(dataset, "ids", None)
    if isinstance(own, (np.ndarray, torch.Tensor)):
        own = own.tolist()
    if isinstance(own, Sequence) and not isinstance(own, str):
        if len(own) != len(dataset):
            raise BadInput(
                f"the dataset {type(dataset).__name__} has {len(own)} ids for {len(dataset)} rows: give it one id for "
                "each row, in their order."
            )
        if unique:
            _require_different(own, getattr(dataset, "name", None) or type(dataset).__name__)
        return own
    if isinstance(dataset, Subset):
        whole = ids_of(dataset.dataset, unique)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [ids_of(part, unique) for part in dataset.datasets]
        if all(part is None for part in parts):
            return None
        named = zip(parts, dataset.datasets, strict=True)
        return list(chain.from_iterable([""] * len(data) if ids is None else ids for ids, data in named))  # type: ignore[arg-type]
    files = _files_of(dataset, len(dataset))
    return _files_of(getattr(dataset, "reader", None), len(dataset)) if files is None else files


def _require_different(ids: Sequence[Any], name: str) -> None:
    rows: dict[str, int] = {}
    for row, each in enumerate(ids):
        text = "" if each is None else str(each)
        if text and rows.setdefault(text, row) != row:
            raise BadInput(
                f"rows {rows[text]} and {row} of the dataset {name} have the same id {text!r}: give each row an id of "
                "its own, or none."
            )


def below(paths: Sequence[str], top: str | os.PathLike[str]) -> list[str]:
    """Return paths relative to a folder; those outside of it are unchanged."""
    start = os.path.join(os.fspath(top), "")
    return [path.removeprefix(start) for path in paths]


def _files_of(holder: Any, rows: int) -> list[str] | None:
    """Return the files that a dataset or its reader keeps, one for each row; None if it keeps none."""
    for name in FILES_ATTRIBUTES:
        entries = getattr(holder, name, None)
        if isinstance(entries, (list, tuple)) and len(entries) == rows:
            files = [entry[0] if isinstance(entry, tuple) and entry else entry for entry in entries]
            if all(isinstance(file, (str, os.PathLike)) for file in files):
                root = getattr(holder, "root", "")
                top = os.fspath(root) if isinstance(root, (str, os.PathLike)) else ""
                paths = [os.fspath(file) for file in files]
                if any(os.path.isfile(os.path.join(folder, path)) for folder in ("", top) for path in paths[:1]):
                    return below(paths, top) if top else paths
    return None
