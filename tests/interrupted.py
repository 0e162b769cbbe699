"""Loaders that raise an error midway, and processes that are killed, for tests that continue an extraction."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class Interrupted(RuntimeError):
    """The error that the loader raises midway."""


class InterruptedLoader:
    """A loader of known length over inputs and labels, which raises ``Interrupted`` at batch ``stop``."""

    def __init__(self, inputs: Tensor, labels: Tensor, stop: int | None = None, batch_size: int = 4) -> None:
        self.dataset, self.batch_size, self.stop = TensorDataset(inputs, labels), batch_size, stop

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for number in range(len(self)):
            if number == self.stop:
                raise Interrupted
            yield self.dataset[number * self.batch_size : (number + 1) * self.batch_size]


def hide_gpus() -> None:
    """Let ``device="auto"`` be the CPU for the rest of this process: a fork cannot use CUDA that its parent started."""
    torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0


def exit_code_of_fork(work: Callable[[], object]) -> int:
    """Return the exit code of a fork of this process that does some work, on one thread and without a GPU."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            hide_gpus()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
