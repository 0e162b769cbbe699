"""Tests of long-tailed subsets: published counts, chosen images, and labels found without reading images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from ood_scores.data.images import ImageArrays, ImageFiles, TorchvisionImages
from ood_scores.data.kinds.digits import digits
from ood_scores.data.long_tail import labels_of, long_tail, long_tail_counts
from ood_scores.errors import BadInput, BadLabels, ShapeMismatch

CIFAR10_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
NAN = float("nan")


def test_published_long_tail_counts() -> None:
    assert long_tail_counts(5000, 10, 100) == CIFAR10_LT
    assert sum(long_tail_counts(5000, 10, 100)) == 12406
    cifar100 = long_tail_counts(500, 100, 100)
    assert (cifar100[0], cifar100[-1], sum(cifar100)) == (500, 5, 10847)
    assert long_tail_counts(5000, 10, 1) == [5000] * 10
    assert long_tail_counts(7, 1, 3) == [7]


@pytest.mark.parametrize("ratio", [10, 50, 100, 1000])
@pytest.mark.parametrize(("n_max", "classes"), [(5000, 10), (5000, 4), (1300, 7)])
def test_counts_are_rounded_down_exactly(n_max: int, classes: int, ratio: int) -> None:
    for c, count in enumerate(long_tail_counts(n_max, classes, ratio)):
        power = classes - 1  # n <= n_max ratio^(-c/power), in whole numbers
        assert count**power * ratio**c <= n_max**power < (count + 1) ** power * ratio**c


@pytest.mark.parametrize(("n_max", "classes", "ratio"), [(0, 10, 10), (5, 0, 10), (5, 3, 0.5), (5, 3, NAN), (5, 3, 6)])
def test_long_tail_counts_errors(n_max: int, classes: int, ratio: float) -> None:
    with pytest.raises(BadInput):
        long_tail_counts(n_max, classes, ratio)


def test_long_tail_takes_the_first_images_of_each_class() -> None:
    labels = [2, 0, 1, 0, 0, 1, 2, 0, 1, 2, 1, 2]  # four of each; 4, 2 and 1 are kept
    images = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), dtype=np.uint8)
    dataset = ImageArrays(images, labels, np.asarray, name="tiny")
    subset = long_tail(dataset, 4)
    assert subset.indices == [0, 1, 2, 3, 4, 5, 7]
    assert subset.labels.tolist() == [2, 0, 1, 0, 0, 1, 0]
    assert subset.class_counts.tolist() == [4, 2, 1]
    assert (subset.name, subset.transform) == ("tiny-LT[4]", np.asarray)
    items = [(int(image.max()), label) for image, label in subset]  # type: ignore[attr-defined]
    assert items == [(index, labels[index]) for index in subset.indices]
    assert long_tail(dataset, 2, n_max=2).class_counts.tolist() == [2, 1, 1]
    assert len(long_tail(dataset, 1)) == 12


def test_digits_with_a_long_tail() -> None:
    images, labels = digits()
    subset = long_tail(ImageArrays(images, labels), 100, n_max=150)
    assert subset.class_counts.tolist() == long_tail_counts(150, 10, 100)
    for c in range(10):
        rows = [row for row in subset.indices if labels[row] == c]
        assert rows == np.flatnonzero(labels == c)[: len(rows)].tolist()
    batch, classes = next(iter(DataLoader(long_tail(ImageArrays(images, labels, to_tensor), 5, n_max=100), 8)))
    assert batch.shape[0] == 8
    assert classes.tolist() == subset.labels[:8].tolist()


def to_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


class Bare(Dataset[int]):
    """Eight rows with the given attributes only."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        raise AssertionError("no item is needed")


LABELS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "dataset",
    [
        Bare(targets=LABELS),
        Bare(targets=torch.tensor(LABELS)),
        Bare(labels=np.array(LABELS)),
        Bare(_labels=LABELS),
        Bare(dataset=Bare(targets=LABELS)),
        Subset(Bare(targets=LABELS[::-1]), range(7, -1, -1)),
        ImageFiles([""] * 8, LABELS, None, "files"),
    ],
)
def test_labels_are_found_without_reading_an_image(dataset: Any) -> None:
    assert labels_of(dataset).tolist() == LABELS
    assert long_tail(dataset, 4).indices == [0, 1, 2, 3, 4]


def test_long_tail_of_a_subset_and_of_torchvision_images() -> None:
    subset = long_tail(Bare(), 2, labels=LABELS)
    assert long_tail(subset, 4).labels.tolist() == [0, 0, 0, 0, 1]

    from torchvision.datasets import FakeData

    fake = FakeData(8, (3, 4, 4))
    fake.targets = LABELS
    assert long_tail(TorchvisionImages(fake, None, "fake"), 4).class_counts.tolist() == [4, 1]


def test_long_tail_errors() -> None:
    with pytest.raises(BadLabels, match="Bare has no labels in"):
        long_tail(Bare(), 10)
    with pytest.raises(BadLabels, match="rows without a class"):
        long_tail(Bare(labels=[-1, *LABELS[1:]]), 10)
    with pytest.raises(BadLabels, match="float64"):
        long_tail(Bare(), 10, labels=np.zeros(8))
    with pytest.raises(ShapeMismatch, match="for 8 rows"):
        long_tail(Bare(), 10, labels=LABELS[1:])
    with pytest.raises(BadInput, match="class 0 has 4 images, but must keep 6"):
        long_tail(Bare(targets=[0, 0, 0, 0, 1, 1, 1, 1]), 1.2, n_max=6)
    with pytest.raises(BadInput, match="class 1 has 0 images"):
        long_tail(Bare(targets=[0, 0, 0, 0, 0, 0, 2, 2]), 3)
