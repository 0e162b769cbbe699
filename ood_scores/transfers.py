"""Copies of tensors between the CPU and a device, which overlap with the work of the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.runtime import CPU


@dataclass(frozen=True)
class Arriving:
    """Columns that are being copied between the CPU and a device; their shapes and types are known already."""

    columns: dict[str, Tensor]
    arrived: torch.cuda.Event | None = None

    def wait(self) -> dict[str, Tensor]:
        """Return the columns once the copies are complete."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.columns

    def on_device(self) -> dict[str, Tensor]:
        """Return the columns at once; work queued on the device's current stream from now on waits for the copies."""
        if self.arrived is not None:
            for values in self.columns.values():
                stream = torch.cuda.current_stream(values.device)
                stream.wait_event(self.arrived)
                values.record_stream(stream)
        return self.columns


class Transfers:
    """Copies between the CPU and a device.

    On a CUDA device each direction has its own stream and uses pinned memory: the next inputs arrive and the last rows
    leave while the device computes, and the calls return at once. On other devices the calls return when the copies
    are complete.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._outward = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reads: list[torch.cuda.Event] = []

    def to_device(self, columns: Mapping[str, Tensor]) -> Arriving:
        """Copy columns to the device unless they are there already."""
        if self._inward is None:
            return Arriving({name: values.to(self._device) for name, values in columns.items()})
        with torch.cuda.stream(self._inward):
            sent = {name: self._sent(values) for name, values in columns.items()}
            event = self._inward.record_event()
        if any(values.is_pinned() for values in columns.values()):
            self._reads.append(event)
        return Arriving(sent, event)

    def wait_for_reads(self) -> None:
        """Wait until the pinned tensors given to ``to_device`` have been read, so that their owner may change them.

        This takes as long as the copies, not as the work of the device. Other tensors have been read already.
        """
        while self._reads:
            self._reads.pop().synchronize()

    def _sent(self, values: Tensor) -> Tensor:
        if values.is_cuda:
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def own_copies(self, columns: Mapping[str, tuple[Tensor, torch.dtype]]) -> dict[str, Tensor]:
        """Copy columns in the given dtypes, so that they can be copied to the CPU without waiting.

        The values may be on any device, and their memory may be changed by work that is queued later, as that of the
        outputs of a CUDA graph is. The copies are ordinary tensors, even in inference mode: on the device, or on the
        CPU if the values are there or if copies to it are not concurrent.
        """
        with torch.inference_mode(False):
            return {
                name: values.to(self._device if self._outward and values.is_cuda else CPU, dtype, copy=True)
                for name, (values, dtype) in columns.items()
            }

    def to_host(self, columns: Mapping[str, Tensor]) -> Arriving:
        """Copy ``own_copies`` to the CPU, once the work queued on the device's current stream is done."""
        if self._outward is None:
            return Arriving(dict(columns))
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        copies = {}
        with torch.inference_mode(False), torch.cuda.stream(self._outward):
            for name, values in columns.items():
                pinned = torch.empty(values.shape, dtype=values.dtype, device=CPU, pin_memory=True)
                copies[name] = pinned.copy_(values, non_blocking=True)
                if values.is_cuda:
                    values.record_stream(self._outward)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(self._outward)
        return Arriving(copies, arrived)


def pins_memory(device: str) -> bool:
    """Whether loaders should pin their batches, which a CUDA device copies sooner, and while the host goes on."""
    return not device.startswith("cpu") and torch.cuda.is_available()


def blocks_on(device: torch.device, blocks: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Copy blocks of columns to a device; on a CUDA device, copy each block while the previous one is in use."""
    transfers = Transfers(device)
    if device.type != "cuda":
        yield from (transfers.to_device(block).columns for block in blocks)
        return
    waiting: Arriving | None = None
    for block in blocks:
        sent = transfers.to_device(block)
        if waiting:
            yield waiting.on_device()
        waiting = sent
    if waiting:
        yield waiting.on_device()
