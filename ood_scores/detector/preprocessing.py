"""Preprocessing of a detector: how an image becomes an input of the model, and how this is stored without code.

A preprocessing is a dictionary that describes it, or a function that cannot be described. There are three kinds of
dictionaries: timm's data configuration; ``{"image_processor": …}``, the configuration of an image processor of Hugging
Face's transformers; and ``{"image_classification": …}``, the parameters of torchvision's ``ImageClassification``, which
``weights.transforms()`` returns.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from ood_scores.errors import BadInput
from ood_scores.models.opening import preprocessing as timm_transform
from ood_scores.models.origin import origin_of
from ood_scores.models.processors import ProcessorTransform
from ood_scores.optional_packages import require
from ood_scores.user_warnings import warn_user

Transform: TypeAlias = Callable[[Image.Image], Tensor]
Preprocessing: TypeAlias = Mapping[str, Any] | Transform

PROCESSOR, PRESET = "image_processor", "image_classification"
DESCRIBED = {PROCESSOR, PRESET}
PRESET_PARAMETERS = ("crop_size", "resize_size", "mean", "std", "interpolation", "antialias")

RESIZING = ("crop_pct", "crop_mode", "interpolation")
"""Entries of timm's data configuration without which only images of the input size are accepted."""

TEXTS = ("image_processor_type", "data_format")
"""Entries of an image processor that may be texts: others could name files or addresses to read."""

FUNCTIONS = "a Hugging Face image processor, torchvision's weights.transforms(), or a function of a PIL image"

EXAMPLE_SIZE = (320, 400)
"""Height and width of the image that shows what a transform returns; larger than most crops."""


