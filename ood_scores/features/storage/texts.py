"""Texts as columns: the ids of rows, whose UTF-8 bytes are padded with zeros to one width.

In a file, such a column is an HDF5 dataset of UTF-8 strings of fixed length, which other programs read as text. In this
package it is uint8 ``[N, W]``, so that it is written, checked, and read like every other column. The bytes of file
names that are not UTF-8 are kept as they are; Python has them as surrogate escapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.errors import BadInput

if TYPE_CHECKING:
    import h5py

IDS = "ids"
"""The column with the ids of the rows; an empty text for a row without one."""

LONGEST = 4096
"""The most bytes of an id, as many as a path may have."""


def packed(texts: Iterable[Any], width: int = 1) -> Tensor:
    """Return texts as a column, uint8 ``[N, W]`` with ``W`` at least ``width``.

    Args:
        texts: Strings, paths, or integers; None stands for an empty text.
        width: The smallest width.

    Raises:
        BadInput: if a text holds a null character or something that UTF-8 cannot encode, or is longer than ``LONGEST``.
    """
    encoded = [_encoded(text) for text in texts]
    width = max([width, *map(len, encoded)])
    rows = np.array(encoded, dtype=f"S{width}")
    return torch.from_numpy(rows.view(np.uint8).reshape(len(encoded), width))


def packed_width(texts: Iterable[Any]) -> int:
    """Return the smallest width of a column of texts; arguments and errors are those of ``packed``."""
    return max((len(_encoded(text)) for text in texts), default=1) or 1


def _encoded(value: Any) -> bytes:
    text = "" if value is None else str(value)
    try:
        found = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise BadInput(f"the id {text[:100]!r} is not valid text: {error.reason}.") from error
    if b"\0" in found or len(found) > LONGEST:
        raise BadInput(
            f"the id {text[:100]!r} has a null character or more than {LONGEST:,} bytes: use a shorter, plain text."
        )
    return found


def unpacked(values: Tensor) -> NDArray[np.str_]:
    """Return the texts of a column, ``[N]``."""
    rows = np.ascontiguousarray(values.cpu().numpy())
    return np.char.decode(rows.view(f"S{rows.shape[1]}")[:, 0], "utf-8", "surrogateescape")


def padded(values: Tensor, width: int) -> Tensor:
    """Return a column with at least the given width."""
    return torch.nn.functional.pad(values, (0, max(0, width - values.shape[1])))


def text_type(width: int) -> np.dtype:
    """The HDF5 type of texts of at most ``width`` bytes."""
    import h5py

    return h5py.string_dtype("utf-8", width)


def row_type(column: h5py.Dataset) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and the dtype of a row of a column; those of a text are its bytes'."""
    if column.dtype.kind == "S":
        return (column.dtype.itemsize,), np.dtype(np.uint8)
    return column.shape[1:], column.dtype


def as_bytes(values: np.ndarray) -> np.ndarray:
    """Return what h5py reads from a column as it is used here: texts as uint8 ``[N, W]``, other values unchanged."""
    if values.dtype.kind != "S":
        return values
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), values.dtype.itemsize)


def as_stored(values: np.ndarray, column: h5py.Dataset) -> np.ndarray:
    """Return values as h5py writes them to a column: the inverse of ``as_bytes``."""
    return np.ascontiguousarray(values).view(column.dtype)[:, 0] if column.dtype.kind == "S" else values
