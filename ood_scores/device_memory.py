"""Work on rows in parts that fit into the memory of a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from ood_scores.user_warnings import warn_user

T = TypeVar("T")


def bytes_on(device: torch.device, least: int, share: float) -> int:
    """Return how much memory to use at a time: ``least``, or on a CUDA device a share of its memory if it is more."""
    if device.type != "cuda":
        return least
    return max(least, int(share * torch.cuda.get_device_properties(device).total_memory))


@dataclass
class FittingParts:
    """Parts of blocks or batches, halved when the memory of the device does not suffice.

    Later ones are divided into parts of the same size from the start, and a single warning says so.

    Args:
        noun: What is divided, for the warning.
        rows: The most rows of a part; None while all rows fit.
    """

    noun: str
    rows: int | None = None

    def run(self, count: int, work: Callable[[slice], T]) -> Iterator[tuple[slice, T]]:
        """Yield consecutive parts of ``count`` rows, each with the result of the work on it.

        Raises:
            torch.OutOfMemoryError: if the memory does not suffice for a single row.
        """
        done = 0
        while done < count:
            part = slice(done, min(count, done + (self.rows or count)))
            try:
                found = work(part)
            except torch.OutOfMemoryError:
                if part.stop - part.start == 1:
                    raise
            else:
                yield part, found
                done = part.stop
                continue
            self._halve(part.stop - part.start)  # here, where the error no longer keeps what was computed

    def _halve(self, rows: int) -> None:
        if self.rows is None:
            warn_user(
                f"the memory of the device does not suffice for a {self.noun} of {rows:,} rows: using smaller ones."
            )
        self.rows = rows // 2
        torch.cuda.empty_cache()
