"""The progress bar of everything that takes a while, and lines that are printed above it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from ood_scores.terminal import SafeConsole

if TYPE_CHECKING:
    from ood_scores.runtime import Cost

_SHOWN: list[ProgressBar] = []
"""The visible bars, the last of which was started last."""

_WORK: ContextVar[ProgressBar | None] = ContextVar("work", default=None)
"""The bar of ``showing_work``."""

LINE_SECONDS = 60.0
"""Time between two lines about a bar in a file or pipe, which the bar itself does not reach before its end."""

LONG = 10.0
"""Seconds after which the cost of a step is told."""

LARGE = 2**30
"""Bytes of memory from which the cost of a step is told."""


class Counts(MofNCompleteColumn):
    """How many units are done, of how many, if anything is counted."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return super().render(task).append(f" {unit}") if unit else Text("")


class Note(TextColumn):
    """Text that is cut off in a narrow terminal, rather than what is beside it."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class ProgressBar:
    """A progress bar on standard error; in a file or pipe, a line each minute. Use it as a context manager.

    Args:
        label: The text before the bar.
        total: How many units there are; None if unknown.
        unit: The plural noun for what is counted.
        done: How many units are done at the start.
        visible: Whether to show anything.
        keep: Whether the bar stays at the end, when it is also written to a file or pipe.
    """

    def __init__(
        self, label: str, total: int | None, unit: str, *, done: int = 0, visible: bool = True, keep: bool = False
    ) -> None:
        console = SafeConsole(stderr=True)
        drawn = console.is_terminal or console.is_jupyter
        self.visible = visible and (keep or drawn)
        self._next_line = monotonic() + LINE_SECONDS if visible and not drawn else math.inf
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # names of datasets hold brackets
            BarColumn(),  # in a narrow terminal, it and the note give way
            Counts(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            Note("{task.fields[note]}", markup=False, table_column=Column()),
            console=console,
            disable=not self.visible,
            transient=not keep,
        )
        self._task = self._progress.add_task(label, total=total, completed=done, unit=unit, note="")

    @property
    def console(self) -> Console:
        return self._progress.console

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        if self.visible:
            _SHOWN.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self.visible:
            _SHOWN.remove(self)
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Count more units as done."""
        self._progress.advance(self._task, count)
        self._write_line()

    def update(self, done: int) -> None:
        """Set how many units are done."""
        self._progress.update(self._task, completed=done)
        self._write_line()

    def describe(self, note: str, label: str | None = None) -> None:
        """Set the text after the bar, and that before it."""
        self._progress.update(self._task, description=label, note=note)

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start to count something else, from 0."""
        self._progress.reset(self._task, total=total, description=label, unit=unit, note="")

    def _write_line(self) -> None:
        """Write a line to a file or pipe if the last one is a minute old."""
        if monotonic() < self._next_line:
            return
        self._next_line = monotonic() + LINE_SECONDS
        (task,) = self._progress.tasks
        of = "" if task.total is None else f" of {task.total:,.0f}"
        left = "" if task.time_remaining is None else f", {timedelta(seconds=int(task.time_remaining))} left"
        note = f", {task.fields['note']}" if task.fields["note"] else ""
        line = f"{task.description}: {task.completed:,.0f}{of} {task.fields['unit']}{note}"
        elapsed = timedelta(seconds=int(task.elapsed or 0))
        self.console.print(f"{line}, {elapsed} elapsed{left}", markup=False, soft_wrap=True)


def stderr_console() -> Console:
    """Return the console of the visible bar, so that a line is printed above it, or else one on standard error."""
    return _SHOWN[-1].console if _SHOWN else SafeConsole(stderr=True)


@contextmanager
def showing_work(label: str, visible: bool = True) -> Iterator[None]:
    """Show a bar on a terminal, on which ``working`` and ``worked`` say what is being done; ``tell`` prints lines."""
    with ProgressBar(label, None, "", visible=visible and not _SHOWN) as bar:
        token = _WORK.set(bar if visible else None)
        try:
            yield
        finally:
            _WORK.reset(token)


def working(label: str, total: int, unit: str) -> None:
    """Say on the bar of ``showing_work``, if there is one, what is being done and how much of it there is."""
    if bar := _WORK.get():
        bar.begin(label, total, unit)


def worked(done: int, note: str = "") -> None:
    """Say how much of what ``working`` has announced is done, and what is next."""
    if bar := _WORK.get():
        bar.update(done)
        bar.describe(note)


def tell(line: str) -> None:
    """Print a line on standard error, within ``showing_work``."""
    if _WORK.get():
        stderr_console().print(line, style="dim", soft_wrap=True, markup=False)


def tells_costs() -> bool:
    """Return whether ``tell_cost`` may print something."""
    return _WORK.get() is not None


def tell_cost(what: str, cost: Cost) -> None:
    """Print what something cost, within ``showing_work``, if it took long or raised the peak memory by much."""
    if cost.seconds >= LONG or cost.memory >= LARGE:
        more = f" and raised the peak memory by {cost.memory / 2**30:.1f} GB" if cost.memory >= LARGE else ""
        tell(f"{what} took {cost.seconds:,.0f} s{more}")
