"""What any dataset can be seen through: some of its rows, or its images with their pixels in disorder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from ood_scores.data.dataset_spec import whole_number
from ood_scores.data.images import ImageDataset
from ood_scores.data.long_tail import long_tail
from ood_scores.errors import BadInput, EmptyInput


class ChosenImages(ImageDataset):
    """Some rows of a dataset.

    Attributes:
        dataset, indices: the whole dataset, and which of its rows these are.
        transform: the one that is applied; that of the whole dataset is not.
    """

    def __init__(self, dataset: ImageDataset, indices: Sequence[int], name: str) -> None:
        super().__init__(name, dataset.transform)
        if not len(indices):
            raise EmptyInput(f"{name} has no images; {dataset.name} has {len(dataset)}")
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return self.dataset.load(self.indices[index])


class ScrambledImages(ImageDataset):
    """The images of a dataset, each with its pixels in a random order of its own.

    The order is drawn from the seed and the row's number alone: the same in every process. A pixel keeps its three
    channels; images are scrambled at their own size, before the transform. Haas et al. (2024, Fig. 5) compare
    "pixel-wise scrambled" CIFAR-10 and do not say whether all images share one order.

    Attributes:
        dataset: the whole one.
        transform: the one that is applied; that of the whole dataset is not.
    """

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        super().__init__(f"{dataset.name}[scramble={seed}]", dataset.transform)
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        row = range(len(self))[index]
        image, label = self.dataset.load(row)
        pixels = np.asarray(image)
        order = np.random.default_rng([self.seed, row]).permutation(image.width * image.height)
        return Image.fromarray(pixels.reshape(-1, 3)[order].reshape(pixels.shape)), label


def seen_through(dataset: ImageDataset, options: Mapping[str, str]) -> ImageDataset:
    """The dataset with the options of `VIEWS` applied, in the order of `VIEWS`."""
    for name in VIEWS:
        if name in options:
            dataset = VIEWS[name](dataset, options[name])
    return dataset


def _scramble(dataset: ImageDataset, seed: str) -> ImageDataset:
    return ScrambledImages(dataset, whole_number("scramble", seed))


def _rows(dataset: ImageDataset, rows: str) -> ImageDataset:
    bounds = rows.split(":")
    try:
        if len(bounds) not in (2, 3):
            raise ValueError("a slice has one colon or two")
        chosen = range(len(dataset))[slice(*(int(bound) if bound else None for bound in bounds))]
    except ValueError as error:
        raise BadInput(f"cannot read rows={rows}; write a slice: rows=0:5000, rows=5000: or rows=::10") from error
    return ChosenImages(dataset, chosen, f"{dataset.name}[rows={rows}]")


def _long_tail(dataset: ImageDataset, ratio: str) -> ImageDataset:
    try:
        number = float(ratio)
    except ValueError as error:
        raise BadInput(
            f"cannot read long_tail={ratio}; write how many times larger the first class is than the last"
        ) from error
    tail = long_tail(dataset, number)
    return ChosenImages(dataset, tail.indices, tail.name)


def _take(dataset: ImageDataset, number: str) -> ImageDataset:
    wanted = whole_number("take", number, 1)
    step = max(1, len(dataset) // wanted)
    return ChosenImages(dataset, range(len(dataset))[::step][:wanted], f"{dataset.name}[take={wanted}]")


VIEWS: dict[str, Callable[[ImageDataset, str], ImageDataset]] = {
    "scramble": _scramble,
    "rows": _rows,
    "long_tail": _long_tail,
    "take": _take,
}
"""By name, the options of every dataset, in the order in which they are applied."""
