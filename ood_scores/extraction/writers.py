"""Writing rows to memory, or to a cache, in a thread beside the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from queue import Queue
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

from ood_scores.features import FeatureSet, Head, Provenance
from ood_scores.features.finite import require_finite
from ood_scores.runtime import Arriving

AHEAD = 2
"""Most batches that wait to be written; the model waits when there are as many."""


class Sink(Protocol):
    """Where rows go: a cache or memory."""

    rows: int

    def append(self, rows: Mapping[str, Tensor]) -> None: ...


class MemorySink:
    """Collects rows in preallocated arrays; where the length is unknown they double as they fill."""

    def __init__(self, rows: int | None, head: Head | None, provenance: Provenance) -> None:
        self._capacity = rows or 0
        self._arrays: dict[str, Tensor] = {}
        self._head, self._provenance = head, provenance
        self.rows = 0

    def append(self, rows: Mapping[str, Tensor]) -> None:
        stop = self.rows + len(rows["features"])
        if stop > self._capacity or not self._arrays:
            self._grow(max(stop, 2 * self._capacity if self._arrays else self._capacity), rows)
        for name, values in rows.items():
            self._arrays[name].numpy()[self.rows : stop] = values.numpy()
        self.rows = stop

    def finish(self) -> None:
        """Cuts the arrays to the rows that came."""
        self._arrays = {name: array[: self.rows] for name, array in self._arrays.items()}

    def feature_set(self) -> FeatureSet:
        """What was collected."""
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
    """Columns by the names that they have in a cache as a feature set in memory."""
    extras = {name.removeprefix("extras/"): columns[name] for name in columns if name.startswith("extras/")}
    return FeatureSet(columns["features"], columns["logits"], columns.get("labels"), head, extras, provenance)


class BackgroundWriter:
    """Writes batches to a sink while the next ones are computed. A context: leaving it waits until all is written.

    What goes wrong with a batch is raised by the next call or on leaving, and later batches are dropped: the sink is
    left as if each batch had been written before the next was begun.

    Args:
        sink: rows are appended to it by the thread alone.
        first: number of the sink's first row in the dataset.
        advance: told the sink's rows after every batch.
    """

    def __init__(self, sink: Sink, first: int, advance: Callable[[int], None]) -> None:
        self._sink, self._first, self._advance = sink, first, advance
        self._waiting: Queue[tuple[int, Arriving] | None] = Queue(AHEAD)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="ood_scores writer", daemon=True)

    def put(self, start: int, rows: Arriving) -> None:
        """A batch whose first row is row ``start`` of the dataset; of those the sink has already, none is written."""
        if self._error:
            raise self._error
        self._waiting.put((start, rows))

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._waiting.put(None)
        self._thread.join()
        if self._error and error is not self._error and (error is None or isinstance(error, Exception)):
            raise self._error  # it concerns earlier rows than what went wrong since

    def _run(self) -> None:
        while (batch := self._waiting.get()) is not None:
            if not self._error:
                try:
                    self._write(*batch)
                except BaseException as error:
                    self._error = error

    def _write(self, start: int, rows: Arriving) -> None:
        columns = rows.wait()
        require_finite(columns, start)
        done = self._first + self._sink.rows - start
        self._sink.append({name: values[done:] for name, values in columns.items()})
        self._advance(self._sink.rows)
