"""Sets of labels that contain the true one with a chosen probability: split conformal classification on logits.

A rule is calibrated on logits and labels of in-distribution rows on which the model was not trained. For a new row that
is exchangeable with them, the set contains the label with a probability of at least 1 - alpha, at finite n, for any
model. Every label gets a nonconformity from the row's softmax probabilities, and the set has the labels whose
nonconformity is at most a quantile of those of the true labels of the calibration rows.

Departure: the nonconformities of APS, RAPS and SAPS have no random part (the u of the papers is 1), so that the same
image always gets the same set. The guarantee is the same, and sets are never empty for that reason; they are larger.

Sources: Sadinle et al. 2019, Least ambiguous set-valued classifiers (LAC); Romano et al. 2020, Classification with
valid and adaptive coverage (APS); Angelopoulos et al. 2021, Uncertainty sets for image classifiers (RAPS); Huang et al.
2024, Conformal prediction for deep classifier via label ranking (SAPS); Vovk 2012 (by class); Ding et al. 2023,
Class-conditional conformal prediction with many classes (by cluster).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from ood_scores.detector.conformal import check_shares
from ood_scores.errors import BadLabels, EmptyInput, MissingInput, NotFinite, ShapeMismatch
from ood_scores.features import FeatureSet
from ood_scores.registry import Registry
from ood_scores.user_warnings import warn_user

Method = Literal["lac", "aps", "raps", "saps"]
Among = Literal["all", "class", "cluster"]
Values = NDArray[np.float64]

RAPS_FREE, RAPS_PENALTY = 5, 0.01
"""Number of labels without a penalty and penalty of each further label; Angelopoulos et al. 2021, Section 3."""
SAPS_STEP = 0.2
"""Nonconformity between labels of neighboring ranks; the paper chooses it on validation data."""
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Quantiles of the nonconformity by which classes are clustered; Ding et al. 2023, Section 2.3, and 1 - alpha."""


@dataclass(frozen=True, eq=False)
class LabelSets:
    """A calibrated rule for sets of labels.

    Attributes:
        method: the nonconformity: ``lac``, ``aps``, ``raps`` or ``saps``.
        alpha: the probability with which a set may lack the label.
        among: the rows for which that holds: ``all`` rows, those of each ``class``, or of each ``cluster`` of classes.
        limits: the largest nonconformity of a label in the set, float64 ``[C]``; infinite for a label that is always in
            the set because it has too few calibration rows.
        rows: the number of calibration rows.
    """

    method: Method
    alpha: float
    among: Among
    limits: Values
    rows: int

    def labels(self, logits: Tensor, classes: Sequence[str] | None = None) -> list[tuple[str | int, ...]]:
        """Return the labels in the set of each row, most probable first, as names or numbers.

        Args:
            logits: the logits ``[B, C]`` on the CPU.
            classes: the names of the classes; None for their numbers.

        Raises:
            ShapeMismatch, NotFinite: as for a call.
        """
        inside = self(logits)
        ranked = logits.argsort(dim=1, descending=True, stable=True).numpy()
        kept = [labels[inside[row, labels]].tolist() for row, labels in enumerate(ranked)]
        return [tuple(labels if classes is None else (classes[label] for label in labels)) for labels in kept]

    def __call__(self, logits: Any) -> NDArray[np.bool_]:
        """Return which labels are in the set of each row, bool ``[B, C]``, for logits ``[B, C]``.

        Raises:
            ShapeMismatch: if the logits do not have one column per class.
            NotFinite: if a logit is NaN or infinite.
        """
        return nonconformity(logits, self.method, classes=len(self.limits)) <= self.limits

    @property
    def described(self) -> dict[str, Any]:
        """All fields but the limits, for JSON."""
        return {"method": self.method, "alpha": self.alpha, "among": self.among, "rows": self.rows}

    @property
    def guarantee(self) -> str:
        """The guarantee, in words, for new rows that are exchangeable with the calibration rows."""
        of = {"all": "rows", "class": "the rows of each class", "cluster": "the rows of each cluster of classes"}
        return (
            f"the set contains the label of at least {1 - self.alpha:.2%} of {of[self.among]} on average over "
            f"calibration sets of {self.rows} rows"
        )


