"""The pictures of the rows of a feature set, found by the names of the rows."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ood_scores.data.kinds.folder import open_folder
from ood_scores.data.original_images import original_image
from ood_scores.data.row_ids import ids_of
from ood_scores.data.sources import open_dataset, reopened
from ood_scores.errors import BadInput, MissingData
from ood_scores.features import FeatureSet

THUMBNAIL = 96


@dataclass(frozen=True)
class Pictures:
    """The pictures of a feature set.

    Attributes:
        dataset: the dataset.
        rows: the row of the dataset with the picture of each row of the set, int64 ``[N]``; -1 if there is none.
    """

    dataset: Any
    rows: np.ndarray

    def __getitem__(self, row: int) -> Image.Image | None:
        """Return the RGB picture of a row of the set, before any transform; None if there is none, or it is damaged."""
        place = int(self.rows[row])
        return None if place < 0 else original_image(self.dataset, place)


def pictures_of(feats: FeatureSet, data: Any = None) -> Pictures:
    """Find the pictures of a set.

    They are found by the ids of the rows. If the dataset has no ids, they are found by their row numbers, which
    requires a whole set of a dataset with as many rows.

    Args:
        feats: the set.
        data: the dataset: a folder of images, a text that ``ood_scores.data.sources.open_dataset`` opens, or a dataset,
            such as those of torchvision. None is the dataset that the set records, but only if this process has opened
            that dataset itself: a set from somebody else can record any path.

    Raises:
        MissingData: if the set records no dataset that this process has opened, or the files do not exist.
        BadInput: if the dataset has none of the pictures, or rows cannot be told apart.
    """
    dataset = dataset_of(feats, data)
    ids = ids_of(dataset)
    if ids is None or feats.ids is None:
        return Pictures(dataset, _rows_by_number(feats, dataset))
    return Pictures(dataset, _rows_by_id(feats, [str(each) for each in ids]))


def data_uri(image: Image.Image, side: int = THUMBNAIL) -> str:
    """Encode an image as a WebP data URI with sides of at most ``side`` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def dataset_of(feats: FeatureSet, data: Any = None) -> Any:
    """Return the dataset with the pictures of a set; arguments and errors are those of ``pictures_of``."""
    if isinstance(data, os.PathLike) or (isinstance(data, str) and os.path.isdir(data)):
        return open_folder(os.fspath(data), Path())
    if isinstance(data, str):
        return open_dataset(data)
    if data is not None:
        return data
    origin = feats.provenance
    dataset = reopened(origin.data_text, origin.data_root) if origin else None
    if dataset is not None:
        return dataset
    if origin is None or origin.data_text is None:
        raise MissingData("the set does not record the dataset of its pictures: pass their folder (data=, --data)")
    raise MissingData(
        f"the set records the pictures {origin.data_text!r} in the folder {origin.data_root!r}, but a file from "
        "somebody else can record any path: name them yourself (data=, --data)"
    )


def _rows_by_id(feats: FeatureSet, ids: list[str]) -> np.ndarray:
    """Return the row of each id; of several rows with one id, that with the number of the row of the set."""
    rows = {name: row for row, name in enumerate(ids)}
    found = np.array([rows.get(name, -1) if name else -1 for name in feats.ids.tolist()])  # type: ignore[union-attr]
    if (found < 0).all():
        raise BadInput(
            f"the dataset has none of the pictures of the set, such as {str(feats.ids[0])!r}; it has "  # type: ignore[index]
            f"{ids[0]!r}: pass the folder in which these names start."
        )
    repeated = {name for name, count in Counter(ids).items() if count > 1}
    if repeated:
        numbers = _numbers(feats)
        for row, name in enumerate(feats.ids.tolist()):  # type: ignore[union-attr]
            if name in repeated:
                same = numbers is not None and numbers[row] < len(ids) and ids[numbers[row]] == name
                found[row] = numbers[row] if same and numbers is not None else -1
    return found


def _rows_by_number(feats: FeatureSet, dataset: Any) -> np.ndarray:
    numbers = _numbers(feats)
    if numbers is None or len(dataset) != feats.provenance.dataset_rows:  # type: ignore[union-attr]
        raise BadInput(
            "the rows of the set have no names, and it is not a whole dataset with as many rows as the pictures: "
            "extract it again from a dataset with names."
        )
    return numbers


def _numbers(feats: FeatureSet) -> np.ndarray | None:
    """Return the row of the dataset of each row; None for some rows of a set, whose numbers are not known."""
    origin = feats.provenance
    return origin.rows_in_dataset(len(feats)) if origin and origin.data_text else None
