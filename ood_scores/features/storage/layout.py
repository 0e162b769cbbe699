"""The layout of a cache: its HDF5 datasets, where their rows are in the file, and what its seal covers."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from ood_scores.atomic import LockedFile
from ood_scores.features.head import Head
from ood_scores.features.provenance import Provenance
from ood_scores.features.storage.checksums import SUM, SUMS, OpenBlock, rows_of_block
from ood_scores.features.storage.reading import FORMAT, zstd
from ood_scores.features.storage.seal import Range, pieces, seal
from ood_scores.features.storage.texts import IDS, row_type, text_type

VERSION = 1
UNKNOWN_LENGTH_ROWS = 1024

SKIPPED = "skipped"
"""The array with the rows that were left out, as JSON: too long for an attribute."""

ARGUMENTS = "arguments"
"""The array with the arguments of the network, as JSON, if they are longer than ``LONGEST_ATTRIBUTE``."""

LONGEST_ATTRIBUTE = 2**15
"""The most characters of an attribute; HDF5 limits attributes to 64 KiB."""

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""The shape of a row and the dtype of each column by name; ids are uint8 ``[W]``."""


def column_names(h5: h5py.File) -> list[str]:
    """The names of the columns: ``features``, ``logits``, ``labels``, ``ids`` if present, then ``extras/<name>``."""
    extras = [f"extras/{name}" for name in h5.get("extras", {})]
    return [name for name in ("features", "logits", "labels", IDS) if name in h5] + extras


def statistics_file(path: Path) -> Path:
    """The file with the statistics of a cache; see ``ood_scores.features.storage.statistics_store``."""
    return path.with_name(f"{path.name}.statistics")


@dataclass(frozen=True)
class Place:
    """The place of a contiguous column in its file, and that of its checksums (None without them)."""

    offset: int
    width: tuple[int, ...]
    dtype: np.dtype
    sums: int | None
    block: int

    @classmethod
    def of(cls, column: h5py.Dataset) -> Place:
        sums = column.file.get(f"{SUMS}{column.name}")
        place, block = (None, 1) if sums is None else (sums.id.get_offset(), int(sums.attrs["rows"]))
        return cls(column.id.get_offset() or 0, *row_type(column), place, block)

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.width, dtype=np.int64)) * self.dtype.itemsize

    def of_row(self, row: int) -> int:
        return self.offset + row * self.row_bytes

    def of_sum(self, block: int) -> int:
        """The place of the checksum of a block."""
        assert self.sums is not None
        return self.sums + block * SUM.itemsize

    def open_block(self, file: LockedFile, rows: int) -> OpenBlock:
        """Return the block to which the row after ``rows`` rows belongs; its rows are read from the file."""
        number, filled = divmod(rows, self.block)
        block = OpenBlock(self.block * self.row_bytes, number)
        for piece in pieces(file, self.of_row(number * self.block), filled * self.row_bytes):
            block, _ = block.extended(np.frombuffer(piece, np.uint8))
        return block


def identifying(provenance: Provenance | None) -> dict[str, Any]:
    """The attributes of a new file: a unique identity and the provenance."""
    return {"identity": uuid.uuid4().hex} | (provenance.to_attributes() if provenance else {})


def lay_out(
    file: LockedFile,
    path: Path,
    columns: Shapes,
    rows: int | None,
    head: Head | None,
    attributes: Mapping[str, Any],
    compress: bool = False,
) -> None:
    """Lay out a cache that will be renamed to ``path``, with a row count of 0. Raises OSError if the disk refuses.

    A compressed file is not sealed, because HDF5 is to write its rows.
    """
    length = UNKNOWN_LENGTH_ROWS if rows is None else rows
    with h5py.File(file, "w", alignment_threshold=1, alignment_interval=8) as h5:
        write_header(h5, path, head, {"compressed": compress, "growing": rows is None} | dict(attributes))
        if any(name.startswith("extras/") for name in columns):
            h5.create_group("extras", track_order=True)  # in the given order, not the alphabetical one
        for name, row in columns.items():
            width, dtype = stored_row(name, *row)
            if compress and length:
                h5.create_dataset(name, (length, *width), dtype, fletcher32=True, **zstd())
            else:
                _allocate(h5, name, (length, *width), dtype)
                _allocate_sums(h5[name])
    file.check()
    if not compress:
        seal_layout(file)


def stored_row(name: str, width: tuple[int, ...], dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape of a row and the dtype of a column in its file, where ids are texts."""
    return ((), text_type(width[0])) if name == IDS else (width, dtype)


def seal_layout(file: LockedFile) -> None:
    """Seal a cache, except for its rows, their checksums, and their count."""
    with h5py.File(file, "r") as h5:
        holes = [
            place
            for name in ("progress", *column_names(h5))
            for array in (h5[name], h5.get(f"{SUMS}/{name}"))
            if array is not None
            for place in places(array)
        ]
    seal(file, holes)


def places(array: h5py.Dataset) -> list[Range]:
    """Return where the values of an array are in its file."""
    if array.chunks:
        chunks: list[Range] = []
        array.id.chunk_iter(lambda chunk: chunks.append((chunk.byte_offset, chunk.size)))
        return chunks
    offset = array.id.get_offset()
    return [] if offset is None else [(offset, array.nbytes)]


def write_header(h5: h5py.File, path: Path, head: Head | None, attributes: Mapping[str, Any]) -> None:
    """Write everything but the columns of a file that will be renamed to ``path``, with a row count of 0."""
    h5.attrs.update({"format": FORMAT, "version": VERSION})
    texts = {SKIPPED} | ({ARGUMENTS} if len(attributes.get(ARGUMENTS, "")) > LONGEST_ATTRIBUTE else set())
    h5.attrs.update({name: value for name, value in attributes.items() if name not in texts})
    for name in texts & attributes.keys():
        h5[name] = np.frombuffer(attributes[name].encode(), np.uint8)
    if head is not None:
        h5["head/weight"], h5["head/bias"] = _array(head.weight), _array(head.bias)
        for kind, words in head.negatives.items():
            h5[f"head/negatives/{kind}"] = _array(words)
    _allocate(h5, "progress", (2,), np.dtype(np.int64))
    h5["progress"].attrs["meaning"] = "rows written; 1 if finished, else 0 or -1"
    h5["statistics"] = h5py.ExternalLink(statistics_file(path).name, "/")


def read_attributes(h5: h5py.File) -> dict[str, Any]:
    """Return the attributes of a file, also those that ``write_header`` has written as arrays."""
    texts = {name: h5[name][()].tobytes().decode() for name in (SKIPPED, ARGUMENTS) if name in h5}
    return {**h5.attrs, **texts}


def _array(values: Tensor) -> np.ndarray:
    """A tensor as an array for HDF5; bfloat16, which HDF5 lacks, becomes float32 without rounding."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _allocate_sums(column: h5py.Dataset) -> None:
    """Allocate the checksums of a column that has rows of at least a byte."""
    if column.nbytes:
        block = rows_of_block(column.nbytes // len(column))
        name = f"{SUMS}{column.name}"
        _allocate(column.file, name, (-(-len(column) // block),), SUM)
        column.file[name].attrs["rows"] = block


def _allocate(h5: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    h5py.h5d.create(h5.id, name.encode(), h5py.h5t.py_create(dtype), space, layout, links)
