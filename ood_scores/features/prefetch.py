"""Blocks on a device, each on its way while the one before is computed with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Columns = dict[str, Tensor]


def moved(parts: Iterator[Columns], device: torch.device) -> Iterator[Columns]:
    """The columns of blocks, in their order, on a device.

    To a CUDA device they go by pinned memory and a stream of their own, one block ahead.
    """
    if device.type != "cuda":
        yield from ({name: values.to(device) for name, values in part.items()} for part in parts)
        return
    stream = torch.cuda.Stream(device)
    waiting: tuple[Columns, torch.cuda.Event] | None = None
    for part in parts:
        with torch.cuda.stream(stream):
            sent = {name: _sent(values, device) for name, values in part.items()}
            arrived = stream.record_event()
        if waiting:
            yield _received(*waiting)
        waiting = sent, arrived
    if waiting:
        yield _received(*waiting)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device) if values.is_cuda else values.pin_memory().to(device, non_blocking=True)


def _received(columns: Columns, arrived: torch.cuda.Event) -> Columns:
    for values in columns.values():
        reader = torch.cuda.current_stream(values.device)
        reader.wait_event(arrived)
        values.record_stream(reader)
    return columns
