"""Gaps: rows of an unfinished cache whose inputs cannot be read.

An unfinished cache has one row for each row of the dataset, so that the number of its rows tells where to continue. The
features of a gap are NaN, which those of other rows never are. When all rows are there, the cache is replaced in one
step by a finished one without the gaps, whose provenance lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from ood_scores.features.storage import cache as caches
from ood_scores.features.storage.layout import column_names
from ood_scores.features.storage.reading import open_to_read
from ood_scores.features.storage.texts import as_bytes, row_type

COPIED_ROWS = 4096
"""Number of rows that are copied at a time."""


def find(path: Path) -> list[int]:
    """Return the numbers of the rows of an unfinished cache that are gaps."""
    with open_to_read(path) as h5:
        return np.flatnonzero(np.isnan(h5["features"][: h5["progress"][0], 0])).tolist()


def remove(path: Path, gaps: Sequence[int], skipped: Sequence[tuple[int, str]]) -> None:
    """Replace an unfinished cache by a finished one without the gaps.

    Args:
        path: the file, to which nobody writes.
        gaps: the numbers of its rows that are gaps.
        skipped: the rows of the dataset that these are, with reasons, for the provenance.
    """
    with open_to_read(path) as h5:
        found = caches.state(h5)
        assert found.provenance is not None
        columns = {name: h5[name] for name in column_names(h5)}
        shapes = {name: row_type(column) for name, column in columns.items()}
        kept = np.delete(np.arange(found.rows), gaps)
        provenance = replace(found.provenance, skipped=tuple(skipped))
        caches.write(path, shapes, len(kept), caches.read_head(h5), provenance, _runs(columns, found.rows, kept))


def _runs(columns: dict[str, h5py.Dataset], rows: int, kept: np.ndarray) -> Iterator[dict[str, Tensor]]:
    for start in range(0, rows, COPIED_ROWS):
        here = kept[(kept >= start) & (kept < start + COPIED_ROWS)] - start
        runs = {name: as_bytes(column[start : start + COPIED_ROWS]) for name, column in columns.items()}
        yield {name: torch.from_numpy(run[here]) for name, run in runs.items()}
