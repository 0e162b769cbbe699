"""The state of a file: what changes whenever the file is written, so that a check need not be repeated."""

from __future__ import annotations

import os
import time
from pathlib import Path

SETTLING_NS = 10**9
"""Two writes within one tick of the clock of a file system leave the same time, so the time of a young file is not
trusted."""

State = tuple[int, ...]


def state_of(path: Path) -> State:
    """Return the device, number, size, and times of a file."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def is_settled(state: State) -> bool:
    """Return whether a later write would give the file another state."""
    return time.time_ns() - max(state[-2:]) > SETTLING_NS
