"""Hooks on modules that are removed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@contextmanager
def hooked(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]], before: bool = False, with_kwargs: bool = False
) -> Iterator[None]:
    """Register forward hooks, or with ``before`` forward pre-hooks, and remove them at the end of the context."""
    with ExitStack() as stack:
        for module, hook in hooks:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook, with_kwargs=with_kwargs).remove)
        yield


def first_argument(inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return the first argument of a call, by position or by name; None if there is none."""
    return next(iter((*inputs, *named.values())), None)


@dataclass(frozen=True)
class Place:
    """A place in a model: what a module receives first, or what it returns."""

    name: str
    module: nn.Module
    after: bool = False

    def __str__(self) -> str:
        return f"output of {self.name}" if self.after else self.name

    def hook(self, read: Callable[[Any], Any]) -> Callable[..., Any]:
        """Return a hook that calls ``read`` with the value, and replaces the value unless ``read`` returns None."""

        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            changed = read(first_argument(inputs, named))
            if changed is None:
                return None
            return ((changed, *inputs[1:]), named) if inputs else ((), {**named, next(iter(named)): changed})

        def after(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            return read(output)

        return after if self.after else before


@contextmanager
def hooked_at(hooks: Iterable[tuple[Place, Callable[..., Any]]]) -> Iterator[None]:
    """Register hooks of places, made by ``Place.hook``, and remove them at the end of the context."""
    with ExitStack() as stack:
        for place, hook in hooks:
            stack.enter_context(hooked([(place.module, hook)], before=not place.after, with_kwargs=True))
        yield


class Capture:
    """The values at some places of a model in a forward pass: ``calls`` holds those of all calls of each place.

    The pass is made within ``running``, which registers hooks, and ``recording``; other passes are not recorded. A
    ``compiled`` model is split at these places. The hooks are the same objects for every pass, so that it need not be
    compiled again.
    """

    def __init__(self, places: Sequence[Place], compiled: bool = False) -> None:
        self.calls: list[list[Any]] = [[] for _ in places]
        self._is_recording = False
        hooks = [place.hook(self._recorder(calls)) for place, calls in zip(places, self.calls, strict=True)]
        if compiled:
            hooks = [torch.compiler.disable(hook) for hook in hooks]
        self._hooks = list(zip(places, hooks, strict=True))

    @property
    def is_complete(self) -> bool:
        """Whether every place was reached."""
        return all(self.calls)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            with hooked_at(self._hooks):
                yield
        finally:
            self._forget()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the calls in this context, and discard those of an earlier pass."""
        self._forget()
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def _recorder(self, calls: list[Any]) -> Callable[[Any], None]:
        def record(value: Any) -> None:
            if self._is_recording:
                calls.append(value)

        return record

    def _forget(self) -> None:
        for calls in self.calls:
            calls.clear()
