"""Reading checkpoint files of any origin, without running code that they contain."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

from ood_scores.atomic import user_path
from ood_scores.errors import CheckpointError
from ood_scores.models.bit_names import as_timm

WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "ema_state_dict",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
)
"""Keys under which training scripts store the weights; averaged weights come first, as in timm."""

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Starts of all names, from wrappers such as DistributedDataParallel, torch.compile, AveragedModel, and Lightning."""

INDEX = "model.safetensors.index.json"
"""The name under which transformers stores the list of the files of a sharded checkpoint."""

DEEPEST = 3
"""The number of mappings inside each other in which weights are looked for."""


class Ignored:
    """A stand-in for plain data that is stored beside weights, whatever it is. It keeps nothing and does nothing."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_IGNORED = [
    type(name, (Ignored,), {"__module__": module})
    for module, names in {
        "numpy": ("dtype", "ndarray"),
        "numpy.core.multiarray": ("scalar", "_reconstruct"),
        "numpy._core.multiarray": ("scalar", "_reconstruct"),
        "pathlib": ("Path", "PosixPath", "WindowsPath"),
        "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
    }.items()
    for name in names
]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name, without the wrappers and prefixes that training scripts add.

    The content decides the format, not the suffix: safetensors, a PyTorch file, or arrays of ``numpy.savez``. Names of
    BiT are those of timm, see ``bit_names``. If the file is a mapping, the weights are looked for under
    ``WRAPPERS`` first; otherwise the only mapping from names to tensors in it is taken. The index of a sharded
    checkpoint, such as ``INDEX``, stands for the files in its folder that it lists.

    Raises:
        CheckpointError: if the file is missing or damaged, contains no weights or several sets of them, or would run
            code when opened.
    """
    path = user_path(path)
    _refuse_one_of_several(path)
    content = _read_shards(path) if path.name.endswith(".index.json") else _read_file(path)
    state = as_timm(without_prefix(clean_state_dict(_without_average_count(_weights_in(content, path)))))
    for name, values in state.items():
        if values.is_meta:
            raise CheckpointError(f"{path} has no values of {name} (device meta): save the weights themselves.")
        if values.layout == torch.strided and values.nbytes > values.untyped_storage().nbytes():
            raise CheckpointError(f"{path} declares more values of {name} than it has: save the weights again.")
    return state


def arguments_of(path: Path, name: str) -> dict[str, Any]:
    """Return the arguments of the network in a checkpoint of ``ood_scores.training``; none for other checkpoints.

    Raises:
        CheckpointError: if the file is missing, or if its metadata are not those that training writes.
    """
    if not _is_safetensors(path):
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = file.metadata() or {}
        known = "arguments" in facts and json.loads(facts.get("architecture", "null")) == name
        arguments = json.loads(facts["arguments"]) if known else {}
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} has damaged metadata ({first_sentence(error)}): restore it.") from error
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path} has damaged metadata (its arguments are not a table): restore it.")
    return arguments


def without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the prefixes of wrappers that all their names share."""
    start = len(shared_prefix(state))
    return {name[start:]: values for name, values in state.items()}


def shared_prefix(state: Mapping[str, Any]) -> str:
    """Return the prefixes of wrappers that all names share, such as ``"module.model."``, or ``""``."""
    found = ""
    while state:
        longer = (f"{found}{each}" for each in PREFIXES)
        shared = next((each for each in longer if all(name.startswith(each) for name in state)), None)
        if shared is None:
            break
        found = shared
    return found


def _read_file(path: Path) -> Any:
    if _is_safetensors(path):
        return _read_safetensors(path)
    return _read_npz(path) if _is_npz(path) else _read_pickle(path)


def _is_npz(path: Path) -> bool:
    """Return whether a file is an archive of NumPy arrays and nothing else."""
    names = _names_in_archive(path)
    return bool(names) and all(name.endswith(".npy") for name in names)


def _names_in_archive(path: Path) -> list[str]:
    """Return the names of the files in a zip archive; none if the file is no archive that zipfile can read."""
    unreadable = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError)  # the last: a newer version of zip
    with suppress(*unreadable), zipfile.ZipFile(path) as archive:
        return archive.namelist()
    return []


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except Exception as error:  # of NumPy, or of torch for kinds of numbers that it does not have
        raise CheckpointError(
            f"{path} is damaged or no archive of arrays of numbers ({first_sentence(error)}): restore it."
        ) from error


def _read_shards(index: Path) -> dict[str, Any]:
    """Return the weights in the files that an index lists."""
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {index}: check the path.") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not the index of a sharded checkpoint ({error!r:.200}): restore it."
        ) from error
    state: dict[str, Any] = {}
    for name in sorted(set(map(str, places.values()))):
        if Path(name).name != name:
            raise CheckpointError(f"{index} lists {name!r}, which is not a file in its folder: restore it.")
        content = _read_file(index.with_name(name))
        state |= content if isinstance(content, dict) else {}
    missing = sorted(places.keys() - state.keys())
    if missing:
        raise CheckpointError(f"{index} lists {missing[0]}, which is not in {places[missing[0]]}: restore both.")
    return state


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts like a safetensors file, or is called one and nothing else."""
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}: check the path.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file of weights: pass the path of a checkpoint file.")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({first_sentence(error)}): check its permissions.") from error
    header = int.from_bytes(start[:8], "little")
    is_zip = start.startswith(b"PK\x03\x04")
    return (start[8:] == b"{" and header <= path.stat().st_size) or (path.suffix == ".safetensors" and not is_zip)


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # of the library, of torch, or of the disk; the file may hold anything
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({first_sentence(error)}): restore it."
        ) from error


