"""Augmentation of whole batches, where they are; every image draws its own numbers from a generator that is given.

Batches are uint8 `[N, C, H, W]` until the last step, then float32 from 0 to 1.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from ood_scores.errors import BadInput
from ood_scores.registry import Registry

Operation = Callable[[Tensor, Generator], Tensor]

GREY = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in torchvision's grey."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to a batch.

    Attributes:
        pixels: operations on uint8 images, in this order.
        colours: operations on float images, after them.
        opening_crop: each image is cropped at random from the file, before it is brought to the size of the network,
            so that nothing can be kept in memory.
        colour_only: wants three channels.
    """

    pixels: tuple[Operation, ...] = ()
    colours: tuple[Operation, ...] = ()
    opening_crop: bool = False
    colour_only: bool = False

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """uint8 `[N, C, H, W]` to float32 `[N, C, H, W]` from 0 to 1."""
        for operation in self.pixels:
            images = operation(images, generator)
        images = images.float().div_(255)
        for operation in self.colours:
            images = operation(images, generator)
        return images


def augmentation(name: str, channels: int) -> Augmentation:
    """The augmentation of a name.

    Raises:
        UnknownName: there is none.
        BadInput: it wants colour images, and the network takes grey ones.
    """
    found = AUGMENTATIONS[name]
    if found.colour_only and channels != 3:
        grey = [known for known, other in AUGMENTATIONS.items() if not other.colour_only]
        raise BadInput(f"augmentation {name!r} is for colour images; for a network of grey ones: {', '.join(grey)}.")
    return found


def seed_of(*numbers: int | str) -> int:
    """A seed that depends on all of the numbers and words: for instance on the run's seed, the epoch and the step."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1


def crop(images: Tensor, generator: Generator) -> Tensor:
    """As `RandomCrop(32, padding=4)`: a black frame of an eighth of the height, then a window of the old size."""
    count, _, height, width = images.shape
    frame = height // 8
    top, left = torch.randint(2 * frame + 1, (2, count, 1), generator=generator, device=images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    padded = F.pad(images, (frame,) * 4).permute(0, 2, 3, 1)
    each = torch.arange(count, device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: Tensor, generator: Generator) -> Tensor:
    """Half of the images mirrored left to right."""
    mirrored = _share(images, 0.5, generator)
    return torch.where(mirrored, images.flip(3), images)


def jitter(images: Tensor, generator: Generator) -> Tensor:
    """As `ColorJitter(0.4, 0.4, 0.4, 0.1)`, for 80% of the images. The order of its steps is drawn once a batch."""
    factors = 0.6 + 0.8 * _uniform(images, 3, generator)
    turn = 0.2 * _uniform(images, 1, generator)[0] - 0.1
    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: (x * factors[0]).clamp(0, 1),
        lambda x: _blend(x, _grey(x).mean(dim=(2, 3), keepdim=True), factors[1]),
        lambda x: _blend(x, _grey(x), factors[2]),
        lambda x: turn_hue(x, turn),
    ]
    order = torch.randperm(4, generator=Generator().manual_seed(generator.initial_seed()))
    changed = images
    for number in order.tolist():
        changed = steps[number](changed)
    return torch.where(_share(images, 0.8, generator), changed, images)


def some_grey(images: Tensor, generator: Generator) -> Tensor:
    """20% of the images without colour."""
    return torch.where(_share(images, 0.2, generator), _grey(images).expand_as(images), images)


def small_crops(images: Tensor, generator: Generator) -> Tensor:
    """A window of 5 to 25% of the area of each image, of aspect 3/4 to 4/3, brought back to the full size."""
    area, log_aspect, x, y = _uniform(images, 4, generator).flatten(1)
    side = (0.05 + 0.2 * area).sqrt()
    stretch = ((2 * log_aspect - 1) * math.log(4 / 3) / 2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    zero = torch.zeros_like(x)
    theta = torch.stack([width, zero, (2 * x - 1) * (1 - width), zero, height, (2 * y - 1) * (1 - height)], dim=1)
    grid = F.affine_grid(theta.reshape(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """RGB images `[N, 3, H, W]` with their hue moved by `turn` `[N, 1, 1, 1]`, in turns of the colour circle."""
    value, _ = images.max(dim=1, keepdim=True)
    spread = value - images.min(dim=1, keepdim=True)[0]
    saturation = spread / torch.where(value == 0, 1, value)
    red, green, blue = images.split(1, dim=1)
    safe = torch.where(spread == 0, 1, spread)
    from_green = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, from_green) + 6 * turn
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).reshape(1, 3, 1, 1)
    sector = (hue + offsets) % 6
    return value - value * saturation * torch.minimum(sector, 4 - sector).clamp(0, 1)


def random_resized_crop(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling, seed: int
) -> Image.Image:
    """As torchvision's `RandomResizedCrop`: 8 to 100% of the area, of aspect 3/4 to 4/3, at `size` (height, width)."""
    draw = random.Random(seed)
    wide, high = image.size
    for _ in range(10):
        area = wide * high * draw.uniform(0.08, 1)
        aspect = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= wide and 0 < height <= high:
            left, top = draw.randint(0, wide - width), draw.randint(0, high - height)
            break
    else:  # a very long image: the middle of it
        width, height = min(wide, round(high * 4 / 3)), min(high, round(wide * 4 / 3))
        left, top = (wide - width) // 2, (high - height) // 2
    return image.resize(size[::-1], resample, (left, top, left + width, top + height))


def _uniform(images: Tensor, count: int, generator: Generator) -> Tensor:
    """`[count, N, 1, 1, 1]` numbers from 0 to 1."""
    return torch.rand((count, len(images), 1, 1, 1), generator=generator, device=images.device)


def _share(images: Tensor, share: float, generator: Generator) -> Tensor:
    return _uniform(images, 1, generator)[0] < share


def _grey(images: Tensor) -> Tensor:
    weights = torch.tensor(GREY, device=images.device).reshape(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (other + factor * (images - other)).clamp(0, 1)


AUGMENTATIONS: Registry[Augmentation] = Registry(
    "augmentation",
    {
        "none": Augmentation(),
        "flip": Augmentation((flip,)),
        "crop_flip": Augmentation((crop, flip)),
        "rna": Augmentation((crop, flip), (jitter, some_grey), colour_only=True),
        "small_crops": Augmentation((flip,), (small_crops,)),
        "imagenet": Augmentation((flip,), opening_crop=True),
    },
)
"""By name.

- `none`: the images as evaluation sees them.
- `flip`: mirrored or not.
- `crop_flip`: `RandomCrop(32, padding=4)` and mirrored or not, for CIFAR.
- `rna`: the same, then `ColorJitter(0.4, 0.4, 0.4, 0.1)` with probability 0.8 and grey with 0.2 (Shin et al. 2024).
- `small_crops`: 5 to 25% of an image, in place of OoD images (Shin et al. 2024, Table 7).
- `imagenet`: `RandomResizedCrop` of the file and mirrored or not.
"""
