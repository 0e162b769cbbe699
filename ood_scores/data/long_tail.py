"""Long-tailed subsets of labeled datasets, created like CIFAR-10-LT and CIFAR-100-LT."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset, Subset

from ood_scores.errors import BadInput, BadLabels, ShapeMismatch

LABEL_ATTRIBUTES = ("labels", "targets", "_labels")
"""Attributes in which datasets keep their labels: in this package, in torchvision, and private ones of torchvision."""

PAIRS_ATTRIBUTE = "_samples"
"""Attribute in which torchvision's GTSRB and some others keep pairs of a file and its label."""


class LongTail(Subset[Any]):
    """A long-tailed subset.

    Attributes:
        dataset: the whole dataset.
        indices: the rows of the dataset that belong to the subset, in ascending order.
        labels: labels of these rows, int64 ``[n]``.
        class_counts: number of rows of each class, int64 ``[C]``.
        name: name of the dataset, with ``-LT`` and the ratio appended.
        transform: transform of the dataset; setting it sets that of the dataset.
    """

    def __init__(self, dataset: Dataset[Any], indices: NDArray[np.int64], labels: NDArray[np.int64], name: str) -> None:
        super().__init__(dataset, indices.tolist())
        self.labels = labels
        self.class_counts = np.bincount(labels)
        self.name = name

    @property
    def transform(self) -> Any:
        return getattr(self.dataset, "transform", None)

    @transform.setter
    def transform(self, transform: Any) -> None:
        if not hasattr(self.dataset, "transform"):
            raise BadInput(
                f"{type(self.dataset).__name__} has no transform to set: pass one when the dataset is created."
            )
        self.dataset.transform = transform


def long_tail(
    dataset: Dataset[Any], ratio: float, *, n_max: int | None = None, labels: ArrayLike | None = None
) -> LongTail:
    """Keep the first ``n_c`` rows of each class c, in the order of the dataset; see ``long_tail_counts`` for ``n_c``.

    Args:
        dataset: a dataset with labels in ``.labels`` or ``.targets``, like those of ``ood_scores.data.images`` and
            torchvision, or a ``Subset`` of one. No image is read.
        ratio: how many times larger the first class is than the last.
        n_max: number of rows of class 0; all by default.
        labels: integers ``[N]``, for a dataset without a list of its labels.

    Departure: the authors' datasets are ordered by class; here the order of the dataset is kept. The rows are the
    same, without shuffling, so that every run trains on the same images.

    Raises:
        BadLabels: if the dataset has no list of its labels, or they are not class indices from 0.
        ShapeMismatch: if there is not one label per row.
        BadInput: if a class has fewer rows than it should keep, and as ``long_tail_counts``.

    Source: Cui et al. 2019, "Class-balanced loss based on effective number of samples"; the code of Wang et al. 2022
    (PASCL) and Shin et al. 2024 (RNA).
    """
    known = _checked(labels_of(dataset) if labels is None else np.asarray(labels), len(dataset))  # type: ignore[arg-type]
    there = np.bincount(known)
    wanted = np.array(long_tail_counts(int(there[0]) if n_max is None else n_max, len(there), ratio))
    if (there < wanted).any():
        label = int(np.argmax(there < wanted))
        raise BadInput(
            f"class {label} has {there[label]} images, but must keep {wanted[label]} for n_max={wanted[0]} and ratio "
            f"{ratio}: lower n_max, or renumber the classes so that the largest come first."
        )
    chosen = np.flatnonzero(_rank_in_class(known, there) < wanted[known])
    name = getattr(dataset, "name", None) or type(dataset).__name__
    return LongTail(dataset, chosen, known[chosen], f"{name}-LT[{ratio:g}]")


def long_tail_counts(n_max: int, classes: int, ratio: float) -> list[int]:
    """Return the number of images of each class: ``n_c = int(n_max ratio^(-c / (C-1)))``, c from 0 to C-1.

    CIFAR-10-LT, ``long_tail_counts(5000, 10, 100)``: 5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50.

    Raises:
        BadInput: if there are no images or classes, the ratio is below 1, or it leaves the last class without images.
    """
    if n_max < 1 or classes < 1:
        raise BadInput(f"n_max and classes must be at least 1, got n_max={n_max} and classes={classes}.")
    if not 1 <= ratio < float("inf"):
        raise BadInput(f"the ratio of the largest class to the smallest must be finite and at least 1, got {ratio}.")
    counts = [int(n_max * ratio ** (-c / max(classes - 1, 1))) for c in range(classes)]
    if counts[-1] < 1:
        raise BadInput(f"ratio {ratio} leaves the last class without images: pass a ratio of at most {n_max}.")
    return counts


def labels_of(dataset: Any) -> NDArray[Any]:
    """Return the labels of a dataset, or of the dataset that it wraps, without reading images.

    Raises:
        BadLabels: if the dataset has no list of its labels.
    """
    for attribute in LABEL_ATTRIBUTES:
        if getattr(dataset, attribute, None) is not None:
            return np.asarray(getattr(dataset, attribute))
    if hasattr(dataset, PAIRS_ATTRIBUTE):
        return np.asarray([label for _, label in getattr(dataset, PAIRS_ATTRIBUTE)])
    if hasattr(dataset, "dataset"):
        labels = labels_of(dataset.dataset)
        return labels[list(dataset.indices)] if hasattr(dataset, "indices") else labels
    raise BadLabels(
        f"{type(dataset).__name__} has no labels in .labels or .targets, which a long tail needs: pass labels=[...], "
        "one class index per row."
    )


def _checked(labels: NDArray[Any], rows: int) -> NDArray[np.int64]:
    if labels.shape != (rows,):
        raise ShapeMismatch(f"labels have shape {list(labels.shape)} for {rows} rows: pass one label per row.")
    if labels.dtype.kind not in "iu":
        raise BadLabels(f"labels have dtype {labels.dtype}: pass integers, one class index per row.")
    if rows == 0 or labels.min() < 0:
        raise BadLabels("there are no rows, or rows without a class: a long tail needs a class index for every row.")
    return labels.astype(np.int64)


def _rank_in_class(labels: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the rows of the same class before each row."""
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return rank
