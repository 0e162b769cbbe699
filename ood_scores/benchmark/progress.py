"""A progress bar for extractions in other processes, which reads their caches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ood_scores.errors import CacheError
from ood_scores.features.storage.cache import CacheState, state
from ood_scores.features.storage.reading import open_to_read
from ood_scores.progress import ProgressBar

SECONDS = 1.0
"""Time between two updates."""


@contextmanager
def watching(caches: Sequence[Path], rows: int, visible: bool) -> Iterator[None]:
    """Show how many rows are in the caches, out of a total of ``rows``."""
    with ProgressBar("extracting", rows, "rows", visible=visible) as bar:
        over = threading.Event()
        look = threading.Thread(target=_follow, args=(caches, over, bar.update))
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
