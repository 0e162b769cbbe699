"""Evaluation of classifiers trained on long-tailed data, by class and for many-, medium- and few-shot classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from ood_scores.errors import BadInput, BadLabels, MissingInput, ShapeMismatch
from ood_scores.evaluation.calibration_error import expected_calibration_error
from ood_scores.evaluation.metrics import Rule
from ood_scores.evaluation.roc_metrics import threshold_index
from ood_scores.evaluation.threshold_counts import Scores, roc_counts
from ood_scores.features import FeatureSet, Sets, as_feature_set
from ood_scores.registry import Registry
from ood_scores.runtime import default_torch_state
from ood_scores.scorers.norms import ActivationRatio

if TYPE_CHECKING:
    import pandas as pd

GroupRule = Literal["cifar", "imagenet"]
Values: TypeAlias = "torch.Tensor | ArrayLike"

GROUPS = ("many", "medium", "few")


@dataclass(frozen=True)
class LongTailReport:
    """Result of ``long_tail_report``.

    Attributes:
        accuracy: Share of all rows that are classified correctly.
        ece: Expected calibration error with 15 bins.
        activation_ratio: Mean share of positive activations, as in the scorer ``activation_ratio``: before pooling if
            the set has the extra ``activations``, else after pooling.
        groups: One row for ``"all"`` classes and one for each of ``"many"``, ``"medium"`` and ``"few"``. Columns:
            ``group``, ``classes``, ``rows``, and the means over classes with rows of ``accuracy``, ``confidence``
            (maximum softmax), ``activation_ratio``, ``fpr95_id`` and ``fpr95_ood``; NaN for a group without such
            classes.
        classes: One row for each class. Columns: ``label``, ``group``, ``train_rows``, ``rows``, and the same five
            values; NaN for a class without rows.
    """

    accuracy: float
    ece: float
    activation_ratio: float
    groups: pd.DataFrame
    classes: pd.DataFrame


@default_torch_state()
def long_tail_report(
    feats: Sets,
    class_counts: Values,
    *,
    rule: GroupRule | None = None,
    id_scores: Scores | None = None,
    ood_scores: Scores | None = None,
) -> LongTailReport:
    """Compute accuracy, calibration, activation and FPR95 of a labeled test set, by class and by group of classes.

    Values of a group are means over its classes, not over its rows, as in the code of the RNA and PASCL authors. This
    includes ``"all"``, which is "Avg." in Table 1 of RNA. Both means are equal for a balanced test set.

    Args:
        feats: Test set with features, logits and labels. It is read once, block by block.
        class_counts: Number of training rows of each class, ``[C]``.
        rule: Rule for grouping classes; see ``class_groups``.
        id_scores: OoD scores of the rows of ``feats``, ``[N]``; higher means more in-distribution.
        ood_scores: OoD scores of an OoD set, ``[M]``. FPR95 is NaN without scores.

    Raises:
        MissingInput: if there are no logits.
        BadLabels: if there are no labels, or they are not class indices of the model.
        BadInput: if counts are not non-negative integers, or only one side of the scores is passed.
        ShapeMismatch: if there is not one count per class, or not one score per row.
        NotFinite: if scores contain NaN, or features or logits contain NaN or infinite values.

    Source: Shin et al. 2024, "Representation norm amplification" (RNA), Tables 1, 2 and 7 and Fig. 2(b); Wang et al.
    2022, "Partial and asymmetric contrastive learning" (PASCL); the code of both.
    """
    import pandas as pd

    feats = as_feature_set(feats)
    if not feats.has("logits"):
        raise MissingInput("accuracy and confidence need logits, and this feature set has none: extract them.")
    labels = feats.class_labels().cpu().numpy()
    counts = _checked_counts(class_counts)
    if len(counts) != feats.num_classes:
        raise ShapeMismatch(
            f"there are {len(counts)} class counts for {feats.num_classes} classes: pass one per class."
        )
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
    """Return the group of each class, int64 ``[C]``: 0 for many training rows, 1 for medium, 2 for few.

    Args:
        class_counts: Number of training rows of each class, ``[C]``, in any order.
        rule: ``"cifar"``: with counts in descending order, classes above the count at position ``int(0.34 C)`` have
            many rows and classes below the count at ``int(0.67 C)`` have few, counting from 0. This makes 3, 4 and 3
            classes of CIFAR-10-LT, and 34, 34 and 32 classes of CIFAR-100-LT. ``"imagenet"``: classes above 100 rows
            have many, classes below 20 have few. None uses the first rule for up to 100 classes and the second for
            more, as the authors' code does.

    Departure: the authors' code reads the two counts in the order of the class numbers, which assumes that they follow
    the counts. Here counts are sorted first, which makes no difference if they do.

    Raises:
        BadInput: if counts are not non-negative integers.
        UnknownName: if there is no such rule.

    Source: the code of Wang et al. 2022 (PASCL) and Shin et al. 2024 (RNA), ``shot_acc``; for ImageNet-LT Liu et al.
    2019, "Large-scale long-tailed recognition in an open world".
    """
    counts = _checked_counts(class_counts)
    chosen = rule or ("cifar" if len(counts) <= 100 else "imagenet")
    above, below = _BOUNDS[chosen](counts)
    return np.where(counts > above, 0, np.where(counts < below, 2, 1))


def class_fpr95_id(id_scores: Scores, ood_scores: Scores, labels: Values, classes: int) -> NDArray[np.float64]:
    """Return the share of OoD rows accepted by the threshold that accepts 95% of each class, float64 ``[C]``.

    This is ``metrics.fpr95_id`` with a single class as ID. Each class has its own threshold, so the value is the cost
    of accepting that class. It is NaN for a class without rows.

    Args:
        id_scores: Scores of ID rows, ``[N]``; higher means more in-distribution.
        ood_scores: Scores of OoD rows, ``[M]``.
        labels: Classes of the ID rows, ``[N]``, from 0 to C-1.
        classes: Number of classes C.

    Raises:
        BadLabels: if labels are not class indices.
        ShapeMismatch: if there is not one label per ID score, or as for ``metrics.roc_counts``.
        NotFinite, EmptyInput, BadInput: as for ``metrics.roc_counts``.
    """
    roc_counts(id_scores, ood_scores)
    inside, outside, label = _array(id_scores), np.sort(_array(ood_scores)), _checked_labels(labels, id_scores, classes)
    rows = np.bincount(label, minlength=classes)
    by_class = inside[np.lexsort((-inside, label))]
    kept = -(-19 * rows // 20)
    last_kept = (rows.cumsum() - rows + kept - 1).clip(0, len(inside) - 1)
    accepted = len(outside) - np.searchsorted(outside, by_class[last_kept], side="left")
    return np.where(rows > 0, accepted / len(outside), np.nan)


def class_fpr95_ood(
    id_scores: Scores, ood_scores: Scores, labels: Values, classes: int, *, rule: Rule = "first"
) -> NDArray[np.float64]:
    """Return the share of rows of each class rejected by the threshold that rejects 95% of OoD rows, float64 ``[C]``.

    This is ``metrics.fpr95_ood`` with a single class as ID. The threshold depends on the OoD rows only, so all classes
    share it, and the mean over the classes of a balanced set is the FPR95 of the set. RNA reports this FPR95 by class:
    its text only says "computed for each class separately", but the mean over classes in its Table 1 is exactly the
    FPR95 on SVHN in its Table 10 (10.94), and the code of PASCL, which it builds on, computes this value. The value is
    NaN for a class without rows. Arguments and errors are those of ``class_fpr95_id``, and ``rule`` is that of
    ``metrics.fpr_at_tpr_id``.

    Source: Shin et al. 2024, Table 1; the code of Wang et al. 2022 (PASCL), ``FPR@TPRn``, which is ``rule="nearest"``.
    """
    as_ood = roc_counts(id_scores, ood_scores).mirrored()
    rejected = _array(id_scores) <= -as_ood.thresholds[threshold_index(as_ood, 0.95, rule)]
    label = _checked_labels(labels, id_scores, classes)
    return _class_means(rejected.astype(np.float64), label, np.bincount(label, minlength=classes))


def sc_ood(
    id_scores: Scores, ood_scores: Scores, ood_labels: Values
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Move the scores of OoD rows whose label is an ID class (0 or above; -1 for none) to the ID side.

    Returns:
        The ID scores followed by the moved scores, and the remaining OoD scores.

    Raises:
        ShapeMismatch: if there is not one label per OoD score.

    Source: Yang et al. 2021, "Semantically coherent out-of-distribution detection" (SC-OOD); RNA and PASCL use it too.
    """
    outside, labels = _array(ood_scores), _numpy(ood_labels)
    if outside.shape != labels.shape:
        raise ShapeMismatch(
            f"OoD scores have shape {list(outside.shape)} and labels {list(labels.shape)}: pass one label each."
        )
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
        raise BadInput("class counts must be non-negative integers: pass the number of training rows of each class.")
    return counts.astype(np.int64)


def _checked_labels(labels: Values, scores: Scores, classes: int) -> NDArray[np.int64]:
    array = _numpy(labels)
    if array.shape != (len(scores),):
        raise ShapeMismatch(
            f"there are {len(scores)} ID scores and labels of shape {list(array.shape)}: pass one label each."
        )
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= classes:
        raise BadLabels(f"labels are not class indices: pass those of the ID rows, from 0 to {classes - 1}.")
    return array.astype(np.int64)


def _array(values: Any) -> NDArray[np.float64]:
    return _numpy(values.double() if isinstance(values, torch.Tensor) else values).astype(np.float64, copy=False)


def _numpy(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _row_figures(
    feats: FeatureSet, labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return correctness (0 or 1), maximum softmax and activation ratio of the rows, float64 ``[N]`` each."""
    figures, activation = np.empty((3, len(feats))), ActivationRatio().decided_for([feats])
    for block in feats.blocks(device="cpu", only=["logits", *activation.needs]):
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
        raise BadInput("FPR95 needs the scores of both sides: pass id_scores and ood_scores, or neither.")
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
