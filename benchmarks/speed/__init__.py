"""The speed of everything, compared with baselines: ``python -m benchmarks.speed``."""

import time

STARTED = time.monotonic()
"""When the process started, before it imported torch, which may take a while."""
