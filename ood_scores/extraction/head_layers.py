"""Layers that may be the head of a model: what they receive and return in a pass, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ood_scores.errors import HeadMismatch
from ood_scores.extraction.hooks import first_argument, hooked
from ood_scores.extraction.outputs import joined, rows_of

HOW_TO_NAME = (
    "Name the affine map that computes the logits with head='module.name' (see model.named_modules()); set "
    "model.num_classes = 0 if the model is an encoder, whose output is the features; or pass head=False to keep logits "
    "and features without a head, which some scorers need"
)


@dataclass
class Layer:
    """A leaf module with weights, and what it received ``[B, D]`` and returned ``[B, K]`` in a pass.

    ``returned`` is None if it is not one vector per input.
    """

    name: str
    module: nn.Module
    received: Tensor
    returned: Tensor | None

    @property
    def is_affine(self) -> bool:
        """Whether the module has a weight that could map each input row to its output row."""
        weight = getattr(self.module, "weight", None)
        if self.returned is None or not isinstance(weight, Tensor) or weight.ndim < 2:
            return False
        return weight[0].numel() == self.received.shape[1] and len(weight) == self.returned.shape[1]

    @property
    def weight(self) -> Tensor:
        """The weight, float32 ``[K, D]``.

        Raises:
            HeadMismatch: if it is quantized.
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        if is_traceable_wrapper_subclass(weight):
            raise HeadMismatch(
                f"the weight of {self.name} is quantized ({type(weight).__name__}), and the layer is not an affine "
                f"map: pass the model before quantization. {HOW_TO_NAME}."
            )
        return weight.detach().to_dense().flatten(1).float().to(self.received.device)

    @property
    def bias(self) -> Tensor:
        """The bias, float32 ``[K]``; zeros if there is none."""
        bias = getattr(self.module, "bias", None)
        if bias is None:
            return self.received.new_zeros(len(self.module.weight), dtype=torch.float32)  # type: ignore[arg-type]
        return bias.detach().float().to(self.received.device)


class Recording:
    """A record of what the leaf modules with weights receive and return, one vector per input, in a pass.

    Args:
        model: the model.
        named: the module whose leaves are recorded; None for all.
    """

    def __init__(self, model: nn.Module, named: nn.Module | None = None) -> None:
        self.model, self.named = model, named
        self.calls: dict[str, list[tuple[Tensor, Tensor | None]]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record the pass that is made in this context."""
        inside = set((self.named or self.model).modules())
        leaves = [(name, leaf) for name, leaf in _leaves_with_weights(self.model) if leaf in inside]
        with hooked(((leaf, self._recorder(name)) for name, leaf in leaves), with_kwargs=True):
            yield

    def layers(self, rows: int, device: torch.device) -> list[Layer]:
        """Return the layers with what they last received and returned for the ``rows`` inputs, on a device."""
        return self._layers(device, lambda calls: joined(calls, rows))

    def layers_of_all_calls(self, device: torch.device) -> list[Layer]:
        """Return the layers with what they received and returned in all calls, one after the other, on a device."""
        return self._layers(device, _all_rows)

    def _layers(self, device: torch.device, join: Callable[[list[Tensor | None]], Tensor | None]) -> list[Layer]:
        found = []
        for name, pairs in self.calls.items():
            received, returned = (join(list(calls)) for calls in zip(*pairs, strict=True))
            if received is not None:
                here = None if returned is None else returned.to(device)  # of a model on several devices
                found.append(Layer(name, self.model.get_submodule(name), received.to(device), here))
        return found

    def _recorder(self, name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            received = rows_of(first_argument(inputs, named))
            if received is not None:
                self.calls.setdefault(name, []).append((received, rows_of(output)))

        return record


def _all_rows(calls: list[Tensor | None]) -> Tensor | None:
    """Return the rows of all calls, unless some have none, or rows of another width."""
    present = [values for values in calls if values is not None]
    same = len(present) == len(calls) and len({values.shape[1] for values in present}) == 1
    return torch.cat(present) if same else None


def _leaves_with_weights(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules with parameters and without children other than torch's parametrizations of weights."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if {child for child, _ in module.named_children()} <= {"parametrizations"}
        and next(module.parameters(), None) is not None
        and "parametrizations" not in name.split(".")
    ]
