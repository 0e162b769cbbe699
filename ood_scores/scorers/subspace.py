"""Subspaces: the directions that the fit set uses, and those that it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet, Head
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.means import Means
from ood_scores.features.statistics.moments import GlobalMoments, Moments
from ood_scores.features.statistics.row_samples import SampledRows
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.gaussian import rows_of
from ood_scores.scorers.numerics.whitening import AMPLIFIED, whitened, whitening
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.user_warnings import warn_user

WANG_2022 = Paper(
    "ViM: Out-Of-Distribution with Virtual-logit Matching",
    "Haoqi Wang, Zhizhong Li, Litong Feng, Wayne Zhang",
    "CVPR",
    2022,
    "https://arxiv.org/abs/2203.10807",
    "https://github.com/haoqiwang/vim",
)

BLOCK_ROWS = 4096
"""Number of sampled rows whose residuals are computed at a time."""

FAR = 1e4
"""Residuals are computed in float64 if the origin is longer than this multiple of their root mean square, as it is for
a head that is nearly rank-deficient: float32 would round the difference from the origin too coarsely."""

MAX_LOGIT = Means("max_logit")


@dataclass
class _ResidualScorer(Scorer):
    """Base class of ``residual`` and ``vim``: the residual space and the norm of a feature in it."""

    dimension: int | None = None
    origin_: Tensor = fitted()
    residual_space_: Tensor = fitted()
    double_: bool = fitted(False)

    def __post_init__(self) -> None:
        if self.dimension is not None:
            self.require_count("dimension")

    def statistics(self) -> Sequence[Statistic]:
        return (GlobalMoments("features"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[GlobalMoments("features")]
        origin = self.find_origin(moments, feats)
        values, vectors = principal_axes(moments_about(moments, origin))
        dimension = default_dimension(len(values)) if self.dimension is None else self.dimension
        rank = rank_of(values)
        self.require(
            dimension < rank,
            f"the fit rows span {rank} dimensions about the origin, so a principal space of {dimension} leaves no "
            "residual: lower dimension, or fit on more rows",
        )
        self.origin_, self.residual_space_ = origin, vectors[:, dimension:].contiguous()
        self.double_ = bool(origin.norm() > FAR * values[dimension:].sum().sqrt())

    def find_origin(self, moments: Moments, feats: FeatureSet) -> Tensor:
        """The origin ``o``, float64 ``[D]``."""
        assert feats.head is not None
        return origin_of(feats.head).to(moments.means)

    def residual_norm(self, features: Tensor) -> Tensor:
        """``||R^T (z - o)||``, float64 ``[B]``; the product is in the precision in which the features are stored, or in
        float64 if the origin is far away."""
        features = features.double() if self.double_ else features
        return row_norm((features - self.origin_.to(features)) @ self.residual_space_.to(features), 2.0)


@register_scorer("residual")
@dataclass
class Residual(_ResidualScorer):
    """Negative norm of the part of a feature outside the principal space, ``-||R^T (z - o)||``.

    Fits the origin ``o = -pinv(W) b``, at which all logits are 0 (as nearly as is possible for one point), and R, the
    eigenvectors ``[D, D - dimension]`` of the smallest eigenvalues of the mean of ``(z - o)(z - o)^T`` over the fit
    set, which is not centered at the mean of the data.

    Source: Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit Matching", their score without the logits.
    The authors' code uses 1,000 principal dimensions from 2,048 features on, otherwise 512; below 768 features, where
    512 would leave little or no residual, the default is half of them, as in the evaluation code of Bitterwolf et al.
    2023 (NINCO). Departure: the eigenvectors are those of a symmetric matrix (``eigh``, float64), while the authors
    call the general ``eig``.

    The product with R is in the precision in which the features are stored: the rounding errors of float32 features are
    as large as those of the product.

    Fails where the fit data do not extend beyond the principal space, which raises BadInput: there are fewer rows than
    ``dimension``, or the dimension is above their rank.

    Args:
        dimension: The dimension of the principal space; None for the default above.
        origin: ``"head"`` for the origin above; ``"mean"`` for the mean of the fit set, which needs no head, so that
            features of an encoder can be fitted: the residual of a principal component analysis. No labels are needed.

    Cost: one product with a ``[D, D - dimension]`` matrix for each block; one eigendecomposition to fit.
    """

    tags = Tags(
        formula=r"s(x) = -\lVert R^\top (z - o) \rVert, \quad o = -W^+ b",
        paper=WANG_2022,
        exceptions={"higher_on_id": "a small row has a small residual"},
    )
    origin: Literal["head", "mean"] = "head"
    needs = ("features",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choices()
        self.fit_needs = ("features", "head") if self.origin == "head" else ("features",)

    def find_origin(self, moments: Moments, feats: FeatureSet) -> Tensor:
        return super().find_origin(moments, feats) if self.origin == "head" else moments.means[0]

    def score_block(self, block: Block) -> Tensor:
        return -self.residual_norm(block.features)


@register_scorer("vim")
@dataclass
class ViM(_ResidualScorer):
    """Energy minus the virtual logit, ``logsumexp(f) - alpha ||R^T (z - o)||``.

    Fits origin and residual space as ``residual`` does, and ``alpha = mean max_c f_c / mean ||R^T (z - o)||`` over the
    fit set. The norm of the residual is not a moment of the features and depends on R: its mean is exact up to 2^26
    activations; beyond that, it is the mean of evenly spaced rows (``SampledRows``), so that one pass is enough.

    Source: Wang et al. 2022, "ViM: Out-Of-Distribution with Virtual-logit Matching"; dimension and departures as for
    ``residual``. The logits are those of the set, while the authors compute them from features and head: the numbers
    are equal up to rounding.

    Fails where the largest logits are negative on average (models trained with sigmoids): alpha is then negative and
    rewards the residual, with a warning. Raises BadInput where ``residual`` does.

    Args:
        dimension: The dimension of the principal space; None for the default of ``residual``.

    Cost: as ``residual``, plus the energy.
    """

    tags = Tags(
        formula=(
            r"s(x) = \log \sum_c e^{f_c} - \alpha \lVert R^\top (z - o) \rVert, \quad \alpha = "
            r"\frac{\operatorname{mean} \max_c f_c}{\operatorname{mean} \lVert R^\top (z - o) \rVert}"
        ),
        paper=WANG_2022,
    )
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
            warn_user(
                f"vim: the largest logits of the fit set are {logit:.3g} on average, so alpha is not positive and "
                "a residual raises the score.",
            )

    def score_block(self, block: Block) -> Tensor:
        return block.logsumexp() - self.alpha_ * self.residual_norm(block.features)


@register_scorer("neco")
@dataclass
class NECO(Scorer):
    """Share of a feature's norm in the principal space, times the largest logit, ``max_c f_c ||P^T x|| / ||x||``.

    The vector x is the feature standardized by the mean and standard deviation (divided by N) of the fit set; P are the
    eigenvectors ``[D, dimension]`` of the largest eigenvalues of the covariance of x. A feature that does not vary on
    the fit set is only centered. A row at the mean of the fit set, where the ratio is 0/0, scores 0.

    Source: Ben Ammar et al. 2024, "NECO: NEural Collapse Based Out-of-distribution detection". The paper's score is the
    ratio; the authors' code multiplies it by the largest logit for every architecture but ResNet. Their code has no
    default for the dimension; the default here, as many as hold 90% of the variance, is that of the evaluation code of
    Mueller & Hein 2025.

    Fails on models without neural collapse; with the logit, also where largest logits are negative, because a larger
    share of the norm then lowers the score.

    Args:
        dimension: The dimension of the principal space; None for the smallest that holds ``variance``.
        variance: The share of the variance in the principal space; ignored if ``dimension`` is given.
        max_logit: Multiply by the largest logit; False for ResNets in the authors' code.
        standardize: With False, P is computed from the raw features, centered, and the norm of the feature itself, not
            centered, is the divisor: the authors' code without its scaler, which it recommends for a ViT on CIFAR.
        raw_norm: Divide by ``||z||`` instead of ``||x||``, as the authors' code does for DeiT and Swin.

    Cost: one product with a ``[D, dimension]`` matrix for each block; one eigendecomposition to fit.
    """

    tags = Tags(
        formula=(
            r"s(x) = \frac{\lVert P^\top \bar z \rVert}{\lVert \bar z \rVert} \, \max_c f_c, \quad \bar z = "
            r"\frac{z - \mu}{\sigma}"
        ),
        paper=Paper(
            "NECO: NEural Collapse Based Out-of-distribution detection",
            "Mouïn Ben Ammar, Nacim Belkhir, Sebastian Popescu, Antoine Manzanera, Gianni Franchi",
            "ICLR",
            2024,
            "https://arxiv.org/abs/2310.06823",
            "https://gitlab.com/drti/neco",
        ),
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
        self.require(0 < self.variance <= 1, f"variance must be in (0, 1], got {self.variance}")
        self.needs = ("features", "logits") if self.max_logit else ("features",)

    def statistics(self) -> tuple[GlobalMoments]:
        return (GlobalMoments("features"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[self.statistics()[0]]
        self.mean_ = moments.means[0]
        self.scale_ = deviations(moments) if self.standardize else torch.ones_like(self.mean_)
        covariance = moments.scatter / moments.counts.sum() / self.scale_ / self.scale_[:, None]
        values, vectors = principal_axes(covariance)
        rank = rank_of(values)
        if rank == 0:
            raise BadInput("neco: the features do not vary and have no principal space: fit on more rows.")
        dimension = self._enough(values) if self.dimension is None else self.dimension
        self.require(dimension <= rank, f"dimension must be at most {rank}, the rank of the features, got {dimension}")
        self.principal_space_ = vectors[:, :dimension].contiguous()

    def score_block(self, block: Block) -> Tensor:
        features = block.space("features")
        rows = (features - self.mean_.to(features)) / self.scale_.to(features)
        whole = rows if self.standardize and not self.raw_norm else features
        smallest = torch.finfo(torch.float64).tiny
        ratio = row_norm(rows @ self.principal_space_.to(features), 2.0) / row_norm(whole, 2.0).clamp_min(smallest)
        return ratio * block.logits64().amax(dim=1) if self.max_logit else ratio

    def _enough(self, values: Tensor) -> int:
        """The smallest number of dimensions that hold the share ``variance`` of the variance."""
        held = values.cumsum(0) / values.sum()
        return min(int((held < self.variance).sum()) + 1, rank_of(values))


@register_scorer("pnml")
@dataclass
class PNML(Scorer):
    """Negative normalized regret of the pNML learner, ``-log(sum_c p_c / (p_c + (1 - p_c) p_c^k)) / log C``.

    ``k = q / (1 + q)`` with ``q = x^T (X^T X)^+ x``, where x is the L2-normalized feature with a 1 appended, and X the
    matrix of these vectors of the fit set; p is the softmax of the head applied to the normalized feature, not to the
    feature itself. The regret is what knowledge of the label would gain: it is small where x lies among the fit data (q
    near 0, and one probability near 1).

    Fits ``X^T X`` in float64, and the root of its pseudo-inverse.

    Source: Bibas et al. 2021, "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution
    Detection"; the authors' code ranks rows by one minus the regret. That code has two versions: ``main_score.py`` puts
    a column of ones before the normalized features, as ``bias=True`` does; the pseudocode of its README, its Lightning
    modules and pytorch-ood do not. Departures: each term is computed as ``1 / (1 + (1 - p_c) p_c^(k - 1))`` from
    log-probabilities, which are not clipped; k is not raised to the squared norm of the part of x outside the span, as
    it is in ``main_score.py``. The products are in the precision in which the features are stored, or in float64 if the
    root amplifies their rounding (features with a large common offset).

    Fails where the logits of normalized features are all small: p is then nearly uniform, and q alone determines the
    score. With a large fit set, q is small for every row in its span. The part of a row outside the span does not
    count, as with any pseudo-inverse.

    Args:
        bias: Append a 1 to each normalized feature, in the fit and in the score.

    Cost: one product with a ``[D, D]`` matrix and one with the ``[D, C]`` head for each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\frac{1}{\log C} \log \sum_c \frac{p_c}{p_c + (1 - p_c) \, p_c^{k}}, \quad k = \frac{q}{1 + "
            r"q}, \; q = \bar z^\top (X^\top X)^+ \bar z"
        ),
        paper=Paper(
            "Single Layer Predictive Normalized Maximum Likelihood for Out-of-Distribution Detection",
            "Koby Bibas, Meir Feder, Tal Hassner",
            "NeurIPS",
            2021,
            "https://arxiv.org/abs/2110.09246",
            "https://github.com/kobybibas/pnml_ood_detection",
        ),
        parameters_before={"bias": False},
    )
    bias: bool = True
    root_: Tensor = fitted()
    double_: bool = fitted(False)
    needs = ("features", "head")
    fit_needs = ("features",)

    def statistics(self) -> tuple[GlobalMoments]:
        return (GlobalMoments("features", normalize=True),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        moments = found[self.statistics()[0]]
        mean = moments.means[0]
        products = moments_about(moments, torch.zeros_like(mean))
        if self.bias:
            column = torch.cat([mean, mean.new_ones(1)])
            products = torch.cat([torch.cat([products, mean[None]]), column[:, None]], dim=1)
        root = whitening(products)
        self.double_ = bool(root.norm(dim=0).amax() > AMPLIFIED)
        self.root_ = root / moments.counts.sum().double().sqrt()

    def score_block(self, block: Block) -> Tensor:
        rows = rows_of(block, True, self.double_)
        root = self.root_.to(rows)
        coordinates = whitened(rows, root[: rows.shape[1]])
        if self.bias:
            coordinates += root[-1]
        projected = row_norm(coordinates, 2.0).square()[:, None]
        learner = block.replaced(logits=block.head(rows))
        total, share = learner.total_odds()[:, None], 1 / (1 + projected)
        predicted, others = learner.odds_of_others()
        rest = (total - learner.odds()).scatter_(1, predicted, others)
        powers = torch.addcmul((share - 1) * total.log(), learner.below_max(), -share).exp_()  # p^(k - 1) / total
        inverse = rest.mul_(powers)
        missing = inverse.gather(1, predicted)
        terms = inverse.add_(1).reciprocal_().scatter_(1, predicted, -missing / (1 + missing))  # 1 less, which is exact
        return -terms.sum(dim=1).log1p() / math.log(max(terms.shape[1], 2))


def default_dimension(width: int) -> int:
    """ViM's default dimension of the principal space for a number of features."""
    return 1000 if width >= 2048 else 512 if width >= 768 else width // 2


def origin_of(head: Head) -> Tensor:
    """The smallest feature whose logits are as near to 0 as the head allows, ``-pinv(W) b``, float64 ``[D]``."""
    return -torch.linalg.pinv(head.weight.double()) @ head.bias.double()


def moments_about(moments: Moments, origin: Tensor) -> Tensor:
    """The mean of ``(z - origin)(z - origin)^T``, ``[D, D]``, from the moments of all rows."""
    offset = moments.means[0] - origin
    return moments.scatter / moments.counts.sum() + torch.outer(offset, offset)


def deviations(moments: Moments) -> Tensor:
    """Standard deviations ``[D]``, divided by N; 1 for features that do not vary by more than rounding."""
    found = (moments.scatter.diagonal() / moments.counts.sum()).sqrt()
    rounding = torch.finfo(found.dtype).eps * moments.counts.sum() * moments.means[0].abs()
    return torch.where(found > rounding, found, 1.0)


def principal_axes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[D]`` of a positive semi-definite matrix, largest first, and its eigenvectors ``[D, D]``."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def rank_of(values: Tensor) -> int:
    """The number of eigenvalues, sorted with the largest first, that exceed the rounding error."""
    return int((values > torch.finfo(values.dtype).eps * len(values) * values[0]).sum())
