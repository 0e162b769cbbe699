"""Kernel PCA: reconstruction errors of mapped features."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Accumulator, Found
from ood_scores.features.statistics.moments import GlobalMoments
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.subspace import principal_axes, rank_of
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work

FANG_2024 = Paper(
    "Kernel PCA for Out-of-Distribution Detection",
    "Kun Fang, Qinghua Tao, Kexin Lv, Mingzhen He, Xiaolin Huang, Jie Yang",
    "NeurIPS",
    2024,
    "https://arxiv.org/abs/2402.02949",
    "https://github.com/fanghenshaometeor/ood-kernel-pca",
)

LEVEL = 1e-24
"""Variances of vectors of length about one that are at most this large are rounding errors."""


@dataclass
class _KernelPCA(Scorer):
    """Base class of ``cop`` and ``corp``: the principal space of mapped features and the residual outside it.

    Of the two spaces, ``axes_`` spans the one that takes fewer products. A residual is never the difference of two
    squares, so that a residual much shorter than the feature keeps its digits.
    """

    variance: float
    mean_: Tensor = fitted()
    axes_: Tensor = fitted()
    outside_: bool = fitted()
    needs = ("features",)
    fit_needs = ("features",)

    def __post_init__(self) -> None:
        self.require(0 < self.variance < 1, f"variance must be in (0, 1), got {self.variance}")

    @abstractmethod
    def mapped(self, rows: Tensor) -> Tensor:
        """The map of L2-normalized features, ``[B, M]``."""

    def fit_axes(self, axes: Axes) -> None:
        values, width = axes.values, len(axes.mean)
        if values[0] <= LEVEL:
            raise BadInput(f"{self.name}: the features do not vary and have no principal space: fit on more rows.")
        dimension = int((values.cumsum(0) / values.sum() < self.variance).sum()) + 1
        self.require(
            dimension < width,
            f"variance={self.variance} needs all {width} dimensions and leaves no residual: lower variance",
        )
        self.mean_ = axes.mean
        self.outside_ = axes.vectors.shape[1] == width and width - dimension < 2 * dimension
        chosen = slice(dimension, None) if self.outside_ else slice(dimension)
        self.axes_ = axes.vectors[:, chosen].contiguous()

    def score_block(self, block: Block) -> Tensor:
        rows = self.mapped(block.unit_features())
        rows = rows - self.mean_.to(rows)
        axes = self.axes_.to(rows)
        residual = rows @ axes if self.outside_ else rows - (rows @ axes) @ axes.T
        return -row_norm(residual, 2.0)


@dataclass(frozen=True)
class Axes:
    """A mean ``[M]``, and the eigenvalues of a covariance, largest first, with their eigenvectors ``[M, K]``."""

    mean: Tensor
    values: Tensor
    vectors: Tensor


@register_scorer("cop")
@dataclass
class CoP(_KernelPCA):
    """Negative reconstruction error of the L2-normalized feature by its principal components, ``-||y - P P^T y||``.

    ``y = x - m`` and ``x = z / ||z||``, which is the map of the cosine kernel. Fits m, the mean of x, and P, the fewest
    eigenvectors of the covariance of x that hold the share ``variance`` of it, in float64. Scores are computed in the
    precision in which the features are stored: their errors are as large as those from the rounding of x.

    Source: Fang et al. 2024, "Kernel PCA for Out-of-Distribution Detection". Their code uses 0.85 for ResNet-18 on
    CIFAR-10, the default here, and 0.99 for ResNet-50 on ImageNet; 0.85 and 0.7 if these are trained with the
    supervised contrastive loss.

    Fails where OoD features have the direction of ID features and differ in length, and where the fit data fill all
    dimensions, so that little residual is left.

    Args:
        variance: The share of the variance in the principal space.

    Cost: two products with a ``[D, q]`` matrix for each block, or, from ``q > D/3`` on, one with a ``[D, D - q]``
    matrix; one eigendecomposition to fit.
    """

    tags = Tags(
        formula=r"s(x) = -\lVert y - P P^\top y \rVert, \quad y = \frac{z}{\lVert z \rVert} - m",
        paper=FANG_2024,
        search_space={"variance": (0.7, 0.85, 0.99)},
    )
    variance: float = 0.85

    def statistics(self) -> tuple[GlobalMoments]:
        return (GlobalMoments("features", normalize=True),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[self.statistics()[0]]
        self.fit_axes(Axes(moments.means[0], *principal_axes(moments.scatter / moments.counts.sum())))

    def mapped(self, rows: Tensor) -> Tensor:
        return rows


@register_scorer("corp")
@dataclass
class CoRP(_KernelPCA):
    """``cop`` of random Fourier features of the L2-normalized feature: a cosine and a Gaussian kernel.

    ``phi = sqrt(2/M) cos(W x + u)`` replaces x: W is normal ``[M, D]`` with variance ``2 gamma``, and u is uniform in
    ``[0, 2 pi)``, so that ``phi(x) . phi(y)`` is nearly ``exp(-gamma ||x - y||^2)``.

    Source: Fang et al. 2024, "Kernel PCA for Out-of-Distribution Detection". Their code uses ``variance=0.8, gamma=2,
    directions=2048`` for ResNet-18 on CIFAR-10, the defaults here, and 0.5, 3, and 4,096 for ResNet-50 on ImageNet; if
    these are trained with the supervised contrastive loss, 0.7, 1, and 2,048, and 0.5, 1, and 4,096. The draw of the
    directions alone moves the AUROC by .006 to .020.

    Fails as ``cop`` does; also with many more directions than fit rows, which then span few of them.

    Args:
        variance: The share of the variance of phi in the principal space.
        gamma: The parameter of the Gaussian kernel.
        directions: The number M of random Fourier features.
        seed: The seed of W and u.

    Cost: one product with a ``[D, M]`` and two with a ``[M, q]`` matrix for each block, or, from ``q > M/3`` on, one
    with a ``[M, M - q]`` matrix; to fit, ``M^2`` products for each row and the eigendecomposition of ``[M, M]``, or of
    ``[N, N]`` with fewer rows.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\lVert y - P P^\top y \rVert, \quad y = \sqrt{\tfrac{2}{M}} \cos \Bigl( \Omega "
            r"\frac{z}{\lVert z \rVert} + u \Bigr) - m"
        ),
        paper=FANG_2024,
        small_parameters={"directions": 40},
        search_space={"variance": (0.5, 0.7, 0.8), "gamma": (1.0, 2.0, 3.0)},
    )
    variance: float = 0.8
    gamma: float = 2.0
    directions: int = 2048
    seed: int = 0
    weight_: Tensor = fitted()
    phase_: Tensor = fitted()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("gamma")
        self.require_count("directions")

    def work(self, sizes: Sizes) -> Work:
        fitted = 6.0 * sizes.fit_rows * self.directions**2
        return Work(fitted + 2.0 * sizes.rows * self.directions * (sizes.features + self.directions))

    def statistics(self) -> tuple[FourierAxes]:
        return (FourierAxes(self.gamma, self.directions, self.seed),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.fit_axes(found[self.statistics()[0]])
        self.weight_, self.phase_ = fourier_map(feats.num_features, self.gamma, self.directions, self.seed)

    def mapped(self, rows: Tensor) -> Tensor:
        return fourier_features(rows, self.weight_, self.phase_)


@dataclass(frozen=True)
class FourierAxes:
    """Statistic: the ``Axes`` of the random Fourier features of all rows."""

    gamma: float
    directions: int
    seed: int
    reads: ClassVar[Sequence[str]] = ("features",)

    def start(self, feats: FeatureSet) -> Accumulator[Axes]:
        kind = _FewFourierRows if len(feats) < self.directions else _ManyFourierRows
        return kind(*fourier_map(feats.num_features, self.gamma, self.directions, self.seed))


@dataclass
class _ManyFourierRows:
    """Sums of features and of their products; these are of the order of their deviations, so that no digits cancel."""

    weight: Tensor
    phase: Tensor
    rows: int = 0
    total: Tensor | float = 0.0
    products: Tensor | float = 0.0

    def update(self, block: Block) -> None:
        features = fourier_features(block.space("features", True), self.weight, self.phase)
        self.rows += len(block)
        self.total = self.total + features.sum(dim=0)
        self.products = self.products + features.T @ features

    def result(self) -> Axes:
        if not isinstance(self.total, Tensor):
            raise BadInput("no block was read.")
        mean = self.total / self.rows
        return Axes(mean, *principal_axes(self.products / self.rows - torch.outer(mean, mean)))


@dataclass
class _FewFourierRows:
    """For fewer rows than features: their inner products have the same eigenvalues, and the eigenvectors follow."""

    weight: Tensor
    phase: Tensor
    rows: list[Tensor] = field(default_factory=list)

    def update(self, block: Block) -> None:
        self.rows.append(fourier_features(block.space("features", True), self.weight, self.phase))

    def result(self) -> Axes:
        rows = torch.cat(self.rows)
        mean = rows.mean(dim=0)
        rows = (rows - mean) / math.sqrt(len(rows))
        values, vectors = principal_axes(rows @ rows.T)
        kept = max(1, rank_of(values))
        return Axes(mean, values[:kept], rows.T @ vectors[:, :kept] / values[:kept].clamp_min(LEVEL).sqrt())


def fourier_map(width: int, gamma: float, directions: int, seed: int) -> tuple[Tensor, Tensor]:
    """``W`` and ``u`` of random Fourier features, float64 ``[M, D]`` and ``[M]``."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(directions, width, generator=generator, dtype=torch.float64)
    phase = torch.rand(directions, generator=generator, dtype=torch.float64)
    return math.sqrt(2 * gamma) * weight, 2 * math.pi * phase


def fourier_features(rows: Tensor, weight: Tensor, phase: Tensor) -> Tensor:
    """``sqrt(2/M) cos(W x + u)`` of each row x, ``[B, M]``."""
    return torch.addmm(phase.to(rows), rows, weight.to(rows).T).cos_().mul_(math.sqrt(2 / len(phase)))
