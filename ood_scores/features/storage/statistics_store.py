"""Stored statistics: the statistics of a cache in a file beside it, so that the next fit need not read the cache.

A finished cache is never written again. Its statistics are in a separate HDF5 file, which the cache links to as
``statistics``. The file is replaced as a whole and can be deleted without loss. It is used only if it is sealed and
names the identity of the cache and this version of ood_scores, and an entry only if its SHA-256 is right. It also
records the size and time of the cache: if they are different now, the rows of the cache are checked first, and nothing
is used if they have no checksums. If the file cannot be written, no statistics are stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ood_scores.atomic import is_marked, replacing
from ood_scores.errors import CacheError, StaleCache
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.statistics.base import Statistic, Stored
from ood_scores.features.storage.checksums import verify_rows
from ood_scores.features.storage.columns import DiskColumn
from ood_scores.features.storage.layout import column_names, places, statistics_file
from ood_scores.features.storage.reading import open_to_read, shard_files
from ood_scores.features.storage.seal import check_seal, seal
from ood_scores.features.storage.structure import objects
from ood_scores.runtime import version_of

FORMAT = "ood_scores statistics"
VERSION = 1
LARGEST_SHARE = 1 / 4
"""A statistic is stored if it takes at most this share of the bytes of the columns of the cache."""

UNUSABLE = (CacheError, OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
"""The errors that h5py, the disk, and this package raise for damaged files."""

Arrays = Mapping[str, np.ndarray]


def recall(feats: FeatureSet, wanted: Iterable[Statistic]) -> None:
    """Add those of the wanted statistics that are stored beside the cache to the statistics of the set."""
    cache = cache_of(feats)
    asked = [each for each in wanted if isinstance(each, Stored) and each not in feats.statistics]
    if not cache or not asked or not _is_of_present_rows(*cache):
        return
    with suppress(*UNUSABLE), _opened(*cache) as h5:
        for statistic in asked:
            arrays = _read(h5, repr(statistic))
            if arrays:
                feats.statistics[statistic] = _result(statistic.stored_as, arrays)


def remember(feats: FeatureSet, found: Mapping[Statistic, Any]) -> None:
    """Add results to the statistics of the set, and store the small ones beside its cache."""
    feats.statistics.update(found)
    cache = cache_of(feats)
    if not cache:
        return
    summaries = {repr(each): _arrays(result) for each, result in found.items() if isinstance(each, Stored)}
    most = LARGEST_SHARE * sum(_bytes(column) for column in feats.columns.values())
    small = {name: arrays for name, arrays in summaries.items() if sum(map(_bytes, arrays.values())) <= most}
    if small:
        with suppress(OSError, CacheError):
            _write(*cache, (_read_all(*cache) if _is_of_present_rows(*cache) else {}) | small)


def names(cache: Path, identity: str) -> list[str]:
    """The names of the statistics that are stored beside a cache of the given identity."""
    with suppress(*UNUSABLE), _opened(cache, identity) as h5:
        return list(h5)
    return []


def cache_of(feats: FeatureSet) -> tuple[Path, str] | None:
    """The file and identity of the cache of a set; None unless the set is one whole cache whose rows are checked."""
    features = feats.columns["features"]
    if not feats.is_whole_file or not isinstance(features, DiskColumn) or features.identity is None:
        return None
    if features.verify is False:
        return None
    return Path(features.file), features.identity


@contextmanager
def _opened(cache: Path, identity: str) -> Iterator[h5py.File]:
    """Open the stored statistics of a cache. Raises CacheError or OSError if there are none."""
    place = statistics_file(cache)
    if not place.is_file() or not check_seal(place):
        raise StaleCache(f"{place} holds no statistics, or those of another program: delete it.")
    with open_to_read(place) as h5:
        if any(h5.attrs.get(name) != value for name, value in _attributes(identity).items()):
            raise StaleCache(f"{place} holds statistics of another cache or another version of ood_scores: delete it.")
        yield h5


def _is_of_present_rows(cache: Path, identity: str) -> bool:
    """Return whether the file describes the rows that the cache has now, which are checked if the cache was written.

    Raises:
        DamagedCache: if rows of the cache are not those that were written.
    """
    recorded = None
    with suppress(*UNUSABLE), _opened(cache, identity) as h5:
        recorded = h5.attrs["cache_state"]
    if recorded is None:
        return False
    with open_to_read(cache) as h5:
        if recorded == _state(h5):
            return True
        if not verify_rows([h5[name] for name in column_names(h5)]):
            return False
    with suppress(OSError, CacheError):
        _write(cache, identity, _read_all(cache, identity))
    return True


def _state(cache: h5py.File) -> str:
    """The size and the time of the last write of a cache and its shards, which copies may keep."""
    shards = shard_files(cache) if "shards" in cache else []
    return " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in map(os.stat, [cache.filename, *shards]))


def _attributes(identity: str) -> dict[str, Any]:
    version = version_of("ood_scores")
    return {"format": FORMAT, "version": VERSION, "ood_scores": version, "identity": identity}


def _write(cache: Path, identity: str, entries: Mapping[str, Arrays]) -> None:
    place = statistics_file(cache)
    if not _replaceable(place):
        return
    with open_to_read(cache) as h5:
        state = _state(h5)
    with replacing(place) as file:
        with h5py.File(file, "w") as h5:
            h5.attrs.update(_attributes(identity) | {"cache_state": state})
            for name, arrays in entries.items():
                group = h5.create_group(name)
                group.attrs["sha256"] = _sha256(arrays)
                for part, values in arrays.items():
                    group[part] = values
            holes = [hole for array in objects(h5) if isinstance(array, h5py.Dataset) for hole in places(array)]
        file.check()
        seal(file, holes)


def _replaceable(place: Path) -> bool:
    """Whether the file does not exist, or holds statistics in any state; any other file is not replaced."""
    if not place.exists():
        return True
    return is_marked(place, FORMAT) or (place.is_file() and place.stat().st_size == 0)


def _read_all(cache: Path, identity: str) -> dict[str, Arrays]:
    """The undamaged entries of the file."""
    entries: dict[str, Arrays] = {}
    with suppress(*UNUSABLE), _opened(cache, identity) as h5:
        entries |= {name: arrays for name in h5 if (arrays := _read(h5, name))}
    return entries


def _read(h5: h5py.File, name: str) -> Arrays | None:
    """The arrays of an entry, or None if it is damaged."""
    with suppress(*UNUSABLE):
        arrays = {part: values[()] for part, values in h5[name].items()}
        return arrays if h5[name].attrs["sha256"] == _sha256(arrays) else None
    return None


def _sha256(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(arrays.items()):
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _arrays(result: Any) -> Arrays:
    """The arrays of a result: its fields that are not None, or the tensor itself as ``value``."""
    parts = {"value": result} if isinstance(result, Tensor) else vars(result)
    return {name: part.cpu().numpy() for name, part in parts.items() if part is not None}


def _result(kind: type, arrays: Arrays) -> Any:
    """Rebuild a result from its arrays, in memory that torch allocates: its alignment affects the rounding of sums."""
    tensors = {name: torch.from_numpy(values).clone() for name, values in arrays.items()}
    if kind is Tensor:
        return tensors["value"]
    return kind(**{field.name: tensors.get(field.name) for field in fields(kind)})


def _bytes(values: Any) -> int:
    """The number of bytes of a column or an array."""
    return int(np.prod(values.shape, dtype=np.int64)) * values.dtype.itemsize
