"""The images of each step, and their way to the device.

Orders depend only on the seed, the epoch and the step, so that a run can resume anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.images import ImageDataset
from ood_scores.runtime import from_workers
from ood_scores.training.augment import seed_of

HELD_BYTES = 2**32
"""Datasets with more bytes are loaded batch by batch."""

Opening = Callable[[Image.Image, int], Image.Image]
"""Function of the image in a file and a seed that returns an image of the network's size and channels."""


class Images(Protocol):
    """Images with labels, accessed by row."""

    labels: Tensor

    def __len__(self) -> int: ...

    def batches(self, rows: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield uint8 images ``[n, C, H, W]`` and labels ``[n]`` on the device for each list of rows and its seed."""


class HeldImages:
    """Images held in the memory of the device: uint8 ``[N, C, H, W]``, labels ``[N]``."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images = images.to(device)
        self.labels = labels.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rows: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in _sent_at_once(rows, self.images.device):
            yield self.images[chosen], self.labels[chosen]


class LoadedImages:
    """Images that ``workers`` processes open on demand."""

    def __init__(self, images: OpenedImages, labels: Tensor, workers: int, device: torch.device) -> None:
        self.images = images
        self.labels = labels
        self.workers = workers
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, rows: Sequence[Tensor], seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        keys: Any = (
            [(row, seed_of(seed, place)) for place, row in enumerate(batch.tolist())]
            for batch, seed in zip(rows, seeds, strict=True)
        )
        pinned = self.device.type == "cuda"
        loader = DataLoader(self.images, batch_sampler=keys, num_workers=self.workers, pin_memory=pinned)
        labels = _sent_at_once([self.labels[batch] for batch in rows], self.device)
        for images, own in zip(from_workers(loader), labels, strict=True):
            yield images.to(self.device, non_blocking=True), own


def _sent_at_once(vectors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Return vectors on a device; a copy for each one would let the host wait for every step."""
    if not vectors:
        return []
    return torch.cat(list(vectors)).to(device).split([len(each) for each in vectors])


class OpenedImages(Dataset[Tensor]):
    """Rows of a dataset as uint8 ``[C, H, W]``, indexed by ``(position among the rows, seed)``."""

    def __init__(self, dataset: ImageDataset, rows: np.ndarray, opening: Opening) -> None:
        self.dataset = dataset
        self.rows = rows
        self.opening = opening

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        position, seed = key
        image, _ = self.dataset.load(int(self.rows[position]))
        return pil_to_tensor(self.opening(image, seed))


def make_images(opened: OpenedImages, labels: Tensor, device: torch.device, *, hold: bool, workers: int) -> Images:
    """Hold the images on the device if ``hold`` is set and they fit, else load them on demand."""
    if hold and _fits(opened, device):
        return HeldImages(torch.stack([opened[position, 0] for position in range(len(opened))]), labels, device)
    return LoadedImages(opened, labels, workers, device)


def _fits(opened: OpenedImages, device: torch.device) -> bool:
    size = opened[0, 0].numel() * len(opened)
    free = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else size
    return size <= min(HELD_BYTES, free)


def order(seed: int, epoch: int, images: int, batch_size: int, drop_last: bool) -> list[Tensor]:
    """Return the rows of each batch of an epoch."""
    rows = torch.randperm(images, generator=_generator(seed, "order", epoch))
    batches = list(rows.split(batch_size))
    return batches[:-1] if drop_last and len(batches[-1]) < batch_size else batches


def cycled(seed: int, stage: int, first: int, batches: int, images: int, batch_size: int) -> list[Tensor]:
    """Return batches ``first``, ``first + 1``, … of an endless stream that repeats all images in new orders.

    A batch may span the end of one round and the start of the next.
    """
    start, stop = first * batch_size, (first + batches) * batch_size
    rounds = range(start // images, -(-stop // images))
    rows = torch.cat([torch.randperm(images, generator=_generator(seed, "cycle", stage, each)) for each in rounds])
    offset = rounds.start * images
    return list(rows[start - offset : stop - offset].split(batch_size))


def in_order(images: int, batch_size: int) -> list[Tensor]:
    """Return the batches of every row once, for evaluation."""
    return list(torch.arange(images).split(batch_size))


def share(batches: Sequence[Tensor], rank: int, processes: int) -> list[Tensor]:
    """Return the part of each batch that belongs to one of several processes; some parts may be empty."""
    return [batch[rank::processes] for batch in batches]


def _generator(*numbers: Any) -> Generator:
    return Generator().manual_seed(seed_of(*numbers))
