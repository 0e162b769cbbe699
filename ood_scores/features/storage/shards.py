"""Shards: the files that several processes write, each with its own rows, and the cache that joins them.

The joined cache holds no rows: its columns are HDF5 virtual datasets over those of the shards, which stay in the same
folder and must be moved with it. Every shard is itself a cache.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from ood_scores.atomic import replacing
from ood_scores.errors import DamagedCache, ForeignFile, ShapeMismatch, StaleCache
from ood_scores.features.provenance import Provenance
from ood_scores.features.storage import cache as caches
from ood_scores.features.storage.layout import Shapes, column_names, identifying, stored_row, write_header
from ood_scores.features.storage.reading import open_to_read
from ood_scores.features.storage.seal import seal
from ood_scores.features.storage.texts import IDS, row_type


def shard_path(cache: Path, rank: int, count: int) -> Path:
    """The file of the shard that one of ``count`` processes writes."""
    return cache.with_name(f"{cache.name}.shard-{rank}-of-{count}.h5")


def require_no_others(cache: Path, count: int = 1) -> None:
    """Raise StaleCache if the folder has shards of the cache by another number of processes than ``count``."""
    others = {of for of in _shards_beside(cache).values() if of != count}
    if others:
        raise StaleCache(
            f"an extraction to {cache} by {min(others)} processes has not finished: continue it with torchrun "
            f"--nproc-per-node {min(others)}, or pass overwrite=True to extract again."
        )


def remove(cache: Path, keep: int = 0) -> None:
    """Remove the shards of a cache that is replaced, except those of ``keep`` processes."""
    for shard, count in _shards_beside(cache).items():
        if count != keep:
            caches.check_replaceable(shard)
            shard.unlink()


def join(cache: Path, shards: Mapping[Path, Provenance]) -> None:
    """Write the cache that reads the shards as one file.

    Args:
        cache: The path of the cache, in the folder of the shards.
        shards: The finished shards in the order of their rows, and the expected provenance of each.

    Raises:
        StaleCache: if a shard has another provenance.
        UnfinishedCache: if a shard is not finished.
        ShapeMismatch: if the shards have different columns.
        DamagedCache: if a shard is missing or damaged.
        CacheWriteFailed: if the disk refuses a write.
    """
    with ExitStack() as stack:
        parts = [stack.enter_context(_opened(shard, wanted)) for shard, wanted in shards.items()]
        columns = _columns_of_all(parts)
        counts = [caches.state(part).rows for part in parts]
        found = [caches.state(part).provenance for part in parts]
        skipped = tuple(row for each in found if each for row in each.skipped)
        made_by = replace(found[0], shard=None, skipped=skipped)  # type: ignore[type-var]
        attributes = {"compressed": False, "growing": False} | identifying(made_by)
        with replacing(cache, caches.how_to_resume(0)) as file:
            with h5py.File(file, "w", alignment_threshold=1, alignment_interval=8) as h5:
                write_header(h5, cache, caches.read_head(parts[0]), attributes)
                h5["shards/file"] = [shard.name for shard in shards]
                h5["shards/identity"] = [part.attrs["identity"] for part in parts]
                h5["progress"][:] = sum(counts), 1
                if "extras" in parts[0]:
                    h5.create_group("extras", track_order=True)
                for name, (width, dtype) in columns.items():
                    h5.create_virtual_dataset(name, _one_after_the_other(name, width, dtype, list(shards), counts))
            file.check()
            seal(file)


def _shards_beside(cache: Path) -> dict[Path, int]:
    """The shards of the cache in its folder, and the number of processes of each."""
    of = re.compile(re.escape(cache.name) + r"\.shard-\d+-of-(\d+)\.h5")
    files = sorted(cache.parent.glob(f"{glob.escape(cache.name)}.shard-*.h5"))
    return {file: int(found[1]) for file in files if (found := of.fullmatch(file.name))}


@contextmanager
def _opened(shard: Path, wanted: Provenance) -> Iterator[h5py.File]:
    """Open a finished shard whose provenance is ``wanted``."""
    if not shard.exists():
        raise DamagedCache(f"the shard {shard} is missing: all processes must write to one shared folder.")
    with open_to_read(shard) as h5:
        caches.require_finished(h5)
        made_by = caches.state(h5).provenance
        if made_by is None:
            raise ForeignFile(f"{shard} has no provenance: pass overwrite=True to extract again.")
        made_by.require_same(wanted, str(shard))
        yield h5


def _columns_of_all(parts: Sequence[h5py.File]) -> Shapes:
    found = [{name: row_type(part[name]) for name in column_names(part)} for part in parts]
    ids = [columns.pop(IDS) for columns in found if IDS in columns]
    if len(ids) == len(found):  # earlier versions wrote shards without ids
        widest = max(ids, key=lambda row: row[0])  # each shard is as wide as its longest id
        found = [columns | {IDS: widest} for columns in found]
    first, *others = found
    for part, columns in zip(parts[1:], others, strict=True):
        if columns != first:
            raise ShapeMismatch(
                f"{part.filename} has the columns {columns}, but {parts[0].filename} has {first}: extract both again."
            )
    return first


def _one_after_the_other(
    name: str, width: tuple[int, ...], dtype: np.dtype, shards: Sequence[Path], counts: Sequence[int]
) -> h5py.VirtualLayout:
    width, dtype = stored_row(name, width, dtype)
    layout = h5py.VirtualLayout((sum(counts), *width), dtype)
    start = 0
    for shard, count in zip(shards, counts, strict=True):
        if count:
            literal = shard.name.replace("%", "%%")  # HDF5 reads the name as a pattern
            layout[start : start + count] = h5py.VirtualSource(literal, name, (count, *width))
        start += count
    return layout
