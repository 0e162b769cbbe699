"""Nearest rows of a bank, exact in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ood_scores.scorers.numerics.distances import squared_distances
from ood_scores.scorers.numerics.exact_search import Wanted, search_unit_rows

BANK_PIECE = 4096
"""Number of bank rows that are converted to float64 at a time."""

CACHED_ROWS = 512
"""Number of rows whose products with ``BANK_PIECE`` bank rows fit the caches of a processor."""

CANDIDATES = 8
"""How many bank rows that are nearest in float32 ``nearest_neighbors`` compares in float64."""

ROUNDING = 2.0**-24
"""The largest relative error of a rounded float32 value."""

SHORTEST = 1e-15
"""The shortest row that ``nearest_neighbors`` searches for in float32, whose squares do not underflow."""

VANISHING = 1e-35
"""A bound on the squares that float32 may lose by underflow, for each feature."""


def nearest_neighbors(rows: Tensor, bank: Tensor, of_bank: Tensor, happens: Callable[[Tensor], bool]) -> Tensor:
    """The number of each row's nearest bank row, ``[B]``.

    Products in float32 order the bank rows, and the distances of the first ``CANDIDATES`` are computed in float64. A
    bank row of length L that is farther down the order is not nearer than the last candidate by more than the errors of
    both products, each at most ``(D + 4) L`` roundings for a row of length 1. Where that leaves a doubt, the row is
    compared with the whole bank in float64.

    Args:
        rows: The rows, float64 ``[B, D]``, of length 1 or less.
        bank: The bank, float32 ``[N, D]``, on the same device, of rows of length 1 or less.
        of_bank: The ``lengths_of`` the bank.
        happens: Whether a rare condition, bool ``[B]``, holds for any row; see ``Block.happens``.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1)
    directions = (rows / lengths.clamp_min(SHORTEST)[:, None]).float()
    wanted = Wanted(bank, min(CANDIDATES, len(bank)), lengths=lengths.clamp_min(SHORTEST), bank_lengths=of_bank)
    (found,) = search_unit_rows(directions, [wanted])
    distances = torch.stack([torch.linalg.vector_norm(rows - bank[each], dim=1) for each in found.unbind(dim=1)], dim=1)
    nearest, place = distances.min(dim=1)
    numbers = found.gather(1, place[:, None])[:, 0]
    doubtful = nearest.square() > distances[:, -1].square() - _error(
        lengths, distances[:, -1], of_bank.amax(), bank.shape[1]
    )
    doubtful |= lengths < SHORTEST
    if len(bank) > CANDIDATES and happens(doubtful):
        numbers[doubtful] = exact_neighbors(rows[doubtful], bank, 1)[:, 0]
    return numbers


def _error(lengths: Tensor, last: Tensor, longest: Tensor, width: int) -> Tensor:
    """A bound ``[B]`` on how much smaller than that of the last candidate any other squared distance may be.

    A bank row that is longer than the row and the distance to the last candidate together is farther away.
    """
    reach = torch.minimum(lengths + last, longest)
    in_products, in_float64 = (width + 4) * lengths * reach + 2 * reach.square(), 1e-13 * lengths.square()
    return 4 * ROUNDING * in_products + in_float64 + VANISHING * width


def exact_neighbors(rows: Tensor, bank: Tensor, k: int, piece: int = BANK_PIECE) -> Tensor:
    """The numbers of each row's k nearest bank rows, ``[B, k]``, nearest first; in float64, by pieces of the bank."""
    nearest, numbers = rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.int64)
    for start in range(0, len(bank), piece):
        near, found = _nearest(rows, bank[start : start + piece].to(rows), k)
        nearest, numbers = torch.cat([nearest, near], dim=1), torch.cat([numbers, found + start], dim=1)
        nearest, chosen = nearest.topk(min(k, nearest.shape[1]), dim=1, largest=False)
        numbers = numbers.gather(1, chosen)
    return numbers


def _nearest(rows: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The squared distances to each row's k nearest rows of a small bank, and their numbers, ``[B, <= k]``."""
    parts = [
        squared_distances(some, bank).topk(min(k, len(bank)), dim=1, largest=False)
        for some in rows.split(CACHED_ROWS if rows.device.type == "cpu" else max(1, len(rows)))
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
