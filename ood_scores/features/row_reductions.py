"""Reductions of each row of a matrix to one value: norms, entropies, and largest shares."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import threshold

PIECE = 2**20
"""The number of values that a CPU processes at a time when only a reduction of them is kept: they fit its caches."""

SUMMED = 2**18
"""The same for sums of columns and for products, whose last digits may depend on it."""

UNIT = 2**16
"""The number of values that a CPU normalizes at a time."""

LOG2_E = math.log2(math.e)


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


def exp_(values: Tensor, divisor: float = 1.0) -> Tensor:
    """``exp(values / divisor)``, in place: many CPUs compute powers of 2 in half the time."""
    if torch.compiler.is_compiling():
        return (values / divisor).exp()
    return values.mul_(LOG2_E / divisor).exp2_()


def below_largest(logits: Tensor) -> Tensor:
    """``f - max f`` of the logits f of each row, ``[B, C]``: at most 0."""
    return logits - logits.amax(dim=1, keepdim=True)


def odds_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Each probability of ``softmax(logits / temperature)`` divided by the largest one, which becomes 1, ``[B, C]``."""
    return exp_(below_largest(logits), temperature)


def others_of(odds: Tensor) -> Tensor:
    """The sum of the odds of each row but one that is 1, float64 ``[B]``, to all digits; the odds are overwritten."""
    total = odds.sum(dim=1).double()
    minus_others = threshold(odds.neg_(), -1.0, 0.0, inplace=True).sum(dim=1).double()
    return torch.where(total < 1.5, -minus_others, total - 1)


def entropy(logits: Tensor) -> Tensor:
    """The entropy in nats of the softmax of logits ``[B, C]``, float64 ``[B]``."""
    below = below_largest(logits)
    return entropy_and_others(below, exp_(below.clone()))[0]


def entropy_and_others(below: Tensor, odds: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy in nats of the softmax, and the sum of the odds but one, both float64 ``[B]``.

    ``below`` are the logarithms of the odds; both are overwritten.
    """
    weighted = below.mul_(odds).sum(dim=1).double()  # the terms have one sign, so nothing cancels
    others = others_of(odds)
    return others.log1p().sub_(weighted / (1 + others)), others


def exp_minus_tangent(values: Tensor) -> Tensor:
    """``exp(x) - 1 - x`` for small x, by its power series up to x^10."""
    series = torch.full_like(values, 1 / math.factorial(10))
    for power in range(9, 1, -1):
        series = series.mul_(values).add_(1 / math.factorial(power))
    return series * values.square()


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
