"""Shards of the library ``webdataset``: tar files in which files of one name belong together."""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ood_scores.data.dataset_spec import located
from ood_scores.data.decoding import read_rgb
from ood_scores.data.image_files import IMAGE_SUFFIXES
from ood_scores.data.images import ImageDataset, checked_labels
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.remedies import remedy_for_path
from ood_scores.errors import BadInput, EmptyInput, MissingData

INSTALL = "pip install webdataset"
META = re.compile(r"__[^/]*__($|/)")
"""Files about a shard, which the library skips, too."""
DEFAULT_LABEL = "cls"
LONGEST_LABEL = 100
"""The most bytes of a label; longer files are something else."""


@dataclass(frozen=True)
class Place:
    """A file in a shard: the shard, and the offset and the size of the content in bytes."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the content of the file."""
        with open(self.shard, "rb") as shard:
            shard.seek(self.offset)
            return shard.read(self.size)


class ShardImages(ImageDataset):
    """Images in shards, which are read one by one.

    Attributes:
        places: where the images are.
        ids: the keys of the samples; those of several shards, if they have the same keys, start with the shard's name.
        labels: class indices, int64 ``[N]``, or None.
    """

    def __init__(self, places: Sequence[Place], keys: Sequence[str], labels: Sequence[int] | None, name: str) -> None:
        super().__init__(name, None)
        self.places = places
        self.keys = keys
        self.labels = None if labels is None else checked_labels(labels, len(places))

    @property
    def ids(self) -> Sequence[str]:
        """The keys of the samples."""
        return self.keys

    def __len__(self) -> int:
        return len(self.places)

    def load(self, index: int) -> tuple[Image.Image, int | None]:
        place = self.places[index]
        image = read_rgb(place.read(), f"{self.keys[index]} in {place.shard}")
        return image, None if self.labels is None else int(self.labels[index])


def _remedy(text: str, root: Any) -> str:
    try:
        import webdataset  # noqa: F401
    except ImportError:
        return INSTALL
    return remedy_for_path(text, root)


@register_dataset_kind("wds", _remedy, suggested_for=lambda path: path.suffix == ".tar")
def open_wds(target: str, base: Path, *, image: str | None = None, label: str | None = None) -> ShardImages:
    """Open ``wds:DIR/shards-{000..127}.tar``: local tar files in the format of the library ``webdataset``.

    The files of a sample follow each other and have one name up to the first dot, its key, such as ``n01/7.jpg`` and
    ``n01/7.cls``; the keys are the ids of the rows. ``image`` and ``label`` are the extensions of the image and of the
    text with its class; by default, the image is the one with the suffix of an image, and there are no labels if no
    sample has a ``.cls``. Opening reads the headers of all files, so that rows can be read in any order; the tar files
    must not be compressed.

    Raises:
        MissingData: if the library is not installed, or a shard does not exist.
        BadInput: if a shard or a label cannot be read, or a sample does not have one image.
        EmptyInput: if there are no samples.
    """
    if not target:
        raise BadInput("wds needs a path: write wds:DIR/shards-{000..127}.tar.")
    if re.match(r"[a-z]+:", target):
        raise BadInput(f"wds reads local files, got {target[:100]!r}: download the shards and write wds:DIR/NAME.tar.")
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise MissingData(f"wds:{target} is opened by the library 'webdataset', which is not installed") from error
    shards = [located(path, base) for path in expand_urls(target)]
    samples = [sample for shard in shards for sample in _samples(shard)]
    if not samples:
        raise EmptyInput(
            f"there are no samples in {target}: the names of files must have a dot, such as 7.jpg and 7.cls."
        )
    places = [_image_of(sample, image) for sample in samples]
    is_labeled = label is not None or any(DEFAULT_LABEL in sample for sample in samples)
    labels = [_label(sample, label or DEFAULT_LABEL) for sample in samples] if is_labeled else None
    name = shards[0].stem if len(shards) == 1 else Path(target).stem
    return ShardImages(places, _keys(samples), labels, name)


def _samples(shard: Path) -> list[dict[str, Any]]:
    """Return the samples of a shard as the library groups them: the key, the shard, and a place by extension."""
    from webdataset.tariterators import group_by_keys

    if not shard.is_file():
        raise MissingData(f"there is no shard {shard}")
    try:
        with tarfile.open(shard, "r:") as tar:
            return list(group_by_keys(_files(tar, shard)))
    except (tarfile.TarError, ValueError, EOFError, OSError) as error:
        raise BadInput(
            f"cannot read {shard} as an uncompressed tar file ({error.args[0] if error.args else error})."
        ) from error


def _files(tar: tarfile.TarFile, shard: Path) -> Iterator[dict[str, Any]]:
    size = shard.stat().st_size
    for member in tar:
        if member.isreg() and not META.match(member.name):
            if member.offset_data + member.size > size:
                raise EOFError(f"{member.name} is truncated")
            yield {
                "fname": member.name,
                "data": Place(shard, member.offset_data, member.size),
                "__url__": str(shard),
            }
        tar.members = []  # type: ignore[attr-defined]  # of millions


def _image_of(sample: dict[str, Any], extension: str | None) -> Place:
    kinds = [kind for kind, place in sample.items() if isinstance(place, Place)]
    found = [
        kind for kind in kinds if (f".{kind}".endswith(IMAGE_SUFFIXES) if extension is None else kind == extension)
    ]
    if len(found) != 1:
        raise BadInput(
            f"the sample {sample['__key__']!r} of {sample['__url__']} must have one image, but has the files "
            f"{', '.join(kinds)}: write image=EXTENSION."
        )
    place: Place = sample[found[0]]
    return place


def _label(sample: dict[str, Any], extension: str) -> int:
    place = sample.get(extension)
    text = place.read()[: LONGEST_LABEL + 1] if isinstance(place, Place) else b""
    try:
        return int(text if len(text) <= LONGEST_LABEL else b"")
    except ValueError as error:
        raise BadInput(
            f"the label of the sample {sample['__key__']!r} of {sample['__url__']} is {text[:20]!r}: it must be an "
            f"integer in a file of at most {LONGEST_LABEL} bytes that ends in .{extension}."
        ) from error


def _keys(samples: Sequence[dict[str, Any]]) -> list[str]:
    keys = [str(sample["__key__"]) for sample in samples]
    if max(Counter(keys).values()) == 1:
        return keys
    return [f"{Path(sample['__url__']).name}/{key}" for sample, key in zip(samples, keys, strict=True)]
