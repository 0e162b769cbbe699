"""Saved scorers: a safetensors file holds the parameters and the fitted state of a scorer.

Tensors are stored as they are; everything else is JSON in the metadata of the file. Nothing is pickled, so opening a
file runs none of its contents. The metadata also hold a SHA-256 of the whole file, in which the digits of the SHA-256
itself count as zeros.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ood_scores.atomic import COPY_BYTES, is_marked, replacing, user_path
from ood_scores.errors import (
    BadInput,
    CacheError,
    DamagedCache,
    ForeignFile,
    NotFitted,
    OodScoresError,
    ShapeMismatch,
    UnknownName,
)
from ood_scores.features import Block, Head, Provenance
from ood_scores.parameters import check_types
from ood_scores.runtime import default_torch_state, version_of
from ood_scores.scorers.registry import create_scorer, is_registered, scorer_class

if TYPE_CHECKING:
    from ood_scores.scorers.base import Scorer

FORMAT = "ood_scores scorer"
VERSION = 2
"""Version 1 has no checksum."""

KEY = "scorer"
"""The key of the description in the metadata of the file."""

CHECKSUM = re.compile(rb'"sha256":"([0-9a-f]{64})"')
"""The entry of the metadata with the checksum. Quotes within other entries are escaped, so only the entry matches."""

NO_CHECKSUM = 64 * "0"

TRIED_BYTES = 2**26
"""Scorers in files up to this size are tried when they are loaded."""

DAMAGED = (
    safetensors.SafetensorError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    MemoryError,
    OSError,
)
"""The errors to which a damaged file may lead. Those that are no OodScoresError are converted to DamagedCache."""


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
        "ood_scores": version_of("ood_scores"),
        "scorer": _describe(scorer, "", tensors),
    }
    content = memoryview(
        safetensors.torch.save(_unshared(tensors), {KEY: json.dumps(described), "sha256": NO_CHECKSUM})
    )
    place = CHECKSUM.search(content)
    assert place is not None
    digest = hashlib.sha256(content).hexdigest().encode()
    _write(user_path(path), [content[: place.start(1)], digest, content[place.end(1) :]])


def load_scorer(path: str | os.PathLike[str]) -> Scorer:
    """Load a scorer that ``Scorer.save`` wrote: it is equal to it, with the same scores bit for bit.

    Raises:
        FileNotFoundError: if there is no such file.
        ForeignFile: if it is not a saved scorer, or if a newer version of this package wrote it.
        DamagedCache: if it is truncated, changed, or unreadable.
        UnknownName: if the class of the scorer is not registered, or no longer has one of its parameters.
    """
    file = user_path(path)
    with _opened(file) as (stored, verified):
        described = json.loads((stored.metadata() or {}).get(KEY, "{}"))
        _check_format(described, file)
        if described["version"] > 1 and not verified:
            raise DamagedCache("its checksum is missing")
        scorer = _remake(described["scorer"], stored)
        if file.stat().st_size <= TRIED_BYTES:
            _try(scorer)
        return scorer


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
    try:
        scorer_class(described["name"])
    except (UnknownName, BadInput) as error:
        raise UnknownName(
            f"the file holds a scorer {described['name']!r}, which is not registered: import the module that registers "
            "it first (--import on the command line)."
        ) from error
    parameters = {name: _decode(value, stored) for name, value in described["parameters"].items()}
    cls = scorer_class(described["name"])
    check_types(cls, parameters, cls.name)
    scorer = create_scorer(cls.name, **{**cls.tags.parameters_before, **parameters})
    if described["state"]:
        scorer.restore({name: _decode(value, stored) for name, value in described["state"].items()})
    scorer.fitted_widths = _widths(described["fitted_widths"])
    scorer.fitted_on = Provenance.from_attributes(described["fitted_on"] or {})
    return scorer


def _widths(widths: Any) -> dict[str, int] | None:
    if widths is None:
        return None
    if not all(type(width) is int and width >= 0 for width in dict(widths).values()):
        raise BadInput(f"its widths are {widths!r}")
    return dict(widths)


@default_torch_state()
def _try(scorer: Scorer) -> None:
    """Score one row of the fitted widths: values that are valid by themselves may not fit together.

    A scorer that reads extras, whose shapes are not known, is not tried, nor is one that would need a large row or head
    for it.

    Raises:
        ShapeMismatch, or an error of another package: if the scorer cannot score.
    """
    widths = scorer.fitted_widths or {}
    with_head = "head" in scorer.needs
    read = ({*scorer.needs, "features", "logits"} - {"head"}) if with_head else set(scorer.needs)
    size = 8 * math.prod(widths.get(name, 0) for name in read)
    if not 0 < size <= TRIED_BYTES:
        return
    row: dict[str, Any] = {name: torch.linspace(0.1, 1, widths[name])[None] for name in read}
    head = Head(torch.ones(widths["logits"], widths["features"])) if with_head else None
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            shape = scorer.score_block(Block(**row, head=head, rows=1)).shape
    except ShapeMismatch:
        raise
    except OodScoresError:
        return
    if shape != (1,):
        raise ShapeMismatch(f"it returns scores of shape {tuple(shape)} for one row")


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
    copied: Tensor = stored.get_tensor(name).clone().permute(back)
    return copied


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which the format cannot represent."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    return {
        name: tensor.clone() if storages.count(storage) > 1 else tensor
        for (name, tensor), storage in zip(tensors.items(), storages, strict=True)
    }


def _write(path: Path, content: Iterable[bytes | memoryview]) -> None:
    if path.exists() and not is_marked(path, FORMAT):
        raise ForeignFile(
            f"{path} is not a scorer that ood_scores saved and is not overwritten: choose another path, or delete it "
            "yourself."
        )
    with replacing(path) as file:
        for part in content:
            file.write(part)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, bool]]:
    """Open a file, and turn errors of reading it into errors of this package; also return whether it was verified."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not is_marked(path, FORMAT):
        raise ForeignFile(f"{path} is not a scorer that ood_scores saved: pass the path of a saved scorer.")
    try:
        verified = _verified(path)
        with safetensors.safe_open(path, "pt") as stored:
            yield stored, verified
    except (UnknownName, ForeignFile):
        raise
    except (*DAMAGED, CacheError) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise DamagedCache(f"{path} is truncated or damaged ({reason}): fit the scorer again and save it.") from error


def _verified(path: Path) -> bool:
    """Return whether the file holds a checksum.

    Raises:
        DamagedCache: if its content has another one.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        header = file.read(8 + min(length, path.stat().st_size))
        place = CHECKSUM.search(header)
        if not place:
            return False
        digest = hashlib.sha256(header[: place.start(1)] + NO_CHECKSUM.encode() + header[place.end(1) :])
        while part := file.read(COPY_BYTES):
            digest.update(part)
    if digest.hexdigest().encode() != place[1]:
        raise DamagedCache("its content differs from its checksum")
    return True


def _check_format(described: Mapping[str, Any], path: Path) -> None:
    if described.get("format") != FORMAT:
        raise ForeignFile(f"{path} is not a scorer that ood_scores saved: pass the path of a saved scorer.")
    if described["version"] > VERSION:
        raise ForeignFile(
            f"{path} has scorer format {described['version']}, but this version of ood_scores reads formats up to "
            f"{VERSION}: update ood_scores."
        )
