"""The HDF5 cache: a run that is killed at any instant, or stopped by a full disk, leaves a file that can be resumed.

HDF5 lays out the file under a temporary name, with every HDF5 dataset contiguous and at its full length, and closes it;
the file is then renamed in one step. After that HDF5 writes nothing: rows are written as plain bytes at the offset of
their HDF5 dataset, and then the row counter, eight aligned bytes. (If HDF5 wrote the rows, those that the disk refuses
when an HDF5 dataset is closed would be lost without an error, and the process would crash later.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from torch import Tensor

from ood_scores.atomic import (
    LockedFile,
    closed_on_error,
    copy_bytes,
    disk_errors,
    is_marked,
    remove_abandoned,
    replacing,
    require_unlocked,
)
from ood_scores.errors import (
    BadInput,
    CacheBusy,
    DamagedCache,
    ForeignFile,
    ShapeMismatch,
    UnfinishedCache,
)
from ood_scores.features.head import Head
from ood_scores.features.provenance import Provenance
from ood_scores.features.storage.checksums import SUM, OpenBlock, checksum
from ood_scores.features.storage.layout import (
    VERSION,
    Place,
    Shapes,
    column_names,
    identifying,
    lay_out,
    read_attributes,
    seal_layout,
)
from ood_scores.features.storage.reading import FORMAT, open_to_read
from ood_scores.features.storage.seal import pieces
from ood_scores.features.storage.texts import IDS, as_stored, padded

HASHED_ASIDE = 2**20
"""Bytes from which a run of rows is hashed while it is written; to start a thread costs more than to hash fewer."""

UNFINISHED, FINISHED, HAS_GAPS = 0, 1, -1
"""The second number of ``progress``; the last is that of an unfinished file, some of whose rows are gaps."""


def check_is_cache(h5: h5py.File) -> None:
    """Check that an HDF5 file is a cache.

    Raises:
        ForeignFile: if this package did not write the file, or a newer version wrote it.
        DamagedCache: if parts of the cache are missing.
    """
    if h5.attrs.get("format") != FORMAT:
        raise ForeignFile(f"{h5.filename} is an HDF5 file but not a feature cache: choose a file that extract() wrote.")
    if int(h5.attrs["version"]) > VERSION:
        raise ForeignFile(
            f"{h5.filename} has cache format {int(h5.attrs['version'])}, and this version of ood_scores reads up to "
            f"{VERSION}: update ood_scores."
        )
    if "progress" not in h5 or "features" not in h5:
        raise DamagedCache(
            f"{h5.filename} lacks its features or their row count: pass overwrite=True to extract again."
        )


@dataclass(frozen=True)
class CacheState:
    """The row count, completeness, and provenance that a cache file records.

    ``has_gaps`` tells whether some rows of an unfinished file are gaps; see ``ood_scores.features.storage.gaps``.
    """

    rows: int
    finished: bool
    provenance: Provenance | None
    has_gaps: bool = False


def state(h5: h5py.File) -> CacheState:
    """Read the state of a cache."""
    check_is_cache(h5)
    rows, finished = h5["progress"][()].tolist()
    capacity = h5["features"].shape[0]
    known = finished in (UNFINISHED, FINISHED, HAS_GAPS)
    if not known or not 0 <= rows <= capacity or (finished == FINISHED and rows < capacity):
        raise DamagedCache(
            f"{h5.filename} is damaged: it counts {rows:,} of {capacity:,} rows. Delete it, or pass overwrite=True to "
            "extract again."
        )
    return CacheState(rows, finished == FINISHED, _provenance(h5), finished == HAS_GAPS)


def _provenance(h5: h5py.File) -> Provenance | None:
    return Provenance.from_attributes(read_attributes(h5))


def require_finished(h5: h5py.File) -> None:
    """Raise UnfinishedCache unless the extraction that writes the cache has finished."""
    found = state(h5)
    if not found.finished:
        raise UnfinishedCache(
            f"{h5.filename} holds {found.rows:,} rows of an unfinished extraction: run the same extract(...) again to "
            "continue it."
        )


def read_head(h5: h5py.File) -> Head | None:
    if "head" not in h5:
        return None
    negatives = {kind: words[()] for kind, words in h5.get("head/negatives", {}).items()}
    return Head(h5["head/weight"][()], h5["head/bias"][()], negatives)


def check_replaceable(path: Path) -> None:
    """Check that a file may be replaced by a cache.

    Raises:
        ForeignFile: if the file exists and this version of the package did not write it.
        CacheBusy: if another process is writing it.
    """
    if not path.exists():
        return
    try:
        with open_to_read(path) as h5:
            require_unlocked(path)  # HDF5 itself does not check this if HDF5_USE_FILE_LOCKING is FALSE
            if h5.attrs.get("format") == FORMAT and int(h5.attrs["version"]) <= VERSION:
                return
    except DamagedCache:
        if is_marked(path, FORMAT):
            return
    except ForeignFile:
        pass
    raise ForeignFile(
        f"{path} is not a feature cache of this version of ood_scores and is not replaced: choose another path, or "
        "delete the file."
    )


def how_to_resume(rows: int) -> str:
    """The remedy for a refused write to a cache that holds ``rows`` rows."""
    return f"{rows:,} rows are safe: make room on the disk and run the same call again to continue"


class CacheWriter:
    """A writer that appends rows to a cache file. Use it as a context manager.

    A file that is closed without ``finish`` can be resumed. The writer holds an exclusive lock of the file until it is
    closed, so two writers cannot share a file.
    """

    path: Path
    rows: int
    has_gaps: bool
    has_ids: bool
    _file: LockedFile
    _blocks: dict[str, OpenBlock]

    def __init__(self, file: LockedFile, path: Path) -> None:
        self.path = path
        self._use(file)

    @classmethod
    def create(
        cls,
        path: Path,
        columns: Shapes,
        rows: int | None,
        head: Head | None,
        provenance: Provenance | None,
        replace: bool = False,
    ) -> CacheWriter:
        """Create a file for ``rows`` rows, or for any number of rows if ``rows`` is None.

        Raises:
            CacheBusy: if ``replace`` is False and another process has just created the file.
        """
        with replacing(path, how_to_resume(0), exclusive=not replace, keep_open=True) as file:
            lay_out(file, path, columns, rows, head, identifying(provenance))
            writer = cls(file, path)
            if replace:
                check_replaceable(path)  # another process may have begun to write it since the last check
        return writer

    @classmethod
    def resume(cls, path: Path, expected: CacheState) -> CacheWriter:
        """Open the unfinished file at ``path`` to continue after its last counted row.

        Raises:
            CacheBusy: if another process is writing it, or has written it since it was in the ``expected`` state.
        """
        remove_abandoned(path)
        with disk_errors(path, how_to_resume(expected.rows)), closed_on_error(path, "r+") as file:
            with h5py.File(file, "r") as h5:
                found = state(h5)
            if found != expected or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise CacheBusy(f"another process has just written {path}: run the same call again.")
            return cls(file, path)

    def append(self, rows: Mapping[str, Tensor], gaps: Sequence[int] = ()) -> None:
        """Write a run of rows of every column, then count them.

        ``gaps`` are the rows of this run that cannot be read; see ``ood_scores.features.storage.gaps``.
        """
        rows = self._with_room_for_ids(rows)
        arrays = self._arrays(rows)
        if gaps:
            arrays["features"] = arrays["features"].copy()
            arrays["features"][gaps] = np.nan
        stop = self.rows + len(arrays["features"])
        if stop > self._capacity:
            if not self._growing:
                raise BadInput(f"{self.path} was created for {self._capacity:,} rows, got {stop:,}.")
            self._move_to(max(stop, 2 * self._capacity))
        blocks = dict(self._blocks)
        with disk_errors(self.path, how_to_resume(self.rows)), ThreadPoolExecutor(1) as aside:
            for name, array in arrays.items():
                extended = self._extended(name, array, aside) if name in blocks else None
                self._file.write_at(self._places[name].of_row(self.rows), array)
                if extended:
                    blocks[name], sums = extended()
                    self._file.write_at(self._places[name].of_sum(self._blocks[name].number), sums)
            if gaps:
                self.has_gaps = True
                self._file.write_at(self._counter + 8, np.array([HAS_GAPS]))
            self._file.write_at(self._counter, np.array([stop]))
        self.rows, self._blocks = stop, blocks

    def _extended(self, name: str, array: np.ndarray, aside: Executor) -> Callable[[], tuple[OpenBlock, np.ndarray]]:
        """Return a function that returns the column's open block, extended by rows, and the checksums of full blocks.

        Much is hashed in a thread, which begins now, while the rows are written.
        """
        extended = partial(self._blocks[name].extended, array.reshape(-1).view(np.uint8))
        return aside.submit(extended).result if array.nbytes >= HASHED_ASIDE else extended

    def finish(self) -> None:
        """Mark the file as finished; a file of unknown length is first shortened to the rows that it holds."""
        if self.rows < self._capacity:
            if not self._growing:
                raise BadInput(f"{self.path} was created for {self._capacity:,} rows, got {self.rows:,}.")
            self._move_to(self.rows)
        with disk_errors(self.path, how_to_resume(self.rows)):
            for name, block in self._blocks.items():
                if block.filled:
                    self._file.write_at(self._places[name].of_sum(block.number), block.sum)
            os.fsync(self._file.fileno())
            self._file.write_at(self._counter, np.array([self.rows, 1]))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _use(self, file: LockedFile) -> None:
        with h5py.File(file, "r") as h5:
            self._places = {name: Place.of(h5[name]) for name in column_names(h5)}
            self._counter = h5["progress"].id.get_offset()
            self._capacity = h5["features"].shape[0]
            self.has_ids = IDS in self._places
            self._growing = bool(h5.attrs["growing"])
            self.rows, finished = h5["progress"][()].tolist()
            self.has_gaps = finished == HAS_GAPS
        self._file = file
        self._blocks = {name: place.open_block(file, self.rows) for name, place in self._places.items() if place.sums}

    def _arrays(self, rows: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The rows as arrays of the dtypes in the file."""
        if rows.keys() != self._places.keys():
            raise BadInput(f"{self.path} has the columns {', '.join(self._places)}, got rows of {', '.join(rows)}.")
        arrays = {}
        for name, values in rows.items():
            place = self._places[name]
            arrays[name] = np.ascontiguousarray(values.numpy(), dtype=place.dtype)
            if values.shape != (len(rows["features"]), *place.width):
                raise ShapeMismatch(
                    f"rows of {name} have shape {place.width} in {self.path}, got {tuple(values.shape[1:])}."
                )
        return arrays

    def _with_room_for_ids(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return rows whose ids are as wide as those of the file, which is widened if they are longer."""
        if IDS not in rows or IDS not in self._places:
            return rows
        longest, width = rows[IDS].shape[1], self._places[IDS].row_bytes
        if longest > width:
            self._move_to(self._capacity, longest + longest // 2)
        return {**rows, IDS: padded(rows[IDS], self._places[IDS].row_bytes)}

    def _move_to(self, capacity: int, id_bytes: int | None = None) -> None:
        """Continue in a copy with room for ``capacity`` rows or longer ids, which replaces the file in one step."""
        old = self._file
        with replacing(self.path, how_to_resume(self.rows), keep_open=True) as file:
            with h5py.File(old, "r") as h5:
                shapes = {name: (place.width, place.dtype) for name, place in self._places.items()}
                if id_bytes is not None:
                    shapes[IDS] = (id_bytes,), np.dtype(np.uint8)
                growing = {"growing": self._growing}
                lay_out(file, self.path, shapes, capacity, read_head(h5), read_attributes(h5) | growing)
            new = CacheWriter(file, self.path)
            for name, place in self._places.items():
                if place.row_bytes != new._places[name].row_bytes:
                    new._write_widened(name, old, place, self.rows)
                    continue
                copy_bytes(old, place.offset, file, new._places[name].offset, self.rows * place.row_bytes)
                if name in self._blocks:
                    sums = place.of_sum(0), new._places[name].of_sum(0)
                    copy_bytes(old, sums[0], file, sums[1], self._blocks[name].number * SUM.itemsize)
            state = [self.rows, HAS_GAPS if self.has_gaps else UNFINISHED]
            file.write_at(new._counter, np.array(state))
        self._use(file)
        old.close()

    def _write_widened(self, name: str, old: LockedFile, narrow: Place, rows: int) -> None:
        """Copy rows from another file to a wider column of this one, and their checksums."""
        place = self._places[name]
        for start in range(0, rows, place.block):
            count = min(place.block, rows - start)
            parts = b"".join(map(bytes, pieces(old, narrow.of_row(start), count * narrow.row_bytes)))
            array = np.zeros((count, place.row_bytes), np.uint8)
            array[:, : narrow.row_bytes] = np.frombuffer(parts, np.uint8).reshape(count, -1)
            self._file.write_at(place.of_row(start), array)
            self._file.write_at(place.of_sum(start // place.block), checksum(array.reshape(-1)))


def write(
    path: Path,
    columns: Shapes,
    rows: int,
    head: Head | None,
    provenance: Provenance | None,
    runs: Iterable[Mapping[str, Tensor]],
    compress: bool = False,
) -> None:
    """Write a whole cache file, which replaces ``path`` once it is complete."""
    check_replaceable(path)
    with replacing(path, how_to_resume(0)) as file:
        lay_out(file, path, columns, rows, head, identifying(provenance), compress)
        if compress:
            _write_compressed(file, runs)
            seal_layout(file)
        else:
            writer = CacheWriter(file, path)
            for run in runs:
                writer.append(run)
            writer.finish()


def _write_compressed(file: LockedFile, runs: Iterable[Mapping[str, Tensor]]) -> None:
    done = 0
    with h5py.File(file, "r+") as h5:
        for run in runs:
            stop = done + len(run["features"])
            for name, values in run.items():
                h5[name][done:stop] = as_stored(values.numpy(), h5[name])
            file.check()
            done = stop
        h5["progress"][:] = done, 1
