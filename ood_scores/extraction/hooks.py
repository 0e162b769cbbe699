"""Hooks on modules that are removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], before: bool = False) -> Iterator[None]:
    """Register forward hooks, or with ``before`` forward pre-hooks, and remove them at the end of the context."""
    with ExitStack() as stack:
        for module, hook in hooks:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook).remove)
        yield


class Capture:
    """The first inputs that some modules receive in a forward pass made within ``running``.

    A ``compiled`` model is split at these modules. The hooks are the same objects for every pass, so that it need not
    be compiled again.
    """

    def __init__(self, modules: Sequence[nn.Module], compiled: bool = False) -> None:
        self.received: list[Tensor | None] = [None] * len(modules)
        keepers = [_keeper(self.received, place) for place in range(len(modules))]
        if compiled:
            keepers = [torch.compiler.disable(keeper) for keeper in keepers]
        self._hooks = list(zip(modules, keepers, strict=True))

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            with hooked(self._hooks, before=True):
                yield
        finally:
            self.forget()

    def forget(self) -> None:
        """Discard the inputs of an earlier pass."""
        self.received[:] = [None] * len(self.received)


def _keeper(received: list[Tensor | None], place: int) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        received[place] = inputs[0]

    return keep
