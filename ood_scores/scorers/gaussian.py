"""Gaussians fitted to the features of each class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.statistics import ClassMoments, Statistic
from ood_scores.scorers.base import Scorer, register_scorer

JITTERS = (0.0, torch.finfo(torch.float64).eps, *(10.0**power for power in range(-10, 0)))
"""What is added to the diagonal of a class covariance, smallest first, until it is positive definite."""

DENSITY_BYTES = 4 * 2**20
"""Bound on the whitened copy ``[rows, D]`` that one step of the mixture's density makes: it stays in the caches."""

SOLVED = 128
"""Features that are solved for at a time."""

FACTORISED = 8
"""Covariances of which copies are factorised at a time."""


@register_scorer("mahalanobis")
@dataclass
class Mahalanobis(Scorer):
    """Distance to the nearest class mean, ``-min_c (z - mu_c)^T Sigma^-1 (z - mu_c)``.

    Fits class means and one tied covariance, the pooled within-class scatter divided by N, in float64. Scores have the
    precision that the features are kept in: float32 features have errors of their own of the size that a product makes.

    Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
    Attacks", on penultimate features, without input perturbation. Directions in which the fit data do not vary (a
    singular covariance) are left out, as a pseudo-inverse does.

    Fails on near OoD: the distance is mostly that in directions that do not tell classes apart (Ren et al. 2021).

    Args:
        normalize: L2-normalise features at fit and at score.

    Cost: one product with a ``[D, D]`` and one with a ``[D, C]`` matrix for each block.
    """

    normalize: bool = False
    whitening_: Tensor = field(init=False, repr=False, compare=False)
    means_: Tensor = field(init=False, repr=False, compare=False)
    centre_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("features",)
    fit_needs = ("features", "labels")

    def statistics(self) -> Sequence[Statistic]:
        return (ClassMoments("features", self.normalize),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (moments,) = (found[statistic] for statistic in self.statistics())
        means = moments.means[_classes_present(moments.counts)]
        self.centre_ = means.mean(dim=0)
        self.whitening_ = whitening(moments.scatter / moments.counts.sum())
        self.means_ = (means - self.centre_) @ self.whitening_

    def score_block(self, block: Block) -> Tensor:
        features = block.unit_features() if self.normalize else block.features
        rows = whitened(features - self.centre_.to(features), self.whitening_.to(features))
        return -squared_distances(rows, self.means_.to(features)).amin(dim=1)


@register_scorer("mahalanobis_pp")
@dataclass
class MahalanobisPP(Mahalanobis):
    """Mahalanobis distance of L2-normalised features: ``mahalanobis`` with ``normalize=True`` as its default.

    Source: Mueller & Hein 2025, "Mahalanobis++: Improving OOD Detection via Feature Normalization". The norms of
    features differ more between classes and between ID and OoD rows than Gaussians with one covariance allow; on the
    sphere they cannot. Normalised before the means and the covariance are fitted, as in the authors' code; the means
    are not normalised again.

    Fails where the norm is what tells OoD rows apart (models trained with an L2-normalised head).

    Args:
        normalize: L2-normalise features at fit and at score.

    Cost: as ``mahalanobis``.
    """

    normalize: bool = True


@register_scorer("relative_mahalanobis")
@dataclass
class RelativeMahalanobis(Scorer):
    """Distance to the nearest class relative to that to the whole data, ``-min_c (d_c - d_0)``.

    ``d_c = (z - mu_c)^T Sigma^-1 (z - mu_c)`` with the tied covariance of ``mahalanobis``, and
    ``d_0 = (z - mu)^T Sigma_0^-1 (z - mu)`` with mean and covariance of all rows; both covariances divided by N.

    Fits class means and the scatter within classes; that of all rows is it plus the scatter between the class means, so
    that it takes no further pass. Only the directions in which class means differ (C - 1 at most) are kept: in all
    others, once whitened, ``d_c`` and ``d_0`` are the same number and cancel. With p the coordinates of ``z - mu`` in
    these directions, m_c those of the class means and lambda their variances,
    ``d_c - d_0 = |m_c|^2 - 2 p m_c + sum_k p_k^2 lambda_k / (1 + lambda_k)``, without the cancellation.

    Source: Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection". Departure:
    directions in which the fit data do not vary within any class (a singular covariance) are left out of both
    distances. Inverting both covariances on their own, as by a pseudo-inverse or a ridge, would leave them in ``d_0``,
    and a row that is odd there would score higher for it.

    Fails on rows that are odd in directions that do not tell classes apart: they count nothing. A model with a
    single class scores 0 for every row.

    Args:
        normalize: L2-normalise features at fit and at score ("relative Mahalanobis++" of Mueller & Hein 2025).

    Cost: one product with a ``[D, C]`` and one with a ``[C, C]`` matrix for each block.
    """

    normalize: bool = False
    mean_: Tensor = field(init=False, repr=False, compare=False)
    directions_: Tensor = field(init=False, repr=False, compare=False)
    means_: Tensor = field(init=False, repr=False, compare=False)
    shares_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("features",)
    fit_needs = ("features", "labels")

    def statistics(self) -> Sequence[Statistic]:
        return (ClassMoments("features", self.normalize),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (moments,) = (found[statistic] for statistic in self.statistics())
        present = _classes_present(moments.counts)
        means, weights = moments.means[present], moments.counts[present] / moments.counts.sum().double()
        root = whitening(moments.scatter / moments.counts.sum())
        self.mean_ = weights @ means
        centred = (means - self.mean_) @ root
        _, deviations, axes = torch.linalg.svd(weights.sqrt()[:, None] * centred, full_matrices=False)
        self.directions_, self.means_ = root @ axes.T, centred @ axes.T
        self.shares_ = deviations.square() / (1 + deviations.square())

    def score_block(self, block: Block) -> Tensor:
        features = block.unit_features() if self.normalize else block.features
        means = self.means_.to(features)
        rows = (features - self.mean_.to(features)) @ self.directions_.to(features)
        nearest = (means.square().sum(dim=1) - 2 * rows @ means.T).amin(dim=1)
        return -(nearest + rows.square() @ self.shares_.to(features))


@register_scorer("gmm")
@dataclass
class GMM(Scorer):
    """Log density of one full-covariance Gaussian for each class, ``logsumexp_c log N(z; mu_c, Sigma_c)``.

    Fits, in float64, class means and covariances (divided by ``n_c - 1``), each with the smallest jitter of
    ``JITTERS`` on its diagonal that makes it positive definite. A class with a single row gets the tied covariance,
    with a warning; a class without rows is left out.

    Source: Mukhoti et al. 2021 (DDU); Haas et al. 2022 on L2-normalised features. DDU's code takes one jitter for all
    classes, from a ladder that starts at 2e-308, and accepts a factorisation that succeeds by rounding alone.

    Fails with fewer rows of a class than features: its covariance is singular, and the jitter decides.

    Args:
        space: ``"features"`` or ``"logits"``.
        normalize: L2-normalise at fit *and* at score (Haas 2022).
        prior: ``"none"``, equal weight for every class, as DDU's code does; ``"empirical"``, log n_c/N added, as the
            ``q(y)`` of DDU's paper says.
        output: ``"density"``; or ``"entropy"``: minus the entropy of the responsibilities of the classes.

    Cost: ``C D^2`` operations a row, in matrix products, and ``C D^2`` float64 of memory.
    """

    space: Literal["features", "logits"] = "features"
    normalize: bool = False
    prior: Literal["none", "empirical"] = "none"
    output: Literal["density", "entropy"] = "density"
    means_: Tensor = field(init=False, repr=False, compare=False)
    cholesky_: Tensor = field(init=False, repr=False, compare=False)
    log_weights_: Tensor = field(init=False, repr=False, compare=False)
    jitter_: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.require(self.space in ("features", "logits"), f"space is 'features' or 'logits', got {self.space!r}")
        self.require(self.prior in ("none", "empirical"), f"prior is 'none' or 'empirical', got {self.prior!r}")
        self.require(self.output in ("density", "entropy"), f"output is 'density' or 'entropy', got {self.output!r}")
        self.needs = (self.space,)
        self.fit_needs = (self.space, "labels")

    def statistics(self) -> Sequence[Statistic]:
        return (ClassMoments(self.space, self.normalize, per_class=True),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (moments,) = (found[statistic] for statistic in self.statistics())
        present = _classes_present(moments.counts)
        counts = moments.counts[present]
        covariances = moments.class_scatter[present].div_((counts - 1).clamp_min(1)[:, None, None])
        alone = counts == 1
        if alone.any():
            warnings.warn(
                f"gmm: {int(alone.sum())} classes have a single row to fit and get the tied covariance.", stacklevel=3
            )
            covariances[alone] = moments.scatter / counts.sum()
        self.means_ = moments.means[present]
        self.cholesky_, self.jitter_ = cholesky_with_jitter(covariances)
        log_determinant = 2 * self.cholesky_.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        normaliser = -0.5 * (log_determinant + self.means_.shape[1] * math.log(2 * math.pi))
        self.log_weights_ = normaliser + ((counts.double() / counts.sum()).log() if self.prior == "empirical" else 0)

    def score_block(self, block: Block) -> Tensor:
        log_densities = self._log_densities(block.space(self.space, self.normalize))
        if self.output == "density":
            return log_densities.logsumexp(dim=1)
        log_responsibilities = log_densities.log_softmax(dim=1)
        return (log_responsibilities.exp() * log_responsibilities).sum(dim=1)

    def _log_densities(self, values: Tensor) -> Tensor:
        """``log pi_c N(z; mu_c, Sigma_c)``, ``[B, C]``, some rows and one class at a time so that memory is bounded."""
        means, factors, inverses = (part.to(values.device) for part in (self.means_, self.cholesky_, self._inverses()))
        distances = values.new_empty(len(means), len(values))
        for rows, found in zip(*(part.split(self._rows(), dim=-1) for part in (values.T, distances)), strict=True):
            columns = rows.contiguous()
            for c, mean in enumerate(means):
                found[c] = solved_squares(factors[c], inverses[c], columns - mean[:, None])
        return self.log_weights_.to(values) - 0.5 * distances.T

    def _rows(self) -> int:
        return max(1, DENSITY_BYTES // (8 * self.means_.shape[1]))

    def _inverses(self) -> Tensor:
        """Those of the diagonal blocks of the factors, ``[C, blocks, S, S]``: from the factors, once."""
        known: tuple[Tensor, Tensor] | None = getattr(self, "_inverted", None)
        if known is None or known[0] is not self.cholesky_:
            self._inverted = self.cholesky_, inverted_diagonal(self.cholesky_)
        return self._inverted[1]


def inverted_diagonal(factors: Tensor) -> Tensor:
    """The inverses ``[C, ceil(D / S), S, S]`` of the diagonal blocks of lower factors, S = ``SOLVED`` or D if less.

    The last block is filled up with the identity.
    """
    width = factors.shape[1]
    size = min(SOLVED, width)
    blocks = torch.eye(size, dtype=factors.dtype, device=factors.device).repeat(len(factors), -(-width // size), 1, 1)
    for number, start in enumerate(range(0, width, size)):
        block = factors[:, start : start + size, start : start + size]
        here = blocks[:, number, : block.shape[1], : block.shape[1]]
        here.copy_(torch.linalg.solve_triangular(block, here, upper=False))
    return blocks


def solved_squares(factor: Tensor, inverses: Tensor, columns: Tensor) -> Tensor:
    """``|L^-1 x|^2`` of every column x of ``[D, B]``, which is overwritten; ``inverses`` of ``inverted_diagonal``.

    Substitution by blocks: nearly all of it is matrix products, which run at more than twice the speed of a triangular
    solve, and only the small diagonal blocks are inverted, so that it is as accurate as one.
    """
    size, solved = inverses.shape[-1], torch.empty_like(columns)
    for inverse, start in zip(inverses, range(0, len(columns), size), strict=True):
        stop = min(start + size, len(columns))
        if start:
            columns[start:stop].addmm_(factor[start:stop, :start], solved[:start], alpha=-1)
        torch.mm(inverse[: stop - start, : stop - start], columns[start:stop], out=solved[start:stop])
    return torch.mul(solved, solved, out=columns).sum(dim=0)


def whitening(covariance: Tensor) -> Tensor:
    """``[D, K]`` such that ``W W^T`` is the inverse of the covariance, or its pseudo-inverse (K < D) if singular."""
    cholesky, failed = torch.linalg.cholesky_ex(covariance)
    diagonal = cholesky.diagonal()
    smallest = torch.finfo(covariance.dtype).eps * len(covariance)
    if not failed and (diagonal.amin() / diagonal.amax()).square() > smallest:
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        return torch.linalg.solve_triangular(cholesky, identity, upper=False).T
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > smallest * values.amax()
    if not kept.any():
        raise BadInput("the features do not vary within any class, so they have no covariance to whiten with.")
    return vectors[:, kept] / values[kept].sqrt()


def whitened(rows: Tensor, root: Tensor) -> Tensor:
    """``rows @ root`` of a root from ``whitening``: where that is triangular, without multiplying its zeros."""
    if root.tril(-1).any():
        return rows @ root
    found = rows.new_empty(len(rows), root.shape[1])
    for start in range(0, root.shape[1], SOLVED):
        stop = min(start + SOLVED, root.shape[1])
        torch.mm(rows[:, :stop], root[:stop, start:stop], out=found[:, start:stop])
    return found


def squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    """``||x_i - c_j||^2`` for every pair, ``[B, C]``, never negative."""
    products = torch.addmm(rows.square().sum(dim=1, keepdim=True), rows, centres.T, alpha=-2)
    return (products + centres.square().sum(dim=1)).clamp_min(0)


def cholesky_with_jitter(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors ``[C, D, D]`` and the jitter ``[C]`` each matrix needed.

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
            raise BadInput(
                f"class covariance {int(pending[0])} is not positive definite even with {JITTERS[-1]} added."
            )
    return factors, jitter


def _classes_present(counts: Tensor) -> Tensor:
    present = counts > 0
    if not present.all():
        warnings.warn(
            f"{int((~present).sum())} of {len(counts)} classes have no row to fit and are left out.", stacklevel=4
        )
    return present
