"""How a classifier trained on long-tailed data does on classes with many, medium and few training images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingInput, NotFinite, ShapeMismatch
from ood_scores.evaluation.metrics import Scores, roc_counts
from ood_scores.features import FeatureSet
from ood_scores.registry import Registry
from ood_scores.scorers.norms import ActivationRatio

if TYPE_CHECKING:
    import pandas as pd

GroupRule = Literal["cifar", "imagenet"]
Values: TypeAlias = "torch.Tensor | ArrayLike"

GROUPS = ("many", "medium", "few")


@dataclass(frozen=True)
class LongTailReport:
    """What ``long_tail_report`` finds.

    Attributes:
        accuracy: share of all rows that are classified correctly.
        ece: expected calibration error, 15 bins.
        activation_ratio: mean share of features above zero, the scorer of that name.
        groups: a row for ``"all"`` classes and for ``"many"``, ``"medium"`` and ``"few"``: ``group``, ``classes``,
            ``rows``, and the means over the classes that have rows of ``accuracy``, ``confidence`` (maximum softmax),
            ``activation_ratio``, ``fpr95_id``, ``fpr95_ood``; NaN for a group without such classes.
        classes: the same figures of each class: ``label``, ``group``, ``train_rows``, ``rows``, and the five; NaN for a
            class without rows.
    """

    accuracy: float
    ece: float
    activation_ratio: float
    groups: pd.DataFrame
    classes: pd.DataFrame


def long_tail_report(
    feats: FeatureSet,
    class_counts: Values,
    *,
    rule: GroupRule | None = None,
    id_scores: Scores | None = None,
    ood_scores: Scores | None = None,
) -> LongTailReport:
    """Accuracy, calibration, activation and FPR95 of a labelled test set, by class and by group of classes.

    Args:
        feats: the test set: features, logits, labels. Read once, block by block.
        class_counts: how many training rows each class had, ``[C]``.
        rule: how classes are grouped; see ``class_groups``.
        id_scores: ``[N]`` OoD scores of the rows of ``feats``, and
        ood_scores: ``[M]`` of an OoD set, higher = more in-distribution; without them FPR95 is NaN.

    The figures of a group are means over its classes, not over its rows, as in the code of the RNA and PASCL authors;
    so are those of ``"all"``, the "Avg." of RNA's Table 1. On a balanced test set these are the same.

    Raises:
        MissingInput: there are no logits.
        BadLabels: there are no labels, or they are not class indices of the model.
        BadInput: counts that are not whole numbers from 0; one side of the scores without the other.
        ShapeMismatch: not one count per class, or not one score per row.
        NotFinite: features, logits or scores hold NaN (features and logits: or infinite values).

    Source: Shin et al. 2024, "Representation norm amplification" (RNA), Tables 1, 2 and 7 and Fig. 2(b); Wang et al.
    2022, "Partial and asymmetric contrastive learning" (PASCL); the code of both.
    """
    import pandas as pd

    if not feats.has("logits"):
        raise MissingInput("accuracy and confidence need logits, and this feature set has none.")
    labels = feats.class_labels().cpu().numpy()
    counts = _checked_counts(class_counts)
    if len(counts) != feats.num_classes:
        raise ShapeMismatch(f"{len(counts)} class counts for {feats.num_classes} classes; give one per class.")
    correct, confidence, active = _row_figures(feats, labels)
    rows = np.bincount(labels, minlength=len(counts))
    per_id, per_ood = _class_fpr95(id_scores, ood_scores, labels, len(counts))
    classes = pd.DataFrame(
        {
            "label": np.arange(len(counts)),
            "group": np.array(GROUPS)[class_groups(counts, rule)],
            "train_rows": counts,
            "rows": rows,
            "accuracy": _class_means(correct, labels, rows),
            "confidence": _class_means(confidence, labels, rows),
            "activation_ratio": _class_means(active, labels, rows),
            "fpr95_id": per_id,
            "fpr95_ood": per_ood,
        }
    )
    return LongTailReport(
        accuracy=float(correct.mean()),
        ece=expected_calibration_error(confidence, correct),
        activation_ratio=float(active.mean()),
        groups=_group_table(classes),
        classes=classes,
    )


def class_groups(class_counts: Values, rule: GroupRule | None = None) -> NDArray[np.int64]:
    """The group of each class, int64 ``[C]``: 0 for many training rows, 1 for medium, 2 for few (see ``GROUPS``).

    Args:
        class_counts: how many training rows each class had, ``[C]``, in any order.
        rule: ``"cifar"``: with the counts in descending order, many are those above the count at position
            ``int(0.34 C)`` and few those below the count at ``int(0.67 C)``, counted from 0: 3, 4 and 3 of CIFAR-10-LT,
            34, 34 and 32 of CIFAR-100-LT. ``"imagenet"``: many are above 100, few below 20. None takes the first for
            up to 100 classes and the second for more, as the authors' code does.

    Departure: that code reads the two counts from the classes as they are numbered, which presumes that the numbers
    follow the counts; here they are sorted first, which changes nothing where they do.

    Raises:
        BadInput: counts that are not whole numbers from 0.
        UnknownName: another rule.

    Source: the code of Wang et al. 2022 (PASCL) and Shin et al. 2024 (RNA), ``shot_acc``; for ImageNet-LT Liu et al.
    2019, "Large-scale long-tailed recognition in an open world".
    """
    counts = _checked_counts(class_counts)
    chosen = rule or ("cifar" if len(counts) <= 100 else "imagenet")
    above, below = _BOUNDS[chosen](counts)
    return np.where(counts > above, 0, np.where(counts < below, 2, 1))


def class_fpr95_id(id_scores: Scores, ood_scores: Scores, labels: Values, classes: int) -> NDArray[np.float64]:
    """Of each class, the share of OoD rows accepted by the threshold that keeps 95% of that class, ``[C]``.

    ``metrics.fpr95_id`` with the class alone as ID; ID is positive. Each class has a threshold of its own: what it
    would cost to keep that class. A class without rows is NaN.

    Args:
        id_scores: ``[N]``, higher = more in-distribution.
        ood_scores: ``[M]``.
        labels: ``[N]`` classes of the ID rows, 0 to C-1.
        classes: C.

    Raises:
        BadLabels, ShapeMismatch: labels that are not one class index per ID score. Besides, what ``metrics.roc_counts``
            raises.
    """
    roc_counts(id_scores, ood_scores)
    inside, outside, label = _array(id_scores), np.sort(_array(ood_scores)), _checked_labels(labels, id_scores, classes)
    rows = np.bincount(label, minlength=classes)
    by_class = inside[np.lexsort((-inside, label))]
    kept = -(-19 * rows // 20)
    last_kept = (rows.cumsum() - rows + kept - 1).clip(0, len(inside) - 1)
    accepted = len(outside) - np.searchsorted(outside, by_class[last_kept], side="left")
    return np.where(rows > 0, accepted / len(outside), np.nan)


def class_fpr95_ood(id_scores: Scores, ood_scores: Scores, labels: Values, classes: int) -> NDArray[np.float64]:
    """Of each class, the share of its rows rejected by the threshold that catches 95% of the OoD rows, ``[C]``.

    ``metrics.fpr95_ood`` with the class alone as ID; OoD is positive. The threshold depends on the OoD rows only, so
    that all classes share it, and the mean over the classes of a balanced set is the FPR95 of the set. This is the
    FPR95 by class of RNA: its text only says "computed for each class separately", but its Table 1 gives as the mean
    over classes exactly the FPR95 on SVHN of its Table 10 (10.94), and PASCL's code, which it builds on, computes this.
    A class without rows is NaN. Arguments and errors as for ``class_fpr95_id``.

    Source: Shin et al. 2024, Table 1; the code of Wang et al. 2022 (PASCL), ``FPR@TPRn``, but with the first threshold
    that catches at least 95% instead of the nearest (see ``metrics``).
    """
    as_ood = roc_counts(id_scores, ood_scores).mirrored()
    first = np.searchsorted(as_ood.positives, -(-19 * as_ood.n_positive // 20))
    rejected = _array(id_scores) <= -as_ood.thresholds[first]
    label = _checked_labels(labels, id_scores, classes)
    return _class_means(rejected.astype(np.float64), label, np.bincount(label, minlength=classes))


def expected_calibration_error(confidence: Values, correct: Values, bins: int = 15) -> float:
    """``sum_m |B_m| / N  |acc(B_m) - conf(B_m)|`` over bins of equal width.

    Bin m, from 1 to M, holds the confidences in ``((m-1)/M, m/M]``; one of exactly 0 belongs to the first bin. The
    edges are the float64 numbers nearest to m/M, so that a confidence of 0.2 lies on the edge 3/15 and not above it.

    Args:
        confidence: ``[N]`` from 0 to 1, usually the maximum softmax.
        correct: ``[N]`` whether the prediction is right.
        bins: M.

    Raises:
        BadInput: confidences outside 0 to 1, or less than one bin.
        NotFinite: a confidence is NaN.
        EmptyInput: no rows.
        ShapeMismatch: not one of each per row.

    Source: Guo et al. 2017, "On calibration of modern neural networks", Eq. 3; Shin et al. 2024, Table 7.
    """
    sure, right = _array(confidence), _array(correct)
    if bins < 1:
        raise BadInput(f"there is at least one bin, got bins={bins}.")
    if sure.ndim != 1 or sure.shape != right.shape:
        raise ShapeMismatch(f"confidence {list(sure.shape)} and correct {list(right.shape)} must both be [rows].")
    if not len(sure):
        raise EmptyInput("there are no confidences to compare with accuracies.")
    if np.isnan(sure).any():
        raise NotFinite("a confidence is NaN: look at the logits.")
    if sure.min() < 0 or sure.max() > 1:
        raise BadInput(f"confidences run from {sure.min()} to {sure.max()}; give probabilities, not scores or logits.")
    number = np.searchsorted(np.arange(1, bins) / bins, sure, side="left")
    return float(np.abs(np.bincount(number, weights=right - sure, minlength=bins)).sum() / len(sure))


def sc_ood(
    id_scores: Scores, ood_scores: Scores, ood_labels: Values
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The scores with the OoD rows whose label is an ID class (0 or above; -1 is none) moved to the ID side.

    Returns the ID scores followed by the moved ones, and the OoD scores that are left.

    Raises:
        ShapeMismatch: not one label per OoD score.

    Source: Yang et al. 2021, "Semantically coherent out-of-distribution detection" (SC-OOD); RNA and PASCL use it so.
    """
    outside, labels = _array(ood_scores), _numpy(ood_labels)
    if outside.shape != labels.shape:
        raise ShapeMismatch(f"{list(outside.shape)} OoD scores with labels {list(labels.shape)}; give one label each.")
    return np.concatenate([_array(id_scores), outside[labels >= 0]]), outside[labels < 0]


