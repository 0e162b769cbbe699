"""Factors of class covariances, with the jitter that a singular one needs.

A few in memory, as ``[C, D, D]``; or *packed* one after the other into one long row, which may lie in a file: of a
class with few rows the directions that these span, of any other a triangle without the zeros above it.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ood_scores.errors import BadInput, CacheWriteFailed

JITTERS = (0.0, torch.finfo(torch.float64).eps, *(10.0**power for power in range(-10, 0)))
"""What is added to the diagonal of a class covariance, smallest first, until it is positive definite."""

SOLVED = 128
"""Features that are solved for at a time. Packed factors that were saved depend on it."""

FACTORISED = 8
"""Covariances of which copies are factorised at a time."""

LOW_RANK = 1 / 4
"""A class of at most this share of D rows is kept as the directions that they span: up to there it takes less memory
than a triangle, and no more operations."""


def cholesky_with_jitter(covariances: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Lower factors ``[C, D, D]`` and the jitter ``[C]`` each matrix needed; ``first`` numbers the first of them.

    A matrix counts as positive definite if what the factorisation leaves of every diagonal entry is more than its
    rounding error: a singular matrix can be factorised by luck, and its determinant is then noise.

    Raises BadInput if one is not positive definite even with the largest jitter.
    """
    factors, jitter = torch.empty_like(covariances), covariances.new_zeros(len(covariances))
    rounding = torch.finfo(covariances.dtype).eps * covariances.shape[1]
    for pending in torch.arange(len(covariances), device=covariances.device).split(FACTORISED):
        for amount in JITTERS:
            jitter[pending] = amount
            candidates = covariances[pending]
            candidates.diagonal(dim1=1, dim2=2).add_(amount)
            found, failed = torch.linalg.cholesky_ex(candidates)
            left = found.diagonal(dim1=1, dim2=2).square() / candidates.diagonal(dim1=1, dim2=2)
            factors[pending] = found
            pending = pending[(failed != 0) | ~(left > rounding).all(dim=1)]
            if not len(pending):
                break
        else:
            raise _hopeless(first + int(pending[0]))
    return factors, jitter


