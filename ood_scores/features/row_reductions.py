"""Reductions of each row of a matrix to one value: norms, entropies, and largest shares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import threshold

PIECE = 2**19
"""The number of values that a CPU processes at a time when only a reduction of them is kept: they fit its caches."""

SUMMED = 2**18
"""The same for sums of columns and for products, whose last digits may depend on it."""

UNIT = 2**16
"""The number of values that a CPU normalizes at a time."""


def by_pieces(reduced: Callable[[Tensor], Tensor], values: Tensor, piece: int = PIECE) -> Tensor:
    """Reduce each row of ``[B, K]`` to one value ``[B]`` or several ``[..., B]``; on a CPU, by ``piece`` values."""
    rows = max(1, piece // max(1, values.shape[1]))
    if values.device.type != "cpu" or torch.compiler.is_compiling() or len(values) <= rows:
        return reduced(values)
    return torch.cat([reduced(some) for some in values.split(rows)], dim=-1)


def column_sums(values: Tensor) -> Tensor:
    """The sum of each column of ``[B, K]``, float64 ``[K]``; NumPy adds float32 values in float64 without a copy."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(np.add.reduce(values.detach().numpy(), axis=0, dtype=np.float64))
    return values.sum(dim=0, dtype=torch.float64)


def entropy(softmax: Tensor, logits: Tensor) -> Tensor:
    """The entropy in nats of the softmax ``[B, C]`` of logits, float64 ``[B]``; the softmax is overwritten."""
    below = logits - logits.amax(dim=1, keepdim=True)
    below_largest = below.mul_(softmax).sum(dim=1).double()  # the terms have one sign, so nothing cancels
    return -largest_share(softmax).log() - below_largest


def row_norm(values: Tensor, p: float, overwritten: bool = False) -> Tensor:
    """The p-norm of each row, p in (0, inf], float64 ``[B]``; rows are scaled first if a power could overflow.

    If the values may be ``overwritten``, a 1-norm takes no other memory.
    """
    if p == float("inf"):
        return values.abs().amax(dim=1).double()
    if p == 1.0:
        return by_pieces(lambda piece: (piece.abs_() if overwritten else piece.abs()).sum(dim=1), values).double()
    if p == 2.0:
        return torch.linalg.vector_norm(values, 2, dim=1).double()
    largest = values.abs().amax(dim=1, keepdim=True)
    scaled = values.abs() / torch.where(largest > 0, largest, 1)
    return scaled.pow(p).sum(dim=1).double().pow(1.0 / p) * largest[:, 0].double()


def unit_rows(values: Tensor) -> Tensor:
    """Rows divided by their 2-norms in float64, as float32 ``[B, K]``; a row of zeros stays zero."""
    found = torch.empty_like(values, dtype=torch.float32)
    rows = max(1, UNIT // max(1, values.shape[1])) if values.device.type == "cpu" else len(values)
    for some, unit in zip(values.split(rows), found.split(rows), strict=True):
        double = some.double()
        unit.copy_(double / row_norm(double, 2.0).clamp_min(1e-12)[:, None])
    return found


def largest_share(shares: Tensor) -> Tensor:
    """The largest of shares that sum to 1, float64 ``[B]``; the shares are overwritten."""
    largest = shares.amax(dim=1).double()
    minus_others = threshold(shares.neg_(), -0.5, 0.0, inplace=True).sum(dim=1).double()  # all below one half
    return torch.where(largest > 0.75, 1 + minus_others, largest)
