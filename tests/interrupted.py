"""A loader that raises an error midway, for tests that continue an extraction."""

from __future__ import annotations

from collections.abc import Iterator

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
