"""Images of noise, with independent pixels and channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from ood_scores.data.dataset_spec import whole_number
from ood_scores.data.images import ImageDataset
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.registry import Registry

MOST_PIXELS = 10_000
"""The largest height and width."""

Pixels = Callable[[Generator, tuple[int, ...]], NDArray[np.uint8]]


def uniform_pixels(rng: Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Draw pixels that are uniform on 0 to 255."""
    return rng.integers(0, 256, shape, dtype=np.uint8)


def gaussian_pixels(rng: Generator, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Draw pixels from N(127.5, 63.75²), rounded and clipped to 0 to 255.

    Haas et al. (2024, Fig. 5) use Gaussian noise and do not state its mean or variance. Here, 95% of the pixels lie
    within the range before clipping. Liang et al. (2018, ODIN) draw from N(127.5, 255²), where 62% are clipped.
    """
    return np.rint(rng.normal(127.5, 63.75, shape).clip(0, 255)).astype(np.uint8)


DRAWN: Registry[Pixels] = Registry("noise", {"gaussian": gaussian_pixels, "uniform": uniform_pixels})


class NoiseImages(ImageDataset):
    """``n`` RGB images of noise, ``size`` x ``size`` pixels, without labels.

    An image is drawn when it is loaded and depends only on the seed and its row, so it is the same in every order and
    process.
    """

    def __init__(self, kind: str, n: int, size: int, seed: int) -> None:
        super().__init__(f"{kind}_noise", None)
        self.draw = DRAWN[kind]
        self.n = n
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.n

    def load(self, index: int) -> tuple[Image.Image, None]:
        rng = np.random.default_rng([self.seed, range(self.n)[index]])
        return Image.fromarray(self.draw(rng, (self.size, self.size, 3))), None


@register_dataset_kind("noise")
def open_noise(target: str, base: Path, *, n: str = "10000", size: str = "32", seed: str = "0") -> NoiseImages:
    """Open ``noise:gaussian?n=10000&size=32&seed=0``: Gaussian, or with ``noise:uniform`` uniform, noise.

    Raises:
        UnknownName: if there is no such noise.
        BadInput: if an option is not a whole number.
    """
    side = whole_number("size", size, 1, MOST_PIXELS)
    return NoiseImages(target, whole_number("n", n, 1), side, whole_number("seed", seed))
