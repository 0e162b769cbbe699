"""The speed of everything, compared with baselines: ``python -m benchmarks.speed``."""

import os
import time
from pathlib import Path

MOST_SECONDS = 60.0
"""The most that is believed of a process's age, in case its clock is not that of the machine."""


def process_age() -> float:
    """Seconds since this process started, which may be long before the import of this module; 0 where it is unknown."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:  # not Linux
        return 0.0
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return min(max(age, 0.0), MOST_SECONDS)


STARTED = time.monotonic() - process_age()
"""When the process started, by ``time.monotonic``."""
