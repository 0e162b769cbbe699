"""Decision boundaries: distances and angles to the boundaries between the predicted class and the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.means import Means
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.class_means import CLOSEST
from ood_scores.scorers.numerics.distances import inner, squares_between
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags


@register_scorer("fdbd")
@dataclass
class FDBD(Scorer):
    """Mean distance to the decision boundaries, relative to the distance to the mean feature.

    ``1/(C-1) sum_{c != yhat} |f_yhat - f_c| / (||w_yhat - w_c|| ||z - mu||)``: the first part of the quotient is the
    distance of z to the nearest point that would be predicted as class c.

    Fits mu, the mean of all features, and the distances between the rows of the head's weight, from their Gram matrix.

    Source: Liu & Qin 2024, "Fast Decision Boundary based Out-of-Distribution Detector". Departures: classes with equal
    weights have no boundary between them and are left out of the mean; where ``z = mu``, the distance counts as 1e-12.

    Fails where OoD features lie near mu: the division then makes their scores large.

    Cost: one gathered row of C distances and one pass over the logits for each row.
    """

    tags = Tags(
        formula=(
            r"s(x) = \frac{1}{C - 1} \sum_{c \ne \hat y} \frac{|f_{\hat y} - f_c|}{\lVert w_{\hat y} - w_c \rVert "
            r"\, \lVert z - \mu \rVert}"
        ),
        paper=Paper(
            "Fast Decision Boundary based Out-of-Distribution Detector",
            "Litian Liu, Yao Qin",
            "ICML",
            2024,
            "https://arxiv.org/abs/2312.11536",
            "https://github.com/litianliu/fDBD-OOD",
        ),
    )
    mean_: Tensor = fitted()
    inverse_distances_: Tensor = fitted()
    needs = ("features", "logits")
    fit_needs = ("features", "head")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        self.mean_ = found[Means("features")].means[0]
        self.inverse_distances_ = _inverse_distances(feats.head.weight.double().to(self.mean_.device))

    def score_block(self, block: Block) -> Tensor:
        logits = block.logits
        gaps = logits.amax(dim=1, keepdim=True) - logits
        boundaries = inner(gaps, self.inverse_distances_.to(logits)[block.prediction()])
        return boundaries / row_norm(block.features - self.mean_.to(block.features), 2.0).clamp_min(CLOSEST)


@register_scorer("ora")
@dataclass
class ORA(Scorer):
    """Largest angle, seen from the mean feature, between a feature and its projections onto the decision boundaries.

    ``max_c angle(z - mu, z_c - mu)`` in radians, with ``z_c = z - (f_yhat - f_c) d_c / ||d_c||^2`` and ``d_c = w_yhat -
    w_c``: z_c is the nearest point at which class c is as likely as the predicted class. A feature deep inside its
    class has to turn far.

    Fits mu, the mean of all features, and the distances between the rows of the head's weight, from their Gram matrix.

    Source: Demirel, Fumero & Locatello 2025, "Out-of-Distribution Detection with Relative Angles". Their code divides
    the angle by pi; their postprocessor for OpenOOD takes the mean over the C classes, with 0 for the predicted one:
    ``aggregate="mean"``. Departures: mu is the mean of the rows, while their code takes the mean of the class means,
    which is the same if classes are of equal size; the angle is computed from its tangent, not from its cosine, so that
    angles near 0 keep their digits; features are not projected, because the angle follows from products with W. Classes
    with equal weights have no boundary between them and count as angle 0, as in their code; a row at mu has no
    direction and scores 0.

    Fails where OoD features lie near mu, from where a small step is a large angle, and where one far boundary
    determines the score: on a ResNet-20 for CIFAR-10, the mean separates CIFAR-100 better (AUROC 0.88) than the maximum
    (0.80).

    Args:
        aggregate: ``"max"`` or ``"mean"`` over the classes.

    Cost: one product with the head's weight for each block.
    """

    tags = Tags(
        formula=(
            r"s(x) = \max_{c \ne \hat y} \angle(z - \mu, \, z_c - \mu), \quad z_c = z - \frac{f_{\hat y} - "
            r"f_c}{\lVert w_{\hat y} - w_c \rVert^2} (w_{\hat y} - w_c)"
        ),
        paper=Paper(
            "Out-of-Distribution Detection with Relative Angles",
            "Berker Demirel, Marco Fumero, Francesco Locatello",
            "NeurIPS",
            2025,
            "https://arxiv.org/abs/2410.04525",
            "https://github.com/berkerdemirel/ORA-OOD-Detection-with-Relative-Angles",
        ),
    )
    aggregate: Literal["max", "mean"] = "max"
    mean_: Tensor = fitted()
    weight_: Tensor = fitted()
    squares_: Tensor = fitted()
    needs = ("features", "logits")
    fit_needs = ("features", "head")

    def __post_init__(self) -> None:
        self.require_choices()

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features"),)

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        assert feats.head is not None
        self.mean_ = found[Means("features")].means[0]
        self.weight_ = feats.head.weight.double().to(self.mean_.device)
        self.squares_ = squares_between(self.weight_)

    def score_block(self, block: Block) -> Tensor:
        rows = block.space("features") - self.mean_.to(block.features.device)
        along = rows @ self.weight_.to(rows).T
        predicted = block.prediction()
        along = along.gather(1, predicted[:, None]) - along
        logits = block.logits64()
        gaps = logits.amax(dim=1, keepdim=True) - logits
        squares = self.squares_.to(rows)[predicted]
        steps = torch.where(squares > 0, gaps / squares.clamp_min(torch.finfo(torch.float64).tiny), 0)
        lengths = rows.square().sum(dim=1, keepdim=True)
        aside = steps * (lengths * squares - along.square()).clamp_min(0).sqrt()
        angles = angle(aside, lengths - steps * along)
        return angles.amax(dim=1) if self.aggregate == "max" else angles.mean(dim=1)


def angle(aside: Tensor, along: Tensor) -> Tensor:
    """``atan2``; a traced graph computes it in float32, because onnxruntime has no float64 version."""
    if torch.compiler.is_compiling():
        return torch.atan2(aside.float(), along.float()).double()
    return torch.atan2(aside, along)


def _inverse_distances(rows: Tensor) -> Tensor:
    """Inverse distance of each pair of rows, divided by the row's number of distinct partners; 0 for equal rows."""
    squares = squares_between(rows)
    apart = squares > 0
    inverse = torch.where(apart, squares.clamp_min(CLOSEST**2).rsqrt(), 0)
    return inverse / apart.sum(dim=1, keepdim=True).clamp_min(1)
