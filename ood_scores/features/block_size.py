"""The default size of a block."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ood_scores.device_memory import bytes_on
from ood_scores.features.storage.columns import Column

BLOCK_BYTES = 16 * 2**20
"""The largest default size of a block, measured in float64."""

BLOCK_ROWS = 16384
"""The most rows of a default block: enough to hide the overhead of Python, few enough for the processor's caches."""

GPU_BLOCK_SHARE = 1 / 256
"""The largest default size of a block on a GPU, measured in float64, as a share of its memory."""

GPU_BLOCK_ROWS = 2**17
"""The most rows of a default block on a GPU, which needs more of them to be busy."""


def default_rows(columns: Iterable[Column], device: torch.device) -> int:
    """Return the default number of rows of a block of some columns on a device."""
    width = sum(math.prod(column.shape[1:]) for column in columns)
    most_rows = GPU_BLOCK_ROWS if device.type == "cuda" else BLOCK_ROWS
    most_bytes = bytes_on(device, BLOCK_BYTES, GPU_BLOCK_SHARE)
    return max(1, min(most_rows, most_bytes // (8 * max(width, 1))))
