"""How often the host waits for a CUDA device, or for the simulation of one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import torch


def waits_of(run: Callable[[], object]) -> int:
    """Count how often the host waits for the device: torch warns of it, and the simulation counts."""
    if "simcuda" in sys.modules:
        with sys.modules["simcuda"].watch() as events:
            run()
        return int(events.waits())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)
