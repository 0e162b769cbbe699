"""Image datasets of the Hugging Face hub, opened by the library ``datasets``, which is imported only here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ood_scores.data.dataset_spec import parse
from ood_scores.data.decoding import as_rgb, read_rgb, unreadable
from ood_scores.data.images import ImageDataset, checked_labels
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.remedies import literal, python_command
from ood_scores.data.row_ids import below
from ood_scores.errors import BadInput, EmptyInput, MissingData
from ood_scores.registry import unknown

LABEL_COLUMNS = ("label", "labels")
"""Columns of integers that are used as labels if no column has the type ``ClassLabel``."""

ID_COLUMNS = ("id", "image_id", "__key__", "file_name", "filename")
"""Columns whose texts or integers are used as ids, if they are different in all rows."""


class HubImages(ImageDataset):
    """A split of a dataset of the hub, whose images are decoded one by one.

    Attributes:
        rows: the split with only the column of images, each as ``{"bytes": ..., "path": ...}``.
        column: name of this column.
        labels: class indices, int64 ``[N]``, with -1 for rows without a label; None if no row has one.
    """

    def __init__(
        self,
        rows: Any,
        column: str,
        labels: Sequence[int | None] | None,
        name: str,
        ids: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(name, None)
        self._ids = ids
        if len(rows) == 0:
            raise EmptyInput(f"{name} has no images.")
        self.rows = rows
        self.column = column
        self.labels: NDArray[np.int64] | None = None
        if labels is not None and any(label is not None for label in labels):
            self.labels = checked_labels([-1 if label is None else label for label in labels], len(rows))

    @property
    def ids(self) -> Sequence[Any] | None:
        """The values of the column of ids, or the paths of the images, as the dataset has them."""
        return self._ids

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        return self._image(index), None if self.labels is None else int(self.labels[index])

    def _image(self, index: int) -> Image.Image:
        row = f"in row {index} of {self.name}"
        match self.rows[index][self.column]:
            case Image.Image() as image:
                return as_rgb(image, row)
            case {"bytes": bytes(encoded)}:
                return read_rgb(encoded, row)
            case {"bytes": None, "path": str(path)}:
                return read_rgb(path, f"{row}, {path}")
            case None:
                raise unreadable(row, "it is empty")
            case other:
                raise BadInput(
                    f"column {self.column!r} of {self.name} holds {type(other).__name__}, not images: write image=NAME."
                )


def _remedy(text: str, root: object) -> str:
    _, target, options = parse(text)
    arguments = [literal(target), *([literal(options["config"])] if "config" in options else [])]
    call = f"from datasets import load_dataset; load_dataset({', '.join(arguments)})"
    return f"pip install datasets && {python_command(call)}"


@register_dataset_kind("hf", _remedy, offline=lambda text: None)
def open_hub(
    target: str,
    base: Path,
    *,
    split: str = "test",
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    id: str | None = None,
) -> HubImages:
    """Open ``hf:OWNER/NAME?split=test``: an image dataset of the Hugging Face hub.

    The library ``datasets`` downloads the dataset or finds it in its cache. ``image`` and ``label`` name columns; they
    are only needed if the dataset has several columns of images or classes. Rows without a label have the label -1.
    ``id`` names the column with the ids of the rows; by default it is one of ``ID_COLUMNS``, or else the ids are the
    paths of the images, if all rows have different ones.

    Raises:
        MissingData: if the library is not installed, or neither the hub nor its local cache has the dataset.
        UnknownName: if a column does not exist.
        BadInput: if there is no such split or configuration, or a column must be named.
    """
    if not target:
        raise BadInput("hf needs a dataset: write hf:OWNER/NAME.")
    try:
        import datasets  # type: ignore[import-not-found, unused-ignore]

        load_dataset = datasets.load_dataset
    except (ImportError, AttributeError) as error:
        raise MissingData(f"hf:{target} is opened by the library 'datasets', which is not installed") from error
    try:
        rows = load_dataset(target, config, split=split)
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"cannot open split {split!r} of hf:{target}: {error}") from error
    except OSError as error:
        raise MissingData(f"cannot open hf:{target}: {error}") from error
    pictures = _column("image", image, rows.features, _of_type("Image", rows.features))
    if pictures is None:
        raise BadInput(f"hf:{target} has no column of images; it has: {', '.join(rows.features)}.")
    classes = _of_type("ClassLabel", rows.features) or [name for name in LABEL_COLUMNS if _is_integer(rows, name)]
    labels = _column("label", label, rows.features, classes)
    name = f"{target.rpartition('/')[2]}[{split if config is None else f'{config},{split}'}]"
    images = rows.select_columns([pictures])
    if pictures in _of_type("Image", rows.features):
        images = images.cast_column(pictures, datasets.Image(decode=False))
    ids = _ids(rows, images, pictures, id)
    dataset = HubImages(images, pictures, None if labels is None else list(rows[labels]), name, ids)
    dataset.class_names = getattr(rows.features[labels], "names", None) if labels else None
    return dataset


def _ids(rows: Any, images: Any, pictures: str, named: str | None) -> list[Any] | None:
    """Return the ids in the column that the user named, or else those that are different in all rows."""
    if named is not None:
        return list(rows[_column("id", named, rows.features, [])])
    for name in ID_COLUMNS:
        if str(getattr(rows.features.get(name), "dtype", "")).startswith(("string", "int", "uint")):
            found = list(rows[name])
            if len(set(found)) == len(found):
                return found
    return _paths(images, pictures)


def _paths(images: Any, column: str) -> list[str] | None:
    """Return the paths of the images, without decoding one; None unless all rows have different ones.

    Absolute paths are shortened to those below their common folder.
    """
    if column not in _of_type("Image", images.features):
        return None
    import pyarrow.compute

    cells = images.with_format("arrow")[:][column]
    if not pyarrow.types.is_struct(cells.type):
        return None
    paths = pyarrow.compute.struct_field(cells, "path").to_pylist()
    if not all(paths) or len(set(paths)) < len(paths):
        return None
    return below(paths, os.path.commonpath(map(os.path.dirname, paths))) if all(map(os.path.isabs, paths)) else paths


def _of_type(kind: str, features: Mapping[str, Any]) -> list[str]:
    return [name for name, feature in features.items() if type(feature).__name__ == kind]


def _is_integer(rows: Any, name: str) -> bool:
    return str(getattr(rows.features.get(name), "dtype", "")).startswith(("int", "uint"))


def _column(option: str, named: str | None, features: Mapping[str, Any], found: list[str]) -> str | None:
    """Return the column that the user named, or else the one that was found."""
    if named is not None and named not in features:
        raise unknown("there is no column", named, features)
    if named is None and len(found) > 1:
        raise BadInput(f"several columns may be the {option}, {', '.join(found)}: write {option}=NAME.")
    return named or next(iter(found), None)
