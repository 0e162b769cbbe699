"""The process among those of ``torchrun``, the device that it computes on, and transfers to and from that device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ood_scores.errors import BadInput

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """Which process this is (from 0), of how many, and which one on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def here(cls) -> Ranks:
        """As `torchrun` says in the environment.

        Raises:
            BadInput: the environment names several processes, but not where they meet.
        """
        rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if count > 1 and "MASTER_ADDR" not in os.environ:
            raise BadInput(
                f"WORLD_SIZE={count} is in the environment, but MASTER_ADDR is not: start the processes with torchrun, "
                "or unset WORLD_SIZE to run alone."
            )
        return cls(rank, max(count, 1), local)

    @property
    def first(self) -> bool:
        return self.rank == 0


def find_device(device: str | torch.device, own: torch.device = CPU, local_rank: int = 0) -> torch.device:
    """``"auto"``: one's own device if it is not the CPU, else a GPU if there is one, else the CPU.

    Processes beside each other on a machine each take the GPU of their ``local_rank``.

    Raises:
        BadInput: there is no such device here.
    """
    if device == "auto":
        device = f"cuda:{local_rank}" if own.type == "cpu" and torch.cuda.is_available() else own
    if str(device) == "cuda" and local_rank:
        device = f"cuda:{local_rank}"
    try:
        found = torch.zeros(1, device=device)
        found.item()  # the meta device has no values
        return found.device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BadInput(f"there is no device {str(device)!r} here: {str(error).splitlines()[0]}") from error


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
        """Return the columns at once; what the device's current stream is given from now on waits for the copies."""
        if self.arrived is not None:
            for values in self.columns.values():
                stream = torch.cuda.current_stream(values.device)
                stream.wait_event(self.arrived)
                values.record_stream(stream)
        return self.columns


class Transfers:
    """Copies between the CPU and a device.

    On a CUDA device each direction has a stream of its own and goes through pinned memory: the next inputs arrive and
    the last rows leave while the device computes, and the calls return at once. On other devices they return when the
    copies are complete.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._outward = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, columns: Mapping[str, Tensor]) -> Arriving:
        """Copy columns to the device, as far as they are not there."""
        if self._inward is None:
            return Arriving({name: values.to(self._device) for name, values in columns.items()})
        with torch.cuda.stream(self._inward):
            sent = {name: self._sent(values) for name, values in columns.items()}
            return Arriving(sent, self._inward.record_event())

    def _sent(self, values: Tensor) -> Tensor:
        if values.is_cuda:
            return values.to(self._device)
        return values.pin_memory().to(self._device, non_blocking=True)

    def to_host(self, columns: Mapping[str, tuple[Tensor, torch.dtype]]) -> Arriving:
        """Copies of columns in the given types, of what the device's current stream has been given to compute.

        The copies are ordinary tensors, even in inference mode.
        """
        with torch.inference_mode(False):
            return self._copied(columns)

    def _copied(self, columns: Mapping[str, tuple[Tensor, torch.dtype]]) -> Arriving:
        if self._outward is None:
            return Arriving({name: values.to("cpu", dtype, copy=True) for name, (values, dtype) in columns.items()})
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        copies = {}
        with torch.cuda.stream(self._outward):
            for name, (values, dtype) in columns.items():
                copies[name] = torch.empty(values.shape, dtype=dtype, pin_memory=True).copy_(values, non_blocking=True)
                if values.is_cuda:
                    values.record_stream(self._outward)
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(self._outward)
        return Arriving(copies, arrived)


def blocks_on(device: torch.device, blocks: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Copy blocks of columns to a device; to a CUDA device each while the block before is computed with."""
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
