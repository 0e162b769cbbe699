"""Training in one process, or in several that ``torchrun`` started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ood_scores.runtime import CPU, Ranks, find_device

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes(Ranks):
    """The rank of this process among those that train one model, and its device. The first process writes files.

    Attributes:
        device: Device of this process.
    """

    device: torch.device = CPU

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, on each of them."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return the first process's value, on each process."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the running statistics of the first process to all others, as DDP does before each step."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def with_sync_batchnorm(self, model: nn.Module) -> nn.Module:
        """Return the model with BatchNorm synchronized over all processes; names and weights stay the same."""
        return convert_sync_batchnorm(model) if self.count > 1 else model

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()

    def wrap(self, step: nn.Module, some_unread: bool) -> nn.Module:
        """Average gradients over all processes; ``some_unread`` says that the loss ignores some parameters."""
        if self.count == 1:
            return step
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(step, device_ids=ids, find_unused_parameters=some_unread)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes of ``torchrun``, or run alone; ``auto`` uses a GPU if there is one, each process its own.

    Raises:
        BadInput: if there is no such device, or the environment is not that of ``torchrun``.
    """
    ranks = Ranks.here()
    own = find_device(device, local_rank=ranks.local)
    with torch.cuda.device(own) if own.type == "cuda" else nullcontext():
        if ranks.count == 1:
            yield Processes(device=own)
            return
        started_here = not dist.is_initialized()
        if started_here:
            _start_group(own)
        try:
            yield Processes(ranks.rank, ranks.count, ranks.local, own)
        finally:
            if started_here:
                dist.destroy_process_group()


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN find the fastest algorithms on a GPU by trial, which pays for many batches of the same size.

    They may sum in another order in the next run, so a caller who requests deterministic algorithms keeps the defaults.
    """
    cudnn = torch.backends.cudnn
    before, deterministic = cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    cudnn.benchmark = before or (device.type == "cuda" and not deterministic)
    try:
        yield
    finally:
        cudnn.benchmark = before


def _start_group(device: torch.device) -> None:
    """Start the process group; with NCCL, each process is bound to its GPU from the start."""
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
