"""Files of a run: weights that timm opens, and the state from which it resumes. No pickles; written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ood_scores.atomic import LockedFile, disk_errors, make_folder, replacing
from ood_scores.errors import BadInput, CheckpointError
from ood_scores.training.recipe import Recipe, flat_tables

LAST, STATE, LOG = "last.safetensors", "state.safetensors", "log.csv"
FORMAT = 1
FREE_KEYS = {"workers", "checkpoint_every", "state_every", "tensorboard"}
"""Keys of a recipe that do not change the result: a run may resume with other values."""
CONTINUE = "what was saved before is safe; make room on the disk and start the same training again to resume it"


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        epoch: Number of completed epochs.
        step: Number of completed steps of the next epoch.
        sums: Sums over these steps: loss, correct predictions, feature norms, samples, terms of the loss.
        history: One record for each completed epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """The content of a state file: progress, recipe, facts about the data, and tensors by name."""

    progress: Progress
    recipe: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of ``model``, ``objective`` or ``optimizer``, without that prefix."""
        return {key.partition(".")[2]: value for key, value in self.tensors.items() if key.startswith(f"{name}.")}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file with facts as JSON in its metadata, in one atomic step.

    Raises:
        CacheWriteFailed: if the disk refuses the write; the previous file is unchanged.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"format": "pt", **{name: json.dumps(fact) for name, fact in facts.items()}}
    content = save(own, metadata)
    with replacing(path, CONTINUE) as file:
        file.write(content)


def save_state(
    path: Path,
    progress: Progress,
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
    model: nn.Module,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that another process needs to resume the run exactly."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"objective.{name}": value for name, value in objective.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    facts = {
        "ood_scores": FORMAT,
        "progress": vars(progress),
        "recipe": recipe,
        "data": data,
        "optimizer": numbers,
    }
    write_tensors(path, tensors, facts)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def load_state(path: Path) -> State:
    """Read a file of ``save_state``.

    Raises:
        CheckpointError: if the file is damaged or not a state.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
        progress = Progress(**facts["progress"])
        return State(progress, facts["recipe"], facts["data"], facts["optimizer"], read_tensors(path))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged or not the state of a training run ({error}): choose another folder, or pass overwrite."
        ) from error


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load the saved state into a new optimizer of the same parameters."""
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in state.optimizer.items()}
    for name, value in state.part("optimizer").items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder unless it exists, and lock it for this run.

    Raises:
        BadInput: if it is a file.
        CacheBusy: if another process trains in the folder.
        CacheWriteFailed: if the folder may not be written.
    """
    make_folder(folder)
    with disk_errors(folder):
        lock = LockedFile(folder / ".lock", "a")
    with lock:
        yield


def find_state(folder: Path, recipe: Recipe) -> State | None:
    """Return the state in the folder, or None if there is none.

    Raises:
        BadInput: if the state is that of another recipe, or there are weights without a state.
    """
    if not (folder / STATE).exists():
        if (folder / LAST).exists() and not _of_first_epoch(folder):
            raise BadInput(
                f"{folder} has a {LAST} but no {STATE} to resume from: pass overwrite, or choose another folder."
            )
        return None
    state = load_state(folder / STATE)
    require_same(folder, "another recipe", flat_tables(state.recipe), flat_tables(recipe.to_dict()))
    return state


def _of_first_epoch(folder: Path) -> bool:
    """Whether the run was killed between writing the weights of the first epoch and its state."""
    with safe_open(folder / LAST, "pt") as file:
        return (file.metadata() or {}).get("epoch") == "1"


def require_same(folder: Path, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise BadInput if the run in the folder has another recipe or other data.

    Texts are compared with their environment variables expanded.
    """
    keys = [key for key in {**old, **new} if key not in FREE_KEYS and _expanded(old, key) != _expanded(new, key)]
    if keys:
        listed = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys[:8])
        raise BadInput(
            f"{folder} holds a run with {what} ({listed}): choose another folder, or pass overwrite to discard it."
        )


def _expanded(facts: Mapping[str, Any], key: str) -> Any:
    value = facts.get(key)
    return os.path.expandvars(value) if isinstance(value, str) else value


def clear(folder: Path) -> None:
    """Remove the files of a run; the state first, so that no run resumes from incomplete files."""
    for path in (folder / STATE, folder / LOG, *sorted(folder.glob("epoch_*.safetensors")), folder / LAST):
        path.unlink(missing_ok=True)
