"""OpenMax: Weibull distributions of the distances to the mean logits of each class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.features import Block, FeatureSet
from ood_scores.features.row_reductions import row_norm
from ood_scores.features.statistics.base import Found
from ood_scores.features.statistics.means import Means
from ood_scores.features.statistics.row_samples import Logits
from ood_scores.scorers.base import Scorer, fitted
from ood_scores.scorers.class_means import CLOSEST, warn_of_classes_without_rows
from ood_scores.scorers.numerics.distances import squared_distances
from ood_scores.scorers.registry import register_scorer
from ood_scores.scorers.tags import Paper, Tags
from ood_scores.scorers.work import Sizes, Work

TRANSLATION = 10_000.0
"""The smallest distance of a tail after the shift that libmr applies before it fits a Weibull distribution."""


STEP = 1e300
"""The shape of a Weibull distribution whose tail is a single value: a step."""


@register_scorer("openmax")
@dataclass
class OpenMax(Scorer):
    """Log probability that the class is a known one, ``log(1 - p_unknown)``, after OpenMax has changed the logits.

    The i-th largest logit f_c, i = 1 .. alpha, keeps the share ``1 - omega`` with ``omega = (alpha + 1 - i)/alpha
    F_c(||f - mu_c||)``. The removed shares add up to the logit of the unknown class; p is the softmax of all logits.
    F_c is a Weibull distribution of the distance of rows of class c to the mean of the class.

    Fits, on rows that are predicted as their label, the mean mu_c of the logits of each class, and the shape and scale
    of F_c by maximum likelihood from the ``tail`` largest distances to the mean, shifted to ``TRANSLATION`` as in
    libmr. All classes are fitted at once, by bisection of the single equation that determines the shape. A class
    without such a row has F_c = 1, with a warning: every row is far from it. If all distances of a class are equal (a
    single row), F_c is a step.

    Source: Bendale & Boult 2016, "Towards Open Set Deep Networks": tail 20 and alpha 10 as in the authors' code (alpha
    is 3 in OpenOOD); the activations are the logits, as their fc8 of AlexNet. Departures: their code adds the cosine
    distance to 1/200 of the Euclidean distance (``euclidean=0.005, cosine=1``), which suits the size of AlexNet's
    logits; the log of 1 - p_unknown ranks rows as -p_unknown does, without ties at 0 and 1.

    Fails with few rows for each class, too few to fit a tail, and where logits are negative: they then lower the logit
    of the unknown class.

    Args:
        tail: The number of largest distances of each class that are fitted.
        alpha: The number of largest logits that are changed; models with fewer classes use all.
        euclidean: The weight of the Euclidean distance.
        cosine: The weight of the cosine distance.

    Cost: one product with a ``[C, C]`` matrix for each block; the fit keeps the logits of the fit set ``[N, C]``.
    """

    tags = Tags(
        formula=(
            r"s(x) = \log(1 - p_{\text{unknown}}), \quad \omega_i = \frac{\alpha + 1 - i}{\alpha} F_c(\lVert f - "
            r"\mu_c \rVert)"
        ),
        paper=Paper(
            "Towards Open Set Deep Networks",
            "Abhijit Bendale, Terrance E. Boult",
            "CVPR",
            2016,
            "https://arxiv.org/abs/1511.06233",
            "https://github.com/abhijitbendale/OSDN",
        ),
        small_parameters={"tail": 5},
    )
    tail: int = 20
    alpha: int = 10
    euclidean: float = 1.0
    cosine: float = 0.0
    means_: Tensor = fitted()
    present_: Tensor = fitted()
    nearest_: Tensor = fitted()
    shape_: Tensor = fitted()
    log_scale_: Tensor = fitted()
    needs = ("logits",)
    fit_needs = ("logits", "labels")

    def __post_init__(self) -> None:
        self.require_count("tail")
        self.require_count("alpha")
        weights = (self.euclidean, self.cosine)
        valid = all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
        self.require(valid, f"euclidean and cosine must be at least 0 and not both 0, got {weights}")

    def work(self, sizes: Sizes) -> Work:
        return Work(memory=4.0 * sizes.fit_rows * sizes.classes)

    def statistics(self) -> tuple[Means, Logits]:
        return (Means("logits", "correct"), Logits())

    def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
        of_classes, of_rows = self.statistics()
        means, all_logits = found[of_classes], found[of_rows]
        self.means_, self.present_ = means.means, means.counts > 0
        if not self.present_.any():
            raise BadInput("openmax: no row of the fit set is predicted correctly: check the labels.")
        warn_of_classes_without_rows("openmax", means.counts)
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
        """Distances of each row to each class mean, ``[B, C]``."""
        means = self.means_.to(logits)
        center = means.mean(dim=0)
        distances = self.euclidean * squared_distances(logits - center, means - center).sqrt()
        if self.cosine:
            lengths = row_norm(logits, 2.0)[:, None] * row_norm(means, 2.0)
            distances = distances + self.cosine * (1 - logits @ means.T / lengths.clamp_min(CLOSEST))
        return distances

    def _weibull(self, distances: Tensor, classes: Tensor) -> Tensor:
        """The value of F at the distances to some classes of each row, ``[B, K]``."""
        nearest, shape, log_scale = (
            values.to(distances.device)[classes] for values in (self.nearest_, self.shape_, self.log_scale_)
        )
        logs = _log_translated(distances.gather(1, classes), nearest)
        probability = -torch.expm1(-torch.exp(shape * (logs - log_scale)))
        return torch.where(self.present_.to(distances.device)[classes], probability, 1.0)


def largest_by_class(values: Tensor, labels: Tensor, classes: int, count: int) -> Tensor:
    """The ``count`` largest values of each class, ``[C, count]``; NaN where a class has fewer."""
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
    """Shape and log scale of the most likely Weibull distribution of each row of logarithms; NaN marks missing values.

    The shape k solves ``sum x^k log x / sum x^k - mean(log x) = 1/k``, whose left side grows with k. Logarithms are
    relative to the largest of the row and in units of their standard deviation, so that k is of the order of 1.
    """
    there = logs.isfinite()
    count = there.sum(dim=1, keepdim=True).clamp_min(1)
    largest = logs.nan_to_num(-math.inf).amax(dim=1, keepdim=True).nan_to_num(0, neginf=0)
    values = torch.where(there, logs - largest, 0)
    mean = values.sum(dim=1, keepdim=True) / count
    spread = (torch.where(there, values - mean, 0).square().sum(dim=1, keepdim=True) / count).sqrt()
    varies = spread > 0
    unit, mean = values / torch.where(varies, spread, 1), mean / torch.where(varies, spread, 1)
    low = -torch.where(varies, -mean, 1).log()  # log k: the left side is at most the largest minus the mean
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
    """``log((distance - nearest + TRANSLATION) / TRANSLATION)`` without loss of digits."""
    return ((distances - nearest) / TRANSLATION).clamp_min(-1).log1p()
