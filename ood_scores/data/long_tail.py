"""Long-tailed subsets of labelled datasets, as CIFAR-10-LT and CIFAR-100-LT are made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset, Subset

from ood_scores.errors import BadInput, BadLabels, ShapeMismatch

LABEL_ATTRIBUTES = ("labels", "targets", "_labels")
"""Where datasets keep their labels: this package's, torchvision's, and some of torchvision's out of sight."""

PAIRS_ATTRIBUTE = "_samples"
"""Where torchvision's GTSRB and some others keep pairs of a file and its label."""


class LongTail(Subset[Any]):
    """A long-tailed subset.

    Attributes:
        dataset, indices: the whole dataset, and which of its rows these are, ascending.
        labels: int64 ``[n]`` of these rows.
        class_counts: int64 ``[C]``, how many rows each class has here.
        name: the dataset's, with ``-LT`` and the ratio.
        transform: the dataset's own; setting it sets the dataset's.
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
            raise BadInput(f"{type(self.dataset).__name__} has no transform to set; give it one when it is opened.")
        self.dataset.transform = transform


def long_tail(
    dataset: Dataset[Any], ratio: float, *, n_max: int | None = None, labels: ArrayLike | None = None
) -> LongTail:
    """The first ``n_c`` rows of each class c, in the dataset's order; ``n_c`` as in ``long_tail_counts``.

    Args:
        dataset: one with labels in ``.labels`` or ``.targets``, as those of ``ood_scores.data.images`` and torchvision
            have them, or a ``Subset`` of one. No image is read.
        ratio: how many times larger the first class is than the last.
        n_max: how many rows of class 0; all by default.
        labels: integers ``[N]``, for a dataset that does not say them itself.

    Departure: the authors' datasets put class after class; here the order of the dataset is kept. The rows are the
    same, without shuffling, so that every run trains on the same images.

    Raises:
        BadLabels: the dataset says no labels, or they are not class indices from 0.
        ShapeMismatch: not one label per row.
        BadInput: a class has less rows than it should, or what ``long_tail_counts`` raises.

    Source: Cui et al. 2019, "Class-balanced loss based on effective number of samples"; the code of Wang et al. 2022
    (PASCL) and Shin et al. 2024 (RNA).
    """
    known = _checked(labels_of(dataset) if labels is None else np.asarray(labels), len(dataset))  # type: ignore[arg-type]
    there = np.bincount(known)
    wanted = np.array(long_tail_counts(int(there[0]) if n_max is None else n_max, len(there), ratio))
    if (there < wanted).any():
        label = int(np.argmax(there < wanted))
        raise BadInput(
            f"class {label} has {there[label]} images and should keep {wanted[label]} of {wanted[0]} at ratio {ratio}: "
            "lower n_max, or renumber the classes so that the largest come first."
        )
    chosen = np.flatnonzero(_rank_in_class(known, there) < wanted[known])
    name = getattr(dataset, "name", None) or type(dataset).__name__
    return LongTail(dataset, chosen, known[chosen], f"{name}-LT[{ratio:g}]")


def long_tail_counts(n_max: int, classes: int, ratio: float) -> list[int]:
    """How many images each class has: ``n_c = int(n_max ratio^(-c / (C-1)))``, c from 0 to C-1.

    CIFAR-10-LT, ``long_tail_counts(5000, 10, 100)``: 5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50.

    Raises:
        BadInput: no images or classes, a ratio below 1, or one so large that the last class is left without images.
    """
    if n_max < 1 or classes < 1:
        raise BadInput(f"there is at least one image and one class, got n_max={n_max} and classes={classes}.")
    if not 1 <= ratio < float("inf"):
        raise BadInput(f"the ratio is that of the largest class to the smallest, at least 1; got {ratio}.")
    counts = [int(n_max * ratio ** (-c / max(classes - 1, 1))) for c in range(classes)]
    if counts[-1] < 1:
        raise BadInput(f"at ratio {ratio} the last class has none of {n_max} images; give a ratio of {n_max} at most.")
    return counts


def labels_of(dataset: Any) -> NDArray[Any]:
    """The labels of a dataset, its own or those of the dataset that it wraps, without reading its images.

    Raises:
        BadLabels: it does not say them.
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
        f"{type(dataset).__name__} says no labels, in .labels or .targets: a long tail needs a labelled "
        "dataset; pass labels=[...], one class index per row."
    )


def _checked(labels: NDArray[Any], rows: int) -> NDArray[np.int64]:
    if labels.shape != (rows,):
        raise ShapeMismatch(f"labels have shape {list(labels.shape)} beside {rows} rows; give one label per row.")
    if labels.dtype.kind not in "iu":
        raise BadLabels(f"labels have dtype {labels.dtype}; give integers, one class index per row.")
    if rows == 0 or labels.min() < 0:
        raise BadLabels("a long tail needs the class of every row, from 0; rows are unlabelled, or there are none.")
    return labels.astype(np.int64)


def _rank_in_class(labels: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of the same class stand before each row."""
    order = np.argsort(labels, kind="stable")
    rank = np.empty(len(labels), dtype=np.int64)
    rank[order] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return rank
