"""Cholesky factors of class covariances, with the jitter that a singular covariance needs.

A few factors are held in memory as ``[C, D, D]``. Many are *packed* one after the other into one vector, which may be
mapped from a file: for a class with few rows, the directions that these rows span; for any other class, the lower
triangle without the zeros.
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
"""The values added to the diagonal of a class covariance, smallest first, until it is positive definite."""

SOLVED = 128
"""The number of features solved for at a time. The layout of packed factors in saved scorers depends on it."""

FACTORED = 8
"""The number of covariances that a CPU copies and factors at a time."""

BATCH_BYTES = 2**28
"""The size of the matrices of several classes that a device processes at a time."""

LOW_RANK = 1 / 4
"""A class whose number of rows is at most this share of D is stored as the directions that they span, which takes less
memory than a triangle and no more operations."""


def cholesky_with_jitter(covariances: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return the lower factors ``[C, D, D]`` and the jitter ``[C]`` that each matrix needed.

    A matrix counts as positive definite if the factorization leaves more of every diagonal entry than its rounding
    error: a singular matrix may be factored by luck, and its determinant is then noise.

    Args:
        covariances: the matrices ``[C, D, D]``.
        first: the number of the first class, for error messages.

    Raises:
        BadInput: if a matrix is not positive definite even with the largest jitter.
    """
    factors, jitter = torch.empty_like(covariances), covariances.new_zeros(len(covariances))
    rounding = torch.finfo(covariances.dtype).eps * covariances.shape[1]
    at_a_time = FACTORED if covariances.device.type == "cpu" else classes_at_a_time(covariances[0].numel())
    for pending in torch.arange(len(covariances), device=covariances.device).split(at_a_time):
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


