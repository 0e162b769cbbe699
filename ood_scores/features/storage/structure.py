"""What an HDF5 file of this package may consist of, checked before any of its arrays is read.

The file may come from a stranger. It must not refer to other files of the machine, and must not declare arrays that it
does not contain, because those would be read as zeros, or take any amount of memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import h5py

from ood_scores.errors import DamagedCache
from ood_scores.features.storage.file_states import State, is_settled, state_of

STATISTICS = "/statistics"
"""The link to the statistics beside a cache. It serves other readers; this package does not follow it."""

MOST_OBJECTS = 10_000
LARGEST_CHUNK = 2**26
"""Bytes of a compressed chunk; those that this package writes have at most a tenth of that."""

_CHECKED: set[State] = set()
"""The states of files that were found in order."""


def check_structure(h5: h5py.File) -> None:
    """Check the links, the arrays, and the identity of a file, once for each state of it.

    Raises:
        DamagedCache: if it refers to other files than shards in its folder, or lacks values that it declares.
    """
    state = state_of(Path(h5.filename))
    file_bytes = os.path.getsize(h5.filename)
    if state in _CHECKED:
        return
    if not isinstance(h5.attrs.get("identity", ""), str):
        raise DamagedCache(f"{h5.filename} has a damaged identity: pass overwrite=True to extract again.")
    arrays = [each for each in objects(h5) if isinstance(each, h5py.Dataset)]
    for array in arrays:
        if not array.is_virtual and not _is_complete(array, file_bytes):
            raise DamagedCache(
                f"{h5.filename} does not contain the values of {array.name} that it declares: delete it, or pass "
                "overwrite=True to extract again."
            )
    shards = _shards(h5)
    for array in arrays:
        if array.is_virtual and not {each.file_name for each in array.virtual_sources()} <= shards:
            raise _refers_elsewhere(h5, array.name)
    if is_settled(state):
        _CHECKED.add(state)


def objects(h5: h5py.File) -> Iterator[h5py.Group | h5py.Dataset]:
    """Yield every object of a file.

    Raises:
        DamagedCache: if there is a link to another file, except to the statistics beside it, or too many objects.
    """
    waiting: list[h5py.Group] = [h5]
    seen = 0
    while waiting:
        group = waiting.pop()
        for name in group:
            seen += 1
            link = group.get(name, getlink=True)
            if (
                group == h5
                and name == "statistics"
                and isinstance(link, h5py.ExternalLink)
                and _is_plain(link.filename)
            ):
                continue  # for readers other than this package, which does not follow it
            if not isinstance(link, h5py.HardLink) or seen > MOST_OBJECTS:
                raise _refers_elsewhere(h5, f"{group.name}/{name}")
            found = group[name]
            if isinstance(found, h5py.Group):
                waiting.append(found)
            yield found


def _is_complete(array: h5py.Dataset, file_size: int) -> bool:
    """Return whether the file itself contains all values of an array."""
    declared = array.size * array.id.get_type().get_size()
    if array.external:
        return False
    if array.chunks is None:
        return declared <= file_size and array.id.get_storage_size() >= declared
    chunks = math.prod(-(-length // part) for length, part in zip(array.shape, array.chunks, strict=True))
    return (
        math.prod(array.chunks) * array.dtype.itemsize <= LARGEST_CHUNK
        and chunks <= file_size
        and array.id.get_num_chunks() == chunks
    )


def _shards(h5: h5py.File) -> set[str]:
    """Return the shards of a joined cache, as its virtual arrays name them."""
    if "shards" not in h5:
        return set()
    names = [str(name) for name in h5["shards/file"].asstr()[()]]
    if not all(_is_plain(name) and name != Path(h5.filename).name for name in names):
        raise _refers_elsewhere(h5, "/shards")
    return {name.replace("%", "%%") for name in names}


def _is_plain(name: str) -> bool:
    """Return whether a name is that of a file in the same folder."""
    return Path(name).name == name and "\\" not in name and name not in ("", ".", "..")


def _refers_elsewhere(h5: h5py.File, name: str) -> DamagedCache:
    return DamagedCache(
        f"{h5.filename} is damaged, or not safe to read: {name} refers to something that caches do not refer to, such "
        "as another file. Delete it, or pass overwrite=True to extract again."
    )
