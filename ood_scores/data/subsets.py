"""Options of every dataset: labels in another order, some of the rows or classes, or images with scrambled pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ood_scores.data.class_names import RenumberedImages, read_classes, renumbered
from ood_scores.data.dataset_spec import located, whole_number
from ood_scores.data.images import ImageDataset, SameRows
from ood_scores.data.long_tail import labels_of, long_tail
from ood_scores.errors import BadInput, EmptyInput, MissingData


class ChosenImages(ImageDataset):
    """Some rows of a dataset.

    Attributes:
        dataset: the whole dataset, whose transform is not applied.
        indices: the rows of the dataset that belong to the subset.
        transform: function that is applied to the images.
    """

    def __init__(self, dataset: ImageDataset, indices: Sequence[int], name: str) -> None:
        super().__init__(name, dataset.transform)
        if not len(indices):
            raise EmptyInput(f"{name} has no images: {dataset.name} has {len(dataset)}.")
        self.dataset = dataset
        self.indices = indices
        self.class_names, self.listed_classes = dataset.class_names, dataset.listed_classes
        self.label_order = dataset.label_order

    @property
    def ids(self) -> Sequence[Any] | None:
        """The names of these rows in the whole dataset."""
        ids = self.dataset.ids
        return None if ids is None else [ids[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return self.dataset.load(self.indices[index])


class ScrambledImages(SameRows):
    """The images of a dataset with the pixels of each image in a random order of its own.

    The order depends only on the seed and the row, so it is the same in every process. A pixel keeps its three
    channels. Images are scrambled at their own size, before the transform. Haas et al. (2024, Fig. 5) compare
    "pixel-wise scrambled" CIFAR-10 and do not state whether all images share one order.

    Attributes:
        dataset: the original dataset, whose transform is not applied.
        transform: function that is applied to the scrambled images.
    """

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        super().__init__(dataset, f"{dataset.name}[scramble={seed}]")
        self.seed = seed
        self.class_names, self.listed_classes = dataset.class_names, dataset.listed_classes
        self.label_order = dataset.label_order

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        row = range(len(self))[index]
        image, label = self.dataset.load(row)
        pixels = np.asarray(image)
        order = np.random.default_rng([self.seed, row]).permutation(image.width * image.height)
        return Image.fromarray(pixels.reshape(-1, 3)[order].reshape(pixels.shape)), label


class UnlabeledImages(SameRows):
    """The images of a dataset without their labels.

    Attributes:
        dataset: the original dataset, whose transform is not applied.
        transform: function that is applied to the images.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(dataset, dataset.name)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return self.dataset.load(index)[0], None


def seen_through(dataset: ImageDataset, options: Mapping[str, str], base: Path = Path()) -> ImageDataset:
    """Apply the options of ``VIEWS`` to a dataset, in the order of ``VIEWS``; relative paths start from ``base``."""
    for name in VIEWS:
        if name in options:
            dataset = VIEWS[name](dataset, options[name], base)
    return dataset


def _classes(dataset: ImageDataset, file: str, base: Path) -> ImageDataset:
    path = located(file, base)
    if not path.exists():
        raise MissingData(f"there is no file {path} with the names of classes")
    names = read_classes(path)
    found = renumbered(dataset, names, path)
    found.listed_classes = len(names)
    return found


def _scramble(dataset: ImageDataset, seed: str, base: Path) -> ImageDataset:
    return ScrambledImages(dataset, whole_number("scramble", seed))


def _only(dataset: ImageDataset, classes: str, base: Path) -> ImageDataset:
    kept, labels = _class_numbers(classes), labels_of(dataset)
    absent = sorted(set(kept) - set(labels.tolist()))
    if absent:
        raise BadInput(f"cannot read only={classes}: {dataset.name} has no image of class {absent[0]}.")
    numbers = np.full(int(labels.max()) + 1, -1)
    numbers[kept] = np.arange(len(kept))
    names = dataset.class_names
    renamed = RenumberedImages(dataset, numbers, [names[number] for number in kept] if names else [])
    renamed.class_names = renamed.class_names or None
    rows = np.flatnonzero(np.isin(labels, kept))
    return ChosenImages(renamed, rows.tolist(), f"{dataset.name}[{len(kept)} classes]")


def _class_numbers(text: str) -> list[int]:
    """Return the numbers in a text such as ``3,5-7``."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise BadInput(f"cannot read only={text}: write numbers of classes, such as only=0,4-7.")
        numbers += range(int(first), int(last if dash else first) + 1)
    if not numbers or len(set(numbers)) < len(numbers):
        raise BadInput(f"cannot read only={text}: name at least one class, and each once.")
    return numbers


def _rows(dataset: ImageDataset, rows: str, base: Path) -> ImageDataset:
    bounds = rows.split(":")
    try:
        if len(bounds) not in (2, 3):
            raise ValueError("a slice has one colon or two")
        chosen = range(len(dataset))[slice(*(int(bound) if bound else None for bound in bounds))]
    except ValueError as error:
        raise BadInput(f"cannot read rows={rows}: write a slice, rows=0:5000, rows=5000: or rows=::10.") from error
    return ChosenImages(dataset, chosen, f"{dataset.name}[rows={rows}]")


def _long_tail(dataset: ImageDataset, ratio: str, base: Path) -> ImageDataset:
    try:
        number = float(ratio)
    except ValueError as error:
        raise BadInput(
            f"cannot read long_tail={ratio}: write how many times larger the first class is than the last."
        ) from error
    tail = long_tail(dataset, number)
    return ChosenImages(dataset, tail.indices, tail.name)


def validation_split(labels: np.ndarray, part: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows for training and for validation, which gets a share ``part`` of each class, rounded down.

    A class with one image keeps it for training. The split depends only on the labels.
    """
    shuffled = np.random.default_rng(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    kept = rank < np.repeat((counts * part).astype(np.int64), counts)
    return np.sort(by_class[~kept]), np.sort(by_class[kept])


def _validation(dataset: ImageDataset, share: str, base: Path) -> ImageDataset:
    _, aside = validation_split(labels_of(dataset), _share("validation", share))
    return ChosenImages(dataset, aside.tolist(), f"{dataset.name}[validation={share}]")


def _without_validation(dataset: ImageDataset, share: str, base: Path) -> ImageDataset:
    kept, _ = validation_split(labels_of(dataset), _share("without_validation", share))
    return ChosenImages(dataset, kept.tolist(), f"{dataset.name}[without_validation={share}]")


def _share(name: str, value: str) -> float:
    with suppress(ValueError):
        if 0 < float(value) < 1:
            return float(value)
    raise BadInput(f"cannot read {name}={value}: write the share of each class that is held out, such as 0.1.")


def _take(dataset: ImageDataset, number: str, base: Path) -> ImageDataset:
    wanted = whole_number("take", number, 1)
    step = max(1, len(dataset) // wanted)
    return ChosenImages(dataset, range(len(dataset))[::step][:wanted], f"{dataset.name}[take={wanted}]")


def _labels(dataset: ImageDataset, value: str, base: Path) -> ImageDataset:
    if value != "none":
        raise BadInput(f"cannot read labels={value}: write labels=none for images without their labels.")
    return UnlabeledImages(dataset)


VIEWS: dict[str, Callable[[ImageDataset, str, Path], ImageDataset]] = {
    "classes": _classes,
    "scramble": _scramble,
    "only": _only,
    "rows": _rows,
    "long_tail": _long_tail,
    "validation": _validation,
    "without_validation": _without_validation,
    "take": _take,
    "labels": _labels,
}
"""The options of every dataset by name, in the order in which they are applied."""
