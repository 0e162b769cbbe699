"""Images for the dataset tests, solid colors on disk and numbered arrays, and functions that read datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ood_scores.data.images import ImageArrays, ImageDataset

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, color: Any, mode: str = "RGB", size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def items(dataset: ImageDataset) -> list[Any]:
    return [dataset[index] for index in range(len(dataset))]


def corner(image: Image.Image) -> Any:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


def pixels(dataset: ImageDataset, index: int) -> np.ndarray:
    return np.asarray(dataset.load(index)[0])


def numbered(n: int, labels: Any = None) -> ImageArrays:
    """Create images whose pixels encode their row, up to 65,535."""
    rows = np.arange(n)
    images = np.stack([rows // 256, rows % 256, 0 * rows], axis=1).astype(np.uint8)[:, None, None]
    return ImageArrays(np.ascontiguousarray(np.broadcast_to(images, (n, 2, 2, 3))), labels, name="numbered")


def rows_of(dataset: ImageDataset) -> list[int]:
    corners = [pixels(dataset, index)[0, 0].astype(int) for index in range(len(dataset))]
    return [256 * high + low for high, low, _ in corners]
