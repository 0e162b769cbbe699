"""Seals: a digest of the structure of an HDF5 file, which is checked before HDF5 parses the file.

HDF5 can hang or crash if a byte of its own structures is changed. The seal is written after the last byte of HDF5,
which ignores it. It covers the whole file except for *holes*: arrays that are written later or have checksums of their
own. A program that changes the file through HDF5 cuts the seal off, and the file is then read like one without a seal.

The seal consists of the offset and size of each hole, the digest, the number of holes, and a mark.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from ood_scores.atomic import LockedFile
from ood_scores.errors import DamagedCache
from ood_scores.features.storage.file_states import State, is_settled, state_of

SUPERBLOCK = b"\x89HDF\r\n\x1a\n\0"
MARK = b"oodseal1"
FOOT = struct.Struct("<16sQ8s")
"""The digest, the number of holes, and the mark."""

HOLE = np.dtype(("<u8", 2))
MOST_HOLES = 2**22
PIECE_BYTES = 2**18

Range = tuple[int, int]
"""The offset and the size of a part of a file, in bytes."""

_CHECKED: set[State] = set()


def seal(file: LockedFile, holes: Iterable[Range] = ()) -> None:
    """Append a seal to a file that HDF5 has closed. Raises OSError if the disk refuses."""
    size = os.fstat(file.fileno()).st_size
    joined = list(_joined(holes))
    if len(joined) <= MOST_HOLES:
        foot = FOOT.pack(_digest(file, size, joined), len(joined), MARK)
        file.write_at(size, np.frombuffer(_packed(joined) + foot, np.uint8))


def check_seal(path: Path) -> bool:
    """Check the seal of a file, once for each state of it; return False if it has none.

    Raises:
        DamagedCache: if something other than the holes was changed after the file was sealed.
    """
    state = state_of(path)
    if state in _CHECKED:
        return True
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size - FOOT.size
        foot = b"".join(map(bytes, pieces(file, size, FOOT.size))) if size >= 0 else b""
        if not foot.endswith(MARK):
            if _hdf5_size(file) < size + FOOT.size:
                raise _damaged(path, "truncated or damaged (its last bytes are neither of HDF5 nor a seal)")
            return False
        digest, count, _ = FOOT.unpack(foot)
        start = size - count * HOLE.itemsize
        if count > MOST_HOLES or start < 0 or _digest(file, start, _holes(file, start, count)) != digest:
            raise _damaged(path, "damaged (its structure was changed after it was written)")
    if is_settled(state):
        _CHECKED.add(state)
    return True


def _damaged(path: Path, reason: str) -> DamagedCache:
    return DamagedCache(f"{path} is {reason}: delete it, or pass overwrite=True to extract again.")


def _hdf5_size(file: io.FileIO) -> float:
    """Return the size of a file according to the HDF5 superblock of the version that this package writes, else inf."""
    file.seek(0)
    start = file.read(48)
    return int.from_bytes(start[40:], "little") if start.startswith(SUPERBLOCK) else math.inf


def pieces(file: io.FileIO, offset: int, size: int) -> Iterator[memoryview]:
    """Yield the bytes of a part of a file in pieces, each valid until the next one; fewer if the file is too short."""
    buffer = memoryview(bytearray(min(size, PIECE_BYTES)))
    file.seek(offset)
    while size and (count := file.readinto(buffer[:size])):
        yield buffer[:count]
        size -= count


def _digest(file: io.FileIO, size: int, holes: list[Range]) -> bytes:
    """Return the digest of the first ``size`` bytes of a file outside of the holes, and of the holes' places."""
    digest = xxhash.xxh3_128(_packed(holes))
    done = 0
    for offset, length in [*holes, (size, 0)]:
        for piece in pieces(file, done, max(0, min(offset, size) - done)):
            digest.update(piece)
        done = min(max(done, offset + length), size)
    return digest.digest()


def _holes(file: io.FileIO, offset: int, count: int) -> list[Range]:
    packed = b"".join(map(bytes, pieces(file, offset, count * HOLE.itemsize)))
    return [(first, length) for first, length in np.frombuffer(packed, HOLE).tolist()]


def _packed(holes: list[Range]) -> bytes:
    return np.array(holes, "<u8").tobytes()


def _joined(holes: Iterable[Range]) -> Iterator[Range]:
    """Yield the holes in order, those without a gap as one."""
    start = stop = 0
    for offset, size in sorted(holes):
        if offset > stop:
            if stop > start:
                yield start, stop - start
            start = offset
        stop = max(stop, offset + size)
    if stop > start:
        yield start, stop - start
