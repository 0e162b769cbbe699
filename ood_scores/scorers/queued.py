"""Scoring blocks on a device: the work on a block is queued, and then the host waits once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ood_scores.device_memory import FittingParts
from ood_scores.errors import OodScoresError
from ood_scores.features import Block
from ood_scores.runtime import Cost


@dataclass
class QueuedScores:
    """The scores of blocks on a device, each with one wait of the host and one transfer.

    The transfer carries the scores of all scorers, the logits if they are asked for, whether the columns are finite,
    and whether a rare condition (see ``Block.happens``) holds for a row. If one does, this block and the following ones
    are scored with waits. Blocks for which the memory of the device does not suffice are scored in parts.

    Args:
        score: A function that writes the scores of a block into ``[S, B]`` on its device.
    """

    score: Callable[[Block, Tensor], None]
    waits: bool = field(default=False, init=False)
    parts: FittingParts = field(default_factory=lambda: FittingParts("block"), init=False)

    def write(self, block: Block, scores: Tensor, logits: Tensor | None = None) -> None:
        """Write the scores of a block into ``scores`` ``[S, B]`` and its logits into ``logits`` ``[B, C]`` on the CPU.

        Raises:
            NotFinite: if a column holds NaN or infinite values.
        """

        def received(rows: slice) -> tuple[Tensor, Tensor]:
            return self._received(block.part(rows), len(scores), logits is not None)

        for part, (found, its_logits) in self.parts.run(len(block), received):
            scores[:, part] = found
            if logits is not None:
                logits[part] = its_logits

    def _received(self, block: Block, count: int, with_logits: bool) -> tuple[Tensor, Tensor]:
        """Return the scores ``[count, B]`` and the logits ``[B, C]`` of a block on the CPU; C is 0 without logits."""
        block.postponed = None if self.waits else []
        found = torch.empty(count, len(block), dtype=torch.float64, device=block.device)
        try:
            self.score(block, found)
        except OodScoresError:
            block.require_finite()  # it may be the reason
            raise
        finite, happened = block.is_finite(), [condition.to(block.device) for condition in block.postponed or []]
        flags = [finite, torch.stack(happened).any() if happened else ~finite.new_ones(())]
        logits = block.logits if with_logits else found.new_empty(len(block), 0)
        received = torch.cat([values.flatten().double() for values in (found, logits, torch.stack(flags))]).cpu()
        is_finite, has_happened = received[-2:].tolist()
        if not is_finite:
            block.require_finite()
        if has_happened:
            self.waits = True
            return self._received(block.part(slice(None)), count, with_logits)
        return received[: found.numel()].view(count, -1), received[found.numel() : -2].view(logits.shape)


@dataclass
class DeviceClock:
    """The time that work takes on a CUDA device, measured without waiting for it.

    Args:
        memory: Whether the memory of work on the CPU is measured too.
    """

    memory: bool
    marks: list[tuple[Cost, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def measured(self, cost: Cost, device: torch.device) -> AbstractContextManager[None]:
        """Add what the work within the context costs, on another device at once, on a CUDA device in ``settle``."""
        return self._marked(cost, device) if device.type == "cuda" else cost.measured(self.memory)

    @contextmanager
    def _marked(self, cost: Cost, device: torch.device) -> Iterator[None]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        yield
        stop.record(torch.cuda.current_stream(device))
        self.marks.append((cost, start, stop))

    def settle(self) -> None:
        """Add the times of work that is complete."""
        for cost, start, stop in self.marks:
            stop.synchronize()
            cost.seconds += start.elapsed_time(stop) / 1000
        self.marks.clear()
