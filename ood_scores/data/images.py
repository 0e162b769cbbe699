"""Datasets of images in an array, in files, or in a torchvision dataset."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch.utils.data import Dataset

from ood_scores.data.decoding import as_rgb, read_rgb, unreadable
from ood_scores.data.row_ids import below, ids_of
from ood_scores.errors import BadInput, BadLabels, EmptyInput, ShapeMismatch

Transform: TypeAlias = Callable[[Image.Image], Any]


class ImageDataset(Dataset[Any], ABC):
    """A dataset whose items are ``(image, label)``, or ``image`` if there are no labels.

    Images are RGB and pass through ``transform``. Subclasses implement ``__len__`` and ``load``.

    Attributes:
        name: a short name for tables.
        transform: function that is applied to the PIL image of every item, or None.
        text, root: the text that opened the dataset, and the folder where its paths start; None for other datasets.
        class_names: the names of the classes, in the order of the labels; None if they are unknown.
        listed_classes: the length of the list that numbers the classes (``?classes=FILE``); None without a list.
        label_order: the order of the labels, if it is not the dataset's own or, for folders, the alphabetical one. It
            is part of the identity of a cache.
    """

    text: str | None = None
    root: str | None = None
    class_names: Sequence[str] | None = None
    listed_classes: int | None = None
    label_order: str | None = None

    def __init__(self, name: str, transform: Transform | None) -> None:
        self.name = name
        self.transform = transform

    @property
    def ids(self) -> Sequence[Any] | None:
        """The name of each row, such as its file in the folder of the dataset; None if rows have no names."""
        return None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int | None]:
        """Return the RGB image of a row and its label."""

    def __getitem__(self, index: int) -> Any:
        image, label = self.load(index)
        item = image if self.transform is None else self.transform(image)
        return item if label is None else (item, label)


class SameRows(ImageDataset):
    """The rows of another dataset, with other images or labels.

    Attributes:
        dataset: the original dataset, whose transform is not applied.
    """

    def __init__(self, dataset: ImageDataset, name: str) -> None:
        super().__init__(name, dataset.transform)
        self.dataset = dataset

    @property
    def ids(self) -> Sequence[Any] | None:
        """The names of the rows of the original dataset."""
        return self.dataset.ids

    def __len__(self) -> int:
        return len(self.dataset)


class ImageArrays(ImageDataset):
    """Images in one array.

    Args:
        images: RGB images, uint8 ``[N, H, W, 3]``, or gray ones, ``[N, H, W]``.
        labels: class indices ``[N]``, or None.
        transform: function that is applied to each PIL image, or None.
        name: a short name for tables.
        names: the name of each image ``[N]``, or None.

    Raises:
        BadInput: if the images are not uint8.
        BadLabels: if the labels are not integers.
        ShapeMismatch: if the images have another shape, or there is not one label or name per image.
        EmptyInput: if there are no images.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: ArrayLike | None = None,
        transform: Transform | None = None,
        name: str = "arrays",
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name, transform)
        if images.dtype != np.uint8:
            raise BadInput(f"images have dtype {images.dtype}: pass uint8 from 0 to 255.")
        if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] == 3):
            raise ShapeMismatch(f"images have shape {list(images.shape)}: pass [N, H, W, 3], or [N, H, W] if gray.")
        if len(images) == 0:
            raise EmptyInput(f"{name} has no images.")
        if names is not None and len(names) != len(images):
            raise ShapeMismatch(f"there are {len(names)} names for {len(images)} images: pass one name per image.")
        self.images = images
        self.labels = None if labels is None else checked_labels(labels, len(images))
        self.names = names

    @property
    def ids(self) -> Sequence[str] | None:
        """The names of the images."""
        return self.names

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        label = None if self.labels is None else int(self.labels[index])
        return Image.fromarray(self.images[index]).convert("RGB"), label


class ImageFiles(ImageDataset):
    """Images in files, which are opened one by one; an error names the file that is missing or cannot be read.

    The ids are the files, relative to the folder ``top`` if they are in it.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        transform: Transform | None,
        name: str,
        top: str | os.PathLike[str] = "",
    ) -> None:
        super().__init__(name, transform)
        self.paths = paths
        self.top = top
        self.labels = None if labels is None else checked_labels(labels, len(paths))

    @property
    def ids(self) -> Sequence[str]:
        """The files, relative to ``top`` if they are in it."""
        return below(self.paths, self.top)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return read_rgb(self.paths[index]), None if self.labels is None else int(self.labels[index])


class TorchvisionImages(ImageDataset):
    """A classification dataset of torchvision that was created without a transform."""

    def __init__(self, dataset: Any, transform: Transform | None, name: str) -> None:
        super().__init__(name, transform)
        if len(dataset) == 0:
            raise EmptyInput(f"{name} has no images.")
        self.dataset = dataset
        names = getattr(dataset, "classes", None)
        if isinstance(names, (list, tuple)) and names:
            self.class_names = [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
        match self._item(0):
            case (Image.Image(), int() | np.integer() | None):
                pass
            case _:
                raise BadInput(f"the items of {name} are not an image and its class: name a classification dataset.")

    @property
    def ids(self) -> Sequence[Any] | None:
        """The files of the dataset, if it has a list of them."""
        return ids_of(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        image, label = self._item(index)
        return as_rgb(image, f"in row {index} of {self.name}"), None if label is None else int(label)

    def _item(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (BadInput, IndexError):
            raise
        except Exception as error:  # a decoder may raise anything on damaged bytes
            raise unreadable(f"in row {index} of {self.name}", error) from error


def checked_labels(labels: ArrayLike, n_images: int) -> NDArray[np.int64]:
    """Return labels as int64 ``[n_images]``.

    Raises:
        BadLabels: if they are not integers.
        ShapeMismatch: if there is not one label per image.
    """
    array = np.asarray(labels)
    if array.dtype.kind not in "iu":
        raise BadLabels(f"labels have dtype {array.dtype}: pass integers, one class index per image.")
    if array.shape != (n_images,):
        raise ShapeMismatch(f"labels have shape {list(array.shape)} for {n_images} images: pass one label per image.")
    return array.astype(np.int64)
