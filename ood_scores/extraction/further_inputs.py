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

MASKS = ("attention_mask", "pixel_attention_mask")
"""Names of the inputs of transformers that say which tokens are no padding."""


def further_inputs(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a dict batch, other than the inputs and labels, that are parameters of ``forward``.

    A ``forward`` without named parameters, but with ``**kwargs``, takes all of them.

    Raises:
        BadInput: if one of them does not have one row per input.
    """
    if not isinstance(batch, Mapping):
        return {}
    named, takes_any, _ = _parameters(model)
    others = batch.keys() - {input_key(batch), label_key(batch)}
    taken = others if takes_any else others & set(named)
    found = {name: values for name, values in batch.items() if name in taken and isinstance(values, Tensor)}
    rows = len(batch[input_key(batch)])
    for name, values in found.items():
        if not values.ndim or len(values) != rows:
            raise BadInput(f"{name!r} of a batch has shape {list(values.shape)}, but there are {rows} inputs.")
    return found


def mask_in(further: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens ``[B, T]`` are no padding, from the further inputs of a batch; None if they do not say."""
    return next((further[name] for name in MASKS if name in further), None)


@contextmanager
def passed_by_name(model: nn.Module, batch: Any, further: Mapping[str, Tensor]) -> Iterator[None]:
    """Pass the input by its name, and further inputs, whenever the model is called with its first input alone.

    This holds in the context. Of a call with other rows, as a trial of the first few inputs, further inputs are the
    first rows. The input is passed by position if ``forward`` has no parameter of its name.
    """
    name = input_key(batch) if isinstance(batch, Mapping) else ""
    named, takes_any, takes_position = _parameters(model)
    by_name = name in named or (bool(name) and takes_any and not takes_position)
    if not further and (not by_name or named[:1] == [name]):
        yield
        return

    def add(
        module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = len(inputs[0])
        added = {key: _first_rows(values, rows) for key, values in further.items() if key not in named}
        return ((), {name: inputs[0], **named, **added}) if by_name else (inputs, {**named, **added})

    with hooked([(model, add)], before=True, with_kwargs=True):
        yield


def _parameters(model: nn.Module) -> tuple[list[str], bool, bool]:
    """Return the names of the parameters of ``forward``, and if there are none, whether it takes any keyword and any
    position."""
    found = inspect.signature(model.forward).parameters.values()
    kinds = {each.kind for each in found}
    named = [each.name for each in found if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    variable = inspect.Parameter.VAR_KEYWORD in kinds, inspect.Parameter.VAR_POSITIONAL in kinds
    return named, not named and variable[0], variable[1]


def _first_rows(values: Tensor, rows: int) -> Tensor:
    return values if rows == len(values) else values[torch.arange(rows, device=values.device) % len(values)]
