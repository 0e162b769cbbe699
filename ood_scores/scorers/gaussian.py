"""Gaussians: distances to class means under one shared covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import ShapeMismatch
from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.extras import read_extra
from ood_scores.scorers.numerics.distances import squared_distances
from ood_scores.scorers.numerics.whitening import amplifies, loses_distances, tied_whitening, whitened
from ood_scores.scorers.papers import LEE_2018
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.user_warnings import warn_user


@dataclass
class _TiedGaussians(Scorer):
    """Base class of scores under class means and one covariance; ``double_`` says whether rows need float64."""

    normalize: bool = False
    means_: Tensor = fitted()
    double_: bool = fitted(False)
    needs = ("features",)

    def __post_init__(self) -> None:
        self.fit_needs: tuple[str, ...] = ("features", "labels")

    def statistics(self) -> tuple[ClassMoments | GlobalMoments]:
        return (ClassMoments("features", self.normalize),)


@register_scorer("mahalanobis")
@dataclass
class Mahalanobis(_TiedGaussians):
    """Negative squared distance to the nearest class mean, ``-min_c (z - mu_c)^T Sigma^-1 (z - mu_c)``.

    Fits class means and one tied covariance, the pooled within-class scatter divided by N, in float64. Scores are
    computed in the precision in which the features are stored, because the rounding errors of float32 features are as
    large as those of a product. Only where a nearly singular covariance would amplify these errors (``AMPLIFIED``), or
    where the classes are so far apart or collapsed that distances would lose them (``LOST``), is float64 used.

    Source: Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial
    Attacks", on penultimate features, without input perturbation. Directions in which the fit data do not vary (a
    singular covariance) are left out, as with a pseudo-inverse. So is the one in which the features of a LayerNorm vary
    by rounding alone (``tied_whitening``).

    Fails on near OoD: most of the distance is in directions that do not separate the classes (Ren et al. 2021).

    Args:
        normalize: L2-normalize features in the fit and in the score.
        one_class: Fit one mean and the covariance around it, as for a single class. No labels are needed.

    Cost: one product with a ``[D, D]`` and one with a ``[D, C]`` matrix for each block.
    """

    tags = Tags(formula=r"s(x) = -\min_c \, (z - \mu_c)^\top \Sigma^{-1} (z - \mu_c)", aliases=("mds",), paper=LEE_2018)
    one_class: bool = False
    whitening_: Tensor = fitted()
    centre_: Tensor = fitted()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.one_class:
            self.fit_needs = ("features",)

    def statistics(self) -> tuple[ClassMoments | GlobalMoments]:
        return ((GlobalMoments if self.one_class else ClassMoments)("features", self.normalize),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[self.statistics()[0]]
        means = moments.means[classes_present(moments.counts, self.name)]
        self.centre_ = means.mean(dim=0)
        self.whitening_ = tied_whitening(moments, feats)
        self.means_ = (means - self.centre_) @ self.whitening_
        self.double_ = amplifies(self.whitening_, moments) or loses_distances(self.means_)

    def score_block(self, block: Block) -> Tensor:
        rows = self.compared(block)
        return -squared_distances(rows, self.means_.to(rows)).amin(dim=1)

    def compared(self, block: Block) -> Tensor:
        """Return the whitened features."""
        features = rows_of(block, self.normalize, self.double_)
        return whitened(features - self.centre_.to(features), self.whitening_.to(features))


@register_scorer("mahalanobis_pp")
@dataclass
class MahalanobisPP(Mahalanobis):
    """Mahalanobis distance of L2-normalized features: ``mahalanobis`` with ``normalize=True`` as its default.

    Source: Mueller & Hein 2025, "Mahalanobis++: Improving OOD Detection via Feature Normalization". Feature norms
    differ more between classes and between ID and OoD rows than Gaussians with one covariance allow; on the sphere they
    cannot differ. Features are normalized before the means and the covariance are fitted, as in the authors' code; the
    means are not normalized again.

    Fails where the norm is what separates OoD rows (models trained with an L2-normalized head).

    Args:
        normalize: L2-normalize features in the fit and in the score.
        one_class: Fit one mean and the covariance around it, as for a single class. No labels are needed.

    Cost: as ``mahalanobis``.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\min_c \, (\bar z - \mu_c)^\top \Sigma^{-1} (\bar z - \mu_c), \quad \bar z = "
            r"\frac{z}{\lVert z \rVert}"
        ),
        aliases=("mahalanobis++", "mahalanobispp"),
        paper=Paper(
            "Mahalanobis++: Improving OOD Detection via Feature Normalization",
            "Maximilian Mueller, Matthias Hein",
            "ICML",
            2025,
            "https://arxiv.org/abs/2505.18032",
            "https://github.com/mueller-mp/maha-norm",
        ),
    )
    normalize: bool = True


