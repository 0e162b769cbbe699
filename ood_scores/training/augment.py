"""Augmentation of whole batches on their device; every image draws its own random numbers from the given generator.

Batches are uint8 ``[N, C, H, W]`` until the last step, then float32 in [0, 1].
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from ood_scores.errors import BadInput
from ood_scores.registry import Registry

Operation = Callable[[Tensor, Generator], Tensor]

GRAY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in torchvision's grayscale."""


@dataclass(frozen=True)
class Augmentation:
    """The operations that augment a batch.

    Attributes:
        pixels: Operations on uint8 images, in order.
        colors: Operations on float images, applied afterwards.
        opening_crop: Smallest share of the area of an image that a random crop of the file keeps before it is resized;
            None for no such crop. Images that are cropped cannot be held in memory.
        color_only: Whether the images need three channels.
    """

    pixels: tuple[Operation, ...] = ()
    colors: tuple[Operation, ...] = ()
    opening_crop: float | None = None
    color_only: bool = False

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Augment uint8 images ``[N, C, H, W]`` and return float32 images in [0, 1]."""
        for operation in self.pixels:
            images = operation(images, generator)
        images = images.float().div_(255)
        for operation in self.colors:
            images = operation(images, generator)
        return images


def augmentation(name: str, channels: int) -> Augmentation:
    """Return an augmentation by name.

    Raises:
        UnknownName: if there is no such augmentation.
        BadInput: if it needs color images, and the network takes gray ones.
    """
    found = AUGMENTATIONS[name]
    if found.color_only and channels != 3:
        gray = [known for known, other in AUGMENTATIONS.items() if not other.color_only]
        raise BadInput(
            f"augmentation {name!r} needs color images: for a network of gray images choose one of {', '.join(gray)}."
        )
    return found


def seed_of(*numbers: int | str) -> int:
    """Return a seed that depends on all numbers and words, such as the run's seed, the epoch and the step."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def crop(images: Tensor, generator: Generator) -> Tensor:
    """Crop as ``RandomCrop(32, padding=4)``: pad by an eighth of the height with black, then cut a random window."""
    count, _, height, width = images.shape
    frame = height // 8
    top, left = torch.randint(2 * frame + 1, (2, count, 1), generator=generator, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    padded = F.pad(images, (frame,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror half of the images left to right."""
    mirrored = _share(images, 0.5, generator)
    return torch.where(mirrored, images.flip(3), images)


def jitter(images: Tensor, generator: Generator) -> Tensor:
    """Apply ``ColorJitter(0.4, 0.4, 0.4, 0.1)`` to 80% of the images, its steps in one random order per batch."""
    factors = 0.6 + 0.8 * _uniform(images, 3, generator)
    turn = 0.2 * _uniform(images, 1, generator)[0] - 0.1
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: (x * factors[0]).clamp(0, 1),
        lambda x: _blend(x, _gray(x).mean(dim=(2, 3), keepdim=True), factors[1]),
        lambda x: _blend(x, _gray(x), factors[2]),
        lambda x: turn_hue(x, turn),
    ]
    order = torch.randperm(4, generator=Generator().manual_seed(generator.initial_seed()))
    changed = images
    for number in order.tolist():
        changed = steps[number](changed)
    return torch.where(_share(images, 0.8, generator), changed, images)


def some_gray(images: Tensor, generator: Generator) -> Tensor:
    """Convert 20% of the images to grayscale."""
    return torch.where(_share(images, 0.2, generator), _gray(images).expand_as(images), images)


def small_crops(images: Tensor, generator: Generator) -> Tensor:
    """Crop 5 to 25% of the area of each image, with an aspect ratio of 3/4 to 4/3, and resize it to the full size."""
    area, log_aspect, x, y = _uniform(images, 4, generator).flatten(1)
    side = (0.05 + 0.2 * area).sqrt()
    stretch = ((2 * log_aspect - 1) * math.log(4 / 3) / 2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    zero = torch.zeros_like(x)
    theta = torch.stack([width, zero, (2 * x - 1) * (1 - width), zero, height, (2 * y - 1) * (1 - height)], dim=1)
    grid = F.affine_grid(theta.reshape(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue of RGB images ``[N, 3, H, W]`` by ``turn`` ``[N, 1, 1, 1]``, in turns of the color circle."""
    value, _ = images.max(dim=1, keepdim=True)
    spread = value - images.min(dim=1, keepdim=True)[0]
    saturation = spread / torch.where(value == 0, 1, value)
    red, green, blue = images.split(1, dim=1)
    safe = torch.where(spread == 0, 1, spread)
    from_green = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, from_green) + 6 * turn
    sector = (hue + _channels((5.0, 3.0, 1.0), images.device)) % 6
    return value - value * saturation * torch.minimum(sector, 4 - sector).clamp(0, 1)


def random_resized_crop(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling, seed: int, smallest: float = 0.08
) -> Image.Image:
    """Crop as ``RandomResizedCrop``: share ``smallest`` to 1, aspect ratio 3/4 to 4/3, ``size`` (height, width)."""
    draw = random.Random(seed)
    wide, high = image.size
    for _ in range(10):
        area = wide * high * draw.uniform(smallest, 1)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= wide and 0 < height <= high:
            left, top = draw.randint(0, wide - width), draw.randint(0, high - height)
            break
    else:  # a very elongated image: crop its center
        width, height = min(wide, round(high * 4 / 3)), min(high, round(wide * 4 / 3))
        left, top = (wide - width) // 2, (high - height) // 2
    return image.resize(size[::-1], resample, (left, top, left + width, top + height))


def _uniform(images: Tensor, count: int, generator: Generator) -> Tensor:
    """Draw numbers ``[count, N, 1, 1, 1]`` in [0, 1)."""
    return torch.rand((count, len(images), 1, 1, 1), generator=generator, device=images.device)


def _share(images: Tensor, share: float, generator: Generator) -> Tensor:
    return _uniform(images, 1, generator)[0] < share


def _gray(images: Tensor) -> Tensor:
    return (images * _channels(GRAY, images.device)).sum(dim=1, keepdim=True)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a value for each channel, ``[1, C, 1, 1]``, on a device, where it is copied once."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (other + factor * (images - other)).clamp(0, 1)


AUGMENTATIONS: Registry[Augmentation] = Registry(
    "augmentation",
    {
        "none": Augmentation(),
        "flip": Augmentation((flip,)),
        "crop_flip": Augmentation((crop, flip)),
        "rna": Augmentation((crop, flip), (jitter, some_gray), color_only=True),
        "small_crops": Augmentation((flip,), (small_crops,)),
        "imagenet": Augmentation((flip,), opening_crop=0.08),
        "imagenet_lt": Augmentation((flip,), (jitter, some_gray), opening_crop=0.2, color_only=True),
    },
)
"""Augmentations by name.

- ``none``: no augmentation.
- ``flip``: random horizontal flip.
- ``crop_flip``: ``RandomCrop(32, padding=4)`` and random flip, for CIFAR.
- ``rna``: crop_flip, then ``ColorJitter(0.4, 0.4, 0.4, 0.1)`` with probability 0.8 and grayscale with probability 0.2
  (Shin et al. 2024).
- ``small_crops``: 5 to 25% of an image, as a substitute for OoD images (Shin et al. 2024, Table 6).
- ``imagenet``: ``RandomResizedCrop`` of the file and random flip.
- ``imagenet_lt``: ``RandomResizedCrop`` with at least 20% of the area, random flip, and the colors of ``rna``
  (the code of Wang et al. 2022 and Shin et al. 2024).
"""
