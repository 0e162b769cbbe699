"""Convert images in many forms (tensors, arrays, PIL images, files) to batches for the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ood_scores.data.decoding import as_rgb, read_rgb
from ood_scores.detector.preprocessing import FUNCTIONS, Transform, model_input
from ood_scores.errors import BadInput, EmptyInput, RowsLeftOut, ShapeMismatch, UnreadableImage
from ood_scores.extraction.further_inputs import further_inputs, with_names
from ood_scores.extraction.loaders import input_key
from ood_scores.features.finite import require_finite
from ood_scores.user_warnings import warn_user

ROWS = 64
"""Number of images of a list that are decoded and passed to the model at a time."""

ACCEPTED = (
    "pass an input of the model [B, C, H, W], or images: files, PIL images, uint8 arrays [H, W, 3], or uint8 tensors "
    "[3, H, W]"
)

OF_LOADERS = "for the batches of a loader, call detector.decide(ood_scores.extract(detector.model, loader))"
PAIRS = "for batches with labels, pass the inputs alone, detector.predict(x)"


def input_batches(images: Any, transform: Transform | None, errors: dict[int, str] | None = None) -> Iterator[Tensor]:
    """Yield images as batches ``[B, C, H, W]`` of inputs for the model.

    Floating-point values are inputs of the model and are not changed. The transform is applied to pixels: to everything
    that is uint8 or has to be decoded. A batch tensor or array is yielded as one batch, anything else ``ROWS`` images
    at a time.

    Args:
        images: floating-point values ``[B, C, H, W]``; or uint8 pixels, with channels last in NumPy ``[B, H, W, 3]``
            and first in torch ``[B, 3, H, W]``, as is usual in each (1 instead of 3 for gray images); or an iterable of
            single images: PIL images, paths, encoded bytes, Hugging Face's ``{"bytes", "path"}``, uint8 or
            floating-point arrays and tensors without the first dimension. A single path, PIL image, or bytes object is
            a batch of one. A dictionary contains any of these under one of the keys
            ``ood_scores.extraction.loaders.INPUT_KEYS``, such as ``pixel_values``.
            Without a transform, a tensor ``[B, ...]`` of any other shape and type is an input of the model, too, such
            as audio or the numbers of tokens.
        transform: a function from a PIL image to ``[C, H, W]``; None if it is unknown.
        errors: receives the reason why an image of a list cannot be read, by its number, and the image is left out;
            None to raise it, as for a single image.

    Raises:
        EmptyInput: if there is no image, or none that can be read.
        BadInput: if images are in none of these forms, or there is no transform for pixels.
        UnreadableImage: if an image cannot be decoded.
        MissingData: if a file does not exist.
        FileSystemFault: if the operating system does not deliver a file.
        ShapeMismatch: if arrays have another shape, or the images of a batch have different sizes.
        NotFinite: if there are NaN or infinite values.
    """
    rows = 0
    for batch in _batches(images, transform, errors):
        if len(batch):
            require_finite({"pixels": batch}, rows, "image")
            rows += len(batch)
            yield batch
    if errors and not rows:
        raise EmptyInput(f"none of the {len(errors):,} images can be read, the first because: {errors[min(errors)]}")
    if not rows:
        raise EmptyInput("the batch contains no image: pass at least one.")


def inputs_of(images: Any, model: nn.Module) -> tuple[Any, str | None, dict[str, Tensor]]:
    """Return the images that ``predict`` received, and of a dictionary their key and the further inputs of the model.

    A dictionary without any of ``INPUT_KEYS`` has the images under the name of the first parameter of ``forward``.

    Raises:
        BadInput: if a further input does not have one row per image.
    """
    if not isinstance(images, Mapping) or _is_encoded(images):
        return images, None, {}
    batch = with_names(images, model)
    key = input_key(batch)
    found = batch[key]
    is_single = not hasattr(found, "__len__") or isinstance(found, (str, bytes, Mapping))
    return found, key, further_inputs({**batch, key: [found]} if is_single else batch, model)


def file_names(images: Any) -> NDArray[np.str_] | None:
    """Return the names of the files of images, ``[B]``, if they are a file or a list of files, else None."""
    files = [images] if isinstance(images, (str, PathLike)) else images
    if not isinstance(files, (list, tuple)) or not all(isinstance(file, (str, PathLike)) for file in files):
        return None
    return np.array([str(file) for file in files])


def _batches(images: Any, transform: Transform | None, errors: dict[int, str] | None) -> Iterator[Tensor]:
    if isinstance(images, Mapping) and not _is_encoded(images):
        images = images[input_key(images)]
    if isinstance(images, (str, PathLike, bytes, Image.Image, Mapping)):
        images, errors = [images], None
    if isinstance(images, np.ndarray) and images.dtype != object:
        images = _of_array(images, "[B, H, W, 3]", 4)
    elif isinstance(images, Tensor) and images.dtype == torch.uint8:
        images = _of_uint8_tensor(images, "[B, 3, H, W]", 4)
    if isinstance(images, Tensor):
        if transform is not None or images.ndim < 2:
            _require_layout(images, "a batch of images must be [B, C, H, W]", 4)
        yield images
    elif isinstance(images, Iterable):
        singles = enumerate(images)
        while part := list(itertools.islice(singles, ROWS)):
            if readable := list(_readable(part, transform, errors)):
                yield _stacked(readable)
    else:
        advice = f"{OF_LOADERS}, a DataLoader over it" if isinstance(images, Dataset) else ACCEPTED
        raise BadInput(f"a batch of images cannot be of type {type(images).__name__}: {advice}.")


def _readable(
    images: Iterable[tuple[int, Any]], transform: Transform | None, errors: dict[int, str] | None
) -> Iterator[Tensor]:
    for number, image in images:
        try:
            yield _single(image, transform)
        except UnreadableImage as error:
            if errors is None:
                raise
            errors[number] = str(error)


def _require_layout(images: Tensor, layout: str, ndim: int) -> None:
    if not images.is_floating_point():
        raise BadInput(f"images cannot be {_name(images.dtype)}, pixels must be uint8: {ACCEPTED}.")
    if images.ndim != ndim:
        alone = ": pass a single image as a batch, images[None]" if images.ndim == ndim - 1 == 3 else ""
        raise ShapeMismatch(f"{layout}, got {list(images.shape)}{alone}.")


def _single(image: Any, transform: Transform | None) -> Tensor:
    """Return one image as ``[C, H, W]``."""
    if isinstance(image, (list, tuple)):
        image = _array_of_lists(image)
    if isinstance(image, np.ndarray):
        image = _of_array(image, "[H, W, 3]", 3)
    if isinstance(image, Tensor) and image.dtype != torch.uint8:
        if image.ndim > 3:
            raise ShapeMismatch(
                f"an image in a list must be [C, H, W], got the batch {list(image.shape)}: {PAIRS}; {OF_LOADERS}."
            )
        _require_layout(image, "an image in a list must be [C, H, W]", 3)
        return image
    if transform is None:
        raise BadInput(
            "the preprocessing of images for this model is unknown: pass tensors [B, C, H, W], or what a tokenizer of "
            f"texts returns; or pass preprocessing= to calibrate or Detector.load, {FUNCTIONS}."
        )
    return model_input(transform, _as_pil(image))


def _as_pil(image: Any) -> Image.Image:
    if isinstance(image, np.ndarray):
        gray = image.ndim == 3 and image.shape[2] == 1
        return Image.fromarray(image[:, :, 0] if gray else image).convert("RGB")
    if isinstance(image, Tensor):
        return _as_pil(_of_uint8_tensor(image, "[3, H, W]", 3))
    if isinstance(image, Mapping) and _is_encoded(image):
        if image["bytes"] is not None:
            return read_rgb(image["bytes"], image["path"] or "")
        image = image["path"]
    if isinstance(image, (str, PathLike, bytes)):
        return read_rgb(image)
    if isinstance(image, Image.Image):
        return as_rgb(image, str(getattr(image, "filename", "")))
    advice = OF_LOADERS if isinstance(image, Mapping) else ACCEPTED
    raise BadInput(f"an image cannot be of type {type(image).__name__}: {advice}.")


def _is_encoded(image: Mapping[str, Any]) -> bool:
    """Whether this is an image as Hugging Face stores it."""
    return image.keys() == {"bytes", "path"}


def _of_array(array: NDArray[Any], layout: str, ndim: int) -> Tensor | NDArray[np.uint8]:
    """Return floating-point values as a tensor, and uint8 pixels unchanged if their channels come last."""
    if array.dtype.kind == "f":
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    if array.dtype != np.uint8:
        raise BadInput(f"images cannot be an array of {array.dtype}, pixels must be uint8: {ACCEPTED}.")
    gray = array.ndim == 2 and ndim == 3
    if not gray and (array.ndim != ndim or array.shape[-1] not in (1, 3)):
        raise ShapeMismatch(
            f"uint8 images in NumPy must be {layout}, channels last (1 if gray), got {list(array.shape)}: transpose "
            "them, and put a single one in a list."
        )
    return array


def warn_of_unreadable(errors: Mapping[int, str], images: int, consequence: str) -> None:
    """Warn of images that cannot be read, if there are any."""
    if errors:
        first = min(errors)
        warn_user(
            f"{len(errors):,} of {images:,} images cannot be read (image {first}: {errors[first].rstrip('.')}): "
            f"{consequence}.",
            RowsLeftOut,
        )


def _of_uint8_tensor(images: Tensor, layout: str, ndim: int) -> NDArray[np.uint8]:
    """Return the images in NumPy, with channels last."""
    if images.ndim != ndim or images.shape[-3] not in (1, 3):
        raise ShapeMismatch(
            f"uint8 images in torch must be {layout}, channels first (1 if gray), got {list(images.shape)}: permute "
            "them, and put a single one in a list."
        )
    return images.movedim(-3, -1).cpu().numpy()


def _array_of_lists(values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:
        is_pair = any(hasattr(each, "shape") or isinstance(each, Image.Image) for each in values)
        reason = (
            f"a {type(values).__name__} of several values: {PAIRS}; {OF_LOADERS}."
            if is_pair
            else f"lists of different lengths: {ACCEPTED}."
        )
        raise BadInput(f"an image cannot be {reason}") from error


def _stacked(images: list[Tensor]) -> Tensor:
    shapes = list(dict.fromkeys(tuple(image.shape) for image in images))
    if len(shapes) > 1:
        raise ShapeMismatch(
            f"the images of a batch have different shapes, {list(shapes[0])} and {list(shapes[1])}: resize them."
        )
    return torch.stack(images)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
