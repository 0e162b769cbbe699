"""Models with several inputs: the entries of a dict batch that ``forward`` takes by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ood_scores.errors import BadInput
from ood_scores.extraction.hooks import hooked
from ood_scores.extraction.loaders import (
    ID_KEYS,
    INPUT_KEYS,
    LABEL_KEYS,
    NamedInputs,
    can_be_labels,
    input_key,
    label_key,
)

MASKS = ("attention_mask", "pixel_attention_mask")
"""Names of the inputs of transformers that say which tokens are no padding."""

LABELS = "labels"


def with_names(batch: Any, model: nn.Module) -> Any:
    """Return a batch of several inputs as a dictionary; other batches are unchanged.

    These are ``((x, z), labels)`` and ``((x, z),)``, whose inputs are the parameters of ``forward`` in their order;
    ``({"x": x, "z": z}, labels)``; and dictionaries with the first parameter of ``forward``, but without a key of
    ``INPUT_KEYS``.

    Raises:
        BadInput: if there are more inputs than parameters.
    """
    if isinstance(batch, Mapping):
        return _with_first(batch, label_key(batch), model)
    if not isinstance(batch, (tuple, list)) or not batch:
        return batch
    inputs, labels = batch[0], {LABELS: batch[1]} if len(batch) > 1 else {}
    if isinstance(inputs, Mapping):
        return _with_first({**inputs, **labels}, LABELS if labels else label_key(inputs), model)
    is_list = isinstance(inputs, (tuple, list)) and len(inputs) > 0
    if not is_list or not all(isinstance(each, Tensor) for each in inputs):
        return batch
    names = _parameters(model).named
    if len(inputs) > len(names):
        raise BadInput(
            f"a batch has {len(inputs)} inputs, but forward of {type(model).__name__} has the parameters "
            f"{', '.join(names) or '*args or **kwargs only'}: pass a dictionary of inputs by the names of parameters."
        )
    named = dict(zip(names, inputs, strict=False))
    return NamedInputs({**named, **labels}, names[0], LABELS if labels else None)


def _with_first(batch: Mapping[str, Any], label: str | None, model: nn.Module) -> Mapping[str, Any]:
    named = _parameters(model).named
    if not named or named[0] not in batch or not batch.keys().isdisjoint(INPUT_KEYS):
        return batch
    return NamedInputs(batch, named[0], None if label in named and label != LABELS else label)


def further_inputs(batch: Any, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a dict batch, other than the inputs and labels, that are parameters of ``forward``.

    A ``forward`` without named parameters, but with ``**kwargs``, takes all of them. Numeric arrays become tensors.

    Raises:
        BadInput: if one of them does not have one row per input.
    """
    if not isinstance(batch, Mapping):
        return {}
    parameters = _parameters(model)
    others = batch.keys() - {input_key(batch), label_key(batch)}
    taken = others if parameters.takes_any_name else others & set(parameters.named)
    found = {name: values for name in batch if name in taken and (values := _as_tensor(batch[name])) is not None}
    rows = len(batch[input_key(batch)])
    for name, values in found.items():
        if not values.ndim or len(values) != rows:
            raise BadInput(f"{name!r} of a batch has shape {list(values.shape)}, but there are {rows} inputs.")
    return found


def unread_labels(batch: Any, model: nn.Module) -> str | None:
    """Return a warning of a dict batch without labels, but with entries that may be labels under other keys."""
    if not isinstance(batch, Mapping) or label_key(batch) is not None:
        return None
    read = {input_key(batch), *further_inputs(batch, model), *ID_KEYS}
    rows = len(batch[input_key(batch)])
    unread = [str(key) for key, values in batch.items() if key not in read and can_be_labels(values, rows)]
    if not unread:
        return None
    return (
        f"the batches have no labels under {', '.join(LABEL_KEYS[:-1])}, or {LABEL_KEYS[-1]}, and nothing reads "
        f"{', '.join(unread)}: if those are the labels, rename their key to {LABEL_KEYS[1]}."
    )


def mask_in(further: Mapping[str, Tensor]) -> Tensor | None:
    """Return which tokens ``[B, T]`` are no padding, from the further inputs of a batch; None if they do not say."""
    return next((further[name] for name in MASKS if name in further), None)


def _as_tensor(values: Any) -> Tensor | None:
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(values))
    return values if isinstance(values, Tensor) else None


@contextmanager
def passed_by_name(model: nn.Module, batch: Any, further: Mapping[str, Tensor]) -> Iterator[None]:
    """Pass the input by its name, and further inputs, whenever the model is called with its first input alone.

    This holds in the context. Of a call with other rows, as a trial of the first few inputs, further inputs are the
    first rows. The input is passed by position if ``forward`` has no parameter of its name.
    """
    name = input_key(batch) if isinstance(batch, Mapping) else ""
    parameters = _parameters(model)
    by_any_name = bool(name) and parameters.takes_any_name and not parameters.takes_any_position
    by_name = name in parameters.named or by_any_name
    if not further and (not by_name or parameters.named[:1] == [name]):
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


def requires_several(model: nn.Module) -> bool:
    """Return whether ``forward`` cannot be called with one input alone."""
    return _parameters(model).required > 1


@dataclass(frozen=True)
class _Parameters:
    """The parameters of ``forward``.

    Attributes:
        named: their names.
        required: the number of those without a default.
        takes_any_name: whether there are no names, but ``**kwargs``.
        takes_any_position: whether there is ``*args``.
    """

    named: list[str]
    required: int
    takes_any_name: bool
    takes_any_position: bool


def _parameters(model: nn.Module) -> _Parameters:
    found = inspect.signature(model.forward).parameters.values()
    named = [each for each in found if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    kinds = {each.kind for each in found}
    return _Parameters(
        [each.name for each in named],
        sum(each.default is each.empty for each in named),
        not named and inspect.Parameter.VAR_KEYWORD in kinds,
        inspect.Parameter.VAR_POSITIONAL in kinds,
    )


def _first_rows(values: Tensor, rows: int) -> Tensor:
    return values if rows == len(values) else values[torch.arange(rows, device=values.device) % len(values)]
