"""Class residuals: how far a feature lies from the mean feature of its predicted class."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Accumulator, Found, Statistic
from ood_scores.features.statistics.means import GroupMeans, Means
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.entropy import GEN
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.user_warnings import warn_user

LING_2025 = Paper(
    "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature Leveraging",
    "Zhiwei Ling, Yachen Chang, Hailiang Zhao, Xinkui Zhao, Kingsum Chow, Shuiguang Deng",
    "CVPR",
    2025,
    "https://arxiv.org/abs/2503.00325",
    "https://github.com/LingAndZero/CADRef",
)

SMALLEST = 1e-12
"""The smallest value that a length or a confidence counts as before it divides."""
ALIKE = 1e-3
"""``core`` computes similarities in float64 if their standard deviation over the fit set is smaller than this: those of
features with a large common offset differ by less than float32 resolves."""


ROUNDING = 1e-6
"""Residuals shorter than this share of the feature, and deviations below it, are rounding errors."""


@dataclass
class _RelativeToClass(Scorer):
    """Base class of ``caref`` and ``cadref``: the mean feature of each predicted class, and features relative to it."""

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
    """Negative relative distance to the mean feature of the predicted class, ``-|z - m_yhat| / |z|``.

    Both lengths are sums of absolute values (L1).

    Fits m_c, the mean feature of the rows predicted as class c; the fit does not read labels. A class that is never
    predicted has the mean of all rows, with a warning.

    Source: Ling et al. 2025, "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature
    Leveraging", and their code. Departures: their code returns NaN for rows predicted as a class that is never
    predicted in the fit set; the length of a feature counts as at least 1e-12.

    Fails where features of a class differ much in norm; rows near 0 score low whatever they are.

    Cost: one gathered mean for each row.
    """

    tags = Tags(formula=r"s(x) = -\frac{\lVert z - m_{\hat y} \rVert_1}{\lVert z \rVert_1}", paper=LING_2025)
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
"""The confidences by which ``cadref`` can divide, ``[B]``; they are larger for confident rows."""


@register_scorer("cadref")
@dataclass
class CADRef(_RelativeToClass):
    """``caref`` in two parts: errors that raise the predicted logit count less for confident rows.

    ``-(|(s e)_+| / S(f) + |(s e)_-| / mean S) / |z|``, with the error ``e = z - m_yhat``, the signs ``s = sign w_yhat``
    of the predicted class's weight, positive and negative parts ``_+`` and ``_-``, and a confidence S of the logits.

    Fits the means of ``caref`` and the mean of S over the fit set.

    Source: Ling et al. 2025, "CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled Relative Feature
    Leveraging", and their code, in which S is the energy by default. Features whose weight is 0 are in neither part.
    Departures: those of ``caref``; a confidence counts as at least 1e-12, while a negative one would reverse the order
    in their code.

    Fails where S is not positive (energies of models trained with sigmoids); the fit warns if S is not positive on
    average.

    Args:
        confidence: The confidence S: ``"energy"``, ``"max_logit"``, ``"msp"``, or ``"gen"``; the last is the inverse of
            the generalized entropy of the ``max(10, C // 10)`` largest probabilities.

    Cost: one gathered mean and one gathered row of signs for each row.
    """

    tags = Tags(
        formula=(
            r"s(x) = -\frac{1}{\lVert z \rVert_1} \Bigl( \frac{\lVert (\sigma e)_+ \rVert_1}{S(f)} + \frac{\lVert "
            r"(\sigma e)_- \rVert_1}{\operatorname{mean} S} \Bigr), \quad e = z - m_{\hat y}, \; \sigma = "
            r"\operatorname{sign} w_{\hat y}"
        ),
        paper=LING_2025,
        search_space={"confidence": ("energy", "max_logit", "msp", "gen")},
    )
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
            warn_user(
                f"cadref: the confidence {self.confidence!r} is {self.mean_confidence_:.3g} on average over the fit "
                "set, but must be positive: choose 'msp' or 'gen'.",
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
    """Energy plus the alignment of the residual of a feature with that of its predicted class, each standardized.

    ``(E - mean E) / std E + (S - mean S) / std S`` with the energy ``E = logsumexp(f)`` and ``S = cos(r, m_yhat)``. The
    residual r is z without its projection onto the weight w_yhat.

    Fits m_c, the mean residual of the rows predicted as class c (the fit does not read labels), and, in a second pass,
    the means and standard deviations of E and S over the fit set. A class that is never predicted has the mean feature
    of all rows, with a warning.

    Source: Yang, Kim & Bahk 2026, "CORE: Robust Out-of-Distribution Detection via Confidence and Orthogonal Residual
    Scoring", after its abstract and summaries of it; its formulas were not available. These describe a part of the
    feature along the classifier's weights and an orthogonal residual, the energy, the cosine similarity to a direction
    for each class, and the sum of z-scores, at a cost of O(D). Our reading, still to be checked against the text: the
    weight is that of the predicted class alone (all weights together leave no residual where classes outnumber
    features, as in the ViT that they test), and directions and z-scores are those of the fit set. What the authors say
    of their code in pull request 312 of OpenOOD agrees: the energy, and the cosine similarity of the part orthogonal to
    the weights to a class mean. The code itself was not available.

    Fails on OoD classes similar to known ones, whose residuals point in the same direction, and where the fit set is
    the training set and its energies are higher than those of unseen ID rows, which S must then outweigh.

    Cost: two gathered vectors for each row; a second pass to fit.
    """

    tags = Tags(
        formula=(
            r"s(x) = \frac{E - \operatorname{mean} E}{\operatorname{std} E} + \frac{S - \operatorname{mean} "
            r"S}{\operatorname{std} S}, \quad E = \log \sum_c e^{f_c}, \; S = \cos(r, m_{\hat y}), \; r = z - "
            r"\frac{\langle z, w_{\hat y} \rangle}{\lVert w_{\hat y} \rVert^2} w_{\hat y}"
        ),
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
    double_: bool = fitted(False)
    needs = ("features", "logits")
    fit_needs = ("features", "logits", "head")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features", "predicted"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        means = _means_of_predicted(self.name, found[Means("features", "predicted")])
        self.weight_ = normalize(feats.head.weight.double().to(means.device), dim=1)
        self.directions_ = direction_beside(means, self.weight_)
        self.double_ = False
        self._fit_scale(feats)
        if self.deviations_[1] < ALIKE:
            self.double_ = True
            self._fit_scale(feats)

    def _fit_scale(self, feats: FeatureSet) -> None:
        values = torch.cat([self._parts(block) for block in feats.blocks(only=("features", "logits"))])
        smallest = values.new_tensor([ROUNDING, SMALLEST if self.double_ else ROUNDING])
        self.means_ = values.mean(dim=0).tolist()
        self.deviations_ = values.std(dim=0, correction=0).maximum(smallest).tolist()

    def score_block(self, block: Block) -> Tensor:
        columns = zip(self._parts(block).unbind(dim=1), self.means_, self.deviations_, strict=True)
        energy, similarity = ((values - mean) / deviation for values, mean, deviation in columns)
        return energy + similarity

    def _parts(self, block: Block) -> Tensor:
        """The energy E and the similarity S, float64 ``[B, 2]``."""
        predicted, features = block.prediction(), block.space("features") if self.double_ else block.features
        weight, directions = (values.to(features)[predicted] for values in (self.weight_, self.directions_))
        similarity = (direction_beside(features, weight) * directions).sum(dim=1)
        return torch.stack([block.logsumexp(), similarity.double()], dim=1)


def direction_beside(rows: Tensor, units: Tensor) -> Tensor:
    """Unit vectors of the rows without their projections onto paired unit vectors, ``[B, D]``.

    A row that lies along its vector, up to rounding, has almost no residual.
    """
    residual = rows - (rows * units).sum(dim=1, keepdim=True) * units
    smallest = ROUNDING * torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    length = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    return residual / torch.maximum(length, smallest).clamp_min(SMALLEST)


@dataclass(frozen=True)
class MeanConfidence:
    """Statistic: the mean over all rows of one of the ``CONFIDENCES``, a float."""

    confidence: str
    reads: ClassVar[Sequence[str]] = ("logits",)

    def start(self, feats: FeatureSet) -> Accumulator[float]:
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
    warn_user(
        f"{name}: {int(empty.sum())} of {len(empty)} classes are never predicted in the fit set and get the mean of "
        "all rows.",
    )
    shares = groups.counts.double() / groups.counts.sum()
    return torch.where(empty[:, None], shares @ groups.means, groups.means)