def calibrate_sets(
    logits: Any, labels: Any, method: Method = "aps", alpha: float = 0.1, *, among: Among = "all", seed: int = 0
) -> LabelSets:
    """Calibrate sets of labels on held-out in-distribution rows.

    The limit is the ceil((n + 1)(1 - alpha))-th smallest nonconformity of the labels of n rows. ``among="class"`` takes
    it among the rows of each class, so that rare classes are covered too; ``"cluster"`` among the rows of classes with
    similar nonconformity, which are found by k-means on a part of the rows. Classes with too few rows for a cluster
    form one together.

    Args:
        logits: the logits ``[n, C]`` of calibration rows: a tensor, an array, or a list.
        labels: their labels ``[n]``, integers from 0 to C - 1.
        method: the nonconformity: ``"lac"`` makes the smallest sets, ``"aps"``, ``"raps"`` and ``"saps"`` larger ones
            for harder rows.
        alpha: the probability with which a set may lack the label, in (0, 1); taken as the decimal number that it
            prints as.
        among: the rows among which it may.
        seed: the seed of the rows for clusters and of k-means.

    Raises:
        UnknownName: if there is no such method, or no such ``among``.
        BadInput: if ``alpha`` is not in (0, 1).
        BadLabels: if labels are not class indices.
        ShapeMismatch: if there is not one label per row.
        EmptyInput: if there are no rows.
        NotFinite: if a logit is NaN or infinite.
    """
    check_rule(method, alpha, among)
    all_labels = nonconformity(logits, method)
    rows, classes = all_labels.shape
    label = _class_labels(labels, rows, classes)
    return _calibrated(all_labels[np.arange(rows), label], label, classes, method, alpha, among, seed)


def calibrate_sets_on(feats: FeatureSet, method: Method = "aps", alpha: float = 0.1, among: Among = "all") -> LabelSets:
    """Calibrate sets of labels on a feature set, read block by block; see ``calibrate_sets``.

    Raises:
        MissingInput: if the set has no logits.
        BadLabels: if it has no labels, or they are not class indices of the model. Other errors are those of
            ``calibrate_sets``.
    """
    if not feats.has("logits"):
        raise MissingInput("sets of labels need logits, and the feature set has none: extract them.")
    label = feats.class_labels().cpu().numpy()
    of_label = np.empty(len(feats))
    for block in feats.blocks(device="cpu", only=["logits"]):
        here = slice(block.start, block.start + len(block))
        of_label[here] = nonconformity(block.logits, method)[np.arange(len(block)), label[here]]
    return _calibrated(of_label, label, feats.num_classes or 0, method, alpha, among, seed=0)


def check_rule(method: str, alpha: float, among: str) -> None:
    """Raise UnknownName or BadInput if there is no such rule."""
    check_shares(alpha=alpha)
    _FORMULAS[method], _LIMITS[among]


def _calibrated(
    of_label: Values, label: NDArray[np.int64], classes: int, method: Method, alpha: float, among: Among, seed: int
) -> LabelSets:
    rows = len(label)
    limits = _LIMITS[among](of_label, label, classes, alpha, seed)
    unlimited = int(np.isinf(limits).sum())
    if unlimited:
        warn_user(
            f"{unlimited} of {classes} labels are in every set, because there are too few calibration rows for alpha = "
            f"{alpha:g}: at least {math.ceil(1 / Fraction(str(alpha))) - 1} are needed"
            f"{'' if among == 'all' else f' for each {among}'}.",
        )
    return LabelSets(method, alpha, among, limits, rows)


