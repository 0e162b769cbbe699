"""A bar that follows caches while processes fill them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ood_scores.errors import CacheError
from ood_scores.features.storage.cache import CacheState, open_to_read, state

SECONDS = 1.0
"""Between two looks."""


@contextmanager
def watching(caches: Sequence[Path], rows: int, visible: bool) -> Iterator[None]:
    """Shows how many of so many rows are in the caches by now, as their own counters say, on a terminal."""
    columns = (TextColumn("extracting"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not visible, transient=True) as bar:
        task = bar.add_task("", total=rows)
        over = threading.Event()
        look = threading.Thread(target=_follow, args=(caches, over, lambda n: bar.update(task, completed=n)))
        look.start()
        try:
            yield
        finally:
            over.set()
            look.join()


def _follow(caches: Sequence[Path], over: threading.Event, show: Callable[[int], None]) -> None:
    finished: dict[Path, int] = {}
    while not over.wait(SECONDS):
        states = {cache: _state(cache) for cache in caches if cache not in finished}
        finished |= {cache: found.rows for cache, found in states.items() if found and found.finished}
        growing = sum(found.rows for cache, found in states.items() if found and cache not in finished)
        show(sum(finished.values()) + growing)


def _state(cache: Path) -> CacheState | None:
    try:
        with open_to_read(cache) as h5:
            return state(h5)
    except (CacheError, OSError):
        return None