@register_scorer("mahalanobis_odin")
@dataclass
class MahalanobisODIN(Mahalanobis):
    """``mahalanobis`` of inputs moved toward the nearest class, ``-min_c (z' - mu_c)^T Sigma^-1 (z' - mu_c)``.

    Reads ``mahalanobis_odin`` ``[N, D]``, the features z' that the probe of that name keeps. The probe reads the cache
    of the fit set: ``extract(..., probes=["mahalanobis_odin:fit=train.h5"])``. Fits as ``mahalanobis``, on the features
    of inputs that were not moved; use the same set, and the same ``normalize`` and ``one_class`` as of the probe.

    Source: Lee et al. 2018, section 2.2, on penultimate features. A detector cannot contain it, because the probe reads
    a file.

    Fails where the step does not suit the data: its authors tune it on OoD data. On near OoD, it fails as
    ``mahalanobis`` does (AUROC 0.61 of a ResNet-20 with 1,000 fit rows, CIFAR-10 against CIFAR-100, after 0.59 without
    the step; 0.85 after 0.84 against textures).

    Args:
        normalize: L2-normalize features in the fit and in the score.
        one_class: Fit one mean and the covariance around it, as for a single class. No labels are needed.

    Cost: as ``mahalanobis``; the probe costs a forward and backward pass, and a forward pass.
    """

    tags = Tags(
        paper=LEE_2018,
        formula=r"s(x) = -\min_c (z(x') - \mu_c)^\top \Sigma^{-1} (z(x') - \mu_c)",
        small_extras={"mahalanobis_odin": lambda features, logits: 1.01 * features},
        search_space={"normalize": (False, True)},
    )
    needs = ("mahalanobis_odin",)

    def score_block(self, block: Block) -> Tensor:
        moved = read_extra(block, "mahalanobis_odin", self.name)
        if moved.shape[1] != len(self.centre_):
            raise ShapeMismatch(
                f"{self.name!r} was fitted on features of width {len(self.centre_)}, but those of moved inputs have "
                f"{moved.shape[1]}: use sets from the same model."
            )
        return super().score_block(block.replaced(features=moved))


