"""Transfers: inputs to the device and rows back, beside the model where the device can do both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arriving:
    """Rows of columns on their way to the CPU; their shapes and types are known already."""

    columns: dict[str, Tensor]
    arrived: torch.cuda.Event | None = None

    def wait(self) -> dict[str, Tensor]:
        """The columns, once they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.columns


class Transfers:
    """Copies between the CPU and a device.

    On a CUDA device each direction has a stream of its own and goes by pinned memory: the next inputs arrive and the
    last rows leave while the model runs, and the calls return at once. On other devices they return when all is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._outward = torch.cuda.Stream(device) if device.type == "cuda" else None

    def to_device(self, inputs: Tensor) -> Tensor:
        """The inputs, for what is started next on the device's current stream."""
        if self._inward is None or inputs.device.type != "cpu":
            return inputs.to(self._device)
        model = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._inward):
            moved = inputs.pin_memory().to(self._device, non_blocking=True)
        model.wait_stream(self._inward)
        moved.record_stream(model)
        return moved

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
