"""Check that the preprocessing of a detector returns the inputs that its calibration features were extracted from."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ood_scores.data.original_images import original_image
from ood_scores.data.sources import open_dataset, reopened
from ood_scores.detector.inputs import input_batches
from ood_scores.detector.parts import DetectorParts
from ood_scores.errors import BadInput
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.further_inputs import requires_several
from ood_scores.extraction.loaders import is_in_order
from ood_scores.features import FeatureSet
from ood_scores.models.running import model_dtype
from ood_scores.user_warnings import warn_user

IMAGES = 8
"""Number of images to check, evenly spaced in the dataset."""

CLOSE, CLOSE_IN_BF16 = 0.05, 0.15
"""The largest relative difference of a feature vector that rounding explains.

Measured at most, with EfficientNet-Lite0 on eight images of ImageNet: 0.04 for resizing in torch instead of PIL, and
0.07 for bfloat16 instead of float32; 0.09 for Lanczos instead of bicubic interpolation, 0.19 for bilinear, and 0.3 to
0.8 for another crop or normalization.
"""


def check_preprocessing(detector: DetectorParts, feats: FeatureSet, data: Any, images: Any = None) -> None:
    """Compare features of a few images, computed through the detector's preprocessing, with those of a set.

    If the images cannot be had, or the model has several inputs, warn if the preprocessing is known to be another one.

    Args:
        detector: the detector.
        feats: the calibration set.
        data: what the user passed: the loader that it was extracted from, or the set.
        images: the images of the set, in order: a dataset, its text, or a loader; None for those of the loader or, for
            a set, of the dataset that its provenance names, if this process opened that itself.

    Raises:
        BadInput: if the features differ by more than rounding, or ``images`` are not those of the set.
    """
    if detector.transform is None:
        return
    shown = {} if requires_several(detector.model) else _some_images(feats, data, images)
    if not shown:
        _warn_of_other_text(detector)
        return
    (inputs,) = input_batches(list(shown.values()), detector.transform)
    options = replace(detector.forward.options, compile=False, probes=())
    found, expected = Forward(detector.model, options).feature_set(inputs), feats[list(shown)]
    differences = _relative(found.features, expected.features)
    in_bf16 = options.amp == "bf16" or model_dtype(detector.model) == torch.bfloat16
    if float(differences.max()) > (CLOSE_IN_BF16 if in_bf16 else CLOSE):
        known = f" ({detector.data.preprocessing})" if detector.data and detector.data.preprocessing else ""
        raise BadInput(
            f"the preprocessing does not reproduce the features of the ID set: of {len(shown)} of its images, "
            f"{_changed(found, expected)} have another label, and features differ by {differences.mean():.1%} on "
            f"average and up to {differences.max():.1%}. Pass the preprocessing that the set was extracted with{known} "
            "as preprocessing=..., or extract it again."
        )


def _some_images(feats: FeatureSet, data: Any, images: Any) -> dict[int, Image.Image]:
    """Return a few images of a set by their row; none if they cannot be had. See ``check_preprocessing``."""
    if images is not None:
        dataset = open_dataset(images) if isinstance(images, str) else _dataset(images)
    else:
        dataset = _opened(feats) if isinstance(data, FeatureSet) else _dataset(data)
    origin = feats.provenance
    places = origin.rows_in_dataset(len(feats)) if origin else np.arange(len(feats))
    count = len(feats) + (len(origin.skipped) if origin else 0)
    rows = range(0, len(feats), max(1, len(feats) // IMAGES))[:IMAGES] if _len(dataset) == count else ()
    found = {row: image for row in rows if (image := original_image(dataset, int(places[row])))}
    if images is not None and not found:
        raise BadInput(
            f"images must be the dataset of {count:,} images that the ID set was extracted from, in order, got "
            f"{type(images).__name__} with {_len(dataset) or 'an unknown number of'} rows."
        )
    return found


def _opened(feats: FeatureSet) -> Any:
    """Open the dataset that a set names, without a network, if this process has opened it before; else return None.

    The set may come from somebody else, and name any path of this machine.
    """
    origin = feats.provenance
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the dataset leaves out
            return reopened(origin.data_text, origin.data_root) if origin else None
    except Exception:  # the dataset is gone, or is of a kind that is not registered
        return None


def _dataset(data: Any) -> Any:
    """Return the dataset of a loader that reads it in order, or a dataset itself; None for other loaders."""
    if isinstance(data, Dataset):
        return data
    return getattr(data, "dataset", None) if is_in_order(data) else None


def _len(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _relative(found: Tensor, expected: Tensor) -> Tensor:
    """Return the norm of the difference of each row, relative to the norm of the expected row, float64 ``[N]``."""
    found, expected = (values.double().flatten(1).cpu() for values in (found, expected))
    return (found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-12)


def _changed(found: FeatureSet, expected: FeatureSet) -> str:
    if found.logits is None or expected.logits is None:
        return "an unknown number"
    return str(int((found.logits.argmax(1).cpu() != expected.logits.argmax(1).cpu()).sum()))


def _warn_of_other_text(detector: DetectorParts) -> None:
    """Warn if the text of the preprocessing differs from that of the calibration set."""
    known = detector.data.preprocessing if detector.data else ""
    if known and known != detector.transform_text:
        warn_user(
            f"the preprocessing of the calibration images was {known}, but that of images passed to predict is "
            f"{detector.transform_text}; unless both are equivalent, the threshold is not valid: pass "
            "preprocessing=..., or tensors. To compare the features with the images of the ID set, pass "
            f"images={detector.data.data_text if detector.data and detector.data.data_text else '...'!r}.",
        )
