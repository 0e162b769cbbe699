"""Class residuals: how far a feature lies from the mean feature of its predicted class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.block import row_norm
from ood_scores.features.statistics.base import Accumulator, Found, Statistic
from ood_scores.features.statistics.means import GroupMeans, Means
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.entropy import GEN
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags

LING_2025 = Paper(
    "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature Leveraging",
    "Zhiwei Ling, Yachen Chang, Hailiang Zhao, Xinkui Zhao, Kingsum Chow, Shuiguang Deng",
    "CVPR",
    2025,
    "https://arxiv.org/abs/2503.00325",
    "https://github.com/LingAndZero/CADRef",
)

SMALLEST = 1e-12
"""Lengths and confidences are taken to be at least this before they divide."""


ROUNDING = 1e-6
"""Residuals that are shorter than this share of the feature, and deviations below it, are rounding errors."""


@dataclass
class _RelativeToClass(Scorer):
    """What ``caref`` and ``cadref`` share: the means by predicted class, and a feature relative to that of its own."""

    means_: Tensor = fitted()

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features", "predicted"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        self.means_ = _means_of_predicted(self.name, found[Means("features", "predicted")])

    def relative(self, block: Block) -> Tensor:
        """``z - m_yhat``, ``[B, D]``."""
        return block.features - self.means_.to(block.features)[block.prediction()]


@register_scorer("caref")
@dataclass
class CARef(_RelativeToClass):
    """Minus the distance to the mean feature of the predicted class, relative to the feature: ``-|z - m_yhat| / |z|``.

    Both lengths are sums of absolute values (L1).

    Fits m_c, the mean feature of the rows predicted as class c; labels are not read. The mean of all rows stands for
    that of a class never predicted, with a warning.

    Source: Ling et al. 2025, "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature
    Leveraging", and their code. Departures: theirs gives NaN for rows predicted as a class that no fit row was; the
    length of a feature counts as at least 1e-12.

    Fails where features of a class differ much in norm; rows near 0 score low whatever they are.

    Cost: one mean gathered for each row.
    """

    tags = Tags(paper=LING_2025)
    needs = ("features", "logits")
    fit_needs = ("features", "logits")

    def score_block(self, block: Block) -> Tensor:
        return -row_norm(self.relative(block), 1.0) / block.feature_norm(1.0).clamp_min(SMALLEST)


CONFIDENCES: Mapping[str, Callable[[Block], Tensor]] = {
    "energy": lambda block: block.logsumexp(),
    "max_logit": lambda block: block.logits64().amax(dim=1),
    "msp": lambda block: block.softmax().amax(dim=1),
    "gen": lambda block: -1 / GEN(top=max(10, block.logits.shape[1] // 10)).score_block(block).clamp_max(-SMALLEST),
}
"""What ``cadref`` can divide by: larger for confident rows, ``[B]``."""


@register_scorer("cadref")
@dataclass
class CADRef(_RelativeToClass):
    """As ``caref``, but in two parts: what raises the predicted logit counts less the more confident the row is.

    ``-(|(s e)_+| / S(f) + |(s e)_-| / mean S) / |z|``, with the error ``e = z - m_yhat``, the signs ``s = sign w_yhat``
    of the predicted class's weight, positive and negative parts ``_+`` and ``_-``, and a confidence S of the logits.

    Fits the means of ``caref`` and the mean of S over the fit set.

    Source: Ling et al. 2025, "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature
    Leveraging", after their code, whose default S is the energy. Features whose weight is 0 are in neither part.
    Departures: those of ``caref``; a confidence counts as at least 1e-12, where theirs would turn the order around.

    Fails where S is not positive (energies of models trained with sigmoids), of which a warning tells if it is so on
    average.

    Args:
        confidence: S: ``"energy"``, ``"max_logit"``, ``"msp"`` or ``"gen"``; the last is 1 over the generalised entropy
            of the ``max(10, C // 10)`` largest probabilities.

    Cost: one mean and one row of signs gathered for each row.
    """

    tags = Tags(paper=LING_2025, search_space={"confidence": ("energy", "max_logit", "msp", "gen")})
    confidence: Literal["energy", "max_logit", "msp", "gen"] = "energy"
    signs_: Tensor = fitted()
    mean_confidence_: float = fitted(math.nan)
    needs = ("features", "logits")
    fit_needs = ("features", "logits", "head")

    def __post_init__(self) -> None:
        self.require_choices()

    def statistics(self) -> Sequence[Statistic]:
        return (*super().statistics(), MeanConfidence(self.confidence))

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        super().fit_statistics(found, feats)
        self.signs_ = feats.head.weight.sign().to(self.means_.device, torch.int8)
        self.mean_confidence_ = found[MeanConfidence(self.confidence)]
        if self.mean_confidence_ <= 0:
            warnings.warn(
                f"cadref: the confidence {self.confidence!r} of the fit set is {self.mean_confidence_:.3g} on average, "
                "and cannot divide: choose 'msp' or 'gen'.",
                stacklevel=4,
            )

    def score_block(self, block: Block) -> Tensor:
        relative = self.relative(block)
        aligned = relative * self.signs_.to(relative)[block.prediction()]
        raising, lowering = (row_norm(part.clamp_min(0), 1.0) for part in (aligned, -aligned))
        confidence = CONFIDENCES[self.confidence](block).clamp_min(SMALLEST)
        error = raising / confidence + lowering / max(self.mean_confidence_, SMALLEST)
        return -error / block.feature_norm(1.0).clamp_min(SMALLEST)


@register_scorer("core")
@dataclass
class CORE(Scorer):
    """Energy, and the direction of what a feature has beside the predicted class's weight, each standardised.

    ``(E - mean E) / std E + (S - mean S) / std S`` with the energy ``E = logsumexp(f)`` and ``S = cos(r, m_yhat)``. The
    residual r is z without its projection on the weight w_yhat.

    Fits m_c, the mean residual of the rows predicted as class c (labels are not read), and in a second pass the means
    and standard deviations of E and S over the fit set. The mean feature of all rows stands for that of a class never
    predicted, with a warning.

    Source: Yang, Kim & Bahk 2026, "CORE: Robust Out-of-Distribution Detection via Confidence and Orthogonal Residual
    Scoring", after its abstract and summaries of it; its formulas were not at hand. These say: a part of the feature
    along the classifier's weights and an orthogonal residual, the energy, cosine similarity to a direction for each
    class, z-scores and their sum, at a cost of O(D). Our reading, which is to be checked against the text: the weight
    is that of the predicted class alone (all weights together leave nothing where classes outnumber features, as in the
    ViT that they test), directions and z-scores are those of the fit set.

    Fails on OoD classes much like known ones, whose residuals point the same way; and where the fit set is the
    training set and energies are higher there than on unseen ID rows, which S must then outweigh.

    Cost: two vectors gathered for each row; a second pass to fit.
    """

    tags = Tags(
        paper=Paper(
            "CORE: Robust Out-of-Distribution Detection via Confidence and Orthogonal Residual Scoring",
            "Jin Mo Yang, Hyung-Sin Kim, Saewoong Bahk",
            "arXiv",
            2026,
            "https://arxiv.org/abs/2603.18290",
        ),
        experimental="written after the abstract and summaries of the paper, whose formulas were not available",
    )
    weight_: Tensor = fitted()
    directions_: Tensor = fitted()
    means_: list[float] = fitted()
    deviations_: list[float] = fitted()
    needs = ("features", "logits")
    fit_needs = ("features", "logits", "head")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features", "predicted"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        means = _means_of_predicted(self.name, found[Means("features", "predicted")])
        self.weight_ = normalize(feats.head.weight.double().to(means.device), dim=1)
        self.directions_ = direction_beside(means, self.weight_)
        values = torch.cat([self._parts(block) for block in feats.blocks(only=("features", "logits"))])
        self.means_ = values.mean(dim=0).tolist()
        self.deviations_ = values.std(dim=0, correction=0).clamp_min(ROUNDING).tolist()

    def score_block(self, block: Block) -> Tensor:
        parts = self._parts(block)
        return ((parts - parts.new_tensor(self.means_)) / parts.new_tensor(self.deviations_)).sum(dim=1)

    def _parts(self, block: Block) -> Tensor:
        """E and S, float64 ``[B, 2]``."""
        predicted, features = block.prediction(), block.features
        weight, directions = (values.to(features)[predicted] for values in (self.weight_, self.directions_))
        similarity = (direction_beside(features, weight) * directions).sum(dim=1)
        return torch.stack([block.logsumexp(), similarity.double()], dim=1)


def direction_beside(rows: Tensor, units: Tensor) -> Tensor:
    """Rows without their projections on paired vectors of length one, brought to length one, ``[B, D]``.

    Of a row that lies along its vector, but for rounding, hardly anything is left.
    """
    residual = rows - (rows * units).sum(dim=1, keepdim=True) * units
    smallest = ROUNDING * torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    length = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    return residual / torch.maximum(length, smallest).clamp_min(SMALLEST)


@dataclass(frozen=True)
class MeanConfidence:
    """Asks for the mean over all rows of one of the ``CONFIDENCES``, a float."""

    confidence: str
    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator:
        return _MeanConfidenceAccumulator(self.confidence)


@dataclass
class _MeanConfidenceAccumulator:
    confidence: str
    total: float = 0.0
    rows: int = 0

    def update(self, block: Block) -> None:
        self.total += float(CONFIDENCES[self.confidence](block).sum())
        self.rows += len(block)

    def result(self) -> float:
        if not self.rows:
            raise BadInput("no block was read.")
        return self.total / self.rows


def _means_of_predicted(name: str, groups: GroupMeans) -> Tensor:
    """The mean of each group, and that of all rows for a group without rows, ``[G, D]``."""
    empty = groups.counts == 0
    if not empty.any():
        return groups.means
    warnings.warn(
        f"{name}: {int(empty.sum())} of {len(empty)} classes are never predicted in the fit set; the mean of all rows "
        "stands for theirs.",
        stacklevel=5,
    )
    shares = groups.counts.double() / groups.counts.sum()
    return torch.where(empty[:, None], shares @ groups.means, groups.means)
