"""A probe that mixes inputs with images of another dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput, MissingData
from ood_scores.extraction.probes.base import Pass, Probe, register_probe
from ood_scores.extraction.probes.reruns import seed_of

if TYPE_CHECKING:
    from ood_scores.data.images import ImageDataset

SHARES = (0.25, 0.5, 0.75)
"""The shares of the input in a mixed one, of which each row draws one."""

IDENTIFYING = 16
"""Number of images at the start that identify the dataset."""


@register_probe
@dataclass(frozen=True)
class Mixup(Probe):
    """Features of inputs mixed with images of another dataset: the extra ``mixup`` ``[N, D]``, for ``mfs``.

    ``z(a x + (1 - a) x')``, where x' is an image of a dataset that stands for OoD data, and a is one of ``SHARES``.
    Both are drawn for each row. Only the fit set needs the extra.

    Source: the authors' code of OpenMIBOOD (Gutbrod et al. 2025), ``mds_mfs`` and others. Departure: what a row draws
    depends on the seed and on the number of the row, not on the size of batches.

    Args:
        proxy: the text of a dataset, such as ``folder:photos``, which is opened when the probe runs. Its images are
            transformed as those of the loader's dataset, if that has a ``transform``, or else as ``preprocessing`` of
            the model does.
        seed: the seed of the draw.
        identity: a checksum of the first images of the dataset, which is computed if it is "".
        root: the folder where relative paths in ``proxy`` start; defaults to the current folder.

    Cost: one additional forward pass, and reading one image for each input.
    """

    name: str = "mixup"
    proxy: str = ""
    seed: int = 0
    identity: str = ""
    root: str = field(default="", repr=False)
    needs_logits: ClassVar[bool] = False
    random: ClassVar[bool] = True
    reads_a_file: ClassVar[bool] = True
    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset({"root"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proxy and not self.identity:
            with suppress(MissingData):  # a benchmark file can be read without its data; the extraction fails
                object.__setattr__(self, "identity", _identity(_images(self.proxy, self.root)))

    def for_model(self, model: nn.Module, inputs: Tensor) -> Probe:
        if not self.proxy:
            raise BadInput(
                f"{self.name} needs images to mix inputs with: name a dataset, {self.name}:proxy=folder:PHOTOS."
            )
        return self

    def columns(self, done: Pass, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from ood_scores.models.opening import preprocessing

        assert done.features_of is not None
        images, transform = _opened(self.proxy, self.root, self.identity), done.transform or preprocessing(done.model)
        drawn = [seed_of(self.seed, done.start + row) for row in range(len(done.inputs))]
        others = torch.stack([torch.as_tensor(transform(images.load(each % len(images))[0])) for each in drawn])
        if others.shape != done.inputs.shape:
            raise BadInput(
                f"{self.name}: images of {self.proxy} become inputs of shape {list(others.shape[1:])}, those of the "
                f"loader have {list(done.inputs.shape[1:])}: give the dataset of the loader a transform to this shape."
            )
        shares = done.inputs.new_tensor([SHARES[each // len(images) % len(SHARES)] for each in drawn])
        mixed = torch.lerp(others.to(done.inputs), done.inputs, shares[:, None, None, None])
        return {self.name: done.features_of(mixed)}


def _images(proxy: str, root: str) -> ImageDataset:
    from ood_scores.data.sources import open_dataset  # which scoring does not need

    return open_dataset(proxy, root=root)


def _identity(images: ImageDataset) -> str:
    checksum = hashlib.sha256(str(len(images)).encode())
    for number in range(min(len(images), IDENTIFYING)):
        checksum.update(images.load(number)[0].tobytes())
    return checksum.hexdigest()


@lru_cache(maxsize=2)
def _opened(proxy: str, root: str, identity: str) -> ImageDataset:
    images = _images(proxy, root)
    if identity and _identity(images) != identity:
        raise BadInput(f"the images of {proxy} have changed since the probe was created: create it again.")
    return images
