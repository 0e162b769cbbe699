"""Roots of inverse covariances, rows in the space where the covariance is the identity, and the precision they need."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import FeatureSet
from ood_scores.features.statistics.moments import Moments
from ood_scores.scorers.numerics.cholesky import SOLVED

ROUNDED = 4.0
"""Deviations of features of up to so many units of their last digit are rounding alone."""

AMPLIFIED = 3e5
"""Float32 features are whitened in float32 unless whitening multiplies the length of deviations by more than this."""

LOST = 1e-3
"""Squared distances are float32 unless its rounding may reach this share of their spread among the fit rows."""


def amplifies(root: Tensor, moments: Moments) -> bool:
    """Return whether whitening lengthens rows so much that their rounding in float32 matters.

    What is rounded is the deviation of a row from the mean, and the row or the mean itself, which may be much longer.
    """
    means = moments.means[moments.counts > 0]
    largest = means.square().sum(dim=1).mean()
    between = means - means.mean(dim=0)
    spread = moments.scatter.trace() / moments.counts.sum() + between.square().sum(dim=1).mean()
    return bool(root.norm(dim=0).amax() * spread.maximum(largest).sqrt() > AMPLIFIED)


def loses_distances(means: Tensor) -> bool:
    """Return whether float32 would lose the squared distances to whitened means ``[C, K]``.

    Their terms are as large as the squared lengths of the means, which are long if classes are far apart or collapsed,
    while the squared distances of the fit rows to their own mean have a standard deviation of about ``sqrt(2 K)``.
    """
    longest = means.square().sum(dim=1).amax()
    return bool(torch.finfo(torch.float32).eps * longest > LOST * math.sqrt(2 * means.shape[1]))


def tied_whitening(moments: Moments, feats: FeatureSet) -> Tensor:
    """Return the ``whitening`` of the pooled covariance, without directions that rounding alone fills.

    The features that a LayerNorm returns lie in a hyperplane, from which rounding moves them by about one unit of the
    last digit. If this direction were kept, scores would depend on the device, the batch size, and the runtime.
    """
    rows, width = moments.counts.sum(), moments.means.shape[1]
    squares = moments.scatter.trace() + moments.counts.double() @ moments.means.square().sum(dim=1)
    digit = torch.finfo(torch.promote_types(feats.columns["features"].dtype, torch.float32)).eps
    return whitening(moments.scatter / rows, noise=float((ROUNDED * digit) ** 2 * squares / (rows * width)))


def whitening(covariance: Tensor, noise: float = 0.0) -> Tensor:
    """W ``[D, K]`` such that ``W W^T`` is the inverse of the covariance, or its pseudo-inverse (K < D) if singular.

    Directions whose variance is at most ``noise`` are left out, too.
    """
    cholesky, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = cholesky.diagonal()
    smallest = torch.finfo(covariance.dtype).eps * len(covariance)
    is_regular = not failed and bool((diagonal.amin() / diagonal.amax()).square() > smallest)
    if is_regular and (diagonal.amin() > len(covariance) * noise**0.5 or torch.linalg.eigvalsh(covariance)[0] > noise):
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        return torch.linalg.solve_triangular(cholesky, identity, upper=False).T
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > max(smallest * float(values.amax()), noise)
    if not kept.any():
        raise BadInput("the features do not vary within any class and have no covariance: fit on more rows.")
    return vectors[:, kept] / values[kept].sqrt()


def whitened(rows: Tensor, root: Tensor, size: int = SOLVED) -> Tensor:
    """``rows @ root`` for a root from ``whitening``; a triangular root is multiplied without its zeros."""
    if torch.compiler.is_compiling() or root.device.type != "cpu" or root.tril(-1).any():
        return rows @ root  # a graph cannot look at the root, and the host would have to wait for a GPU
    found = rows.new_empty(len(rows), root.shape[1])
    for start in range(0, root.shape[1], size):
        stop = min(start + size, root.shape[1])
        torch.mm(rows[:, :stop], root[:stop, start:stop], out=found[:, start:stop])
    return found