def inverted_diagonal(factors: Tensor, size: int = SOLVED) -> Tensor:
    """The inverses ``[C, ceil(D / S), S, S]`` of the diagonal blocks of lower factors, S = ``size`` or D if less.

    The last block is filled up with the identity.
    """
    width = factors.shape[1]
    size = min(size, width)
    blocks = torch.eye(size, dtype=factors.dtype, device=factors.device).repeat(len(factors), -(-width // size), 1, 1)
    for number, start in enumerate(range(0, width, size)):
        block = factors[:, start : start + size, start : start + size]
        here = blocks[:, number, : block.shape[1], : block.shape[1]]
        here.copy_(torch.linalg.solve_triangular(block, here, upper=False))
    return blocks


def block_rows(factor: Tensor, inverses: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every ``SOLVED`` rows of a lower factor what is left of the diagonal block, and that block's inverse."""
    size = inverses.shape[-1]
    for inverse, start in zip(inverses, range(0, len(factor), size), strict=True):
        left = factor[start : start + size, :start]
        yield left, inverse[: len(left), : len(left)]


def solved_squares(rows: Iterable[tuple[Tensor, Tensor]], columns: Tensor) -> Tensor:
    """``|L^-1 x|^2`` of every column x of ``[D, B]``, which is overwritten; the ``block_rows`` of L.

    Substitution by blocks: nearly all of it is matrix products, which run at more than twice the speed of a triangular
    solve, and only the small diagonal blocks are inverted, so that it is as accurate as one.
    """
    solved, start = torch.empty_like(columns), 0
    for left, inverse in rows:
        stop = start + len(left)
        if start:
            columns[start:stop].addmm_(left, solved[:start], alpha=-1)
        torch.mm(inverse, columns[start:stop], out=solved[start:stop])
        start = stop
    return torch.mul(solved, solved, out=columns).sum(dim=0)


def all_solved_squares(factors: Tensor, inverses: Tensor, columns: Tensor) -> Tensor:
    """``solved_squares`` of ``[C, D, B]`` for all factors, ``[C, B]``; overwrites nothing, so that it can be traced."""
    size, solved = inverses.shape[-1], columns[:, :0]
    for number, start in enumerate(range(0, columns.shape[1], size)):
        stop = min(start + size, columns.shape[1])
        here = columns[:, start:stop] - factors[:, start:stop, :start] @ solved if start else columns[:, start:stop]
        inverse = inverses[:, number, : stop - start, : stop - start]
        solved = torch.cat([solved, inverse @ here], dim=1)
    return solved.square().sum(dim=1)


# --- packed -----------------------------------------------------------------------------------------------------------


def packed_size(rank: int, width: int) -> int:
    """How many numbers the packed factor of a class takes; ``rank`` is its number of rows, or D for a triangle."""
    if rank < width:
        return rank * (width + rank)
    stops = [min(start + SOLVED, width) for start in range(0, width, SOLVED)]
    return sum((stop - start) * stop for start, stop in zip([0, *stops], stops, strict=False))


def pack_covariance(covariance: Tensor, number: int) -> tuple[Tensor, float, Tensor]:
    """The packed triangle of a class covariance ``[D, D]``, its jitter, and the logarithm of its determinant."""
    factors, jitter = cholesky_with_jitter(covariance[None], number)
    parts = block_rows(factors[0], inverted_diagonal(factors)[0])
    packed = torch.cat([torch.cat(part, dim=1).flatten() for part in parts])
    return packed, float(jitter), 2 * factors[0].diagonal().log().sum()


def pack_rows(rows: Tensor, number: int) -> tuple[Tensor, float, Tensor]:
    """As ``pack_covariance`` of ``R^T R``, of rows R ``[n, D]``, n < D; that matrix is never formed.

    With the orthonormal basis Q ``[D, n]`` of the rows, ``R^T R + j I`` is ``Q K Q^T`` in their span, and ``j I``
    outside it. Kept are Q and the triangle of ``K = L L^T``; it comes from the rows, not from their products, and so
    has twice the digits that a factorised covariance has.
    """
    count, width = rows.shape
    jitter = _jitter_of(rows, number)
    basis, triangle = torch.linalg.qr(rows.T)
    identity = torch.eye(count, dtype=rows.dtype, device=rows.device)
    root = torch.linalg.qr(torch.cat([triangle.T, math.sqrt(jitter) * identity]), mode="r").R
    log_determinant = 2 * root.diagonal().abs().log().sum() + (width - count) * math.log(jitter)
    return torch.cat([basis.T.flatten(), root.flatten()]), jitter, log_determinant


def packed_squares(packed: Tensor, rank: int, jitter: float, columns: Tensor) -> Tensor:
    """``x^T Sigma^-1 x`` of every column x of ``[D, B]``, which is overwritten, by the packed factor of Sigma."""
    width = len(columns)
    if rank == width:
        return solved_squares(_unpacked(packed, width), columns)
    basis, root = packed[: rank * width].view(rank, width), packed[rank * width :].view(rank, rank)
    inside = basis @ columns
    outside = columns.addmm_(basis.T, inside, alpha=-1)
    solved = torch.linalg.solve_triangular(root.T, inside, upper=False)
    return solved.square_().sum(dim=0) + outside.square_().sum(dim=0) / jitter


def reserved(count: int, folder: Path | None) -> Tensor:
    """Room for float64 in a file without a name, which goes with the tensor.

    The disk is asked for all of it at once, so that a full one is an error here and not a crash on some later write.

    Args:
        count: of numbers.
        folder: where; the folder for temporary files if it is None or cannot be written to.

    Raises:
        CacheWriteFailed: there is no such room.
    """
    folder = folder if folder and os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    size = 8 * count
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.float64)
    except OSError as error:
        raise CacheWriteFailed(
            f"the factors of the class covariances take {size / 2**30:,.1f} GiB, for which there is no room in {folder}"
            f" ({error}): make room there, or fit on a set that lies on a larger disk."
        ) from error


def _unpacked(packed: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The ``block_rows`` of a packed triangle."""
    first = 0
    for start in range(0, width, SOLVED):
        stop = min(start + SOLVED, width)
        block = packed[first : first + (stop - start) * stop].view(stop - start, stop)
        yield block[:, :start], block[:, start:]
        first += block.numel()


def _jitter_of(rows: Tensor, number: int) -> float:
    """The jitter that ``cholesky_with_jitter`` finds for ``R^T R``: not 0, since there are fewer rows than features."""
    variances, rounding = rows.square().sum(dim=0), torch.finfo(rows.dtype).eps * rows.shape[1]
    for amount in JITTERS[1:]:
        if (pivots(rows, amount) > rounding * (variances + amount)).all():
            return amount
    raise _hopeless(number)


def _hopeless(number: int) -> BadInput:
    return BadInput(f"class covariance {number} is not positive definite even with {JITTERS[-1]} added.")


def pivots(rows: Tensor, jitter: float, size: int = SOLVED) -> Tensor:
    """The squared diagonal of the Cholesky factor of ``R^T R + j I``, ``[D]``, without that matrix; NaN where it fails.

    Given the features before it, what is left of the variance of feature b (a column of R) is
    ``j (1 + b^T (B B^T + j I)^-1 b)``, with the columns before it in B: matrices of the size of the rows.
    """
    within, found = jitter * torch.eye(len(rows), dtype=rows.dtype, device=rows.device), []
    for columns in rows.split(max(size, len(rows)), dim=1):
        known = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(within).L, columns, upper=False)
        ratios = known.T @ known
        ratios.diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(ratios)
        found.append(jitter * factor.diagonal().square() if not failed else factor.diagonal() * math.nan)
        within.addmm_(columns, columns.T)
    return torch.cat(found)
