"""Saved scorers: a safetensors file holds the parameters and the fitted state of a scorer.

Tensors are stored as they are; everything else is JSON in the metadata of the file. Nothing is pickled, so opening a
file runs none of its contents.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ood_scores.atomic import is_marked, replacing, user_path
from ood_scores.errors import BadInput, DamagedCache, ForeignFile, NotFitted, UnknownName
from ood_scores.features import Head, Provenance
from ood_scores.scorers.registry import create_scorer, is_registered, list_scorers, scorer_class

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

FORMAT = "ood_scores scorer"
VERSION = 1
KEY = "scorer"
"""The key of the description in the metadata of the file."""


def save_scorer(scorer: Scorer, path: str | os.PathLike[str]) -> None:
    """Save a scorer as one safetensors file, which replaces ``path`` once it is complete.

    Raises:
        NotFitted: if the scorer needs a fit and has not been fitted.
        BadInput: if its class is not registered, or if it holds a value that cannot be saved.
        ForeignFile: if the path holds something other than a saved scorer.
        CacheWriteFailed: if the disk is full or fails; a scorer saved there before is kept.
    """
    if not scorer.is_fitted:
        raise NotFitted(f"{scorer.name!r} cannot be saved before it is fitted: call .fit(train_feats) first.")
    tensors: dict[str, Tensor] = {}
    described = {
        "format": FORMAT,
        "version": VERSION,
        "ood_scores": importlib.metadata.version("ood_scores"),
        "scorer": _describe(scorer, "", tensors),
    }
    content = safetensors.torch.save(_unshared(tensors), {KEY: json.dumps(described)})
    _write(user_path(path), content)


def load_scorer(path: str | os.PathLike[str]) -> Scorer:
    """Load a scorer that ``Scorer.save`` wrote: it is equal to it, with the same scores bit for bit.

    Raises:
        FileNotFoundError: if there is no such file.
        ForeignFile: if it is not a saved scorer, or if a newer version of this package wrote it.
        DamagedCache: if it is truncated or unreadable.
        UnknownName: if the class of the scorer is not registered, or no longer has one of its parameters.
    """
    file = user_path(path)
    with _opened(file) as stored:
        described = json.loads((stored.metadata() or {}).get(KEY, "{}"))
        _check_format(described, file)
        return _remake(described["scorer"], stored)


def _describe(scorer: Scorer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return a scorer as JSON, and add its tensors to ``tensors`` under names that start with the prefix."""
    if not is_registered(type(scorer)):
        raise BadInput(
            f"{type(scorer).__name__} is not registered, so a file of it could not be loaded: put "
            '@register_scorer("a_name") before the class.'
        )
    parameters = {name: getattr(scorer, name) for name in inspect.signature(type(scorer)).parameters}
    state = scorer.fitted_state() if scorer.is_fitted else {}
    return {
        "name": scorer.name,
        "parameters": {
            name: _encode(value, f"{prefix}parameters.{name}", tensors) for name, value in parameters.items()
        },
        "state": {name: _encode(value, f"{prefix}{name}", tensors) for name, value in state.items()},
        "fitted_widths": None if scorer.fitted_widths is None else dict(scorer.fitted_widths),
        "fitted_on": scorer.fitted_on.to_attributes() if scorer.fitted_on else None,
    }