@dataclass(frozen=True)
class SameSize:
    """A transform of images that have the size of the input, because how others are resized is unknown.

    Attributes:
        height, width: the size of the images.
        transform: the transform, which does not resize such images.
    """

    height: int
    width: int
    transform: Transform

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the input ``[C, H, W]``.

        Raises:
            BadInput: if the image has another size.
        """
        if image.size != (self.width, self.height):
            raise BadInput(
                f"the preprocessing has no {', '.join(RESIZING)}, so images must be {self.width} x {self.height} "
                f"pixels, got {image.width} x {image.height}: calibrate with these entries, too."
            )
        return self.transform(image)


def preprocessing_of(model: nn.Module, given: Any) -> Preprocessing | None:
    """Return the preprocessing of a model as a description if there is one, else as a function.

    Args:
        model: the model.
        given: entries that replace those of timm's data configuration of the model; an image processor of transformers;
            ``weights.transforms()`` of torchvision; any other function from a PIL image to ``[C, H, W]``; a description
            that this function returned; or None for the model's own in timm.

    Returns:
        The preprocessing; None for a model that is not from timm, if nothing is given.

    Raises:
        BadInput: if an entry does not exist or has a wrong value; if entries other than those of ``RESIZING`` are
            missing for a model that is not from timm; or if this is no function from an RGB image to a tensor.
    """
    origin = origin_of(model)
    if origin and origin.transform and (given is None or (isinstance(given, Mapping) and not given.keys() & DESCRIBED)):
        given = timm_transform(model, **(given or {}))
    if given is None:
        return _timm_config(model, {}) if hasattr(model, "pretrained_cfg") else None
    if isinstance(given, Mapping):
        return given if given.keys() & DESCRIBED else _timm_config(model, given)
    transform = _function_of(given)
    expected = example_input(transform)
    described = _description(transform)
    if described and torch.equal(example_input(transform_of(model, described)), expected):
        return described
    return transform


def transform_of(model: nn.Module, preprocessing: Preprocessing) -> Transform:
    """Return a preprocessing as a function from a PIL image to ``[C, H, W]``.

    Raises:
        BadInput: if an image processor is unknown, or one of its entries could name a file or an address.
        MissingPackage: if transformers, which it needs, is not installed.
    """
    if not isinstance(preprocessing, Mapping):
        return preprocessing
    if PROCESSOR in preprocessing:
        return _processor_of(preprocessing[PROCESSOR])
    if PRESET in preprocessing:
        return _preset_of(preprocessing[PRESET])
    if preprocessing.keys() >= set(RESIZING):
        return timm_transform(model, **preprocessing)
    height, width = preprocessing["input_size"][-2:]
    unused: dict[str, Any] = {
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }  # by images of this very size
    return SameSize(height, width, timm_transform(model, **preprocessing, **unused))


def model_input(transform: Transform, image: Image.Image) -> Tensor:
    """Apply a transform to an image.

    Raises:
        BadInput: if the result is not a floating-point tensor ``[C, H, W]``.
    """
    found: Any = transform(image)
    if isinstance(found, Tensor) and found.is_floating_point() and found.ndim == 3:
        return found
    if isinstance(found, Mapping):
        raise BadInput(
            f"preprocessing must return a tensor [C, H, W] for a PIL image, got {', '.join(found)}: detectors take "
            "images of one size, while ood-scores score and evaluate take caches of any model."
        )
    got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    raise BadInput(f"preprocessing must return a floating-point tensor [C, H, W] for a PIL image, got {got}.")


def example_input(transform: Transform) -> Tensor:
    """Apply a transform to an image of noise, the same one every time.

    Raises:
        BadInput: if the transform cannot be applied to it, or the result is not one of ``model_input``.
    """
    size = (transform.height, transform.width) if isinstance(transform, SameSize) else EXAMPLE_SIZE
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    try:
        return model_input(transform, Image.fromarray(pixels))
    except BadInput:
        raise
    except Exception as error:  # somebody's function
        height, width = EXAMPLE_SIZE
        raise BadInput(
            f"preprocessing failed on an RGB image of {width} x {height} pixels ({type(error).__name__}: {error}): "
            "pass a function from a PIL image to a tensor [C, H, W]."
        ) from error


def _function_of(given: Any) -> Transform:
    transformers = sys.modules.get("transformers")  # imported by whoever has one of its objects
    given = getattr(given, "image_processor", given)  # of a processor of images and texts
    if transformers and isinstance(given, transformers.ImageProcessingMixin):
        return ProcessorTransform(given)
    if not callable(given):
        raise BadInput(
            f"preprocessing cannot be of type {type(given).__name__}: pass {FUNCTIONS}, or a dictionary, "
            "{'mean': …, 'std': …}."
        )
    return given


def _description(transform: Transform) -> dict[str, Any] | None:
    """Return the description of an image processor or preset; None for other functions."""
    if isinstance(transform, ProcessorTransform):
        entries = json.loads(transform.processor.to_json_string())
        own = type(transform.processor).__module__.startswith("transformers.")
        return {PROCESSOR: entries} if own and _is_harmless(entries) else None
    if isinstance(transform, ImageClassification):
        values = {name: getattr(transform, name) for name in PRESET_PARAMETERS}
        return {PRESET: values | {"interpolation": transform.interpolation.value}}
    return None


def _is_harmless(entries: Any) -> bool:
    """Whether entries of an image processor contain no texts but those of ``TEXTS``."""
    if isinstance(entries, dict):
        return all(name in TEXTS or _is_harmless(value) for name, value in entries.items())
    return all(map(_is_harmless, entries)) if isinstance(entries, list) else not isinstance(entries, str)


def _processor_of(entries: dict[str, Any]) -> ProcessorTransform:
    require("the preprocessing, an image processor of Hugging Face, needs", "hub", "transformers")
    import transformers

    name = str(entries.get("image_processor_type"))
    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.ImageProcessingMixin):
        raise BadInput(f"transformers {transformers.__version__} has no image processor {name!r}: update transformers.")
    if not _is_harmless(entries):
        raise BadInput(f"the image processor {name} has entries that could name a file or an address: pass another.")
    return ProcessorTransform(kind.from_dict(entries))


def _preset_of(parameters: Mapping[str, Any]) -> ImageClassification:
    sizes = {name: values[0] for name, values in parameters.items() if name.endswith("_size")}
    interpolation = InterpolationMode(parameters["interpolation"])
    return ImageClassification(**{**parameters, **sizes, "interpolation": interpolation})


def _timm_config(model: nn.Module, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's data configuration of a model, with changes; any other model must have all entries among them.

    Of the other models, those of ``RESIZING`` may be missing together.
    """
    config = resolve_model_data_config(model)
    given = {key: _plain(value) for key, value in changes.items()}
    if given.keys() - config.keys():
        extra = ", ".join(sorted(given.keys() - config.keys()))
        raise BadInput(f"preprocessing has no {extra}: choose from {', '.join(config)}.")
    if not hasattr(model, "pretrained_cfg"):
        _require_known(config, config.keys() - given.keys())
        config = {}
    for key in {"mean", "std"} & given.keys():
        _require_numbers(key, given[key], count=(config | given)["input_size"][0])
    return config | given


def _require_known(config: Mapping[str, Any], missing: Set[str]) -> None:
    """Check that a model's preprocessing has the entries that cannot be guessed."""
    if not missing:
        return
    names = ", ".join(sorted(missing))
    how = (
        f"pass them in preprocessing, too ({', '.join(f'{key}={config[key]!r}' for key in sorted(missing))} is "
        f"common); or pass {FUNCTIONS}."
    )
    if missing != set(RESIZING):
        raise BadInput(f"the model is not from timm, so the {names} of its training are unknown: {how}")
    warn_user(
        f"the model is not from timm, so the {names} of its training are unknown, and the detector will accept only "
        f"images of the input size: {how}",
    )


def _plain(value: Any) -> Any:
    """Return arrays, tensors, and NumPy's numbers as tuples and numbers of Python."""
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _require_numbers(key: str, values: Any, count: int) -> None:
    numbers = isinstance(values, tuple) and all(isinstance(value, (int, float)) for value in values)
    valid = numbers and len(values) in (1, count) and all(map(math.isfinite, values))
    if not valid or (key == "std" and min(values) <= 0):
        raise BadInput(f"{key} in preprocessing must be {count} numbers, one per channel, got {values!r}.")
