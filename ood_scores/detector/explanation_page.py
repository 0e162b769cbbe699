"""Explanations of rejected images as one self-contained HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_scores.atomic import make_folder, replace_text, user_path
from ood_scores.detector.preprocessing import PRESET, PROCESSOR
from ood_scores.evaluation.pictures import data_uri
from ood_scores.models.running import architecture
from ood_scores.terminal import safe

if TYPE_CHECKING:
    from ood_scores.detector.explanation import Explanation, Explanations

SIDE, THUMBNAIL = 320, 192
"""Longest side in pixels of the image and its map, and of similar images."""

RAISING, LOWERING = (0, 114, 178), (213, 94, 0)
"""Colors of positions that raise and lower the score, of Okabe and Ito's palette."""

OPACITY = 0.75


@dataclass(frozen=True)
class Shown:
    """An explanation and its pictures, as data URIs; empty if there are none."""

    row: Explanation
    title: str
    picture: str
    map: str
    neighbors: list[str]


def write_page(found: Explanations, folder: str | os.PathLike[str]) -> Path:
    """Write ``index.html`` to a folder, which is created, and return its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ood_scores.detector"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"safe_text": safe}
    detector = found.detector
    text = environment.get_template("explanations.html.j2").render(
        found=found,
        rows=[_shown(row, detector.preprocessing) for row in found],
        model=architecture(detector.model),
        scorer=detector.scorer.name,
        calibration=str(detector.calibration),
        pooled=found.pooled,
    )
    home = user_path(folder)
    make_folder(home)
    replace_text(home / "index.html", text)
    return home / "index.html"


def _shown(row: Explanation, preprocessing: Any) -> Shown:
    picture = picture_of(row.input, preprocessing)
    drawn = None if picture is None or row.score_map is None else with_map(picture, row.score_map)
    return Shown(
        row,
        f"image {row.image}" if row.id is None else row.id,
        "" if picture is None else data_uri(_scaled(picture, SIDE), SIDE),
        "" if drawn is None else data_uri(drawn, SIDE),
        [
            "" if each.picture is None else data_uri(_scaled(each.picture, THUMBNAIL), THUMBNAIL)
            for each in row.neighbors
        ],
    )


def picture_of(inputs: Tensor, preprocessing: Any) -> Image.Image | None:
    """Return the picture that an input of the model shows, without its normalization; None if it shows none.

    If the normalization is unknown, the values are stretched to the range of pixels.

    Args:
        inputs: ``[C, H, W]``, C = 1 or 3.
        preprocessing: the preprocessing of the detector.
    """
    if inputs.ndim != 3 or inputs.shape[0] not in (1, 3):
        return None
    values = inputs.detach().double().cpu().numpy()
    mean, std = _normalization(preprocessing)
    if mean is not None and std is not None:
        values = values * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    else:
        values = (values - values.min()) / max(np.ptp(values), 1e-12)
    pixels = np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels)


def with_map(picture: Image.Image, score_map: NDArray[np.float64]) -> Image.Image:
    """Draw a map over a picture in gray: blue where it raises the score, orange where it lowers it, against its mean.

    Args:
        picture: the picture.
        score_map: the map, ``[h, w]``, of the whole picture.
    """
    deviation = score_map - score_map.mean()
    scaled = deviation / max(np.abs(deviation).max(), 1e-300)
    size = _scaled(picture, SIDE).size
    smooth = np.asarray(Image.fromarray(scaled.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    gray = np.asarray(picture.convert("L").resize(size, Image.Resampling.BILINEAR), np.float64)[:, :, None]
    color = np.where(smooth[:, :, None] > 0, RAISING, LOWERING)
    opacity = OPACITY * np.abs(smooth)[:, :, None]
    return Image.fromarray(np.rint(gray * (1 - opacity) + color * opacity).astype(np.uint8))


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """Return the picture with a longest side of ``side`` pixels; small ones keep their sharp pixels."""
    factor = side / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.NEAREST if factor > 2 else Image.Resampling.BILINEAR)


def _normalization(preprocessing: Any) -> tuple[Any, Any]:
    """Return mean and standard deviation of the preprocessing; None if they are unknown."""
    entries = preprocessing if isinstance(preprocessing, Mapping) else {}
    if PROCESSOR in entries:
        inner = entries[PROCESSOR]
        return inner.get("image_mean"), inner.get("image_std")
    inner = entries.get(PRESET, entries)
    return inner.get("mean"), inner.get("std")
