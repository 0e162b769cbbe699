"""Images as people have them: tensors, arrays, PIL images, files, in batches that the model takes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from ood_scores.data.images import read_rgb
from ood_scores.errors import BadInput, EmptyInput, ShapeMismatch
from ood_scores.extraction.loaders import IMAGE_KEYS
from ood_scores.features.finite import require_finite

Transform: TypeAlias = Callable[[Image.Image], Tensor]

ROWS = 64
"""How many images of a list are decoded and given to the model at a time."""

ACCEPTED = (
    "Give a tensor [B, C, H, W] as the model takes it, or images: files, PIL images, uint8 arrays [H, W, 3] or uint8 "
    "tensors [3, H, W]"
)


def input_batches(images: Any, transform: Transform | None) -> Iterator[Tensor]:
    """Images as batches ``[B, C, H, W]`` that the model takes.

    Numbers of floating point are what the model takes and stay as they are. Pixels go through the transform: whatever
    is uint8, and all that has to be decoded. A batch tensor or array comes back as one batch, anything else ``ROWS``
    images at a time.

    Args:
        images: floating point ``[B, C, H, W]``; or uint8, channels last in NumPy ``[B, H, W, 3]`` and first in torch
            ``[B, 3, H, W]``, as is the custom of either (1 for 3 where the images are grey); or an iterable of single
            images: PIL images, paths, encoded bytes, Hugging Face's ``{"bytes", "path"}``, uint8 or floating-point
            arrays and tensors without the first dimension. One path, PIL image or bytes object is a batch of one.
        transform: from a PIL image to ``[C, H, W]``; None where it is not known.

    Raises:
        EmptyInput: no image.
        BadInput: something that is none of these, an image that cannot be read, or pixels without a transform.
        MissingData: no such file.
        ShapeMismatch: arrays of another shape, or images of different sizes in a batch.
        NotFinite: NaN or infinite values.
    """
    rows = 0
    for batch in _batches(images, transform):
        if len(batch):
            require_finite({"pixels": batch}, rows, "image")
            rows += len(batch)
            yield batch
    if not rows:
        raise EmptyInput("there is no image in this batch.")


def images_in(batch: Mapping[str, Any]) -> Any:
    """What a batch dictionary holds under one of ``IMAGE_KEYS``. Raises BadInput, naming the keys, if it has none."""
    for key in IMAGE_KEYS:
        if key in batch:
            return batch[key]
    raise BadInput(
        f"the batch has the keys {', '.join(map(str, batch))}; images are looked for under {', '.join(IMAGE_KEYS)}."
    )


def data_config(model: nn.Module, changes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """timm's data configuration of a model, with some changes; None for a model that is not timm's, without any.

    Raises BadInput for entries that there are not, and for a model that is not timm's if essential ones are missing.
    """
    if changes is None and not hasattr(model, "pretrained_cfg"):
        return None
    config = resolve_model_data_config(model)
    given = dict(changes or {})
    if given.keys() - config.keys():
        raise BadInput(f"preprocessing has {', '.join(config)}; got {', '.join(given.keys() - config.keys())}.")
    missing = {"input_size", "mean", "std"} - given.keys()
    if missing and not hasattr(model, "pretrained_cfg"):
        raise BadInput(f"the model is not timm's: its preprocessing needs {', '.join(sorted(missing))}, too.")
    return config | given


def _batches(images: Any, transform: Transform | None) -> Iterator[Tensor]:
    if isinstance(images, (str, PathLike, bytes, Image.Image)):
        images = [images]
    if isinstance(images, np.ndarray) and images.dtype != object:
        images = _of_array(images, "[B, H, W, 3]", 4)
    elif isinstance(images, Tensor) and images.dtype == torch.uint8:
        images = _of_uint8_tensor(images, "[B, 3, H, W]", 4)
    if isinstance(images, Tensor):
        _require_layout(images, "a batch of images is [B, C, H, W]", 4)
        yield images
    elif isinstance(images, Iterable) and not isinstance(images, Mapping):
        singles = iter(images)
        while part := list(itertools.islice(singles, ROWS)):
            yield _stacked([_single(image, transform) for image in part])
    else:
        raise BadInput(f"images are a batch, got {type(images).__name__}. {ACCEPTED}.")


def _require_layout(images: Tensor, layout: str, ndim: int) -> None:
    if not images.is_floating_point():
        raise BadInput(f"the images are {_name(images.dtype)}: pixels are uint8. {ACCEPTED}.")
    if images.ndim != ndim:
        alone = ": put a single one in a batch, images[None]" if images.ndim == ndim - 1 == 3 else ""
        raise ShapeMismatch(f"{layout}, got {list(images.shape)}{alone}.")


def _single(image: Any, transform: Transform | None) -> Tensor:
    """One image as ``[C, H, W]``."""
    if isinstance(image, (list, tuple)):
        image = _array_of_lists(image)
    if isinstance(image, np.ndarray):
        image = _of_array(image, "[H, W, 3]", 3)
    if isinstance(image, Tensor) and image.dtype != torch.uint8:
        _require_layout(image, "an image among several is [C, H, W]", 3)
        return image
    if transform is None:
        raise BadInput(
            "nothing says how an image becomes what this model takes: pass tensors [B, C, H, W], or "
            "calibrate(..., preprocessing={'input_size': (3, 224, 224), 'mean': (...), 'std': (...)})."
        )
    return transform(_as_pil(image))


def _as_pil(image: Any) -> Image.Image:
    if isinstance(image, np.ndarray):
        grey = image.ndim == 3 and image.shape[2] == 1
        return Image.fromarray(image[:, :, 0] if grey else image).convert("RGB")
    if isinstance(image, Tensor):
        return _as_pil(_of_uint8_tensor(image, "[3, H, W]", 3))
    if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:
        image = image["path"] if image["bytes"] is None else image["bytes"]
    if isinstance(image, (str, PathLike)):
        return read_rgb(Path(image))
    if not isinstance(image, (bytes, Image.Image)):
        raise BadInput(f"an image is given as {type(image).__name__}. {ACCEPTED}.")
    try:
        return (Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = "from bytes" if isinstance(image, bytes) else getattr(image, "filename", "")
        raise BadInput(f"cannot read an image {name}: {error}") from error


def _of_array(array: NDArray[Any], layout: str, ndim: int) -> Tensor | NDArray[np.uint8]:
    """Floating point as a tensor; uint8 as it is, if its channels come last."""
    if array.dtype.kind == "f":
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    if array.dtype != np.uint8:
        raise BadInput(f"the images are an array of {array.dtype}: pixels are uint8. {ACCEPTED}.")
    grey = array.ndim == 2 and ndim == 3
    if not grey and (array.ndim != ndim or array.shape[-1] not in (1, 3)):
        raise ShapeMismatch(
            f"uint8 images in NumPy are {layout}, channels last (1 if grey), got {list(array.shape)}: transpose them, "
            "and put a single one in a list."
        )
    return array


def _of_uint8_tensor(images: Tensor, layout: str, ndim: int) -> NDArray[np.uint8]:
    """With channels last, for NumPy."""
    if images.ndim != ndim or images.shape[-3] not in (1, 3):
        raise ShapeMismatch(
            f"uint8 images in torch are {layout}, channels first (1 if grey), got {list(images.shape)}: permute them, "
            "and put a single one in a list."
        )
    return images.movedim(-3, -1).cpu().numpy()


def _array_of_lists(values: Any) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise BadInput(f"an image is lists of different lengths. {ACCEPTED}.") from error


def _stacked(images: list[Tensor]) -> Tensor:
    shapes = list(dict.fromkeys(tuple(image.shape) for image in images))
    if len(shapes) > 1:
        raise ShapeMismatch(f"the images of a batch have different shapes, {list(shapes[0])} and {list(shapes[1])}.")
    return torch.stack(images)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
