"""FeatureSet: what one model said about one dataset."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, BadLabels, EmptyInput, ShapeMismatch
from ood_scores.features.block import Block
from ood_scores.features.head import Head
from ood_scores.features.provenance import Provenance
from ood_scores.features.storage import columns as col
from ood_scores.runtime import CPU, blocks_on, find_device

BLOCK_BYTES = 16 * 2**20
"""Largest default size of a block, counted in float64."""

BLOCK_ROWS = 16384
"""Most rows of a default block: enough to hide Python; what scorers make of them stays in the processor's caches."""


class FeatureSet:
    """What one model said about one dataset, in memory or lazily on an HDF5 file; the same interface.

    Args:
        features: penultimate features ``[N, D]``, floating point: a torch tensor, a NumPy array (shared, not copied) or
            an open ``h5py.Dataset`` (read lazily; the file may be closed afterwards).
        logits: ``[N, C]``, likewise, or None.
        labels: class indices ``[N]``, integers, or None. They may lie outside ``0 .. C-1``: the labels of an OoD set
            often belong to another label space. What needs class indices checks them.
        head: the last affine map, or None.
        extras: further named arrays ``[N, ...]``.
        provenance: where all this comes from, or None.

    Raises:
        ShapeMismatch: the arrays do not fit each other.
        BadInput: a dtype that cannot be worked with.

    ``.features``, ``.logits``, ``.labels`` and ``.extras[name]`` are torch tensors; on a set on disk each access reads
    the whole column, so use ``blocks`` to stream. Slices (``feats[100:200]``) of a set on disk stay on disk; index
    arrays and masks give a set in memory.
    """

    is_whole_file = False
    """Whether the set is all of one cache file, as ``load`` opened it."""

    device: torch.device | None = None
    """Where blocks are computed with, for all that fits or scores; None: where the columns are."""

    block_rows: int | None = None
    """The default number of rows of a block; None chooses it from the size of a row."""

    def __init__(
        self,
        features: Any,
        logits: Any = None,
        labels: Any = None,
        head: Head | None = None,
        extras: Mapping[str, Any] | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        given = {"features": features, "logits": logits, "labels": labels}
        for name in extras or {}:
            if not name or "/" in name or name.strip(".") == "":
                raise BadInput(f"an extra needs a name that HDF5 can use, without '/'; got {name!r}.")
        given |= {f"extras/{name}": values for name, values in (extras or {}).items()}
        self._columns = {name: col.as_column(name, values) for name, values in given.items() if values is not None}
        self.head = head
        self.provenance = provenance
        self.statistics: dict[Any, Any] = {}
        _check_columns(self._columns, head)

    def __len__(self) -> int:
        return self._columns["features"].shape[0]

    @property
    def features(self) -> Tensor:
        """Penultimate features ``[N, D]``."""
        return col.read_all(self._columns["features"])

    @property
    def logits(self) -> Tensor | None:
        """Logits ``[N, C]``, or None."""
        return self._read("logits")

    @property
    def labels(self) -> Tensor | None:
        """Class indices, int64 ``[N]``, or None."""
        labels = self._read("labels")
        return None if labels is None else labels.long()

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """Named further arrays, read when accessed."""
        return _Extras(self)

    @property
    def num_features(self) -> int:
        return self._columns["features"].shape[1]

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the model; None if neither logits nor a head say it."""
        if "logits" in self._columns:
            return self._columns["logits"].shape[1]
        return self.head.num_classes if self.head else None

    @property
    def file(self) -> Path | None:
        """The file that the features are read from, or None for a set in memory."""
        features = self._columns["features"]
        return Path(features.file) if isinstance(features, col.DiskColumn) else None

    def has(self, name: str) -> bool:
        """Whether the set holds ``features``, ``logits``, ``labels``, ``head``, the extra of that name, or extras below
        it: ``"layers"`` stands for ``"layers.layer1"``, ``"layers.layer2"``, and so on."""
        return bool(self._columns_of([name])) or (name == "head" and self.head is not None)

    @property
    def columns(self) -> Mapping[str, col.Column]:
        """The columns as they are stored, in memory or on disk: ``features``, ``logits``, ``labels`` and
        ``extras/<name>``."""
        return self._columns

    def class_labels(self) -> Tensor:
        """Labels as int64 ``[N]``, checked to be class indices of the model.

        Raises:
            BadLabels: there are none, or some lie outside ``0 .. C-1``.
        """
        labels = self.labels
        if labels is None:
            raise BadLabels("this feature set has no labels: extract it from a loader that yields (images, labels).")
        if not len(labels):
            raise EmptyInput("this feature set has no rows.")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (self.num_classes is not None and high >= self.num_classes):
            classes = "at least 0" if self.num_classes is None else f"in 0 .. {self.num_classes - 1}"
            raise BadLabels(
                f"labels run from {low} to {high}, but class indices must be {classes}: is this the in-distribution "
                "set of this model, with the class order it was trained with?"
            )
        return labels

    def __getitem__(self, rows: slice | Any) -> FeatureSet:
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            columns = {name: col.take(column, start, max(start, stop)) for name, column in self._columns.items()}
        else:
            index = self._row_numbers(rows)
            columns = {name: col.gather(column, index) for name, column in self._columns.items()}
        chosen = FeatureSet(**_arguments(columns), head=self.head, provenance=self.provenance)
        chosen.device, chosen.block_rows = self.device, self.block_rows
        return chosen

    def in_blocks(self, rows: int | None) -> FeatureSet:
        """Return a view of the set whose blocks have ``rows`` rows by default; None returns the set itself."""
        if rows is None:
            return self
        view = copy.copy(self)
        view.block_rows = rows
        return view

    def blocks(
        self,
        rows: int | None = None,
        device: torch.device | str | None = None,
        *,
        only: Iterable[str] | None = None,
    ) -> Iterator[Block]:
        """The set as consecutive blocks of at most ``rows`` rows (by default 16,384 and 16 MiB), on ``device``.

        Memory is bounded by the block, on a GPU by two: the next one is on its way there while one is computed with.
        ``only`` names what is read, as ``has`` understands it; None reads everything. Without ``device`` blocks are on
        the set's own. Rows of a cache on disk may be its mapped pages: copy those that are kept for longer.

        Raises EmptyInput if there is no row.
        """
        if len(self) == 0:
            raise EmptyInput("this feature set has no rows.")
        rows = self.block_rows if rows is None else rows
        if rows is not None and rows < 1:
            raise BadInput(f"a block holds at least one row, got rows={rows}.")
        columns = self._columns if only is None else self._columns_of(only)
        rows = rows or self._default_rows(columns)
        to = self.device if device is None else torch.device(device)
        head = self.head.to(to) if self.head and to else self.head
        parts = self._parts(columns, rows)
        starts = range(0, len(self), rows)
        for start, part in zip(starts, blocks_on(to, parts) if to else parts, strict=True):
            yield Block(**_arguments(part), head=head, start=start, rows=min(rows, len(self) - start))

    def _parts(self, columns: Mapping[str, col.Column], rows: int) -> Iterator[dict[str, Tensor]]:
        """The columns as they are kept, ``rows`` rows at a time."""
        with ExitStack() as stack:
            readers = {name: stack.enter_context(col.reader(column)) for name, column in columns.items()}
            for start in range(0, len(self), rows):
                stop = min(start + rows, len(self))
                yield {name: read(start, stop) for name, read in readers.items()}

    def save(self, path: str | os.PathLike[str], *, compress: bool = False) -> None:
        """Writes the set as an HDF5 cache that ``ood_scores.load`` opens, replacing a cache already there.

        Args:
            path: the file.
            compress: Zstandard-compressed chunks; smaller, slower, and other programs need the HDF5 Zstd filter.

        Raises:
            ForeignFile: something that is not a feature cache is in the way.
            CacheWriteFailed: the disk refused.
        """
        from ood_scores.features.storage import cache

        shapes = {name: (column.shape[1:], _numpy_dtype(column.dtype)) for name, column in self._columns.items()}
        cache.write(Path(path), shapes, len(self), self.head, self.provenance, self._runs(), compress)

    def _runs(self) -> Iterator[dict[str, Tensor]]:
        """All columns as they are stored, on the CPU, some rows at a time."""
        return blocks_on(CPU, self._parts(self._columns, self._default_rows(self._columns)))

    def check_finite(self) -> None:
        """Raises naming the first row, if features, logits or extras hold NaN or infinite values."""
        for block in self.blocks():
            block.require_finite()

    def __repr__(self) -> str:
        parts = [f"{len(self):,} rows", f"{self.num_features} features"]
        if self.num_classes is not None:
            parts.append(f"{self.num_classes} classes")
        parts += [name for name in ("labels", "head") if self.has(name)]
        parts += [f"{name!r}" for name in self.extras]
        if self.provenance:
            parts.append(f"{self.provenance.dataset} by {self.provenance.architecture}")
        parts.append(f"on disk: {self.file}" if self.file else "in memory")
        return f"FeatureSet({', '.join(parts)})"

    def _read(self, name: str) -> Tensor | None:
        return col.read_all(self._columns[name]) if name in self._columns else None

    def _row_numbers(self, rows: Any) -> Tensor:
        if isinstance(rows, slice):
            return torch.from_numpy(np.arange(len(self))[rows].copy())
        array = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if array.ndim != 1 or (array.dtype.kind not in "iub" and array.size):
            raise BadInput("rows are chosen by a slice, a one-dimensional index array or a mask.")
        index = torch.from_numpy(array if array.dtype.kind == "b" else array.astype(np.int64))
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise ShapeMismatch(f"a mask of {len(index)} for {len(self)} rows.")
            return index.nonzero()[:, 0]
        if len(index) and not (-len(self) <= int(index.min()) and int(index.max()) < len(self)):
            raise BadInput(f"row numbers run from {int(index.min())} to {int(index.max())}, the set has {len(self)}.")
        return torch.where(index < 0, index + len(self), index)

    def _columns_of(self, names: Iterable[str]) -> dict[str, col.Column]:
        """The columns that the names stand for; of a name that is no column, the extra of that name or those below."""
        wanted = {
            column
            for name in names
            for column in self._columns
            if column in (name, f"extras/{name}") or column.startswith(f"extras/{name}.")
        }
        return {name: column for name, column in self._columns.items() if name in wanted}

    def _default_rows(self, columns: Mapping[str, col.Column]) -> int:
        width = sum(int(np.prod(column.shape[1:])) for column in columns.values())
        return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (8 * max(width, 1))))


class _Extras(Mapping[str, Tensor]):
    def __init__(self, feats: FeatureSet) -> None:
        self._feats = feats

    def __getitem__(self, name: str) -> Tensor:
        return col.read_all(self._feats._columns[f"extras/{name}"])

    def __contains__(self, name: object) -> bool:
        return f"extras/{name}" in self._feats._columns

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix("extras/") for name in self._feats._columns if name.startswith("extras/"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> FeatureSet:
    """Opens a feature cache lazily.

    Args:
        path: the file.
        device: where its blocks are fitted and scored; ``"auto"`` takes a GPU if there is one.

    Raises:
        BadInput: there is no such device.
        FileNotFoundError: there is no such file.
        ForeignFile: it is not a cache of this package.
        UnfinishedCache: its extraction has not finished; the message says how to continue it.
        DamagedCache: it is truncated or unreadable.
        CacheBusy: another process is writing it.
    """
    from ood_scores.features.storage import cache

    found = find_device(device)
    with cache.open_to_read(path) as h5:
        cache.require_finished(h5)
        columns = {name: h5[name] for name in cache.column_names(h5)}
        provenance = cache.state(h5).provenance
        feats = FeatureSet(**_arguments(columns), head=cache.read_head(h5), provenance=provenance)
        feats.is_whole_file = True
        feats.device = None if found.type == "cpu" else found
        return feats


def _arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns as arguments of a FeatureSet or a Block."""
    extras = {name.removeprefix("extras/"): columns[name] for name in columns if name.startswith("extras/")}
    return {name: columns.get(name) for name in ("features", "logits", "labels")} | {"extras": extras}


def _check_columns(columns: Mapping[str, col.Column], head: Head | None) -> None:
    for name in ("features", "logits"):
        if name not in columns:
            continue
        if len(columns[name].shape) != 2:
            raise ShapeMismatch(
                f"{name} must be [rows, width], got {tuple(columns[name].shape)}: pool or flatten first."
            )
        if not columns[name].dtype.is_floating_point:
            raise BadInput(f"{name} must be floating point, got {columns[name].dtype}.")
    if "labels" in columns:
        _check_labels(columns["labels"])
    rows = columns["features"].shape[0]
    for name, column in columns.items():
        if tuple(column.shape[:1]) != (rows,):
            raise ShapeMismatch(f"features have {rows} rows, {name} has shape {tuple(column.shape)}.")
    if head is not None:
        _check_head(columns, head)


def _check_labels(labels: col.Column) -> None:
    if len(labels.shape) != 1:
        raise ShapeMismatch(f"labels must be [rows], got {tuple(labels.shape)}.")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise BadLabels(f"labels must be integer class indices, got {labels.dtype}.")


def _check_head(columns: Mapping[str, col.Column], head: Head) -> None:
    if head.num_features != columns["features"].shape[1]:
        raise ShapeMismatch(f"the head takes {head.num_features} features, the set has {columns['features'].shape[1]}.")
    if "logits" in columns and head.num_classes != columns["logits"].shape[1]:
        raise ShapeMismatch(f"the head gives {head.num_classes} logits, the set has {columns['logits'].shape[1]}.")


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    if dtype == torch.bfloat16:
        raise BadInput("HDF5 has no bfloat16: convert the features to float32 or float16 first.")
    return torch.empty(0, dtype=dtype).numpy().dtype
