"""Inner products and squared distances of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_distances(rows: Tensor, centers: Tensor) -> Tensor:
    """``||x_i - c_j||^2`` for every pair, ``[B, C]``, never negative."""
    products = torch.addmm(rows.square().sum(dim=1, keepdim=True), rows, centers.T, alpha=-2)
    return products.add_(centers.square().sum(dim=1)).clamp_min_(0)


def squares_between(rows: Tensor) -> Tensor:
    """Squared distances between all rows, ``[C, C]``; exactly 0 for rows that differ by rounding only."""
    rows = rows - rows.mean(dim=0)
    squares = squared_distances(rows, rows)
    rounding = torch.finfo(rows.dtype).eps * rows.shape[1] * rows.square().sum(dim=1)
    return torch.where(squares > rounding[:, None] + rounding, squares, 0)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """The inner products of paired rows, float64 ``[B]``."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0].double()
