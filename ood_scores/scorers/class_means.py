"""Class means: scores against the mean softmax, features, or direction of the fit set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import (
    SUMMED,
    below_largest,
    by_pieces,
    entropy_and_others,
    exp_,
    exp_minus_tangent,
    row_norm,
)
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.means import Means
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.gaussian import classes_present
from ood_scores.scorers.numerics.distances import inner
from ood_scores.scorers.papers import HENDRYCKS_2022
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.user_warnings import warn_user

CLOSEST = 1e-12
"""The smallest length that a vector counts as before it divides."""

PARALLEL = 0.99
"""Cosines above this are computed in float64: what float32 leaves of their differences from 1 is too little."""

CANCELED = 1e-3
"""The divergence, relative to the entropy from which it results, below which it is computed without cancellation."""

NO_DIVERGENCE = 1e-10
"""The same, absolute, because the logarithm of a mean near 1 is rounded to 1e-16."""


@register_scorer("kl_matching")
@dataclass
class KLMatching(Scorer):
    """Negative divergence to the nearest typical softmax, ``-min_k KL(p || d_k)``.

    ``KL(p || d_k) = sum_c p_c (log p_c - log d_kc)``. Fits d_k, the mean softmax of the rows predicted as class k; the
    fit does not read labels. Classes that are never predicted are left out.

    Source: Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings", who fit on held-out
    rows: the d_k of a training set that the model has memorized are too sharp. Departure: probabilities below 1e-308
    count as 1e-308. The product with log d has the precision in which the logits are stored, except for rows whose
    divergence is so small that it would cancel.

    Fails where known inputs of one predicted class are confused in more than one way, and where OoD inputs are
    predicted with confidence.

    Cost: one product with a ``[C, C]`` matrix for each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\min_k \sum_c p_c \log \frac{p_c}{d_{kc}}, \quad d_k = \operatorname{mean} \{ p_i : \hat "
            r"y_i = k \}"
        ),
        aliases=("klm", "klmatching"),
        paper=HENDRYCKS_2022,
    )
    log_means_: Tensor = fitted()
    needs = ("logits",)
    fit_needs = ("logits",)

    def statistics(self) -> tuple[Means]:
        return (Means("softmax", "predicted"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        typical = found[self.statistics()[0]]
        means = typical.means[typical.counts > 0]
        self.log_means_ = means.clamp_min(torch.finfo(means.dtype).tiny).log()

    def score_block(self, block: Block) -> Tensor:
        scores, entropy = by_pieces(self._scored, block.logits, SUMMED)
        close = -scores < CANCELED * entropy + NO_DIVERGENCE
        if not torch.compiler.is_compiling() and block.happens(close):
            scores[close] = by_pieces(self._close, block.logits[close], SUMMED)
        return scores

    def _scored(self, logits: Tensor) -> Tensor:
        """The scores and the entropies of the softmax, float64 ``[2, B]``."""
        below = below_largest(logits)
        odds = exp_(below.clone())
        cross = (odds @ self.log_means_.to(odds).T).amax(dim=1)
        entropy, others = entropy_and_others(below, odds)
        return torch.stack([entropy + cross / (1 + others), entropy])

    def _close(self, logits: Tensor) -> Tensor:
        """The scores of rows that are close to a mean, ``sum_c p_c (1 - d_kc / p_c + log (d_kc / p_c))``.

        Their terms have one sign, and each has its digits, so that float64 is exact however small the divergence is.
        """
        log_p, log_means = logits.double().log_softmax(dim=1), self.log_means_.to(logits.device)
        p = log_p.exp()
        log_d = log_means[(p @ (log_means - log_means.mean(dim=0)).T).argmax(dim=1)]
        ratio = log_d - log_p
        return -torch.where(ratio.abs() < 0.1, p * exp_minus_tangent(ratio), log_d.exp() - p - p * ratio).sum(dim=1)


@register_scorer("she")
@dataclass
class SHE(Scorer):
    """Inner product with the mean feature of the predicted class, ``<z, m_yhat>``.

    Fits m_c, the mean feature of the fit rows of class c that are predicted as c. A class without such a row has the
    mean 0, with a warning: rows predicted as that class score 0, which is the lowest score of features after a ReLU.

    Source: Zhang et al. 2023, "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with
    Modern Hopfield Energy".

    Fails where features may be negative, or where norms do not differ: the score grows with ``||z||``.

    Cost: one gathered mean and one inner product for each row.
    """

    tags = Tags(
        formula=r"s(x) = \langle z, m_{\hat y} \rangle, \quad m_c = \operatorname{mean} \{ z_i : y_i = \hat y_i = c \}",
        paper=Paper(
            (
                "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with Modern "
                "Hopfield Energy"
            ),
            "Jinsong Zhang, Qiang Fu, Xu Chen, Lun Du, Zelin Li, Gang Wang, Xiaoguang Liu, Shi Han, Dongmei Zhang",
            "ICLR",
            2023,
            "https://openreview.net/forum?id=KkazG4lgKL",
            "https://github.com/zjs975584714/SHE_ood_detection",
        ),
    )
    means_: Tensor = fitted()
    needs = ("features", "logits")
    fit_needs = ("features", "logits", "labels")

    def statistics(self) -> tuple[Means]:
        return (Means("features", "correct"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        correct = found[self.statistics()[0]]
        warn_of_classes_without_rows("she", correct.counts)
        self.means_ = correct.means

    def score_block(self, block: Block) -> Tensor:
        return inner(block.features, self.means_.to(block.features)[block.prediction()])


@register_scorer("ctm")
@dataclass
class CTM(Scorer):
    """Cosine similarity to the nearest class mean, ``max_c cos(z, mu_c)``.

    Fits mu_c, the mean feature of the fit rows labeled c; classes without rows are left out, with a warning.

    Source: Ngoc-Hieu et al. 2023, "A Cosine Similarity-based Method for Out-of-Distribution Detection" (class typical
    matching), and the authors' code, in which rows are normalized before the product but not before the mean. (The code
    reads a switch for the normalization of rows that nothing in it sets; without it, the score would be no cosine.) A
    feature of zeros scores 0.

    Fails where all features point in nearly the same direction, such as those with a large common offset, and where
    the norm is what separates OoD rows. Neither is so for a ResNet-20 with 1,000 fit rows (AUROC 0.86 for CIFAR-10
    against CIFAR-100, 0.95 against textures).

    Cost: one product with a ``[D, C]`` matrix for each block.
    """

    tags = Tags(
        formula=r"s(x) = \max_c \frac{\langle z, \mu_c \rangle}{\lVert z \rVert \, \lVert \mu_c \rVert}",
        paper=Paper(
            "A Cosine Similarity-based Method for Out-of-Distribution Detection",
            "Nguyen Ngoc-Hieu, Nguyen Hung-Quang, The-Anh Ta, Thanh Nguyen-Tang, Khoa D Doan, Hoang Thanh-Tung",
            "arXiv",
            2023,
            "https://arxiv.org/abs/2306.14920",
            "https://github.com/Fsoft-AIC/CTM_OOD",
        ),
    )
    means_: Tensor = fitted()
    needs = ("features",)
    fit_needs = ("features", "labels")

    def statistics(self) -> tuple[Means]:
        return (Means("features", "label"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        labeled = found[self.statistics()[0]]
        self.means_ = normalize(labeled.means[classes_present(labeled.counts, self.name)], dim=1)

    def score_block(self, block: Block) -> Tensor:
        cosines = (block.unit_features() @ self.means_.to(block.features).T).amax(dim=1).double()
        parallel = cosines > PARALLEL
        if block.features.dtype != torch.float64 and not torch.compiler.is_compiling() and block.happens(parallel):
            rows = normalize(block.features[parallel].double(), dim=1)
            cosines[parallel] = (rows @ self.means_.to(rows).T).amax(dim=1)
        return cosines


@register_scorer("nci")
@dataclass
class NCI(Scorer):
    """Alignment of the centered feature with the predicted class's weight, ``<z - mu, w_yhat> / ||z - mu||``.

    The norm term ``alpha ||z||_1`` is added to it. Fits mu, the mean of all features.

    Source: Liu & Qin 2025, "Detecting Out-of-Distribution through the Lens of Neural Collapse". The paper tunes alpha
    for each model on validation data; the default of 0 omits that term (alpha is 1e-4 in OpenOOD). Departure: a row
    with ``z = mu`` has no direction, and its first term is 0.

    Fails before neural collapse, when features are not aligned with the weights. With alpha = 0, ``||z||`` does not
    count.

    Args:
        alpha: The weight of the feature norm.

    Cost: one gathered weight and one inner product for each row.
    """

    tags = Tags(
        formula=(
            r"s(x) = \frac{\langle z - \mu, \, w_{\hat y} \rangle}{\lVert z - \mu \rVert} + \alpha \lVert z "
            r"\rVert_1"
        ),
        paper=Paper(
            "Detecting Out-of-Distribution through the Lens of Neural Collapse",
            "Litian Liu, Yao Qin",
            "CVPR",
            2025,
            "https://arxiv.org/abs/2311.01479",
            "https://github.com/litianliu/NCI-OOD",
        ),
        search_space={"alpha": (0.0, 0.0001, 0.001, 0.01)},
    )
    alpha: float = 0.0
    mean_: Tensor = fitted()
    weight_: Tensor = fitted()
    needs = ("features", "logits")
    fit_needs = ("features", "head")

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha < math.inf, f"alpha must be at least 0 and finite, got {self.alpha}")

    def statistics(self) -> tuple[Means]:
        return (Means("features"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        self.mean_ = found[Means("features")].means[0]
        self.weight_ = feats.head.weight.double()

    def score_block(self, block: Block) -> Tensor:
        centered = block.features - self.mean_.to(block.features)
        along = inner(centered, self.weight_.to(centered)[block.prediction()])
        scores = along / row_norm(centered, 2.0).clamp_min(CLOSEST)
        return scores + self.alpha * block.feature_norm(1.0) if self.alpha else scores


def warn_of_classes_without_rows(name: str, counts: Tensor) -> None:
    """Warn if some classes have no correctly predicted row in the fit set."""
    lacking = int((counts == 0).sum())
    if lacking:
        warn_user(
            f"{name}: {lacking} of {len(counts)} classes have no correctly predicted row in the fit set.",
        )
