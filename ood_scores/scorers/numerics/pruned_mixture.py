"""Log densities of a Gaussian mixture, computed in full only for the classes that count.

Let the covariance of a class be ``L L^T`` and its mean mu, and let A ``[r, D]`` be ``U^T L^-1``, where the columns of U
``[D, r]`` are orthonormal. Then ``|A (x - mu)|^2 <= |L^-1 (x - mu)|^2``, the squared Mahalanobis distance, for every
row x and every U, because a projection makes no vector longer. These bounds take one float32 product with ``C r`` rows,
while the distances take ``C D^2`` operations in float64. U spans the whitened directions in which the other classes
lie, where the bound is nearly the distance.

For a center m, the largest distance s of a mean from it, and a row a of A, ``a (x - mu)`` is ``|a| (|x - m| + s)``
times the inner product of ``[a, -a (mu - m) / s] / |a|``, of length sqrt(2) or less, with ``[x - m, s] / (|x - m| +
s)``, of length 1 or less. Float32 computes that product with an error of less than ``1.5 (D + 9) 2^-24``, by which it
is brought closer to 0 before it is squared. ``MARGIN`` covers the rounding of everything else: of sums of squares in
float32, and of A and the distances in float64, for a condition number of L of up to 1e9. A bound that overflows is 0.

A class counts for a row unless its bound shows that its density is smaller than another one by a factor of more than
``exp(negligible)``. The class with the best bound comes first, then all those that may count beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from ood_scores.scorers.numerics.cholesky import FACTORED

RANK = 1 / 16
"""The rank r of the projections as a share of D."""

EVEN = 0.1
"""The share of the variance of the means that is added in all directions, for rows that lie elsewhere."""

MARGIN = 2.0**-10
"""The share by which bounds are lowered for rounding other than that of float32 products."""

PROJECTED = 2**21
"""The number of projected values ``[rows, classes, r]`` at a time, few enough for the caches of a processor."""

MOST = 0.5
"""The largest share of pairs of a row and a class that are computed one class at a time, rather than all pairs."""


@dataclass(frozen=True, eq=False)
class ClassBounds:
    """The projections A of all classes, the center m, and the largest distance s of a mean from it.

    Args:
        directions: ``[a, -a (mu - m) / s] / |a|`` for each row of A, float32 ``[C, r, D + 1]``.
        weights: ``|a|`` of each row, divided by the largest one of its class, float32 ``[C, r]``.
        scales: the largest ``|a|`` of each class, ``[C]``.
        center: m, ``[D]``.
        radius: s, a scalar.
    """

    directions: Tensor
    weights: Tensor
    scales: Tensor
    center: Tensor
    radius: Tensor

    def squares(self, values: Tensor) -> Tensor:
        """Return lower bounds of the squared distances of rows, float64 ``[B, D]``, to all classes, ``[C, B]``."""
        classes, rank, width = self.directions.shape
        centered = values - self.center
        lengths = torch.linalg.vector_norm(centered, dim=1, keepdim=True) + self.radius
        rows = torch.cat([centered / lengths, self.radius / lengths], dim=1).float()
        rounding = 1.5 * (width + 8) * 2.0**-24
        found = values.new_empty(classes, len(values))
        at_a_time = max(1, PROJECTED // (rank * max(1, len(values))))
        pieces = (part.split(at_a_time) for part in (found, self.directions, self.weights))
        for bounds, directions, weights in zip(*pieces, strict=True):
            products = softshrink(rows @ directions.flatten(0, 1).T, rounding).unflatten(1, weights.shape)
            bounds.copy_(torch.linalg.vector_norm(products.mul_(weights), dim=2).T)
        bounds = found.mul_(lengths.T).mul_(self.scales[:, None]).square_().mul_(1 - MARGIN)
        return bounds.nan_to_num_(nan=0.0, posinf=0.0)


def class_bounds(means: Tensor, factors: Tensor, numbers: Sequence[int]) -> ClassBounds:
    """Return the bounds for classes with means ``[C, D]``.

    Args:
        means: the means.
        factors: lower factors ``[F, D, D]`` of covariances.
        numbers: the number of the factor of each class.
    """
    width, tiny = means.shape[1], torch.finfo(means.dtype).tiny
    center = means.mean(dim=0)
    offsets = means - center
    radius = torch.linalg.vector_norm(offsets, dim=1).amax().clamp_min(tiny)
    spread = offsets.T @ offsets / len(means)
    spread.diagonal().add_(EVEN * spread.diagonal().mean().clamp_min(tiny))
    start = torch.randn(width, max(1, int(RANK * width)), generator=torch.Generator().manual_seed(0)).to(means)
    groups = zip(torch.tensor(numbers).split(FACTORED), offsets.split(FACTORED), strict=True)
    projections = torch.cat([_projections(factors[here], spread, away, start) for here, away in groups])
    sizes = torch.linalg.vector_norm(projections, dim=2)
    units = projections / sizes[:, :, None]
    directions = torch.cat([units, -(units @ offsets[:, :, None]) / radius], dim=2)
    scales = sizes.amax(dim=1)
    return ClassBounds(directions.float(), (sizes / scales[:, None]).float(), scales, center, radius)


def _projections(factors: Tensor, spread: Tensor, offsets: Tensor, start: Tensor) -> Tensor:
    """Return A ``[C, r, D]``; U spans about the first eigenvectors of ``L^-1 T L^-T``, by one subspace iteration.

    T is the second moment of the means about that of the class, ``spread`` plus the square of the class's offset.
    """
    rows = torch.linalg.solve_triangular(factors.mT, start.expand(len(factors), -1, -1), upper=True)
    moved = spread @ rows + offsets[:, :, None] * (offsets[:, None] @ rows)
    directions = torch.linalg.qr(torch.linalg.solve_triangular(factors, moved, upper=False)).Q
    return torch.linalg.solve_triangular(factors.mT, directions, upper=True).mT


def squares_that_count(
    bounds: Tensor,
    log_weights: Tensor,
    negligible: float,
    squares: Callable[[int, Tensor], Tensor],
    all_squares: Callable[[], Tensor],
) -> Tensor:
    """Return the squared distances ``[C, B]`` of the classes that count, and lower bounds of those of all others.

    Args:
        bounds: lower bounds of the squared distances ``[C, B]``, which are overwritten.
        log_weights: the log densities of the classes at distance 0, ``[C]``.
        negligible: the difference to another log density from which on a class does not count.
        squares: a function of the number of a class and of the numbers ``[b]`` of some rows that returns their squared
            distances, ``[b]``.
        all_squares: a function that returns those of all classes and rows, ``[C, B]``.
    """
    first = (log_weights[:, None] - 0.5 * bounds).argmax(dim=0, keepdim=True)
    known = torch.zeros_like(bounds, dtype=torch.bool).scatter_(0, first, True)
    _fill(bounds, known, squares)
    log_densities = log_weights[:, None] - 0.5 * bounds
    needed = (log_densities > log_densities.gather(0, first) - negligible) & ~known
    if needed.sum() > MOST * needed.numel():
        return all_squares()
    _fill(bounds, needed, squares)
    return bounds


def _fill(found: Tensor, needed: Tensor, squares: Callable[[int, Tensor], Tensor]) -> None:
    rows_of = needed.nonzero()[:, 1].split(needed.sum(dim=1).tolist())
    for number, rows in enumerate(rows_of):
        if len(rows):
            found[number, rows] = squares(number, rows)