def nonconformity(logits: Any, method: Method, *, classes: int | None = None) -> Values:
    """Return the nonconformity of every label, float64 ``[B, C]``, for logits ``[B, C]``; higher means less likely.

    Args:
        logits: the logits.
        method: ``"lac"``, ``"aps"``, ``"raps"`` or ``"saps"``.
        classes: the number of classes; None for any.

    Raises:
        UnknownName, ShapeMismatch, EmptyInput, NotFinite: as for ``calibrate_sets``.
    """
    formula = _FORMULAS[method]
    array = np.asarray(logits.detach().cpu() if isinstance(logits, torch.Tensor) else logits, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != (classes or array.shape[1]):
        raise ShapeMismatch(f"logits have shape {list(array.shape)}: pass [rows, {classes or 'classes'}].")
    if not array.size:
        raise EmptyInput("there are no logits: pass at least one row.")
    if not np.isfinite(array).all():
        raise NotFinite("a logit is NaN or infinite: check the model.")
    p = softmax(array, axis=1)
    order = np.argsort(-p, axis=1, kind="stable")
    found = np.empty_like(p)
    np.put_along_axis(found, order, formula(np.take_along_axis(p, order, axis=1)), axis=1)
    return found


def _lac(p: Values) -> Values:
    return 1 - p


def _aps(p: Values) -> Values:
    return np.cumsum(p, axis=1)


def _raps(p: Values) -> Values:
    ranks = np.arange(1, p.shape[1] + 1)
    return np.cumsum(p, axis=1) + RAPS_PENALTY * np.maximum(0, ranks - RAPS_FREE)


def _saps(p: Values) -> Values:
    return p[:, :1] + SAPS_STEP * np.arange(p.shape[1])


_FORMULAS: Registry[Callable[[Values], Values]] = Registry(
    "kind of label sets", {"lac": _lac, "aps": _aps, "raps": _raps, "saps": _saps}
)
"""Nonconformities of labels in the order of descending probability, by name."""


def _quantile(values: Values, alpha: float) -> float:
    rank = math.ceil((len(values) + 1) * (1 - Fraction(str(alpha))))
    return float(np.partition(values, rank - 1)[rank - 1]) if rank <= len(values) else math.inf


def _limit_of_all(values: Values, labels: NDArray[np.int64], classes: int, alpha: float, seed: int) -> Values:
    return np.full(classes, _quantile(values, alpha))


def _limits_by_class(values: Values, labels: NDArray[np.int64], classes: int, alpha: float, seed: int) -> Values:
    return np.array([_quantile(values[labels == label], alpha) for label in range(classes)])


def _limits_by_cluster(values: Values, labels: NDArray[np.int64], classes: int, alpha: float, seed: int) -> Values:
    rng = np.random.default_rng(seed)
    counts = np.bincount(labels, minlength=classes)
    fewest = max(int(counts.min()), math.ceil(1 / Fraction(str(alpha))) - 1)
    frequent = int((counts >= fewest).sum())
    for_clusters = fewest * frequent // (75 + frequent)
    drawn = rng.random(len(values)) < for_clusters / fewest
    cluster_of = _clusters(values[drawn], labels[drawn], classes, alpha, for_clusters // 2, seed)
    cluster, kept = cluster_of[labels[~drawn]], values[~drawn]
    return np.array([_quantile(kept[cluster == of], alpha) for of in range(cluster_of.max() + 1)])[cluster_of]


def _clusters(
    values: Values, labels: NDArray[np.int64], classes: int, alpha: float, clusters: int, seed: int
) -> NDArray[np.int64]:
    """Return the cluster of each class; classes with too few rows have the last one."""
    from sklearn.cluster import KMeans

    counts = np.bincount(labels, minlength=classes)
    frequent = np.flatnonzero(counts >= math.ceil(1 / Fraction(str(alpha))) - 1)
    number = min(clusters, len(frequent))
    found = np.full(classes, max(number, 0))
    if number > 1:
        shapes = [np.quantile(values[labels == label], (*QUANTILES, 1 - alpha)) for label in frequent]
        means = KMeans(number, n_init=10, random_state=seed).fit(shapes, sample_weight=np.sqrt(counts[frequent]))
        found[frequent] = means.labels_
    return np.unique(found, return_inverse=True)[1]


_LIMITS: Registry[Callable[[Values, NDArray[np.int64], int, float, int], Values]] = Registry(
    "group of rows", {"all": _limit_of_all, "class": _limits_by_class, "cluster": _limits_by_cluster}
)


def _class_labels(labels: Any, rows: int, classes: int) -> NDArray[np.int64]:
    array = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if array.shape != (rows,):
        raise ShapeMismatch(f"there are {rows} rows of logits and labels of shape {list(array.shape)}: pass one each.")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= classes:
        raise BadLabels(f"labels must be class indices in 0 .. {classes - 1}: pass those of the ID rows.")
    return array.astype(np.int64)
