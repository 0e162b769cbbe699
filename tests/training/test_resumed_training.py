"""Killed and resumed training runs end with the weights, log and state of an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ood_scores.training import state, train

KILLS = 8

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["ood_scores.training.trainer", "sklearn.datasets", "tiny"])

AUXILIARY = {"data": "digits?classes=7-9", "batch_size": 48}
RECIPES: dict[str, dict[str, Any]] = {
    "sgd, in the middle of epochs": {
        "epochs": 6,
        "batch_size": 32,
        "state_every": 3,
        "checkpoint_every": 2,
        "model": {"drop": 0.2},
        "data": {"augmentation": "rna", "validation": 0.1},
        "objective": {"name": "rna"},
        "auxiliary": AUXILIARY,
        "schedule": {"name": "cosine"},
    },
    "two stages, adam": {
        "epochs": 3,
        "state_every": 5,
        "data": {"augmentation": "crop_flip"},
        "objective": {"name": "oe"},
        "auxiliary": AUXILIARY,
        "optimizer": {"name": "adam", "lr": 1e-3},
        "stage": [{"epochs": 3, "trainable": ["batchnorm", "head"], "objective": {"name": "logit_adjustment"}}],
    },
}


def work(out: str, changes: dict[str, Any], pause: float, began: Any) -> None:
    import tiny

    from ood_scores.training import trainer
    from ood_scores.training.recipe_file import recipe_from

    torch.set_num_threads(1)
    honest = trainer.train_step

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(pause)
        return honest(*arguments)

    trainer.train_step = slow  # type: ignore[assignment]
    began.set()
    train(recipe_from(tiny.tables(**changes)), out, device="cpu", progress=False)


def start(out: Path, changes: dict[str, Any], pause: float = 0.0) -> Any:
    began = children.Event()
    process = children.Process(target=work, args=(str(out), changes, pause, began))
    process.start()
    assert began.wait(60)
    return process


def contents(folder: Path) -> dict[str, Any]:
    """Return the bytes of all tensors, the metadata, and the text of the other files."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            found[path.name] = path.read_bytes()
            continue
        with safe_open(path, "pt") as file:  # the order of the metadata in a file is random
            found[path.name] = file.metadata()
        for name, tensor in state.read_tensors(path).items():
            found[f"{path.name} {name}"] = (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())
    return found


def changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize("name", RECIPES)
def test_training_killed_at_random_moments_resumes_exactly(name: str, tmp_path: Path) -> None:
    changes = RECIPES[name]
    process = start(tmp_path / "peace", changes)
    process.join()
    assert process.exitcode == 0
    draw, places, kills = random.Random(name), set(), 0
    path = tmp_path / "killed" / "state.safetensors"
    while kills < KILLS:
        process = start(tmp_path / "killed", changes, pause=0.02)
        before = changed_at(path)
        while process.is_alive() and changed_at(path) == before:
            time.sleep(0.005)
        process.join(draw.uniform(0, 0.3))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        progress = state.load_state(path).progress
        places.add((progress.epoch, progress.step))
    process = start(tmp_path / "killed", changes)
    process.join()
    assert process.exitcode == 0
    assert kills == len(places) >= 3
    assert contents(tmp_path / "killed") == contents(tmp_path / "peace")


def test_training_killed_between_two_files_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kill comes after each file of each epoch in turn."""
    import tiny

    from ood_scores.training.recipe_file import recipe_from

    changes: dict[str, Any] = {"epochs": 2, "state_every": 8, "checkpoint_every": 1}
    recipe = recipe_from(tiny.tables(**changes))
    train(recipe, tmp_path / "peace", device="cpu", progress=False)
    honest = os.replace
    for number in range(13):
        calls = iter(range(10**6))

        def killing(source: Any, target: Any, number: int = number, calls: Any = calls) -> None:
            if next(calls) == number:
                raise KeyboardInterrupt
            honest(source, target)

        monkeypatch.setattr(os, "replace", killing)
        out = tmp_path / f"killed{number}"
        try:
            train(recipe, out, device="cpu", progress=False)
        except KeyboardInterrupt:
            monkeypatch.undo()
            train(recipe, out, device="cpu", progress=False)
        else:
            monkeypatch.undo()
            assert (
                number == 12
            )  # for each epoch: weights twice, log and state, and states after 8 and 16 of its 20 steps
            break
        assert contents(out) == contents(tmp_path / "peace"), number
    else:
        pytest.fail("more files are written than this test knows")
