"""Writing beside the model: rows are checked and written by a thread of their own, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from queue import Queue
from threading import Thread
from typing import Protocol

from torch import Tensor

from ood_scores.extraction.transfers import Arriving
from ood_scores.features.finite import require_finite

AHEAD = 2
"""Most batches that wait to be written; the model waits when there are as many."""


class Sink(Protocol):
    """Where rows go: a cache or memory."""

    rows: int

    def append(self, rows: Mapping[str, Tensor]) -> None: ...


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
