"""Kept statistics: what fits found out about a cache, in a file beside it, so that the next fit need not read it again.

The cache itself is never written to once it is finished. Its statistics stand in an HDF5 file of their own, which the
cache links to as ``statistics``, and which is replaced as a whole and thrown away without loss: it counts only if it
names the cache's identity and this version of ood_scores, each entry only if its SHA-256 is right. Where it cannot be
written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
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
from ood_scores.features.storage.cache import statistics_file
from ood_scores.features.storage.columns import DiskColumn
from ood_scores.features.storage.reading import open_to_read

FORMAT = "ood_scores statistics"
VERSION = 1
LARGEST_SHARE = 1 / 4
"""A statistic is kept if it takes at most this share of the bytes of the cache's columns."""

UNUSABLE = (CacheError, OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)
"""What h5py raises on damaged files, and what the disk and this package do."""

Arrays = Mapping[str, np.ndarray]


def recall(feats: FeatureSet, wanted: Iterable[Statistic]) -> None:
    """Adds to the set's statistics those of the wanted that are kept beside its cache."""
    cache = cache_of(feats)
    asked = [each for each in wanted if isinstance(each, Stored) and each not in feats.statistics]
    if not cache or not asked:
        return
    with suppress(*UNUSABLE), _opened(*cache) as h5:
        for statistic in asked:
            arrays = _read(h5, repr(statistic))
            if arrays:
                feats.statistics[statistic] = _result(statistic.stored_as, arrays)


def remember(feats: FeatureSet, found: Mapping[Statistic, Any]) -> None:
    """Adds what was found to the set's statistics, and keeps what is worth it beside the set's cache."""
    feats.statistics.update(found)
    cache = cache_of(feats)
    if not cache:
        return
    summaries = {repr(each): _arrays(result) for each, result in found.items() if isinstance(each, Stored)}
    most = LARGEST_SHARE * sum(_bytes(column) for column in feats.columns.values())
    small = {name: arrays for name, arrays in summaries.items() if sum(map(_bytes, arrays.values())) <= most}
    if small:
        with suppress(OSError, CacheError):
            _write(*cache, _read_all(*cache) | small)


def names(cache: Path, identity: str) -> list[str]:
    """The names of the statistics that are kept beside the cache of that identity."""
    with suppress(*UNUSABLE), _opened(cache, identity) as h5:
        return list(h5)
    return []


def cache_of(feats: FeatureSet) -> tuple[Path, str] | None:
    """File and identity of the cache that the set is; None where it is anything else than one whole cache."""
    features = feats.columns["features"]
    if not feats.is_whole_file or not isinstance(features, DiskColumn) or features.identity is None:
        return None
    return Path(features.file), features.identity


@contextmanager
def _opened(cache: Path, identity: str) -> Iterator[h5py.File]:
    """The statistics of this very cache. Raises CacheError or OSError where there are none."""
    place = statistics_file(cache)
    with open_to_read(place) as h5:
        if any(h5.attrs.get(name) != value for name, value in _attributes(identity).items()):
            raise StaleCache(f"{place} holds statistics of another cache, or of another version of ood_scores.")
        yield h5


def _attributes(identity: str) -> dict[str, Any]:
    version = importlib.metadata.version("ood_scores")
    return {"format": FORMAT, "version": VERSION, "ood_scores": version, "identity": identity}


def _write(cache: Path, identity: str, entries: Mapping[str, Arrays]) -> None:
    place = statistics_file(cache)
    if not _replaceable(place):
        return
    with replacing(place) as file, h5py.File(file, "w") as h5:
        h5.attrs.update(_attributes(identity))
        for name, arrays in entries.items():
            group = h5.create_group(name)
            group.attrs["sha256"] = _sha256(arrays)
            for part, values in arrays.items():
                group[part] = values


def _replaceable(place: Path) -> bool:
    """Whether there is nothing, or statistics in whatever state: what else stands there is someone's, and is left."""
    if not place.exists():
        return True
    return is_marked(place, FORMAT) or (place.is_file() and place.stat().st_size == 0)


def _read_all(cache: Path, identity: str) -> dict[str, Arrays]:
    """The entries that are kept already and undamaged."""
    entries: dict[str, Arrays] = {}
    with suppress(*UNUSABLE), _opened(cache, identity) as h5:
        entries |= {name: arrays for name in h5 if (arrays := _read(h5, name))}
    return entries


def _read(h5: h5py.File, name: str) -> Arrays | None:
    """The arrays of an entry, or None if they are not what was written."""
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
    """The arrays of a result: its fields but those that are None, or itself as ``value``."""
    parts = {"value": result} if isinstance(result, Tensor) else vars(result)
    return {name: part.cpu().numpy() for name, part in parts.items() if part is not None}


def _result(kind: type, arrays: Arrays) -> Any:
    """The result that ``_arrays`` took apart, in memory aligned as torch aligns its own: sums may be rounded by it."""
    tensors = {name: torch.from_numpy(values).clone() for name, values in arrays.items()}
    if kind is Tensor:
        return tensors["value"]
    return kind(**{field.name: tensors.get(field.name) for field in fields(kind)})


def _bytes(values: Any) -> int:
    """Of a column or an array."""
    return int(np.prod(values.shape, dtype=np.int64)) * values.dtype.itemsize
