"""The check that columns hold finite numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import NotFinite


def require_finite(columns: Mapping[str, Tensor], start: int = 0, noun: str = "row") -> None:
    """Check that columns hold neither NaN nor infinite values.

    Args:
        columns: Tensors ``[B, ...]`` by name.
        start: The number of their first row.
        noun: The word for a row, for the error message.

    Raises:
        NotFinite: if one does; the message names the column and its first such row.
    """
    if columns and all(values.is_cuda for values in columns.values()) and _sums_are_finite(list(columns.values())):
        return
    for name, values in columns.items():
        finite = _isfinite(values)
        if not finite.all():
            row = start + int((~finite).reshape(len(finite), -1).any(1).argmax())
            raise NotFinite(
                f"{name} hold NaN or infinite values, first in {noun} {row}: look at that input and at the model's "
                "precision (fp16 overflows above 65,504; amp='bf16' and dtype='float32' do not)."
            )


def all_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; their sum, the cheapest pass there is, mostly tells."""
    return math.isfinite(values.sum()) or bool(values.isfinite().all())


def _sums_are_finite(columns: Sequence[Tensor]) -> bool:
    """Whether the sums of all columns are finite, as they cannot be if a value is not; the host waits once."""
    return bool(torch.stack([values.sum().isfinite().to(columns[0].device) for values in columns]).all())


def _isfinite(values: Tensor) -> np.ndarray:
    """Like ``Tensor.isfinite``, but on a CPU without torch's threads, which would take cores from the model."""
    if values.device.type == "cpu" and values.dtype != torch.bfloat16:  # NumPy has no bfloat16
        return np.isfinite(values.detach().numpy())
    return values.isfinite().cpu().numpy()