def classes_at_a_time(values: int) -> int:
    """Return the number of classes, with that many float64 values each, that a device processes at a time."""
    return max(1, BATCH_BYTES // (8 * max(1, values)))


def inverted_diagonal(factors: Tensor, size: int = SOLVED) -> Tensor:
    """Return the inverses ``[C, ceil(D / S), S, S]`` of the diagonal blocks of lower factors, with S = min(size, D).

    The last block is padded with the identity.
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
    """Yield, for each block of rows of a lower factor, the part before the diagonal block and that block's inverse."""
    size = inverses.shape[-1]
    for inverse, start in zip(inverses, range(0, len(factor), size), strict=True):
        left = factor[start : start + size, :start]
        yield left, inverse[: len(left), : len(left)]


def solved(rows: Iterable[tuple[Tensor, Tensor]], columns: Tensor) -> Tensor:
    """Return ``L^-1 x`` for every column x of ``[D, B]``, which is overwritten.

    The substitution works on blocks: nearly all of it is matrix products, which run more than twice as fast as a
    triangular solve. Only the small diagonal blocks are inverted, so that it is as accurate as a triangular solve.

    Args:
        rows: the ``block_rows`` of L.
        columns: the columns ``[D, B]``.
    """
    found, start = torch.empty_like(columns), 0
    for left, inverse in rows:
        stop = start + len(left)
        if start:
            columns[start:stop].addmm_(left, found[:start], alpha=-1)
        torch.mm(inverse, columns[start:stop], out=found[start:stop])
        start = stop
    return found


def solved_squares(rows: Iterable[tuple[Tensor, Tensor]], columns: Tensor) -> Tensor:
    """Return ``|L^-1 x|^2`` for every column x of ``[D, B]``, which is overwritten; see ``solved``."""
    found = solved(rows, columns)
    return torch.mul(found, found, out=columns).sum(dim=0)


def squares_about(rows: Iterable[tuple[Tensor, Tensor]], columns: Tensor, means: Tensor) -> Tensor:
    """Return ``|L^-1 (x - mu)|^2`` for every column x of ``[D, B]`` and every row mu of ``[M, D]``, as ``[M, B]``.

    The columns are solved for once for all means, which need not have a product with L each.
    """
    if len(means) == 1:
        return solved_squares(rows, columns - means[0][:, None])[None]
    rows, center = list(rows), means.mean(dim=0)[:, None]
    values, origins = solved(rows, columns - center), solved(rows, means.T - center)
    return torch.stack([(values - origin[:, None]).square_().sum(dim=0) for origin in origins.T])


def all_solved_squares(factors: Tensor, inverses: Tensor, columns: Tensor) -> Tensor:
    """Return ``solved_squares`` of ``[C, D, B]`` for all factors, ``[C, B]``, without in-place writes, for tracing."""
    size, solved = inverses.shape[-1], columns[:, :0]
    for number, start in enumerate(range(0, columns.shape[1], size)):
        stop = min(start + size, columns.shape[1])
        here = columns[:, start:stop] - factors[:, start:stop, :start] @ solved if start else columns[:, start:stop]
        inverse = inverses[:, number, : stop - start, : stop - start]
        solved = torch.cat([solved, inverse @ here], dim=1)
    return solved.square().sum(dim=1)


# --- packed -----------------------------------------------------------------------------------------------------------


def packed_size(rank: int, width: int) -> int:
    """Return the length of the packed factor of a class; ``rank`` is its number of rows, or D for a triangle."""
    if rank < width:
        return rank * (width + rank)
    stops = [min(start + SOLVED, width) for start in range(0, width, SOLVED)]
    return sum((stop - start) * stop for start, stop in zip([0, *stops], stops, strict=False))


def pack_covariance(covariance: Tensor, number: int) -> tuple[Tensor, float, Tensor]:
    """Return the packed triangle of a class covariance ``[D, D]``, its jitter, and the log of its determinant."""
    factors, jitter = cholesky_with_jitter(covariance[None], number)
    parts = block_rows(factors[0], inverted_diagonal(factors)[0])
    packed = torch.cat([torch.cat(part, dim=1).flatten() for part in parts])
    return packed, float(jitter), 2 * factors[0].diagonal().log().sum()


def pack_rows(rows: Tensor, number: int) -> tuple[Tensor, float, Tensor]:
    """Return ``pack_covariance`` of ``R^T R`` for rows R ``[n, D]``, n < D, without forming that matrix.

    With the orthonormal basis Q ``[D, n]`` of the rows, ``R^T R + j I`` is ``Q K Q^T`` in their span and ``j I``
    outside of it. The packed factor holds Q and the triangle of ``K = L L^T``, which is computed from the rows rather
    than from their products and therefore has twice as many correct digits as a factored covariance.
    """
    count, width = rows.shape
    jitter = _jitter_of(rows, number)
    basis, triangle = torch.linalg.qr(rows.T)
    identity = torch.eye(count, dtype=rows.dtype, device=rows.device)
    root = torch.linalg.qr(torch.cat([triangle.T, math.sqrt(jitter) * identity]), mode="r").R
    log_determinant = 2 * root.diagonal().abs().log().sum() + (width - count) * math.log(jitter)
    return torch.cat([basis.T.flatten(), root.flatten()]), jitter, log_determinant


def packed_squares(packed: Tensor, rank: int, jitter: float, columns: Tensor) -> Tensor:
    """Return ``x^T Sigma^-1 x`` for every column x of ``[D, B]``, which is overwritten, given a packed factor."""
    width = len(columns)
    if rank == width:
        return solved_squares(unpacked(packed, width), columns)
    basis, root = packed[: rank * width].view(rank, width), packed[rank * width :].view(rank, rank)
    inside = basis @ columns
    outside = columns.addmm_(basis.T, inside, alpha=-1)
    solved = torch.linalg.solve_triangular(root.T, inside, upper=False)
    return solved.square_().sum(dim=0) + outside.square_().sum(dim=0) / jitter


def reserved(count: int, folder: Path | None) -> Tensor:
    """Return a float64 tensor ``[count]`` in an unnamed file, which is deleted together with the tensor.

    The disk space is allocated at once, so that a full disk is an error here rather than a crash on a later write.

    Args:
        count: the number of values.
        folder: the folder of the file; the folder for temporary files if it is None or not writable.

    Raises:
        CacheWriteFailed: if the disk has not enough space.
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
            f"the factors of the class covariances take {size / 2**30:,.1f} GiB, for which there is no space in "
            f"{folder} ({error}): free some space there, or fit on a set that is stored on a larger disk."
        ) from error


def unpacked(packed: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ``block_rows`` of a packed triangle."""
    first = 0
    for start in range(0, width, SOLVED):
        stop = min(start + SOLVED, width)
        block = packed[first : first + (stop - start) * stop].view(stop - start, stop)
        yield block[:, :start], block[:, start:]
        first += block.numel()


def _jitter_of(rows: Tensor, number: int) -> float:
    """Return the jitter that ``cholesky_with_jitter`` finds for ``R^T R``, which is singular, so never 0."""
    variances, rounding = rows.square().sum(dim=0), torch.finfo(rows.dtype).eps * rows.shape[1]
    for amount in JITTERS[1:]:
        if (pivots(rows, amount) > rounding * (variances + amount)).all():
            return amount
    raise _hopeless(number)


def _hopeless(number: int) -> BadInput:
    return BadInput(f"class covariance {number} is not positive definite even with {JITTERS[-1]} added.")


def pivots(rows: Tensor, jitter: float, size: int = SOLVED) -> Tensor:
    """Return the squared diagonal ``[D]`` of the Cholesky factor of ``R^T R + j I`` without forming that matrix.

    The variance of feature b (a column of R) that remains given the features before it is
    ``j (1 + b^T (B B^T + j I)^-1 b)``, where B holds the columns before it: all matrices have the size of the rows.
    An entry is NaN where the factorization fails.
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
