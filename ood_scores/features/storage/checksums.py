"""Checksums of the rows of a cache: one for each block of rows of each column, checked when a block is first read.

``checksums/<column>`` holds the XXH3 (64 bits) of the bytes of each block, and its attribute ``rows`` the number of
rows of a block. Compressed columns have HDF5's own checksums instead, which HDF5 checks whenever it reads a chunk, and
a joined cache those of its shards.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import xxhash

from ood_scores.errors import DamagedCache
from ood_scores.features.storage.file_states import State, is_settled, state_of
from ood_scores.features.storage.reading import opened_shard, shard_files
from ood_scores.features.storage.seal import pieces

SUMS = "checksums"
"""The group of the checksums."""

BLOCK_BYTES = 2**19
SUM = np.dtype("<u8")

Verify = Literal["always", "once", False]
"""Whether checksums of rows are checked at each read, at the first read by a process, or never."""

_VERIFIED: dict[tuple[State, str], np.ndarray] = {}
"""Which blocks of a column of a file in some state were found to be right, bool."""


def rows_of_block(row_bytes: int) -> int:
    """The number of rows of a block of a column."""
    return max(1, BLOCK_BYTES // row_bytes)


def checksum(data: np.ndarray) -> np.ndarray:
    """The checksum of bytes, uint8 ``[B]``, as an array ``[1]``."""
    return np.array([xxhash.xxh3_64_intdigest(data.data)], SUM)


@dataclass(frozen=True)
class OpenBlock:
    """The checksum of the block of a column to which rows are appended.

    Attributes:
        size: the number of bytes of a full block.
        number: the number of the block in its column.
        filled: the number of bytes in the block.
        state: the checksum of these bytes.
    """

    size: int
    number: int = 0
    filled: int = 0
    state: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    @property
    def sum(self) -> np.ndarray:
        """The checksum of what is in the block, ``[1]``."""
        return np.array([self.state.intdigest()], SUM)

    def extended(self, data: np.ndarray) -> tuple[OpenBlock, np.ndarray]:
        """Append bytes, uint8 ``[B]``; return the new open block, and the checksums of the blocks that are now full."""
        left = self.size - self.filled
        if len(data) < left:
            return self._plus(data.data), np.empty(0, SUM)
        starts = range(left, len(data) - self.size + 1, self.size)
        full = [self._plus(data.data[:left]).state.intdigest()]
        full += [xxhash.xxh3_64_intdigest(data.data[start : start + self.size]) for start in starts]
        rest = data.data[left + len(starts) * self.size :]
        return OpenBlock(self.size, self.number + len(full))._plus(rest), np.array(full, SUM)

    def _plus(self, data: memoryview) -> OpenBlock:
        state = self.state.copy()
        state.update(data)
        return replace(self, filled=self.filled + len(data), state=state)


@contextmanager
def checked(column: h5py.Dataset, verify: Verify) -> Iterator[Callable[[int, int], None]]:
    """Open the files of a column within a context, which returns a function ``(start, stop)`` that checks these rows.

    The function raises DamagedCache unless the rows are those that were written. It skips rows without checksums.
    """
    with ExitStack() as stack:
        parts = [] if verify is False else [stack.enter_context(closing(part)) for part in _parts(column) if part]

        def check(start: int, stop: int) -> None:
            for part in parts:
                part.require(start, stop, verify)

        yield check


def verify_rows(columns: Iterable[h5py.Dataset]) -> bool:
    """Check all rows of columns; return False if some of them have no checksums.

    Raises:
        DamagedCache: if a row is not the one that was written.
    """
    covered = [_verify(column) for column in columns]
    return all(covered)


def _verify(column: h5py.Dataset) -> bool:
    if column.fletcher32:
        rows = column.chunks[0]
        for start in range(0, len(column), rows):
            column[start : start + rows]
        return True
    with ExitStack() as stack:
        parts = _parts(column)
        for part in parts:
            if part:
                stack.enter_context(closing(part)).require(0, len(column), "once")
        return None not in parts


def _parts(column: h5py.Dataset) -> list[_Part | None]:
    """Return the checks of a column, or of its parts in shards, in order; None for one without checksums."""
    if not column.is_virtual:
        return [_Part.of(column)]
    parts: list[_Part | None] = []
    first = 0
    for shard in shard_files(column.file):
        with opened_shard(shard) as h5:
            parts.append(_Part.of(h5[column.name], first))
            first += len(h5[column.name])
    return parts


@dataclass
class _Part:
    """Rows of a column that are contiguous in a file, and their checksums.

    Attributes:
        file: the file.
        column: the name of the column.
        first: the number of the first row in the column.
        rows: the number of rows.
        offset: the place of the first row in the file.
        row_bytes: the size of a row.
        block: the number of rows of a block.
        sums: the checksums of the blocks.
        verified: which blocks are known to be right.
    """

    file: io.FileIO
    column: str
    first: int
    rows: int
    offset: int
    row_bytes: int
    block: int
    sums: np.ndarray
    verified: np.ndarray

    @classmethod
    def of(cls, column: h5py.Dataset, first: int = 0) -> _Part | None:
        """Open the file of a column, or return None if the column has no checksums."""
        h5, rows = column.file, len(column)
        table = h5.get(f"{SUMS}{column.name}")
        if table is None or column.chunks:
            return None
        block, offset = int(table.attrs["rows"]), column.id.get_offset()
        if block < 1 or table.shape != (-(-rows // block),) or table.dtype != SUM or offset is None:
            raise ValueError(f"the checksums of {column.name} are not those of its rows")
        verified = _verified_blocks(Path(h5.filename), column.name, len(table))
        width = column.nbytes // rows
        return cls(io.FileIO(h5.filename), column.name[1:], first, rows, offset, width, block, table[()], verified)

    def close(self) -> None:
        self.file.close()

    def require(self, start: int, stop: int, verify: Verify) -> None:
        """Check the blocks that contain rows ``start .. stop`` of the column."""
        start, stop = max(start - self.first, 0), min(stop - self.first, self.rows)
        blocks = np.arange(start // self.block, -(-stop // self.block))
        if verify == "once":
            blocks = blocks[~self.verified[blocks]]
        for block in blocks.tolist():
            if self._sum(block) != self.sums[block]:
                raise self._changed(block)
        self.verified[blocks] = True

    def _rows(self, block: int) -> tuple[int, int]:
        return block * self.block, min((block + 1) * self.block, self.rows)

    def _sum(self, block: int) -> int:
        start, stop = self._rows(block)
        found = xxhash.xxh3_64()
        for piece in pieces(self.file, self.offset + start * self.row_bytes, (stop - start) * self.row_bytes):
            found.update(piece)
        return found.intdigest()

    def _changed(self, block: int) -> DamagedCache:
        start, stop = self._rows(block)
        return DamagedCache(
            f"{self.file.name} is damaged: its {self.column} changed after they were written, in rows {start:,} to "
            f"{stop - 1:,}. Pass overwrite=True to extract again; if you changed them yourself, load the file with "
            "ood_scores.load(path, verify=False) and save the set to another file."
        )


def _verified_blocks(path: Path, column: str, count: int) -> np.ndarray:
    """Return which blocks of a column are known to be right, as an array to be updated."""
    state = state_of(path)
    none = np.zeros(count, bool)
    return _VERIFIED.setdefault((state, column), none) if is_settled(state) else none
