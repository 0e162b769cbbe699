"""Images that need no download, for demos and tests: handwritten digits, patches of photographs, and noise.

The digits and photographs are part of scikit-learn. All images are gray uint8 arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.kinds.noise import gaussian_pixels, uniform_pixels
from ood_scores.errors import BadInput

TEST_SHARE = 0.3
PHOTO_REDUCTION = 8  # a patch of 8 x 8 covers 64 x 64 pixels of the photograph, enough to hold edges


class Split(NamedTuple):
    """Training and test images, uint8 ``[N, 8, 8]``, and their labels, int64 ``[N]``."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


def digits(classes: Sequence[int] = range(10)) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Load handwritten digits of some classes: images, uint8 ``[N, 8, 8]``, and labels, int64 ``[N]``.

    A label is the position of the digit in ``classes``. All ten classes have 1,797 images together.

    Raises:
        BadInput: if ``classes`` is empty, repeats a digit, or has one outside 0 to 9.

    Source: the test set of Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    from sklearn.datasets import load_digits

    if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
        raise BadInput(f"classes are {list(classes)}: pass one or more different digits from 0 to 9.")
    bunch = load_digits()
    position = np.full(10, -1)
    position[list(classes)] = np.arange(len(classes))
    labels = position[bunch.target]
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return images[labels >= 0], labels[labels >= 0]


@register_dataset_kind("digits")
def open_digits(target: str, base: Path, *, classes: str | None = None) -> ImageArrays:
    """Open ``digits?classes=0-6``: scikit-learn's handwritten digits, 8 x 8 pixels.

    ``classes`` is a range or a list such as ``0,1,8``; the label is the position of the class in it.
    """
    if target:
        raise BadInput(f"digits has no path, got {target!r}: write digits or digits?classes=0-6.")
    if classes is None:
        return ImageArrays(*digits(), None, "digits")
    return ImageArrays(*digits(_class_list(classes)), None, f"digits[{classes}]")


def _class_list(classes: str) -> list[int]:
    numbers: list[int] = []
    try:
        for part in classes.split(","):
            first, dash, last = part.partition("-")
            numbers += range(int(first), int(last if dash else first) + 1)
    except ValueError as error:
        raise BadInput(f"cannot read classes={classes}: write, for example, classes=0-6 or classes=0,1,8.") from error
    return numbers


def digits_split(classes: Sequence[int] = range(10), seed: int = 0) -> Split:
    """Split ``digits`` at random into 70% for training and 30% for test, stratified by class."""
    from sklearn.model_selection import train_test_split

    images, labels = digits(classes)
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=seed)
    return Split(images[train], labels[train], images[test], labels[test])


def photo_patches(n: int, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """Cut random patches, uint8 ``[n, size, size]``, out of two photographs, reduced to an eighth of their size.

    Raises:
        BadInput: if ``size`` is larger than the reduced photographs.
    """
    from sklearn.datasets import load_sample_images

    gray = [Image.fromarray(photo).convert("L") for photo in load_sample_images().images]
    photos = np.stack([np.asarray(photo.reduce(PHOTO_REDUCTION)) for photo in gray])
    if not 1 <= size <= min(photos.shape[1:]):
        raise BadInput(f"patches of size {size} cannot be cut: pass a size from 1 to {min(photos.shape[1:])}.")
    patches = np.lib.stride_tricks.sliding_window_view(photos, (size, size), axis=(1, 2))
    rng = np.random.default_rng(seed)
    photo, top, left = (rng.integers(0, choices, n) for choices in patches.shape[:3])
    return patches[photo, top, left]


def uniform_noise(n: int, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """Draw images, uint8 ``[n, size, size]``, with independent pixels that are uniform on 0 to 255."""
    return uniform_pixels(np.random.default_rng(seed), (n, size, size))


def gaussian_noise(n: int, size: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """Draw images, uint8 ``[n, size, size]``, with independent pixels from N(127.5, 63.75²), clipped to 0 to 255."""
    return gaussian_pixels(np.random.default_rng(seed), (n, size, size))
