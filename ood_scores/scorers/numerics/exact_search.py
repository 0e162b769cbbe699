"""Exact search of one bank of unit rows, and sums over it, for several scorers: inner products are computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
    """A request for the ``count`` bank rows with the largest ``weights_i <x, b_i>``, or for the nearest ones.

    With ``lengths`` ``[B]``, they are those nearest to rows of these lengths in the directions x, and the bank rows may
    have any length. ``bank_lengths`` ``[N]`` are the ``lengths_of`` the bank, if they are known; with ``directions``,
    they are the lengths of rows whose directions the bank holds, and the nearest of those rows are requested.
    """

    bank: Tensor
    count: int
    weights: Tensor | None = None
    lengths: Tensor | None = None
    bank_lengths: Tensor | None = None
    directions: bool = False

    @cached_property
    def ranking(self) -> tuple[Tensor, Tensor]:
        """The weights w and offsets a, both ``[N]``, such that ``w_i <x, b_i> + a_i`` ranks the bank rows.

        For the nearest rows, a accounts for their lengths, ``(1 - |b|^2) / 2``: rounding, except for rows of zeros.
        With ``lengths``, it is ``-|b|^2 / 2``, to be divided by the length of the row; for ``directions``, w is |b|.
        """
        if self.weights is not None:
            return self.weights.float(), torch.zeros(len(self.bank), device=self.bank.device)
        constant = 1 if self.lengths is None else 0
        of_bank = lengths_of(self.bank) if self.bank_lengths is None else self.bank_lengths
        weights = of_bank.float() if self.directions else torch.ones(len(self.bank), device=self.bank.device)
        return weights, (constant - of_bank.square()).float() / 2

    @property
    def order(self) -> tuple[int, int, bool]:
        """A key that requests have in common if they rank the bank rows alike, whatever their counts."""
        return id(self.weights), id(self.lengths), self.directions


@dataclass(frozen=True, eq=False)
class Summed:
    """A request for sums over all bank rows.

    ``terms(products, rows, of_bank)`` returns the sums ``[b]``, float64, over some bank rows. The ``products`` ``[b,
    n]``, which must not be changed, are those of the rows in the slice ``rows`` with the bank rows in ``of_bank``.
    """

    bank: Tensor
    terms: Callable[[Tensor, slice, slice], Tensor]


def search_unit_rows(
    rows: Tensor,
    requests: Sequence[Wanted | Summed],
    rows_at_a_time: int | None = None,
    bank_at_a_time: int = SEARCH_BANK,
) -> list[Tensor]:
    """Return, for each request, the indices of its bank rows ``[B, count]``, best first, or its sums ``[B]``.

    They are on the device of the rows. The search is exact up to the rounding of the products. Requests that rank the
    bank rows alike are one search, for the largest count.

    Args:
        rows: normalized rows ``[B, D]``, float32; rows of zeros are allowed.
        requests: the requests, all for the same bank, which may be on the CPU if it is too large for the device.
        rows_at_a_time: the number of rows in one step; by default ``SEARCH_ROWS``, or ``DEVICE_ROWS`` on a device.
        bank_at_a_time: the number of bank rows in one step, a multiple of ``GROUP``.
    """
    bank = requests[0].bank
    wanted = _largest_of_each_order([each for each in requests if isinstance(each, Wanted)])
    summed = {each: rows.new_zeros(len(rows), dtype=torch.float64) for each in requests if isinstance(each, Summed)}
    rows_at_a_time = rows_at_a_time or (SEARCH_ROWS if rows.device.type == "cpu" else DEVICE_ROWS)
    found = {want.order: rows.new_empty(len(rows), want.count, dtype=torch.int64) for want in wanted}
    space = rows.new_empty(min(rows_at_a_time, len(rows)) * min(bank_at_a_time, len(bank) + -len(bank) % GROUP))
    for first in range(0, len(rows), rows_at_a_time):
        here = slice(first, min(first + rows_at_a_time, len(rows)))
        part = rows[here]
        best = [(part.new_empty(len(part), 0), part.new_empty(len(part), 0, dtype=torch.int64)) for _ in wanted]
        for start in range(0, len(bank), bank_at_a_time):
            piece = _Piece(part, here, bank, slice(start, min(start + bank_at_a_time, len(bank))), space, wanted)
            for of_bank, products in piece.products():
                for each, sums in summed.items():
                    sums[here] += each.terms(products, here, of_bank)
            best = [
                (torch.cat([values, more], dim=1), torch.cat([numbers, places + start], dim=1))
                for (values, numbers), (more, places) in zip(best, piece.largest(), strict=True)
            ]
        for want, (values, places) in zip(wanted, best, strict=True):
            found[want.order][here] = places.gather(1, values.topk(want.count, dim=1).indices)
    return [found[each.order][:, : each.count] if isinstance(each, Wanted) else summed[each] for each in requests]


def _largest_of_each_order(wanted: Sequence[Wanted]) -> list[Wanted]:
    largest: dict[tuple[int, int, bool], Wanted] = {}
    for want in wanted:
        known = largest.setdefault(want.order, want)
        largest[want.order] = max(known, want, key=lambda each: each.count)
    return list(largest.values())


def lengths_of(bank: Tensor) -> Tensor:
    """The lengths of the bank rows, float64 ``[N]``."""
    return torch.linalg.vector_norm(bank, dim=1, dtype=torch.float64)


class _Piece:
    """The inner products of some rows with a piece of the bank, written to ``space``, and the largest of each ranking.

    ``products`` computes them, as many at a time as a CPU's caches hold; ``largest`` then returns the values ``[B, <=
    count]`` of each ranking, and their places.
    """

    def __init__(
        self, rows: Tensor, here: slice, bank: Tensor, piece: slice, space: Tensor, wanted: Sequence[Wanted]
    ) -> None:
        self._rows, self._start, self._bank = rows, piece.start, bank[piece].to(rows)
        self._counts = [min(want.count, len(self._bank)) for want in wanted]
        over = -len(self._bank) % GROUP
        width = len(self._bank) + over
        self._rankings = [
            _Ranking(
                pad(weights[piece].to(rows), (0, over)), pad(added[piece].to(rows), (0, over), value=-math.inf), scale
            )
            for (weights, added), scale in ((want.ranking, _scale(want, here, rows)) for want in wanted)
        ]
        self._products = space[: len(rows) * width].view(len(rows), width)
        self._products[:, len(self._bank) :] = 0
        self._maxima = [rows.new_empty(len(rows), width // GROUP) for _ in wanted]

    def products(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some bank rows, as a slice, and the products ``[B, n]`` with them, until all are computed."""
        width = self._products.shape[1]
        at_a_time = SUB_BANK if self._rows.device.type == "cpu" else width
        for start in range(0, width, at_a_time):
            stop, last = min(start + at_a_time, width), min(start + at_a_time, len(self._bank))
            products = self._products[:, start:last]
            torch.mm(self._rows, self._bank[start:last].T, out=products)
            for largest, ranking in zip(self._maxima, self._rankings, strict=True):
                ranked = ranking.of(self._products[:, start:stop], start, stop)
                torch.amax(ranked.unflatten(1, (-1, GROUP)), dim=2, out=largest[:, start // GROUP : stop // GROUP])
            yield slice(self._start + start, self._start + last), products

    def largest(self) -> list[tuple[Tensor, Tensor]]:
        return [
            _largest(self._products, ranking, maxima, count)
            for ranking, maxima, count in zip(self._rankings, self._maxima, self._counts, strict=True)
        ]


@dataclass(frozen=True)
class _Ranking:
    """The weights and offsets of a ``Wanted``, and the factors ``[B, 1]`` of the offsets, if each row has its own."""

    weights: Tensor
    added: Tensor
    scale: Tensor | None

    def of(self, products: Tensor, start: int, stop: int) -> Tensor:
        """Return what ranks the bank rows ``start .. stop``, given the products ``[B, n]`` with them."""
        added = self.added[start:stop] if self.scale is None else self.added[start:stop] * self.scale
        return torch.addcmul(added, products, self.weights[start:stop])

    def of_groups(self, products: Tensor, groups: Tensor) -> Tensor:
        """Return the same for bank rows in the groups ``[B, g]`` of each row, given the products ``[B, g GROUP]``."""
        weights, added = (
            values.view(-1, GROUP).index_select(0, groups.flatten()).view_as(products)
            for values in (self.weights, self.added)
        )
        return products.mul_(weights).add_(added if self.scale is None else added.mul_(self.scale))


def _scale(want: Wanted, rows: slice, like: Tensor) -> Tensor | None:
    return None if want.lengths is None else want.lengths[rows].reciprocal().to(like)[:, None]


def _largest(products: Tensor, ranking: _Ranking, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of a ranking: they lie in the groups with the largest maxima, even with ties."""
    groups = maxima.topk(min(count, maxima.shape[1]), dim=1, sorted=False).indices
    first = torch.arange(0, maxima.numel(), maxima.shape[1], device=maxima.device)[:, None]
    inside = products.view(-1, GROUP).index_select(0, (groups + first).flatten()).view(len(products), -1)
    values, places = ranking.of_groups(inside, groups).topk(count, dim=1)
    return values, groups.gather(1, places // GROUP) * GROUP + places % GROUP
