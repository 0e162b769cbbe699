"""Scores against what the fit set looks like on average: its mean features, softmax or logits, of all or by class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.block import by_pieces, entropy, row_norm
from ood_scores.features.statistics.collect import Logits, Means, Statistic
from ood_scores.scorers.base import Scorer, register_scorer
from ood_scores.scorers.gaussian import squared_distances

CLOSEST = 1e-12
"""Lengths are taken to be at least this before they divide."""

TRANSLATION = 10_000.0
"""libmr moves a tail so that its smallest distance is this, before a Weibull distribution is fitted."""

STEP = 1e300
"""The shape of a Weibull distribution whose tail is a single value: a step."""


@register_scorer("kl_matching")
@dataclass
class KLMatching(Scorer):
    """Divergence to the nearest typical softmax, ``-min_k KL(p || d_k) = -min_k sum_c p_c (log p_c - log d_kc)``.

    Fits d_k, the mean softmax of the rows predicted as class k; labels are not read. Classes that are never predicted
    are left out.

    Source: Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection for Real-World Settings", who fit on held-out
    rows: a training set that the model knows by heart gives d_k that are too sharp. Departure: probabilities below
    1e-308 count as that. The product with log d is taken in the precision that the logits are kept in.

    Fails where known inputs are confused in more than one way for each predicted class, and where OoD inputs are
    predicted with confidence.

    Cost: one product with a ``[C, C]`` matrix for each block.
    """

    log_means_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("logits",)
    fit_needs = ("logits",)

    def statistics(self) -> Sequence[Statistic]:
        return (Means("softmax", "predicted"),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (typical,) = (found[statistic] for statistic in self.statistics())
        means = typical.means[typical.counts > 0]
        self.log_means_ = means.clamp_min(torch.finfo(means.dtype).tiny).log()

    def score_block(self, block: Block) -> Tensor:
        return by_pieces(self._scored, block.logits)

    def _scored(self, logits: Tensor) -> Tensor:
        softmax = logits.softmax(dim=1)
        cross = (softmax @ self.log_means_.to(softmax).T).amax(dim=1)
        return cross + entropy(softmax, logits)


@register_scorer("she")
@dataclass
class SHE(Scorer):
    """Inner product with the mean feature of the predicted class, ``<z, m_yhat>``.

    Fits m_c, the mean feature of the fit rows of class c that are predicted as c. A class without such a row has the
    mean 0, with a warning: rows predicted as that class score 0, which for features after a ReLU is the lowest score.

    Source: Zhang et al. 2023, "Out-of-Distribution Detection based on In-Distribution Data Patterns Memorization with
    Modern Hopfield Energy".

    Fails where features may be negative or norms do not differ: the score grows with ``||z||``.

    Cost: one mean gathered, and one product, for each row.
    """

    means_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("features", "logits")
    fit_needs = ("features", "logits", "labels")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features", "correct"),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        (correct,) = (found[statistic] for statistic in self.statistics())
        _warn_of_classes_without_rows("she", correct.counts)
        self.means_ = correct.means

    def score_block(self, block: Block) -> Tensor:
        return _inner(block.features, self.means_.to(block.features)[block.prediction()])


@register_scorer("fdbd")
@dataclass
class FDBD(Scorer):
    """Mean distance to the decision boundaries, relative to that to the mean feature.

    ``1/(C-1) sum_{c != yhat} |f_yhat - f_c| / (||w_yhat - w_c|| ||z - mu||)``: the quotient is how far z is from where
    class c would be predicted instead.

    Fits mu, the mean of all features, and the distances between the rows of the head's weight, from their Gram matrix.

    Source: Liu & Qin 2024, "Fast Decision Boundary based Out-of-Distribution Detector". Departures: classes whose
    weights are equal have no boundary between them, and are left out of the mean; where ``z = mu`` the distance counts
    as 1e-12.

    Fails where OoD features lie near mu: the division then makes their scores large. A single class has no boundary.

    Cost: one row of C distances gathered, and one pass over the logits, for each row.
    """

    mean_: Tensor = field(init=False, repr=False, compare=False)
    inverse_distances_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("features", "logits")
    fit_needs = ("features", "head")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features"),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        assert feats.head is not None
        if feats.head.num_classes < 2:
            raise BadInput("fdbd: a model with a single class has no decision boundary.")
        self.mean_ = found[Means("features")].means[0]
        self.inverse_distances_ = _inverse_distances(feats.head.weight.double().to(self.mean_.device))

    def score_block(self, block: Block) -> Tensor:
        logits = block.logits
        gaps = logits.amax(dim=1, keepdim=True) - logits
        boundaries = _inner(gaps, self.inverse_distances_.to(logits)[block.prediction()])
        return boundaries / row_norm(block.features - self.mean_.to(block.features), 2.0).clamp_min(CLOSEST)


@register_scorer("nci")
@dataclass
class NCI(Scorer):
    """How far the centred feature points along the predicted class's weight, ``<z - mu, w_yhat> / ||z - mu||``.

    Plus ``alpha ||z||_1``. Fits mu, the mean of all features.

    Source: Liu & Qin 2025, "Detecting Out-of-Distribution through the Lens of Neural Collapse". The paper tunes alpha
    for each model on validation data; the default 0 leaves that term out. Departure: a row with ``z = mu`` has no
    direction, and its first term is 0.

    Fails before neural collapse: features then do not line up with the weights. With alpha 0, ``||z||`` does not
    count.

    Args:
        alpha: weight of the feature norm.

    Cost: one weight gathered, and one product, for each row.
    """

    alpha: float = 0.0
    mean_: Tensor = field(init=False, repr=False, compare=False)
    weight_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("features", "logits")
    fit_needs = ("features", "head")

    def __post_init__(self) -> None:
        self.require(0 <= self.alpha < math.inf, f"alpha must be at least 0 and finite, got {self.alpha}")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("features"),)

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        assert feats.head is not None
        self.mean_ = found[Means("features")].means[0]
        self.weight_ = feats.head.weight.double()

    def score_block(self, block: Block) -> Tensor:
        centred = block.features - self.mean_.to(block.features)
        along = _inner(centred, self.weight_.to(centred)[block.prediction()])
        scores = along / row_norm(centred, 2.0).clamp_min(CLOSEST)
        return scores + self.alpha * block.feature_norm(1.0) if self.alpha else scores


@register_scorer("openmax")
@dataclass
class OpenMax(Scorer):
    """Log probability that the class is one of the known, ``log(1 - p_unknown)``, after OpenMax moved the logits.

    The i-th largest logit f_c, i = 1 .. alpha, keeps the share ``1 - omega``,
    ``omega = (alpha + 1 - i)/alpha F_c(||f - mu_c||)``. What they lose is the logit of the unknown class; p is the
    softmax of all. F_c is a Weibull distribution of how far rows of class c are from its mean.

    Fits, on rows that are predicted as their label, the mean mu_c of the logits of each class and the shape and scale
    of F_c, by maximum likelihood, to the ``tail`` largest distances to it, moved to ``TRANSLATION`` as libmr does. All
    classes are fitted at once, by bisection of the one equation that the shape solves. A class without such a row has
    F_c = 1, with a warning: nothing is known to be near it. Where all its distances are equal (a single row) F_c is a
    step.

    Source: Bendale & Boult 2016, "Towards Open Set Deep Networks": tail 20 and alpha 10 as in the authors' code; the
    activations are the logits, as theirs of AlexNet's fc8. Departures: theirs adds the cosine distance to 1/200 of the
    Euclidean (``euclidean=0.005, cosine=1``), which fits the size of AlexNet's logits; the log of 1 - p_unknown ranks
    as -p_unknown does, without ties at 0 and 1.

    Fails with few rows a class, on which no tail can be fitted, and where logits are negative: the unknown class then
    loses by them.

    Args:
        tail: how many of the largest distances of each class are fitted.
        alpha: how many of the largest logits are moved; with fewer classes all are.
        euclidean: weight of the Euclidean distance.
        cosine: weight of the cosine distance.

    Cost: one product with a ``[C, C]`` matrix for each block; the fit keeps the fit set's logits ``[N, C]``.
    """

    tail: int = 20
    alpha: int = 10
    euclidean: float = 1.0
    cosine: float = 0.0
    means_: Tensor = field(init=False, repr=False, compare=False)
    present_: Tensor = field(init=False, repr=False, compare=False)
    nearest_: Tensor = field(init=False, repr=False, compare=False)
    shape_: Tensor = field(init=False, repr=False, compare=False)
    log_scale_: Tensor = field(init=False, repr=False, compare=False)
    needs = ("logits",)
    fit_needs = ("logits", "labels")

    def __post_init__(self) -> None:
        self.require_count("tail")
        self.require_count("alpha")
        weights = (self.euclidean, self.cosine)
        valid = all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
        self.require(valid, f"the weights of the distances must be at least 0 and not both 0, got {weights}")

    def statistics(self) -> Sequence[Statistic]:
        return (Means("logits", "correct"), Logits())

    def fit_statistics(self, found: Mapping[Statistic, Any], feats: FeatureSet) -> None:
        means, all_logits = (found[statistic] for statistic in self.statistics())
        self.means_, self.present_ = means.means, means.counts > 0
        if not self.present_.any():
            raise BadInput("openmax: no row of the fit set is predicted as its label.")
        _warn_of_classes_without_rows("openmax", means.counts)
        labels = feats.class_labels().to(all_logits.device)
        correct = all_logits.argmax(dim=1) == labels
        distances = torch.cat(
            [
                self._distances(logits.double()).gather(1, label[:, None])[:, 0]
                for logits, label in zip(all_logits[correct].split(8192), labels[correct].split(8192), strict=True)
            ]
        )
        tails = largest_by_class(distances, labels[correct], len(self.means_), self.tail)
        self.nearest_ = tails.nan_to_num(math.inf).amin(dim=1)
        self.shape_, self.log_scale_ = weibull_fit(_log_translated(tails, self.nearest_[:, None]))

    def score_block(self, block: Block) -> Tensor:
        logits = block.logits64()
        largest, classes = logits.topk(min(self.alpha, logits.shape[1]), dim=1)
        ranks = torch.arange(largest.shape[1], device=logits.device, dtype=logits.dtype)
        lost = largest * (1 - ranks / largest.shape[1]) * self._weibull(self._distances(logits), classes)
        known = logits.scatter(1, classes, largest - lost).logsumexp(dim=1)
        return torch.nn.functional.logsigmoid(known - lost.sum(dim=1))

    def _distances(self, logits: Tensor) -> Tensor:
        """From every row to every class mean, ``[B, C]``."""
        means = self.means_.to(logits)
        centre = means.mean(dim=0)
        distances = self.euclidean * squared_distances(logits - centre, means - centre).sqrt()
        if self.cosine:
            lengths = row_norm(logits, 2.0)[:, None] * row_norm(means, 2.0)
            distances = distances + self.cosine * (1 - logits @ means.T / lengths.clamp_min(CLOSEST))
        return distances

    def _weibull(self, distances: Tensor, classes: Tensor) -> Tensor:
        """F of the distances to some classes of each row, ``[B, K]``."""
        nearest, shape, log_scale = (
            values.to(distances.device)[classes] for values in (self.nearest_, self.shape_, self.log_scale_)
        )
        logs = _log_translated(distances.gather(1, classes), nearest)
        probability = -torch.expm1(-torch.exp(shape * (logs - log_scale)))
        return torch.where(self.present_.to(distances.device)[classes], probability, 1.0)


def largest_by_class(values: Tensor, labels: Tensor, classes: int, count: int) -> Tensor:
    """The ``count`` largest values of each class, ``[C, count]``, NaN where a class has fewer."""
    order = values.argsort(descending=True)
    order = order[labels[order].argsort(stable=True)]
    values, labels = values[order], labels[order]
    counts = torch.bincount(labels, minlength=classes)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels]
    kept = rank < count
    found = values.new_full((classes, count), math.nan)
    found[labels[kept], rank[kept]] = values[kept]
    return found


def weibull_fit(logs: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and log of the scale of the likeliest Weibull distribution of each row, from logarithms with NaN for none.

    The shape k solves ``sum x^k log x / sum x^k - mean(log x) = 1/k``, whose left side grows with k. Logarithms are
    taken relative to the row's largest and in units of their standard deviation, so that k is of the order of 1.
    """
    there = logs.isfinite()
    count = there.sum(dim=1, keepdim=True).clamp_min(1)
    largest = logs.nan_to_num(-math.inf).amax(dim=1, keepdim=True).nan_to_num(0, neginf=0)
    values = torch.where(there, logs - largest, 0)
    mean = values.sum(dim=1, keepdim=True) / count
    spread = (torch.where(there, values - mean, 0).square().sum(dim=1, keepdim=True) / count).sqrt()
    varies = spread > 0
    unit, mean = values / torch.where(varies, spread, 1), mean / torch.where(varies, spread, 1)
    low = -torch.where(varies, -mean, 1).log()  # log k: the left side is at most the largest less the mean
    high = low + math.log(1e6)
    for _ in range(64):
        middle = (low + high) / 2
        powers = torch.where(there, (middle.exp() * unit).exp(), 0)
        above = (powers * unit).sum(dim=1, keepdim=True) / powers.sum(dim=1, keepdim=True) - mean > (-middle).exp()
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    shape = torch.where(varies, low.exp() / spread, STEP)
    power_mean = torch.where(there, (shape * values).exp(), 0).sum(dim=1, keepdim=True) / count
    log_scale = largest + torch.where(varies, power_mean.log() / shape, 0)
    return shape[:, 0], log_scale[:, 0]


def _log_translated(distances: Tensor, nearest: Tensor) -> Tensor:
    """``log((distance - nearest + TRANSLATION) / TRANSLATION)``, with its digits."""
    return ((distances - nearest) / TRANSLATION).clamp_min(-1).log1p()


def _inverse_distances(rows: Tensor) -> Tensor:
    """One over the distance of every pair of rows, divided by how many of a row's pairs have one; 0 for equal rows."""
    rows = rows - rows.mean(dim=0)
    squares = squared_distances(rows, rows)
    rounding = torch.finfo(rows.dtype).eps * rows.shape[1] * rows.square().sum(dim=1)
    apart = squares > rounding[:, None] + rounding
    inverse = torch.where(apart, squares.clamp_min(CLOSEST**2).rsqrt(), 0)
    return inverse / apart.sum(dim=1, keepdim=True).clamp_min(1)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """The inner products of paired rows, float64 ``[B]``."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0].double()


def _warn_of_classes_without_rows(name: str, counts: Tensor) -> None:
    lacking = int((counts == 0).sum())
    if lacking:
        warnings.warn(
            f"{name}: {lacking} of {len(counts)} classes have no row to fit that is predicted as its label.",
            stacklevel=4,
        )
