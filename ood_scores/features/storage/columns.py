"""Columns: the arrays of a feature set, in memory or on disk, read in runs of rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, CacheError
from ood_scores.features.storage.texts import IDS, as_bytes, packed, row_type

if TYPE_CHECKING:
    import h5py

    from ood_scores.features.storage.checksums import Verify


@dataclass(frozen=True)
class DiskColumn:
    """Rows ``start .. stop`` of one HDF5 dataset; the file is open only while rows are read.

    ``identity`` is the identity of the file when the column was created (None for a file without one), so that rows
    of a file that was replaced since are never returned. ``verify`` tells when checksums of rows are checked.
    """

    file: str
    name: str
    start: int
    stop: int
    width: tuple[int, ...]
    dtype: torch.dtype
    identity: str | None
    verify: Verify = "once"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.width)

    def slice(self, start: int, stop: int) -> DiskColumn:
        return replace(self, start=self.start + start, stop=self.start + stop)

    @contextmanager
    def reader(self, copied: bool = False) -> Iterator[Callable[[int, int], Tensor]]:
        """Open the file within a context, which returns a function ``(start, stop) -> rows``.

        Unless ``copied``, the rows may be the mapped file itself (see ``MappedRows``) and are valid only within the
        context.
        """
        from ood_scores.features.storage.checksums import checked
        from ood_scores.features.storage.mmap import mapped_rows
        from ood_scores.features.storage.reading import damage_named, opened

        with opened(self.file, sealed=self.verify is not False) as h5, ExitStack() as stack:
            if h5.attrs.get("identity") != self.identity:
                raise CacheError(f"{self.file} was replaced after it was loaded: load it again.")
            with damage_named(self.file):
                dataset = h5[self.name]
                check = stack.enter_context(checked(dataset, self.verify))
                mapped = None if copied else mapped_rows(dataset)

            def read(start: int, stop: int) -> Tensor:
                with damage_named(self.file):
                    rows = slice(self.start + start, self.start + stop)
                    check(rows.start, rows.stop)
                    values = mapped.read(rows.start, rows.stop) if mapped else dataset[rows]
                    return torch.from_numpy(_native(as_bytes(values)))

            yield read


@dataclass(frozen=True)
class CombinedColumn:
    """Rows that are computed, whenever read, from the same rows of other columns, on the device of the first."""

    parts: tuple[Column, ...]
    combine: Callable[[Sequence[Tensor]], Tensor]

    @cached_property
    def _like(self) -> Tensor:
        return self.combine([torch.zeros((1, *part.shape[1:]), dtype=part.dtype) for part in self.parts])

    def combined(self, rows: Sequence[Tensor]) -> Tensor:
        """Compute the values from the same rows of all parts."""
        return self.combine([values.to(rows[0].device) for values in rows])

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.parts[0].shape[0], *self._like.shape[1:])

    def slice(self, start: int, stop: int) -> CombinedColumn:
        return CombinedColumn(tuple(take(part, start, stop) for part in self.parts), self.combine)

    @contextmanager
    def reader(self) -> Iterator[Callable[[int, int], Tensor]]:
        with ExitStack() as stack:
            readers = [stack.enter_context(reader(part)) for part in self.parts]
            yield lambda start, stop: self.combined([read(start, stop) for read in readers])


Column: TypeAlias = "Tensor | DiskColumn | CombinedColumn"


def reader(column: Column) -> AbstractContextManager[Callable[[int, int], Tensor]]:
    """Open any column within a context, which returns a function ``(start, stop) -> rows``."""
    if isinstance(column, Tensor):
        return nullcontext(lambda start, stop: column[start:stop])
    return column.reader()


def as_column(name: str, values: Any) -> Column:
    """Create a column from a torch tensor, NumPy array (shared, not copied), list, or open h5py dataset (lazy)."""
    if isinstance(values, (DiskColumn, CombinedColumn)):
        return values
    if isinstance(values, Tensor):
        return values.detach()
    try:
        if type(values).__module__.startswith("h5py"):
            return disk_column(values)
        return torch.from_numpy(_native(np.ascontiguousarray(values)))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{name} must be a torch tensor, a NumPy array, or an open h5py dataset: {error}") from error


def as_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return columns by name as arguments of a FeatureSet or a Block."""
    extras = {name.removeprefix("extras/"): columns[name] for name in columns if name.startswith("extras/")}
    return {name: columns.get(name) for name in ("features", "logits", "labels", IDS)} | {"extras": extras}


def id_column(ids: Any) -> Column:
    """Create the column of the ids of rows from strings or integers ``[N]``; one that is already a column is unchanged.

    Raises:
        BadInput: if an id is not valid text.
    """
    if isinstance(ids, DiskColumn) or (isinstance(ids, Tensor) and ids.ndim == 2 and ids.dtype == torch.uint8):
        return ids
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise BadInput(f"ids must be a list of names, one for each row, got {type(ids).__name__}.")
    return packed(ids.tolist() if isinstance(ids, (Tensor, np.ndarray)) else ids)


def read_all(column: Column) -> Tensor:
    """Read a whole column into memory."""
    with column.reader(copied=True) if isinstance(column, DiskColumn) else reader(column) as read:
        return read(0, column.shape[0])


def take(column: Column, start: int, stop: int) -> Column:
    """Select rows ``start .. stop``; a column on disk stays there."""
    return column[start:stop] if isinstance(column, Tensor) else column.slice(start, stop)


def gather(column: Column, rows: Tensor) -> Tensor:
    """Read the given rows in the given order into memory; a column on disk is read once, in runs of rows."""
    if isinstance(column, Tensor):
        return column[rows.to(column.device)]
    if isinstance(column, CombinedColumn):
        return column.combined([gather(part, rows) for part in column.parts])
    ordered, position = rows.sort()
    found = torch.empty((len(rows), *column.width), dtype=column.dtype)
    run = 16384
    with column.reader() as read:
        for start in range(0, column.shape[0], run):
            first, last = torch.searchsorted(ordered, torch.tensor([start, start + run])).tolist()
            if first < last:
                found[position[first:last]] = read(start, min(start + run, column.shape[0]))[
                    ordered[first:last] - start
                ]
    return found


def disk_column(dataset: h5py.Dataset) -> DiskColumn:
    """Return the rows of an open HDF5 dataset. Raises ValueError if it has none, or TypeError for a foreign dtype."""
    if not dataset or not dataset.shape:
        raise ValueError("the dataset is closed or has no rows")
    width, row_dtype = row_type(dataset)
    dtype = torch.from_numpy(_native(np.empty(0, dtype=row_dtype))).dtype
    identity = dataset.file.attrs.get("identity")
    file = os.path.abspath(dataset.file.filename)
    return DiskColumn(file, dataset.name, 0, dataset.shape[0], tuple(width), dtype, identity)


def _native(values: np.ndarray) -> np.ndarray:
    """The array in the byte order of this machine, the only one that torch supports."""
    return values.astype(values.dtype.newbyteorder("="), copy=False)
