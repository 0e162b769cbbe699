"""Write rows to memory or to a cache, in a thread of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from queue import Queue
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

from ood_scores.features import FeatureSet, Head, Provenance
from ood_scores.features.finite import require_finite
from ood_scores.features.storage.texts import IDS, padded
from ood_scores.transfers import Arriving

AHEAD = 2
"""Maximum number of batches waiting to be written; the model waits when it is reached."""


class Sink(Protocol):
    """Where rows are appended: a cache or memory.

    A row that cannot be read is a gap, so that there is one row for each row of the dataset until all are written.
    """

    rows: int

    def append(self, rows: Mapping[str, Tensor], gaps: Sequence[int] = ()) -> None: ...


class MemorySink:
    """Collects rows in preallocated arrays, which are doubled when full if the number of rows is unknown."""

    def __init__(self, rows: int | None, head: Head | None, provenance: Provenance, has_ids: bool = False) -> None:
        self._capacity = rows or 0
        self._arrays: dict[str, Tensor] = {}
        self._head, self._provenance = head, provenance
        self.gaps: list[int] = []
        self.rows = 0
        self.has_ids = has_ids

    def append(self, rows: Mapping[str, Tensor], gaps: Sequence[int] = ()) -> None:
        self.gaps += [self.rows + gap for gap in gaps]
        stop = self.rows + len(rows["features"])
        if IDS in rows and self._arrays:
            self._arrays[IDS] = padded(self._arrays[IDS], rows[IDS].shape[1])
            rows = {**rows, IDS: padded(rows[IDS], self._arrays[IDS].shape[1])}
        if stop > self._capacity or not self._arrays:
            self._grow(max(stop, 2 * self._capacity if self._arrays else self._capacity), rows)
        for name, values in rows.items():
            self._arrays[name].numpy()[self.rows : stop] = values.numpy()
        self.rows = stop

    def finish(self) -> None:
        """Cut the arrays to the number of rows."""
        self._arrays = {name: array[: self.rows] for name, array in self._arrays.items()}

    def remove_gaps(self, skipped: Sequence[tuple[int, str]]) -> None:
        """Remove the gaps, and list in the provenance the rows of the dataset that they were, with reasons."""
        kept = torch.ones(self.rows, dtype=torch.bool)
        kept[self.gaps] = False
        self._arrays = {name: array[: self.rows][kept] for name, array in self._arrays.items()}
        self._provenance = replace(self._provenance, skipped=tuple(skipped))

    @property
    def has_gaps(self) -> bool:
        """Whether some rows are gaps."""
        return bool(self.gaps)

    def feature_set(self) -> FeatureSet:
        """Return the rows as a feature set."""
        return feature_set(self._arrays, self._head, self._provenance)

    def _grow(self, capacity: int, like: Mapping[str, Tensor]) -> None:
        old = self._arrays
        self._arrays = {
            name: torch.empty((capacity, *values.shape[1:]), dtype=values.dtype) for name, values in like.items()
        }
        for name, array in old.items():
            self._arrays[name][: self.rows] = array[: self.rows]
        self._capacity = capacity


def feature_set(
    columns: Mapping[str, Tensor], head: Head | None = None, provenance: Provenance | None = None
) -> FeatureSet:
    """Return columns, by the names that they have in a cache, as a feature set in memory."""
    extras = {name.removeprefix("extras/"): columns[name] for name in columns if name.startswith("extras/")}
    labels, ids = columns.get("labels"), columns.get(IDS)
    return FeatureSet(columns["features"], columns.get("logits"), labels, head, extras, provenance, ids)


class BackgroundWriter:
    """Writes batches to a sink while the next ones are computed. Use it as a context manager, which waits for the end.

    An error in a batch is raised by the next call or at the end of the context, and later batches are dropped: the sink
    is in the same state as if each batch had been written before the next one was started.

    Args:
        sink: the sink, to which only the thread appends rows.
        first: the number of the sink's first row in the dataset.
        advance: a function to call with the sink's number of rows after every batch.
    """

    def __init__(self, sink: Sink, first: int, advance: Callable[[int], None]) -> None:
        self._sink, self._first, self._advance = sink, first, advance
        self._waiting: Queue[tuple[int, Arriving, Collection[int]] | None] = Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="ood_scores writer", daemon=True)

    def put(self, start: int, rows: Arriving, gaps: Collection[int] = ()) -> None:
        """Write a batch whose first row is row ``start`` of the dataset, except for rows that the sink already has.

        ``gaps`` are the positions in the batch of rows that are unreadable, which ``rows`` lacks.
        """
        if self._error:
            raise self._error
        self._waiting.put((start, rows, gaps))

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._waiting.put(None)
        self._thread.join()
        if self._error and error is not self._error and (error is None or isinstance(error, Exception)):
            raise self._error  # it concerns earlier rows than the other error

    def _run(self) -> None:
        while (batch := self._waiting.get()) is not None:
            if not self._error:
                try:
                    self._write(*batch)
                except BaseException as error:
                    self._error = error

    def _write(self, start: int, rows: Arriving, gaps: Collection[int]) -> None:
        columns = with_zeros(rows.wait(), gaps) if gaps else rows.wait()
        require_finite(columns, start)
        done = self._first + self._sink.rows - start
        left = [gap - done for gap in sorted(gaps) if gap >= done]
        self._sink.append({name: values[done:] for name, values in columns.items()}, left)
        self._advance(self._sink.rows)


def with_zeros(columns: Mapping[str, Tensor], gaps: Collection[int]) -> dict[str, Tensor]:
    """Return columns with additional rows of zeros at the positions ``gaps``."""
    count = len(columns["features"]) + len(gaps)
    kept = [place for place in range(count) if place not in gaps]
    widened = {name: values.new_zeros(count, *values.shape[1:]) for name, values in columns.items()}
    for name, values in columns.items():
        widened[name][kept] = values
    return widened