def _positions(counts: NDArray[np.int64]) -> tuple[int, int]:
    descending = np.sort(counts)[::-1]
    return int(descending[34 * len(counts) // 100]), int(descending[67 * len(counts) // 100])


_BOUNDS: Registry[Callable[[NDArray[np.int64]], tuple[int, int]]] = Registry(
    "rule", {"cifar": _positions, "imagenet": lambda counts: (100, 20)}
)


def _checked_counts(class_counts: Values) -> NDArray[np.int64]:
    counts = _numpy(class_counts)
    if counts.ndim != 1 or not len(counts) or counts.dtype.kind not in "iu" or counts.min() < 0:
        raise BadInput("class counts are whole numbers from 0, one per class: how many training rows each class had.")
    return counts.astype(np.int64)


def _checked_labels(labels: Values, scores: Scores, classes: int) -> NDArray[np.int64]:
    array = _numpy(labels)
    if array.shape != (len(scores),):
        raise ShapeMismatch(f"{len(scores)} ID scores with labels of shape {list(array.shape)}; give one label each.")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= classes:
        raise BadLabels(f"labels must be class indices from 0 to {classes - 1}, those of the ID rows.")
    return array.astype(np.int64)


def _array(values: Any) -> NDArray[np.float64]:
    return _numpy(values.double() if isinstance(values, torch.Tensor) else values).astype(np.float64, copy=False)


def _numpy(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _row_figures(
    feats: FeatureSet, labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Whether each row is classified correctly, its maximum softmax and its activation ratio, each float64 ``[N]``."""
    figures, activation = np.empty((3, len(feats))), ActivationRatio()
    for block in feats.blocks(device="cpu", only=["features", "logits"]):
        block.require_finite()
        here = slice(block.start, block.start + len(block))
        figures[0, here] = block.prediction().numpy() == labels[here]
        figures[1, here] = block.softmax().amax(dim=1).numpy()
        figures[2, here] = activation.score_block(block).numpy()
    return figures[0], figures[1], figures[2]


def _class_means(values: NDArray[np.float64], labels: NDArray[np.int64], rows: NDArray[np.int64]) -> Any:
    sums = np.bincount(labels, weights=values, minlength=len(rows))
    return np.divide(sums, rows, out=np.full(len(rows), np.nan), where=rows > 0)


def _class_fpr95(
    id_scores: Scores | None, ood_scores: Scores | None, labels: NDArray[np.int64], classes: int
) -> tuple[Any, Any]:
    if id_scores is None and ood_scores is None:
        return np.nan, np.nan
    if id_scores is None or ood_scores is None:
        raise BadInput("FPR95 needs scores of both sides: pass id_scores and ood_scores, or neither.")
    sides = (id_scores, ood_scores, labels, classes)
    return class_fpr95_id(*sides), class_fpr95_ood(*sides)


def _group_table(classes: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    figures = ["accuracy", "confidence", "activation_ratio", "fpr95_id", "fpr95_ood"]
    parts = {"all": classes} | {group: classes[classes["group"] == group] for group in GROUPS}
    rows = [
        {"group": group, "classes": len(part), "rows": int(part["rows"].sum())} | part[figures].mean().to_dict()
        for group, part in parts.items()
    ]
    return pd.DataFrame(rows)
