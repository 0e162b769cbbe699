"""Where the fitted state of a scorer is: on the CPU, with one copy on each device that it scores on."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ood_scores.features import Head

S = TypeVar("S", bound="DeviceState")

COPIES = "_on_devices"
"""The attribute that holds, by device, the attributes that were copied and the copy."""

MOST_OF_MEMORY = 0.5
"""The largest share of the free memory of a device that the copy of one tensor may take; others stay on the CPU."""

_SENT: dict[torch.device, WeakTensorKeyDictionary] = {}
"""The copy of each tensor on each device, so that scorers with a common bank have a common copy."""


class DeviceState:
    """Tensors in attributes, also in lists, tuples, dicts, and objects of this class, that can be on any device."""

    def on_device(self: S, device: torch.device) -> S:
        """Return a copy with all tensors on a device, which is kept; the object itself for the CPU.

        The copy is made again if an attribute has been replaced since, as a fit does.
        """
        if device.type == "cpu":
            return self
        copies: dict[torch.device, tuple[dict[str, Any], S]] = vars(self).setdefault(COPIES, {})
        state, known = self.__getstate__(), copies.get(device)
        if known is None or known[0].keys() != state.keys() or any(known[0][name] is not state[name] for name in state):
            known = copies[device] = state, _like(self, lambda values: _sent(values, device))
        return known[1]

    def keep_on_cpu(self) -> None:
        """Move all tensors to the CPU, from where they can go anywhere."""
        vars(self).update({name: _replaced(value, Tensor.cpu) for name, value in self.__getstate__().items()})

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle: all but the copies on devices."""
        return {name: value for name, value in vars(self).items() if name != COPIES}


def _replaced(value: Any, to: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with other tensors; the value itself if it has none."""
    if isinstance(value, Tensor):
        return to(value)
    if isinstance(value, DeviceState):
        return _like(value, to)
    if isinstance(value, Head):
        weight, bias = to(value.weight), to(value.bias)
        if weight is value.weight and bias is value.bias:
            return value
        return Head(weight, bias, {kind: to(values) for kind, values in value.negatives.items()})
    if type(value) is dict:
        found = {key: _replaced(part, to) for key, part in value.items()}
        return found if any(found[key] is not part for key, part in value.items()) else value
    if type(value) in (list, tuple):
        parts = [_replaced(part, to) for part in value]
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    return value


def _like(value: S, to: Callable[[Tensor], Tensor]) -> S:
    """Return an object with the same attributes but other tensors; the object itself if it has none."""
    state = value.__getstate__()
    found = {name: _replaced(part, to) for name, part in state.items()}
    if all(found[name] is part for name, part in state.items()):
        return value
    made = copy.copy(value)
    vars(made).update(found)
    return made


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Return the copy of a tensor on the device; the tensor itself if the copy would fill much of its memory."""
    if values.device == device:
        return values
    known = _SENT.setdefault(device, WeakTensorKeyDictionary())
    version, found = known.get(values, (None, None))
    if found is None or version != _version(values):
        if device.type == "cuda" and values.nbytes > MOST_OF_MEMORY * torch.cuda.mem_get_info(device)[0]:
            return values
        found = values.to(device)
        known[values] = _version(values), found
    return found


def _version(values: Tensor) -> int:
    """Return a number that changes when the values of a tensor are changed in place."""
    return 0 if values.is_inference() else values._version
