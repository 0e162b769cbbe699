"""The progress bar of everything that takes a while."""

from __future__ import annotations


class ProgressBar:
    """A progress bar on standard error. Use it as a context manager.

    Args:
        label: The text before the bar.
        total: How many units there are; None if unknown.
        unit: The plural noun for what is counted.
        done: How many units are done at the start.
        visible: Whether to show anything.
        keep: Whether the bar stays on the screen at the end.
    """

    def __init__(
        self, label: str, total: int | None, unit: str, *, done: int = 0, visible: bool = True, keep: bool = False
    ) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from ood_scores.terminal import SafeConsole

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),  # names of datasets hold brackets
            BarColumn(),
            MofNCompleteColumn(),
            unit,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=SafeConsole(stderr=True),
            disable=not visible,
            transient=not keep,
        )
        self._task = self._progress.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1) -> None:
        """Count more units as done."""
        self._progress.advance(self._task, count)

    def update(self, done: int) -> None:
        """Set how many units are done."""
        self._progress.update(self._task, completed=done)

    def describe(self, label: str, note: str) -> None:
        """Set the texts before and after the bar."""
        self._progress.update(self._task, description=label, note=note)