def _remake(described: Mapping[str, Any], stored: Any) -> Scorer:
    """Create the scorer from its description."""
    if described["name"] not in list_scorers():
        raise UnknownName(
            f"the file holds a scorer {described['name']!r}, which is not registered: import the module that "
            f"registers it first. Registered scorers: {', '.join(list_scorers())}."
        )
    parameters = {name: _decode(value, stored) for name, value in described["parameters"].items()}
    before = scorer_class(described["name"]).tags.parameters_before
    scorer = create_scorer(described["name"], **{**before, **parameters})
    if described["state"]:
        scorer.restore({name: _decode(value, stored) for name, value in described["state"].items()})
    scorer.fitted_widths = described["fitted_widths"]
    scorer.fitted_on = Provenance.from_attributes(described["fitted_on"] or {})
    return scorer


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON: JSON values as they are (floats to the last bit), others as ``{kind: content}``."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        case np.generic():
            return _encode(value.item(), name, tensors)
        case np.ndarray():
            return {"array": _encode(torch.from_numpy(value.copy()), name, tensors)}
        case Tensor():
            return {"tensor": name, "order": _keep(value, name, tensors)}
        case Head():
            parts = {"weight": value.weight, "bias": value.bias}
            return {"head": [_encode(part, f"{name}.{of}", tensors) for of, part in parts.items()]}
        case _ if is_registered(type(value)):
            return {"scorer": _describe(value, f"{name}.", tensors)}
        case list() | tuple():
            items = [_encode(part, f"{name}.{number}", tensors) for number, part in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        case Mapping():
            return {
                "mapping": [
                    [_encode(key, f"{name}.{number}.key", tensors), _encode(part, f"{name}.{number}", tensors)]
                    for number, (key, part) in enumerate(value.items())
                ]
            }
    raise BadInput(
        f"{name} is a {type(value).__name__}, which cannot be saved: use numbers, strings, tensors, heads, "
        "registered scorers, or lists, tuples and dictionaries of them."
    )


def _decode(value: Any, stored: Any) -> Any:
    """Return the value that ``_encode`` encoded."""
    match value:
        case {"float": text}:
            return float(text)
        case {"array": tensor}:
            return _decode(tensor, stored).numpy()
        case {"tensor": name, "order": order}:
            return _fetch(name, order, stored)
        case {"head": [weight, bias]}:
            return Head(_decode(weight, stored), _decode(bias, stored))
        case {"scorer": described}:
            return _remake(described, stored)
        case {"tuple": parts}:
            return tuple(_decode(part, stored) for part in parts)
        case {"mapping": pairs}:
            return {_decode(key, stored): _decode(part, stored) for key, part in pairs}
        case list():
            return [_decode(part, stored) for part in value]
    return value


def _keep(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> list[int]:
    """Add a tensor, with its dimensions in the order of their memory layout, and return that order.

    A transposed matrix is loaded as a transposed matrix, because products with it may round differently otherwise.
    """
    order = sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
    tensors[name] = tensor.detach().cpu().permute(order).contiguous()
    return order


def _fetch(name: str, order: list[int], stored: Any) -> Tensor:
    """Return a copy of a tensor: the file is only mapped, it may be replaced, and its alignment is arbitrary."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return stored.get_tensor(name).clone().permute(back)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which the format cannot represent."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    return {
        name: tensor.clone() if storages.count(storage) > 1 else tensor
        for (name, tensor), storage in zip(tensors.items(), storages, strict=True)
    }


def _write(path: Path, content: bytes) -> None:
    if path.exists() and not is_marked(path, FORMAT):
        raise ForeignFile(
            f"{path} is not a scorer that ood_scores saved and is not overwritten: choose another path, or delete it "
            "yourself."
        )
    with replacing(path) as file:
        file.write(content)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a file, and turn errors of reading it into errors of this package."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not is_marked(path, FORMAT):
        raise ForeignFile(f"{path} is not a scorer that ood_scores saved: pass the path of a saved scorer.")
    try:
        with safetensors.safe_open(path, "pt") as stored:
            yield stored
    except (safetensors.SafetensorError, json.JSONDecodeError, KeyError, TypeError, OSError) as error:
        raise DamagedCache(f"{path} is truncated or damaged ({error}): fit the scorer again and save it.") from error


def _check_format(described: Mapping[str, Any], path: Path) -> None:
    if described.get("format") != FORMAT:
        raise ForeignFile(f"{path} is not a scorer that ood_scores saved: pass the path of a saved scorer.")
    if described["version"] > VERSION:
        raise ForeignFile(
            f"{path} has scorer format {described['version']}, but this version of ood_scores reads formats up to "
            f"{VERSION}: update ood_scores."
        )
