"""Many small images packed on a few large ones: the sheets ``NAME.00.webp``, ``NAME.01.webp``, … and ``NAME.json``.

A sheet holds ``per_file`` images in rows from left to right. The last sheet may hold fewer, and the rest of the last
row of a sheet is blank. Lossless WebP preserves every pixel.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ood_scores.atomic import read_text
from ood_scores.data.dataset_spec import located
from ood_scores.data.decoding import read_rgb
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.errors import BadInput, MissingData


@dataclass(frozen=True)
class Index:
    """The content of ``NAME.json``.

    Attributes:
        size: height and width of an image in pixels.
        columns: number of images in a row.
        per_file: number of images on a sheet.
        count: number of images in total.
        labels: class indices, or None.
    """

    size: int
    columns: int
    per_file: int
    count: int
    labels: list[int] | None


@register_dataset_kind("sheets")
def open_sheets(target: str, base: Path) -> ImageArrays:
    """Open ``sheets:DIR/NAME``: small images packed on a few WebP files, held in memory.

    Raises:
        MissingData: if the index or one of its sheets does not exist.
        BadInput: if an index or a sheet cannot be read, or they do not fit each other.
        ShapeMismatch: if there is not one label per image.
    """
    if not target:
        raise BadInput("sheets needs a path: write sheets:DIR/NAME.")
    path = located(target, base)
    index = _read_index(path.with_name(f"{path.name}.json"))
    starts = range(0, index.count, index.per_file)
    sheets = [path.with_name(f"{path.name}.{number:02d}.webp") for number in (0, len(starts) - 1)]
    if not sheets[-1].exists():  # before memory is allocated for the images of all sheets
        raise MissingData(f"there is no image {sheets[-1]}")
    _tiles(sheets[0], index, min(index.per_file, index.count))
    images = np.empty((index.count, index.size, index.size, 3), dtype=np.uint8)
    for number, first in enumerate(starts):
        part = images[first : first + index.per_file]
        part[:] = _tiles(path.with_name(f"{path.name}.{number:02d}.webp"), index, len(part))
    return ImageArrays(images, index.labels, name=path.name)


def _read_index(path: Path) -> Index:
    try:
        stored = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise MissingData(f"there is no {path}") from error
    except BadInput:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"cannot read {path} as JSON ({error}): write the index again.") from error
    names = [field.name for field in fields(Index)]
    if not isinstance(stored, dict) or not set(names) <= set(stored):
        raise BadInput(f"{path} is not an index of sheets: it must be an object of {', '.join(names)}.")
    for name in ("size", "columns", "per_file", "count"):
        if not _is_whole(stored[name]) or stored[name] < 1:
            raise BadInput(f"{name} of {path} is {stored[name]!r}: it must be a whole number from 1.")
    labels = stored["labels"]
    if labels is not None and not (isinstance(labels, list) and all(map(_is_whole, labels))):
        raise BadInput(f"labels of {path} are not valid: they must be a list of class indices, or null.")
    return Index(**{name: stored[name] for name in names})


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _tiles(path: Path, index: Index, n_images: int) -> NDArray[np.uint8]:
    """Cut the first images out of a sheet, uint8 ``[n_images, size, size, 3]``."""
    sheet = np.asarray(read_rgb(path))
    height, width, _ = sheet.shape
    rows, size, columns = height // index.size, index.size, index.columns
    if width != columns * size or height != rows * size or rows * columns < n_images:
        raise BadInput(
            f"{path} has {width} x {height} pixels, which are not {n_images} images of {size} x {size} in rows of "
            f"{columns}: write the sheet and its index again."
        )
    return sheet.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)[:n_images]
