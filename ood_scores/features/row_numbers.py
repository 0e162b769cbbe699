"""Numbers of the rows that a slice, an array of indices, or a mask selects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, ShapeMismatch


def row_numbers(rows: Any, total: int) -> Tensor:
    """Return the numbers of the selected rows, int64 ``[K]``, from 0 to ``total - 1``.

    Args:
        rows: A slice, indices ``[K]`` (negative ones count from the end), or a mask, bool ``[total]``.
        total: The number of rows of the set.

    Raises:
        BadInput: if ``rows`` is something else, or an index is out of range.
        ShapeMismatch: if a mask has another length.
    """
    if isinstance(rows, slice):
        return torch.from_numpy(np.arange(total)[rows].copy())
    array = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
    if array.ndim != 1 or (array.dtype.kind not in "iub" and array.size):
        raise BadInput("rows must be a slice, a one-dimensional index array, or a mask.")
    index = torch.from_numpy(array if array.dtype.kind == "b" else array.astype(np.int64))
    if index.dtype == torch.bool:
        if len(index) != total:
            raise ShapeMismatch(
                f"the mask has {len(index)} values, but the set has {total} rows: give one value per row."
            )
        return index.nonzero()[:, 0]
    if len(index) and not (-total <= int(index.min()) and int(index.max()) < total):
        raise BadInput(f"the row numbers {int(index.min())} to {int(index.max())} exceed the {total} rows of the set.")
    return torch.where(index < 0, index + total, index)
