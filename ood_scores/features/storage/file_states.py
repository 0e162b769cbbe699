"""The state of a file: what changes whenever the file is written, so that a check need not be repeated."""

from __future__ import annotations

import os
import time
from pathlib import Path

TICK_NS, COARSE_TICK_NS = 5 * 10**7, 2 * 10**9
"""Longest steps of the clocks of file systems: those that record parts of a second, and those that do not."""

State = tuple[int, ...]


def state_of(path: Path) -> State:
    """Return the device, number, size, and times of a file."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_settled(state: State) -> bool:
    """Return whether a later write would give the file another state: two writes within one step would not."""
    written = max(state[-2:])
    return time.time_ns() - written > (TICK_NS if written % 10**9 else COARSE_TICK_NS)
