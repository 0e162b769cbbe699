"""The trainer: a recipe in; a checkpoint that timm opens, a log and the state to continue from out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open

from ood_scores.atomic import LockedFile
from ood_scores.errors import BadInput
from ood_scores.training.distributed import Processes, processes
from ood_scores.training.recipe import Recipe, flat_tables
from ood_scores.training.recipe_file import load_recipe
from ood_scores.training.run import Run
from ood_scores.training.setup import prepare
from ood_scores.training.state import LAST, LOG, STATE, State, load_state

FREE_KEYS = {"workers", "checkpoint_every", "state_every", "tensorboard"}
"""Keys of a recipe that do not change what comes out: a run may continue with others."""


@dataclass(frozen=True)
class Trained:
    """What a training has come to.

    Attributes:
        checkpoint: the weights, for `timm.create_model(name, num_classes=…, checkpoint_path=…)`.
        history: one record per epoch, the rows of log.csv.
        accuracy: of the finished network on `training` (in training mode, during the last epoch), and on `validation`
            and `test` where the recipe has them.
    """

    checkpoint: Path
    history: list[dict[str, Any]]
    accuracy: dict[str, float]


def train(
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Trained:
    """Train what a recipe says, or continue it where it was stopped.

    A run that was killed at any step goes on from its last state when the same call is made again, and on a CPU ends
    with the same weights, bit for bit, as one that was left in peace. Under `torchrun` all processes train one model.

    Args:
        recipe: a `Recipe`, or the path of its TOML file.
        out: the folder to write; by default `runs/` and the recipe's name.
        device: `cpu`, `cuda`, …; `auto` takes a GPU if there is one.
        overwrite: drop what another training has left in the folder.
        progress: show a bar, or a line per epoch where there is no terminal.

    Returns:
        Where the checkpoint is, and how the training went.

    Raises:
        BadInput: the recipe cannot be carried out, another recipe has been trained in this folder, or what `prepare`
            and `load_recipe` raise.
        NotFinite: the loss or the weights are not finite any more; the last good state is kept.
        CacheBusy: another process trains in this folder.
        CacheWriteFailed: the disk refuses; what was saved before is safe.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = Path("runs") / recipe.name if out is None else Path(out)
    with processes(device) as who, _locked(folder, who):
        state = who.broadcast(_found(folder, recipe) if who.first and not overwrite else None)
        with Console(stderr=True, quiet=not (progress and who.first)).status("reading the images …"):
            prepared = prepare(recipe, who)
        if state is not None:
            _check_same(folder, "data", state.data, prepared.facts())
        if overwrite and who.first:
            _clear(folder)
        run = Run(recipe, folder, who, prepared, state)
        run.train(progress)
        return Trained(folder / LAST, run.progress.history, run.accuracy())


@contextmanager
def _locked(folder: Path, who: Processes) -> Iterator[None]:
    """The folder, for this training alone."""
    if not who.first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with LockedFile(folder / ".lock", "a"):
        yield


def _found(folder: Path, recipe: Recipe) -> State | None:
    """The state in the folder, which must be of the same recipe."""
    if not (folder / STATE).exists():
        if (folder / LAST).exists() and not _of_first_epoch(folder):
            raise BadInput(
                f"{folder} has a {LAST} but no {STATE} to continue from: pass overwrite, or name another folder."
            )
        return None
    state = load_state(folder / STATE)
    _check_same(folder, "recipe", flat_tables(state.recipe), flat_tables(recipe.to_dict()), FREE_KEYS)
    return state


def _of_first_epoch(folder: Path) -> bool:
    """Whether a kill came between the weights of the first epoch and its state."""
    with safe_open(folder / LAST, "pt") as file:
        return (file.metadata() or {}).get("epoch") == "1"


def _check_same(
    folder: Path, what: str, old: dict[str, Any], new: dict[str, Any], leave_out: set[str] | None = None
) -> None:
    keys = [key for key in {**old, **new} if key not in (leave_out or ()) and old.get(key) != new.get(key)]
    if keys:
        listed = "; ".join(f"{key} was {old.get(key)}, is {new.get(key)}" for key in keys[:8])
        raise BadInput(
            f"{folder} holds a training with another {what}: {listed}. Name another folder, or pass overwrite to drop "
            "what is there."
        )


def _clear(folder: Path) -> None:
    """Removes what a training wrote; the state first, so that nothing continues from half of it."""
    for path in (folder / STATE, folder / LOG, *sorted(folder.glob("epoch_*.safetensors")), folder / LAST):
        path.unlink(missing_ok=True)
