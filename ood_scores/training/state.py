"""Files of a run: weights that timm opens, and the state from which it continues. No pickles; written in one step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ood_scores.atomic import LockedFile, replacing
from ood_scores.errors import BadInput, CheckpointError
from ood_scores.training.recipe import Recipe, flat_tables

LAST, STATE, LOG = "last.safetensors", "state.safetensors", "log.csv"
FORMAT = 1
FREE_KEYS = {"workers", "checkpoint_every", "state_every", "tensorboard"}
"""Keys of a recipe that do not change what comes out: a run may continue with others."""
CONTINUE = "what was saved before is safe; make room on the disk and run the same training again to continue"


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the next one.
        sums: of these steps: loss, right predictions, feature norms, samples.
        history: a record for each finished epoch.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class State:
    """What `save_state` has written: how far, what was trained and on what, and tensors by name."""

    progress: Progress
    recipe: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, dict[str, Any]]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of the model, the objective or the optimiser, without that prefix."""
        return {key.partition(".")[2]: value for key, value in self.tensors.items() if key.startswith(f"{name}.")}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """A safetensors file with facts as JSON in its metadata, complete or not there at all.

    Raises:
        CacheWriteFailed: the disk refuses; what was there before is still there.
    """
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    metadata = {"format": "pt", **{name: json.dumps(fact) for name, fact in facts.items()}}
    content = save(own, metadata)
    with replacing(path, CONTINUE) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """A text file, complete or as it was before; raises CacheWriteFailed."""
    with replacing(path, CONTINUE) as file:
        file.write(text.encode())


def save_state(
    path: Path,
    progress: Progress,
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
    model: nn.Module,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Everything that a later process needs to go on as if nothing had happened."""
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
    """The tensors of a safetensors file by name."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def load_state(path: Path) -> State:
    """What `save_state` has written.

    Raises:
        CheckpointError: the file is damaged, or something else.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
        progress = Progress(**facts["progress"])
        return State(progress, facts["recipe"], facts["data"], facts["optimizer"], read_tensors(path))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the state of a training, or it is damaged ({error}): name another folder, or overwrite it."
        ) from error


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Gives a new optimiser of the same parameters the state that the saved one had."""
    entries: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in state.optimizer.items()}
    for name, value in state.part("optimizer").items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder, for this training alone."""
    folder.mkdir(parents=True, exist_ok=True)
    with LockedFile(folder / ".lock", "a"):
        yield


def find_state(folder: Path, recipe: Recipe) -> State | None:
    """The state in the folder, if there is one; it must be of the same recipe."""
    if not (folder / STATE).exists():
        if (folder / LAST).exists() and not _of_first_epoch(folder):
            raise BadInput(
                f"{folder} has a {LAST} but no {STATE} to continue from: pass overwrite, or name another folder."
            )
        return None
    state = load_state(folder / STATE)
    require_same(folder, "recipe", flat_tables(state.recipe), flat_tables(recipe.to_dict()))
    return state


def _of_first_epoch(folder: Path) -> bool:
    """Whether a kill came between the weights of the first epoch and its state."""
    with safe_open(folder / LAST, "pt") as file:
        return (file.metadata() or {}).get("epoch") == "1"


def require_same(folder: Path, what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise BadInput if the training in the folder has another recipe or other data."""
    keys = [key for key in {**old, **new} if key not in FREE_KEYS and old.get(key) != new.get(key)]
    if keys:
        listed = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys[:8])
        raise BadInput(
            f"{folder} holds a training with another {what}: {listed}. Name another folder, or pass overwrite to drop "
            "what is there."
        )


def clear(folder: Path) -> None:
    """Removes what a training wrote; the state first, so that nothing continues from half of it."""
    for path in (folder / STATE, folder / LOG, *sorted(folder.glob("epoch_*.safetensors")), folder / LAST):
        path.unlink(missing_ok=True)
