"""Datasets of images that are held in an array, in files or by torchvision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch.utils.data import Dataset

from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingData, ShapeMismatch

Transform: TypeAlias = Callable[[Image.Image], Any]


class ImageDataset(Dataset[Any], ABC):
    """Items are `(image, label)`, or `image` where there are no labels; the image is RGB and went through `transform`.

    Subclasses give `__len__` and `load`.

    Attributes:
        name: a short name for tables.
        transform: applied to the PIL image of every item; None leaves it as it is.
    """

    def __init__(self, name: str, transform: Transform | None) -> None:
        self.name = name
        self.transform = transform

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int | None]:
        """The RGB image of one row and its label."""

    def __getitem__(self, index: int) -> Any:
        image, label = self.load(index)
        item = image if self.transform is None else self.transform(image)
        return item if label is None else (item, label)


class ImageArrays(ImageDataset):
    """Images held in one array.

    Args:
        images: uint8 [N,H,W,3] in RGB order, or [N,H,W] grey.
        labels: integers [N], or None.
        transform: applied to each PIL image.
        name: a short name for tables.

    Raises:
        BadInput: images that are not uint8.
        BadLabels: labels that are not integers.
        ShapeMismatch: images of another shape, or not one label per image.
        EmptyInput: no images.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: ArrayLike | None = None,
        transform: Transform | None = None,
        name: str = "arrays",
    ) -> None:
        super().__init__(name, transform)
        if images.dtype != np.uint8:
            raise BadInput(f"images have dtype {images.dtype}; give uint8 from 0 to 255")
        if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] == 3):
            raise ShapeMismatch(f"images have shape {list(images.shape)}; give [N,H,W,3] or, for grey, [N,H,W]")
        if len(images) == 0:
            raise EmptyInput(f"{name} has no images")
        self.images = images
        self.labels = None if labels is None else checked_labels(labels, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        label = None if self.labels is None else int(self.labels[index])
        return Image.fromarray(self.images[index]).convert("RGB"), label


class ImageFiles(ImageDataset):
    """Images in files, opened one by one; a file that is missing or cannot be read is a BadInput that names it."""

    def __init__(
        self, paths: Sequence[str], labels: Sequence[int] | None, transform: Transform | None, name: str
    ) -> None:
        super().__init__(name, transform)
        self.paths = paths
        self.labels = None if labels is None else checked_labels(labels, len(paths))

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return read_rgb(self.paths[index]), None if self.labels is None else int(self.labels[index])


class TorchvisionImages(ImageDataset):
    """One of torchvision's classification datasets, opened without a transform."""

    def __init__(self, dataset: Any, transform: Transform | None, name: str) -> None:
        super().__init__(name, transform)
        if len(dataset) == 0:
            raise EmptyInput(f"{name} has no images")
        match dataset[0]:
            case (Image.Image(), int() | np.integer() | None):
                self.dataset = dataset
            case _:
                raise BadInput(f"the items of {name} are not an image and its class; name a classification dataset")

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        image, label = self.dataset[index]
        return image.convert("RGB"), None if label is None else int(label)


def read_rgb(path: str | Path) -> Image.Image:
    """The image in a file, as RGB. Raises MissingData if there is no such file, BadInput if it cannot be read."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except FileNotFoundError as error:
        raise MissingData(f"there is no image {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read the image {path}: {error}") from error


def checked_labels(labels: ArrayLike, n_images: int) -> NDArray[np.int64]:
    """`labels` as int64 `[n_images]`. Raises BadLabels for other types, ShapeMismatch for other lengths."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise BadLabels(f"labels have dtype {array.dtype}; give integers, one class index per image")
    if array.shape != (n_images,):
        raise ShapeMismatch(f"labels have shape {list(array.shape)} beside {n_images} images; give one label per image")
    return array.astype(np.int64)
