"""Models with several inputs: the entries of a dict batch that ``forward`` takes by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput
from ood_scores.extraction.hooks import hooked
from ood_scores.extraction.loaders import input_key, label_key


def further_inputs(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a dict batch, other than the inputs and labels, that are parameters of ``forward``.

    Raises:
        BadInput: if one of them does not have one row per input.
    """
    if not isinstance(batch, Mapping):
        return {}
    taken = inspect.signature(model.forward).parameters.keys() - {input_key(batch), label_key(batch)}
    found = {name: values for name, values in batch.items() if name in taken and isinstance(values, Tensor)}
    rows = len(batch[input_key(batch)])
    for name, values in found.items():
        if not values.ndim or len(values) != rows:
            raise BadInput(f"{name!r} of a batch has shape {list(values.shape)}, but there are {rows} inputs.")
    return found


@contextmanager
def passed_by_name(model: nn.Module, batch: Any, further: Mapping[str, Tensor]) -> Iterator[None]:
    """Pass further inputs whenever the model is called with its first input alone, in this context.

    Of a call with other rows, as a trial of the first few inputs, they are the first rows.
    """
    if not further:
        yield
        return
    name = input_key(batch)
    by_name = name in inspect.signature(model.forward).parameters

    def add(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = len(inputs[0])
        added = {key: _first_rows(values, rows) for key, values in further.items() if key not in named}
        return ((), {name: inputs[0], **named, **added}) if by_name else (inputs, {**named, **added})

    with hooked([(model, add)], before=True, with_kwargs=True):
        yield


def _first_rows(values: Tensor, rows: int) -> Tensor:
    return values if rows == len(values) else values[torch.arange(rows, device=values.device) % len(values)]
