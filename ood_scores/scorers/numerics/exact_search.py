"""Exact search of one bank of unit rows for several scorers: inner products with the bank are computed only once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64
"""The number of products of which at first only the largest is considered."""

SEARCH_ROWS = 512
"""The number of rows whose neighbors are searched for at a time."""

SEARCH_BANK = 2**16
"""The number of bank rows searched at a time: with ``SEARCH_ROWS`` rows, 128 MiB of products."""

SUB_BANK = 2**10
"""The number of bank rows in one matrix product on a CPU, few enough for the caches of the processor."""

DEVICE_ROWS = 2**12
"""The number of rows whose neighbors are searched for at a time on a GPU: with ``SEARCH_BANK``, 1 GiB of products."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """A request for the ``count`` bank rows with the largest ``weights_i <x, b_i>``, or for the nearest ones."""

    bank: Tensor
    count: int
    weights: Tensor | None = None

    @cached_property
    def ranking(self) -> tuple[Tensor, Tensor]:
        """The weights w and offsets a, both ``[N]``, such that ``w_i <x, b_i> + a_i`` ranks the bank rows.

        For the nearest rows, a accounts for their lengths, ``(1 - |b|^2) / 2``: rounding, except for rows of zeros.
        """
        if self.weights is not None:
            return self.weights.float(), torch.zeros(len(self.bank), device=self.bank.device)
        return torch.ones(len(self.bank), device=self.bank.device), (
            1 - torch.linalg.vector_norm(self.bank, dim=1, dtype=torch.float64).square()
        ).float() / 2


def search_unit_rows(
    rows: Tensor, wanted: Sequence[Wanted], rows_at_a_time: int | None = None, bank_at_a_time: int = SEARCH_BANK
) -> list[Tensor]:
    """Return, for each request, the indices of its bank rows ``[B, count]``, best first, on the device of the rows.

    The search is exact up to the rounding of the products.

    Args:
        rows: normalized rows ``[B, D]``, float32; rows of zeros are allowed.
        wanted: the requests, all for the same bank, which may be on the CPU if it is too large for the device.
        rows_at_a_time: the number of rows in one step; by default ``SEARCH_ROWS``, or ``DEVICE_ROWS`` on a device.
        bank_at_a_time: the number of bank rows in one step, a multiple of ``GROUP``.
    """
    bank, rankings = wanted[0].bank, [want.ranking for want in wanted]
    rows_at_a_time = rows_at_a_time or (SEARCH_ROWS if rows.device.type == "cpu" else DEVICE_ROWS)
    found = [rows.new_empty(len(rows), want.count, dtype=torch.int64) for want in wanted]
    space = rows.new_empty(min(rows_at_a_time, len(rows)) * min(bank_at_a_time, len(bank) + -len(bank) % GROUP))
    for first in range(0, len(rows), rows_at_a_time):
        part = rows[first : first + rows_at_a_time]
        best = [(part.new_empty(len(part), 0), part.new_empty(len(part), 0, dtype=torch.int64)) for _ in wanted]
        for start in range(0, len(bank), bank_at_a_time):
            stop = min(start + bank_at_a_time, len(bank))
            here = [(weights[start:stop].to(part), added[start:stop].to(part)) for weights, added in rankings]
            pieces = _search_piece(part, bank[start:stop].to(part), here, [want.count for want in wanted], space)
            best = [
                (torch.cat([values, more], dim=1), torch.cat([numbers, places + start], dim=1))
                for (values, numbers), (more, places) in zip(best, pieces, strict=True)
            ]
        for numbers, (values, places), want in zip(found, best, wanted, strict=True):
            numbers[first : first + len(part)] = places.gather(1, values.topk(want.count, dim=1).indices)
    return found


def _search_piece(
    rows: Tensor, bank: Tensor, rankings: Sequence[tuple[Tensor, Tensor]], counts: Sequence[int], space: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each ranking, the largest values ``[B, <= count]`` and their indices; write products to ``space``."""
    over = -len(bank) % GROUP
    width = len(bank) + over
    grouped = [(pad(weights, (0, over)), pad(added, (0, over), value=-math.inf)) for weights, added in rankings]
    products = space[: len(rows) * width].view(len(rows), width)
    products[:, len(bank) :] = 0
    maxima = [rows.new_empty(len(rows), width // GROUP) for _ in rankings]
    at_a_time = SUB_BANK if rows.device.type == "cpu" else width
    for start in range(0, width, at_a_time):
        stop = min(start + at_a_time, width)
        torch.mm(rows, bank[start:stop].T, out=products[:, start : min(stop, len(bank))])
        for largest, (weights, added) in zip(maxima, grouped, strict=True):
            ranked = torch.addcmul(added[start:stop], products[:, start:stop], weights[start:stop])
            torch.amax(ranked.unflatten(1, (-1, GROUP)), dim=2, out=largest[:, start // GROUP : stop // GROUP])
    return [
        _largest(products, *ranking, largest, min(count, len(bank)))
        for ranking, largest, count in zip(grouped, maxima, counts, strict=True)
    ]


def _largest(products: Tensor, weights: Tensor, added: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of ``w p + a``: they lie in the groups with the largest maxima, even with ties."""
    groups = maxima.topk(min(count, maxima.shape[1]), dim=1, sorted=False).indices
    flat = groups.flatten()
    first = torch.arange(0, maxima.numel(), maxima.shape[1], device=maxima.device)[:, None]
    inside = products.view(-1, GROUP).index_select(0, (groups + first).flatten())
    inside.mul_(weights.view(-1, GROUP).index_select(0, flat)).add_(added.view(-1, GROUP).index_select(0, flat))
    values, places = inside.view(len(products), -1).topk(count, dim=1)
    return values, groups.gather(1, places // GROUP) * GROUP + places % GROUP
