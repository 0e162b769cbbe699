"""Feature sets: the outputs of one model for one dataset."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.atomic import user_path
from ood_scores.errors import BadInput, BadLabels, EmptyInput
from ood_scores.features.block import Block
from ood_scores.features.block_size import default_rows
from ood_scores.features.checks import check_columns
from ood_scores.features.head import Head
from ood_scores.features.logit_columns import logits_of, with_two_classes
from ood_scores.features.provenance import Provenance
from ood_scores.features.row_numbers import row_numbers
from ood_scores.features.storage import columns as col
from ood_scores.features.storage.texts import IDS, unpacked
from ood_scores.notebook import facts_html
from ood_scores.runtime import CPU
from ood_scores.transfers import blocks_on


class FeatureSet:
    """The outputs of one model for one dataset, in memory or read lazily from an HDF5 file.

    ``features``, ``logits``, ``labels``, and ``extras[name]`` are torch tensors. For a set on disk, each access reads
    the whole column; use ``blocks`` to stream it. Slices (``feats[100:200]``) of a set on disk stay on disk; index
    arrays and masks create a set in memory.

    Args:
        features: Floating-point penultimate features ``[N, D]``: a torch tensor, a NumPy array (shared, not copied), or
            an open ``h5py.Dataset`` (read lazily; the file may be closed afterwards).
        logits: Logits ``[N, C]`` of the same types, or None. A single logit z per row, that of a sigmoid, becomes the
            two logits (0, z), and its head likewise.
        labels: Integer class indices ``[N]``, or None. They may lie outside ``0 .. C-1``, since the labels of an OoD
            set often belong to another label space; whatever requires class indices checks them.
        head: The last affine map of the model, a ``Head``, or None.
        extras: Further arrays ``[N, ...]`` by name.
        provenance: The origin of the arrays, or None.
        ids: The name of each row, such as that of its file: strings or integers ``[N]``, with "" or None for a row
            without one; or None.

    Raises:
        ShapeMismatch: if the shapes of the arrays do not match.
        BadInput: if an array has an invalid dtype, or an id is not valid text.
    """

    is_whole_file = False
    """Whether the set is the whole cache file that ``load`` opened."""

    device: torch.device | None = None
    """The device of the blocks, and therefore of fits and scores; None keeps each block where its columns are."""

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
        ids: Any = None,
    ) -> None:
        if features is None:
            raise BadInput(
                "features must be an array [rows, width], got None: to use logits alone, pass them as the features "
                "too, FeatureSet(logits, logits)."
            )
        if not isinstance(extras, Mapping | None):
            raise BadInput(f"extras must map names to arrays, got {type(extras).__name__}: pass {{'name': array}}.")
        given = {"features": features, "logits": logits, "labels": labels}
        for name in extras or {}:
            if not name or "/" in name or name.strip(".") == "":
                raise BadInput(f"the name of an extra must be valid in HDF5 and hold no '/', got {name!r}.")
        given |= {f"extras/{name}": values for name, values in (extras or {}).items()}
        self._columns = {name: col.as_column(name, values) for name, values in given.items() if values is not None}
        self._columns |= {} if ids is None else {IDS: col.id_column(ids)}
        if "logits" in self._columns:
            self._columns["logits"] = with_two_classes(self._columns["logits"])
        self.head = None if head is None else _as_head(head).with_two_classes()
        self.provenance = provenance
        self.statistics: dict[Any, Any] = {}
        check_columns(self._columns, self.head)

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
    def ids(self) -> NDArray[np.str_] | None:
        """The name of each row, such as that of its file, ``[N]``; "" for a row without one; None if no row has one."""
        ids = self._read(IDS)
        return None if ids is None else unpacked(ids)

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """Further arrays by name, read when they are accessed."""
        return _Extras(self)

    @property
    def block_device(self) -> torch.device:
        """The device of the features of blocks."""
        features = self._columns["features"]
        return self.device or (features.device if isinstance(features, Tensor) else CPU)

    @property
    def num_features(self) -> int:
        """The width of the features."""
        return self._columns["features"].shape[1]

    @property
    def num_classes(self) -> int | None:
        """The number of classes of the model; None if there are neither logits nor a head."""
        if "logits" in self._columns:
            return self._columns["logits"].shape[1]
        return self.head.num_classes if self.head else None

    @property
    def file(self) -> Path | None:
        """The file that the features are read from; None for a set in memory."""
        features = self._columns["features"]
        return Path(features.file) if isinstance(features, col.DiskColumn) else None

    def has(self, name: str) -> bool:
        """Return whether the set has a column or head.

        Args:
            name: ``features``, ``logits``, ``labels``, ``ids``, ``head``, or the name of an extra. The name of a probe,
                such as ``layers``, stands for all of its extras, ``layers.layer1``, ``layers.layer2``, and so on.
                ``negatives`` and, for one kind, ``negatives.nouns`` stand for the negatives of the head.
        """
        if name == "head":
            return self.head is not None
        if name.partition(".")[0] == "negatives" and self.head and self.head.negatives:
            return name == "negatives" or name.removeprefix("negatives.") in self.head.negatives
        return bool(self._columns_of([name]))

    @property
    def columns(self) -> Mapping[str, col.Column]:
        """The columns as they are stored, in memory or on disk: ``features``, ``logits``, ``labels``, ``ids`` (the
        bytes of texts, see ``ood_scores.features.storage.texts``), and ``extras/<name>``."""
        return self._columns

    def class_labels(self) -> Tensor:
        """The labels, int64 ``[N]``, after a check that they are class indices of the model.

        Raises:
            BadLabels: if there are no labels, or some lie outside ``0 .. C-1``.
            EmptyInput: if the set has no rows.
        """
        labels = self.labels
        if labels is None:
            raise BadLabels("this feature set has no labels: extract it from a loader of (images, labels).")
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
            index = row_numbers(rows, len(self))
            columns = {name: col.gather(column, index) for name, column in self._columns.items()}
        origin = self.provenance and self.provenance.of_some_rows()
        chosen = FeatureSet(**col.as_arguments(columns), head=self.head, provenance=origin)
        chosen.device, chosen.block_rows = self.device, self.block_rows
        return chosen

    def with_head(self, head: Head) -> FeatureSet:
        """Return a view of the set with another head, whose logits are computed from the features as they are read.

        Args:
            head: The head, such as that of a linear probe (``ood_scores.fit_linear_probe``).

        Raises:
            ShapeMismatch: if the head is for features of another width.
            BadInput: if it needs features of length 1, and those of the first block have another.
        """
        head = _as_head(head).with_two_classes()
        columns = {**self._columns, "logits": logits_of(head, self._columns["features"])}
        origin = self.provenance and replace(self.provenance, head=head.digest)
        view = FeatureSet(**col.as_arguments(columns), head=head, provenance=origin)
        view.device, view.block_rows = self.device, self.block_rows
        if head.unit:
            head.require_unit(next(view.blocks(only=["features"])).features)
        return view

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
        """Iterate over the set in blocks of consecutive rows.

        Memory is bounded by one block, or two on a GPU, where the next block is copied while one is in use. Rows of a
        cache on disk may be its mapped pages: copy rows that you keep.

        Args:
            rows: The most rows of a block; by default ``block_rows``, or else 16,384 and at most 16 MiB; on a GPU,
                131,072 and at most 1/256 of its memory.
            device: The device of the blocks; by default that of the set.
            only: Names of the columns to read, as in ``has``; None reads all columns.

        Raises:
            EmptyInput: if the set has no rows.
            BadInput: if ``rows`` is below 1.
        """
        if len(self) == 0:
            raise EmptyInput("this feature set has no rows.")
        rows = self.block_rows if rows is None else rows
        if rows is not None and rows < 1:
            raise BadInput(f"rows must be at least 1, got {rows}.")
        columns = self._columns if only is None else self._columns_of(only)
        to = self.device if device is None else torch.device(device)
        head = self.head and self.head.to(to or self.block_device)
        rows = rows or default_rows(columns.values(), to or self.block_device)
        parts = self._parts(columns, rows)
        starts = range(0, len(self), rows)
        for start, part in zip(starts, blocks_on(to, parts) if to else parts, strict=True):
            yield Block(**col.as_arguments(part), head=head, start=start, rows=min(rows, len(self) - start))

    def _parts(self, columns: Mapping[str, col.Column], rows: int) -> Iterator[dict[str, Tensor]]:
        """The columns as they are stored, ``rows`` rows at a time."""
        with ExitStack() as stack:
            readers = {name: stack.enter_context(col.reader(column)) for name, column in columns.items()}
            for start in range(0, len(self), rows):
                stop = min(start + rows, len(self))
                yield {name: read(start, stop) for name, read in readers.items()}

    def save(self, path: str | os.PathLike[str], *, compress: bool = False) -> None:
        """Write the set to an HDF5 cache that ``ood_scores.load`` opens, replacing an existing cache.

        Args:
            path: The file.
            compress: Whether to compress with Zstandard; the file is smaller and slower to read, and other programs
                need the HDF5 Zstandard filter.

        Raises:
            ForeignFile: if a file that is not a feature cache exists at ``path``.
            CacheWriteFailed: if the disk refuses a write.
        """
        from ood_scores.features.storage import cache

        shapes = {name: (column.shape[1:], _numpy_dtype(column.dtype)) for name, column in self._columns.items()}
        cache.write(user_path(path), shapes, len(self), self.head, self.provenance, self._runs(), compress)

    def _runs(self) -> Iterator[dict[str, Tensor]]:
        """All columns as they are stored, on the CPU, in runs of rows."""
        return blocks_on(CPU, self._parts(self._columns, default_rows(self._columns.values(), CPU)))

    def check_finite(self, start: int = 0) -> None:
        """Check that features, logits, and extras hold neither NaN nor infinite values.

        Args:
            start: The number of the first row, for the message.

        Raises:
            NotFinite: if one does; the message names the column and its first such row.
        """
        for block in self.blocks():
            block.start += start
            block.require_finite()

    def __repr__(self) -> str:
        parts = [f"{len(self):,} rows", f"{self.num_features} features"]
        if self.num_classes is not None:
            parts.append(f"{self.num_classes} classes")
        parts += [name for name in ("labels", "ids", "head", "negatives") if self.has(name)]
        parts += [f"{name!r}" for name in self.extras]
        if self.provenance:
            parts.append(f"{self.provenance.dataset} by {self.provenance.architecture}")
        parts.append(f"on disk: {self.file}" if self.file else "in memory")
        return f"FeatureSet({', '.join(parts)})"

    def _repr_html_(self) -> str:
        made = self.provenance
        facts = {
            "rows": len(self),
            "features": self.num_features,
            "classes": self.num_classes,
            "columns": ", ".join([*self._columns, *(["head"] if self.has("head") else [])]),
            "dataset": made.dataset if made else None,
            "model": made.architecture if made else None,
            "file": self.file,
        }
        return facts_html("FeatureSet", facts)

    def _read(self, name: str) -> Tensor | None:
        return col.read_all(self._columns[name]) if name in self._columns else None

    def _columns_of(self, names: Iterable[str]) -> dict[str, col.Column]:
        """The columns that the names stand for: a column itself, the extra of that name, or all extras of a probe."""
        wanted = {
            column
            for name in names
            for column in self._columns
            if column in (name, f"extras/{name}") or column.startswith(f"extras/{name}.")
        }
        return {name: column for name, column in self._columns.items() if name in wanted}


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


def _as_head(head: Any) -> Head:
    if not isinstance(head, Head):
        kind = type(head).__name__
        raise BadInput(f"head must be an ood_scores.Head, got {kind}: pass Head(layer.weight, layer.bias).")
    return head


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    if dtype == torch.bfloat16:
        raise BadInput("HDF5 has no bfloat16: convert the features to float32 or float16 first.")
    return torch.empty(0, dtype=dtype).numpy().dtype