def _read_pickle(path: Path) -> Any:
    _refuse_programs(path)
    try:
        # argparse.Namespace is plain data, in which timm stores its options
        with torch.serialization.safe_globals([argparse.Namespace, *_IGNORED]), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of torch raises errors of any kind for files that are not checkpoints
        wanted = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted is None:
            raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint: restore it.") from error
        raise CheckpointError(
            f"{path} was not opened because that would call {wanted[1]}. If you trust the file, save its weights alone "
            f"in Python:\n  content = torch.load({str(path)!r}, weights_only=False)\n"
            "  weights = content.state_dict()  # of a dictionary: content['model'].state_dict(), or content['net']\n"
            f"  torch.save(weights, {f'{path.stem}_weights.pth'!r})"
        ) from error


def _refuse_one_of_several(path: Path) -> None:
    """Raise CheckpointError for one file of a sharded checkpoint whose index is beside it."""
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name)
    index = path.with_name(f"{shard[1]}{shard[2]}.index.json") if shard else None
    if index and index.is_file():
        raise CheckpointError(f"{path} is one of several files of a checkpoint: pass {index}, which lists all of them.")


def _refuse_programs(path: Path) -> None:
    """Raise CheckpointError for archives of whole programs, which hold weights in another form."""
    names = _names_in_archive(path)
    for ending, kind in (("/constants.pkl", "a TorchScript archive"), ("exported_program.json", "an exported program")):
        if any(name.endswith(ending) for name in names):
            raise CheckpointError(
                f"{path} is {kind}, not a file of weights: save model.state_dict() of the original model."
            )


def _weights_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    """Return the weights in the content of a checkpoint."""
    found = dict(_states("", content, DEEPEST))
    for wrapper in ("", *WRAPPERS):
        inside = [state for key, state in found.items() if key == wrapper or key.startswith(f"{wrapper}.")]
        if len(inside) == 1:
            return inside[0]
    if len(found) == 1:
        return next(iter(found.values()))
    advice = "save model.state_dict(), alone or under 'state_dict'"
    if found:
        raise CheckpointError(f"{path} contains several sets of weights ({', '.join(found)}): {advice}.")
    has = ", ".join(map(str, content))[:200] if isinstance(content, Mapping) else f"a {type(content).__name__}"
    raise CheckpointError(f"{path} contains no weights by name (it has: {has or 'nothing'}): {advice}.")


def _states(key: str, content: Any, depth: int) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield every mapping from names to tensors, with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    if content and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        yield key, content
    elif depth:
        for name, value in content.items():
            if isinstance(name, str):  # the states of optimizers have numbers
                yield from _states(f"{key}.{name}" if key else name, value, depth - 1)


def _without_average_count(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the counter that ``torch.optim.swa_utils.AveragedModel`` stores beside the weights."""
    averaged = any(name.startswith("module.") for name in state)
    return {name: values for name, values in state.items() if not (averaged and name == "n_averaged")}


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error, at most 200 characters."""
    return re.split(r"\.\s|\n", str(error), maxsplit=1)[0].rstrip(".")[:200]
