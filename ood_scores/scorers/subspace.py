"""Subspaces: the directions that the fit set uses, and those that it does not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet, Head
from ood_scores.features.block import row_norm
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.means import Means
from ood_scores.features.statistics.moments import GlobalMoments, Moments
from ood_scores.features.statistics.row_samples import SampledRows
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.gaussian import whitened, whitening
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags

WANG_2022 = Paper(
    "ViM: Out-Of-Distribution with Virtual-logit Matching",
    "Haoqi Wang, Zhizhong Li, Litong Feng, Wayne Zhang",
    "CVPR",
    2022,
    "https://arxiv.org/abs/2203.10807",
    "https://github.com/haoqiwang/vim",
)

BLOCK_ROWS = 4096
"""Rows of the sample whose residuals are computed at a time."""

MAX_LOGIT = Means("max_logit")


@dataclass
class _ResidualScorer(Scorer):
    """What ``residual`` and ``vim`` share: the residual space, and a feature's norm in it."""

    dimension: int | None = None
    origin_: Tensor = fitted()
    residual_space_: Tensor = fitted()

    def __post_init__(self) -> None:
        if self.dimension is not None:
            self.require_count("dimension")

    def statistics(self) -> Sequence[Statistic]:
        return (GlobalMoments("features"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[GlobalMoments("features")]
        assert feats.head is not None
        origin = origin_of(feats.head).to(moments.means)
        values, vectors = principal_axes(moments_about(moments, origin))
        dimension = default_dimension(len(values)) if self.dimension is None else self.dimension
        rank = rank_of(values)
        self.require(
            dimension < rank,
            f"the fit rows span {rank} dimensions about the origin, so that a principal space of {dimension} leaves no "
            "residual: lower dimension, or fit on more rows",
        )
        self.origin_, self.residual_space_ = origin, vectors[:, dimension:].contiguous()

    def residual_norm(self, features: Tensor) -> Tensor:
        """``||R^T (z - o)||``, float64 ``[B]``; the product in the precision that the features are kept in."""
        return row_norm((features - self.origin_.to(features)) @ self.residual_space_.to(features), 2.0)


@register_scorer("residual")
@dataclass
class Residual(_ResidualScorer):
    """Minus the norm of what a feature has outside the principal space, ``-||R^T (z - o)||``.

    Fits the origin ``o = -pinv(W) b``, at which all logits are 0 (as nearly as one point can make them), and R, the
    eigenvectors ``[D, D - dimension]`` of the smallest eigenvalues of the mean of ``(z - o)(z - o)^T`` over the fit
    set: not centred at the mean of the data.

    Source: Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit Matching", its score without the logits. The
    authors' code takes 1,000 principal dimensions from 2,048 features on, else 512; below 768 features, where 512 would
    leave little or no residual, the default is half of them, as in the evaluation code of Bitterwolf et al. 2023
    (NINCO). Departure: the eigenvectors are those of a symmetric matrix (``eigh``, float64), where the authors call the
    general ``eig``.

    The product with R is taken in the precision that the features are kept in: float32 features have errors of their
    own of the size that it makes.

    Fails where the fit data fill no more than the principal space, which raises BadInput: fewer rows than
    ``dimension``, or a dimension above their rank.

    Args:
        dimension: of the principal space; None for the default above.

    Cost: one product with a ``[D, D - dimension]`` matrix for each block; one eigendecomposition to fit.
    """

    tags = Tags(paper=WANG_2022, exceptions={"higher_on_id": "a small row has a small residual"})
    needs = ("features",)
    fit_needs = ("features", "head")

    def score_block(self, block: Block) -> Tensor:
        return -self.residual_norm(block.features)


@register_scorer("vim")
@dataclass
class ViM(_ResidualScorer):
    """Energy minus the virtual logit, ``logsumexp(f) - alpha ||R^T (z - o)||``.

    Fits origin and residual space as ``residual`` does, and ``alpha = mean max_c f_c / mean ||R^T (z - o)||`` over the
    fit set. The norm of the residual is no moment of the features and is known only once R is: its mean is exact up to
    2^26 activations, beyond that it is that of evenly spaced rows (``SampledRows``), so that one pass is enough.

    Source: Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit Matching"; dimension and departures as for
    ``residual``. The logits are those of the set, the authors' are computed from features and head: the same numbers
    but for rounding.

    Fails where the largest logits are negative on average (models trained with sigmoids): alpha is then negative and
    rewards the residual, which a warning says. BadInput where ``residual`` raises it.

    Args:
        dimension: of the principal space; None for the default of ``residual``.

    Cost: as ``residual``, and the energy.
    """

    tags = Tags(paper=WANG_2022)
    alpha_: float = fitted(math.nan)
    needs = ("features", "logits")
    fit_needs = ("features", "logits", "head")

    def statistics(self) -> Sequence[Statistic]:
        return (*super().statistics(), SampledRows(), MAX_LOGIT)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        super().fit_statistics(found, feats)
        logit = float(found[MAX_LOGIT].means)
        rows = found[SampledRows()].split(BLOCK_ROWS)
        self.alpha_ = logit / float(torch.cat([self.residual_norm(some) for some in rows]).mean())
        if self.alpha_ <= 0:
            warnings.warn(
                f"vim: the largest logits of the fit set are {logit:.3g} on average, so that alpha is not positive and "
                "a residual raises the score.",
                stacklevel=4,
            )

    def score_block(self, block: Block) -> Tensor:
        return block.logsumexp() - self.alpha_ * self.residual_norm(block.features)


@register_scorer("neco")
@dataclass
class NECO(Scorer):
    """Share of a feature's norm in the principal space, times the largest logit, ``max_c f_c ||P^T x|| / ||x||``.

    x is the feature standardised with mean and standard deviation (divided by N) of the fit set, P the eigenvectors
    ``[D, dimension]`` of the largest eigenvalues of the covariance of x. A feature that does not vary on the fit set is
    only centred. A row at the mean of the fit set, where the ratio is 0/0, scores 0.

    Source: Ben Ammar et al. 2024, "NECO: NEural Collapse Based Out-of-distribution detection". The paper's score is the
    ratio; the authors' code multiplies it by the largest logit for every architecture but ResNet. Their code has no
    default for the dimension; the one here, as many as hold 90% of the variance, is that of the evaluation code of
    Mueller & Hein 2025.

    Fails on models without neural collapse, and with the logit where largest logits are negative: there a larger share
    of the norm lowers the score.

    Args:
        dimension: of the principal space; None: the fewest that hold ``variance``.
        variance: share of the variance that the principal space holds; read where ``dimension`` is None.
        max_logit: multiply by the largest logit; False for ResNets in the authors' code.
        standardize: False takes P from the features as they are, centred, and divides by the norm of the feature
            itself, not centred: what the authors' code gives without its scaler, as it advises for a ViT on CIFAR.
        raw_norm: divide by ``||z||`` instead of ``||x||``, as the authors' code does for DeiT and Swin.

    Cost: one product with a ``[D, dimension]`` matrix for each block; one eigendecomposition to fit.
    """

    tags = Tags(
        paper=Paper(
            "NECO: NEural Collapse Based Out-of-distribution detection",
            "Mouïn Ben Ammar, Nacim Belkhir, Sebastian Popescu, Antoine Manzanera, Gianni Franchi",
            "ICLR",
            2024,
            "https://arxiv.org/abs/2310.06823",
            "https://gitlab.com/drti/neco",
        )
    )
    dimension: int | None = None
    variance: float = 0.9
    max_logit: bool = True
    standardize: bool = True
    raw_norm: bool = False
    mean_: Tensor = fitted()
    scale_: Tensor = fitted()
    principal_space_: Tensor = fitted()
    fit_needs = ("features",)

    def __post_init__(self) -> None:
        if self.dimension is not None:
            self.require_count("dimension")
        self.require(0 < self.variance <= 1, f"variance is a share above 0 and up to 1, got {self.variance}")
        self.needs = ("features", "logits") if self.max_logit else ("features",)

    def statistics(self) -> Sequence[Statistic]:
        return (GlobalMoments("features"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        (moments,) = (found[statistic] for statistic in self.statistics())
        self.mean_ = moments.means[0]
        self.scale_ = deviations(moments) if self.standardize else torch.ones_like(self.mean_)
        covariance = moments.scatter / moments.counts.sum() / self.scale_ / self.scale_[:, None]
        values, vectors = principal_axes(covariance)
        rank = rank_of(values)
        if rank == 0:
            raise BadInput("neco: the features do not vary, so they have no principal space.")
        dimension = self._enough(values) if self.dimension is None else self.dimension
        self.require(dimension <= rank, f"the features vary in {rank} dimensions only, got dimension={dimension}")
        self.principal_space_ = vectors[:, :dimension].contiguous()

    def score_block(self, block: Block) -> Tensor:
        features = block.space("features")
        rows = (features - self.mean_.to(features)) / self.scale_.to(features)
        whole = rows if self.standardize and not self.raw_norm else features
        smallest = torch.finfo(torch.float64).tiny
        ratio = row_norm(rows @ self.principal_space_.to(features), 2.0) / row_norm(whole, 2.0).clamp_min(smallest)
        return ratio * block.logits64().amax(dim=1) if self.max_logit else ratio

    def _enough(self, values: Tensor) -> int:
        """The fewest dimensions that hold the share ``variance`` of the variance."""
        held = values.cumsum(0) / values.sum()
        return min(int((held < self.variance).sum()) + 1, rank_of(values))


@register_scorer("pnml")
@dataclass
class PNML(Scorer):
    """Minus the normalised regret of the pNML learner, ``-log(sum_c p_c / (p_c + (1 - p_c) p_c^k)) / log C``.

    ``k = q / (1 + q)`` with ``q = x^T (X^T X)^+ x``, for the L2-normalised feature x and the matrix X of the
    L2-normalised features of the fit set; p is the softmax of the head applied to x, not to the feature itself. The
    regret is what hindsight of the label would gain: small where x lies among the fit data (q near 0, and one
    probability near 1).

    Fits ``X^T X`` in float64 and its pseudo-inverse's root.

    Source: Bibas et al. 2021, "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution
    Detection"; the authors' code ranks by one minus the regret. Departure: each term is computed as
    ``1 / (1 + (1 - p_c) p_c^(k - 1))``, from log-probabilities, without clipping them. The products are taken in the
    precision that the features are kept in.

    Fails where the logits of normalised features are all small: p is then nearly uniform and q decides alone. Large fit
    sets make q small for every row within their span. What lies outside it counts nothing, as a pseudo-inverse has
    it. With a single class the regret is 0 for every row.

    Cost: one product with a ``[D, D]`` and one with the ``[D, C]`` head for each block.
    """

    tags = Tags(
        paper=Paper(
            "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution Detection",
            "Koby Bibas, Meir Feder, Tal Hassner",
            "NeurIPS",
            2021,
            "https://arxiv.org/abs/2110.09246",
            "https://github.com/kobybibas/pnml_ood_detection",
        )
    )
    root_: Tensor = fitted()
    needs = ("features", "head")
    fit_needs = ("features",)

    def statistics(self) -> Sequence[Statistic]:
        return (GlobalMoments("features", normalize=True),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        (moments,) = (found[statistic] for statistic in self.statistics())
        count = moments.counts.sum()
        zero = torch.zeros_like(moments.means[0])
        self.root_ = whitening(moments_about(moments, zero)) / count.double().sqrt()

    def score_block(self, block: Block) -> Tensor:
        rows = block.unit_features()
        projected = whitened(rows, self.root_.to(rows)).square_().sum(dim=1, keepdim=True).double()
        learner = Block(logits=block.head(rows), rows=rows.shape[0])
        rest = (learner.total_odds()[:, None] - learner.odds()).scatter(1, *learner.odds_of_others())
        rest = rest / learner.total_odds()[:, None]
        terms = rest.mul_((learner.log_softmax() * (-1 / (1 + projected))).exp_()).add_(1).reciprocal_()
        return -terms.sum(dim=1).log() / math.log(max(terms.shape[1], 2))


def default_dimension(width: int) -> int:
    """ViM's dimension of the principal space of so many features."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


def origin_of(head: Head) -> Tensor:
    """The smallest feature whose logits are as near to 0 as the head allows, ``-pinv(W) b``, float64 ``[D]``."""
    return -torch.linalg.pinv(head.weight.double()) @ head.bias.double()


def moments_about(moments: Moments, origin: Tensor) -> Tensor:
    """The mean of ``(z - origin)(z - origin)^T``, ``[D, D]``, from the moments of all rows."""
    offset = moments.means[0] - origin
    return moments.scatter / moments.counts.sum() + torch.outer(offset, offset)


def deviations(moments: Moments) -> Tensor:
    """Standard deviations ``[D]``, divided by N; 1 for a feature that does not vary beyond its rounding error."""
    found = (moments.scatter.diagonal() / moments.counts.sum()).sqrt()
    rounding = torch.finfo(found.dtype).eps * moments.counts.sum() * moments.means[0].abs()
    return torch.where(found > rounding, found, 1.0)


def principal_axes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[D]`` of a positive semi-definite matrix, largest first, and its eigenvectors ``[D, D]``."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def rank_of(values: Tensor) -> int:
    """How many eigenvalues, largest first, are more than rounding error."""
    return int((values > torch.finfo(values.dtype).eps * len(values) * values[0]).sum())
