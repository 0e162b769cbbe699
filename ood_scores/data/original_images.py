"""The images of a dataset before its transform is applied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch.utils.data import Subset

from ood_scores.data.decoding import as_rgb
from ood_scores.data.images import ImageDataset


def original_image(dataset: Any, row: int) -> Image.Image | None:
    """Return the RGB image of a row of a dataset before its transform; None if it cannot be had.

    Args:
        dataset: one of this package, one with an attribute ``transform``, such as those of torchvision, or a ``Subset``
            of these.
        row: the row.
    """
    try:
        if isinstance(dataset, ImageDataset):
            return dataset.load(row)[0]
        if isinstance(dataset, Subset):
            return original_image(dataset.dataset, dataset.indices[row])
        image = _first(_untransformed(dataset)[row])
        return as_rgb(image) if isinstance(image, Image.Image) else None
    except Exception:  # of somebody's dataset
        return None


def _untransformed(dataset: Any) -> Any:
    plain = copy.copy(dataset)
    plain.transform = lambda image: image
    if hasattr(dataset, "transforms"):  # torchvision's transform of an image and its label
        plain.transforms = lambda image, label: (image, label)
    return plain


def _first(item: Any) -> Any:
    values = item.values() if isinstance(item, Mapping) else item if isinstance(item, (tuple, list)) else [item]
    return next((value for value in values if isinstance(value, Image.Image)), None)