@register_scorer("relative_mahalanobis")
@dataclass
class RelativeMahalanobis(_TiedGaussians):
    """Distance to the nearest class relative to the distance to all data, ``-min_c (d_c - d_0)``.

    ``d_c = (z - mu_c)^T Sigma^-1 (z - mu_c)`` with the tied covariance of ``mahalanobis``, and ``d_0 = (z - mu)^T
    Sigma_0^-1 (z - mu)`` with the mean and covariance of all rows; both covariances are divided by N.

    Fits class means and the scatter within classes; the scatter of all rows is their sum with the scatter between the
    class means, so that no further pass is needed. Only the directions in which class means differ (at most C - 1) are
    kept: in all others, once whitened, ``d_c`` and ``d_0`` are the same number and cancel. With p the coordinates of
    ``z - mu`` in these directions, m_c those of the class means, and lambda their variances, ``d_c - d_0 = |m_c|^2 - 2
    p m_c + sum_k p_k^2 lambda_k / (1 + lambda_k)``, without the cancellation.

    Source: Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection". Departure:
    directions in which the fit data do not vary within any class (a singular covariance) are left out of both
    distances. If each covariance were inverted separately, by a pseudo-inverse or a ridge, these directions would stay
    in ``d_0``, and rows that are unusual in them would score higher.

    Fails on rows that are unusual in directions that do not separate the classes, because these do not count. With a
    single class, all rows score 0.

    Args:
        normalize: L2-normalize features in the fit and in the score ("relative Mahalanobis++" of Mueller & Hein 2025).

    Cost: one product with a ``[D, C]`` and one with a ``[C, C]`` matrix for each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\min_c \bigl[ (z - \mu_c)^\top \Sigma^{-1} (z - \mu_c) - (z - \mu)^\top \Sigma_0^{-1} (z - "
            r"\mu) \bigr]"
        ),
        aliases=("rmds", "rmd"),
        paper=Paper(
            "A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection",
            "Jie Ren, Stanislav Fort, Jeremiah Liu, Abhijit Guha Roy, Shreyas Padhy, Balaji Lakshminarayanan",
            "arXiv",
            2021,
            "https://arxiv.org/abs/2106.09022",
        ),
        search_space={"normalize": (False, True)},
    )
    mean_: Tensor = fitted()
    directions_: Tensor = fitted()
    shares_: Tensor = fitted()

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[self.statistics()[0]]
        present = classes_present(moments.counts, self.name)
        means, weights = moments.means[present], moments.counts[present] / moments.counts.sum().double()
        root = tied_whitening(moments, feats)
        self.mean_ = weights @ means
        centered = (means - self.mean_) @ root
        _, deviations, axes = torch.linalg.svd(weights.sqrt()[:, None] * centered, full_matrices=False)
        self.directions_, self.means_ = root @ axes.T, centered @ axes.T
        self.shares_ = deviations.square() / (1 + deviations.square())
        self.double_ = amplifies(root, moments) or loses_distances(self.means_)

    def score_block(self, block: Block) -> Tensor:
        features = rows_of(block, self.normalize, self.double_)
        means = self.means_.to(features)
        rows = (features - self.mean_.to(features)) @ self.directions_.to(features)
        nearest = (means.square().sum(dim=1) - 2 * rows @ means.T).amin(dim=1)
        return -(nearest + rows.square() @ self.shares_.to(features))


@register_scorer("wdiscood")
@dataclass
class WDiscOOD(_TiedGaussians):
    """Distances in two parts of the whitened space, ``-min_c ||V^T (y - y_c)|| - weight ||(I - V V^T) y||``.

    y is ``z - mu``, whitened by the tied covariance of ``mahalanobis``, and y_c the same of the class means. The
    columns of V are the directions in which the class means differ most: those of Fisher's linear discriminants. In
    the rest of the space, the distance is that to the mean mu of all rows.

    Fits class means, the tied covariance, and V, the eigenvectors of the mean of ``y_c y_c^T`` over the classes.

    Source: Chen et al. 2023, "WDiscOOD: Out-of-Distribution Detection via Whitened Linear Discriminant Analysis", and
    their code; a weight of 5 is theirs for ResNet-50. For a ViT, they use 1, 512 dimensions, and ``normalize=True``.
    On ImageNet they use 1,000 dimensions, one of which is noise, since 1,000 class means differ in 999. Departures: the
    default is all directions in which the class means differ; directions in which the fit data do not vary within any
    class are left out; their ridge on the identity covariance, which changes no direction, is omitted.

    Fails where the fit set is the training set and its rows are much nearer to their means than unseen ID rows; with
    more classes than features, nothing is left of the space for the second part. On near OoD, that part outweighs the
    first (AUROC 0.54 of a ResNet-20 with 1,000 fit rows, CIFAR-10 against CIFAR-100; 0.82 against textures).

    Args:
        normalize: L2-normalize features in the fit and in the score.
        dimension: The number of discriminants; None for all.
        weight: The weight of the second part.

    Cost: one product with a ``[D, D]``, two with a ``[D, dimension]``, and one with a ``[dimension, C]`` matrix for
    each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\min_c \lVert V^\top (y - y_c) \rVert - \text{weight} \cdot \lVert (I - V V^\top) y \rVert, "
            r"\quad y = \Sigma^{-1/2} (z - \mu)"
        ),
        paper=Paper(
            "WDiscOOD: Out-of-Distribution Detection via Whitened Linear Discriminant Analysis",
            "Yiye Chen, Yunzhi Lin, Ruinian Xu, Patricio A. Vela",
            "ICCV",
            2023,
            "https://arxiv.org/abs/2303.07543",
            "https://github.com/ivalab/WDiscOOD",
        ),
        search_space={"weight": (0.5, 1.0, 2.0, 5.0), "normalize": (False, True)},
    )
    dimension: int | None = None
    weight: float = 5.0
    mean_: Tensor = fitted()
    whitening_: Tensor = fitted()
    discriminants_: Tensor = fitted()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimension is not None:
            self.require_count("dimension")
        self.require(0 <= self.weight < math.inf, f"weight must be at least 0 and finite, got {self.weight}")

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[self.statistics()[0]]
        present = classes_present(moments.counts, self.name)
        means, shares = moments.means[present], moments.counts[present] / moments.counts.sum().double()
        self.mean_ = shares @ means
        self.whitening_ = tied_whitening(moments, feats)
        centered = (means - self.mean_) @ self.whitening_
        _, deviations, axes = torch.linalg.svd(centered, full_matrices=False)
        differing = deviations > torch.finfo(deviations.dtype).eps * max(centered.shape) * deviations.amax()
        self.discriminants_ = axes[differing][: self.dimension].T.contiguous()
        self.means_ = centered @ self.discriminants_
        self.double_ = amplifies(self.whitening_, moments) or loses_distances(self.means_)

    def score_block(self, block: Block) -> Tensor:
        features = rows_of(block, self.normalize, self.double_)
        rows = whitened(features - self.mean_.to(features), self.whitening_.to(features))
        discriminants = self.discriminants_.to(features)
        along = rows @ discriminants
        nearest = squared_distances(along, self.means_.to(features)).amin(dim=1).sqrt()
        rest = row_norm(rows - along @ discriminants.T, 2.0)
        return -nearest.double() - self.weight * rest


def rows_of(block: Block, normalize: bool, double: bool) -> Tensor:
    """The features, L2-normalized if requested, in their own precision or float64."""
    if double:
        return block.space("features", normalize)
    return block.unit_features() if normalize else block.features


def classes_present(counts: Tensor, name: str) -> Tensor:
    """Mask of the classes that have rows to fit, bool ``[C]``; warns if some have none."""
    present = counts > 0
    if not present.all():
        warn_user(
            f"{name}: {int((~present).sum())} of {len(counts)} classes have no fit row and are left out.",
        )
    return present
