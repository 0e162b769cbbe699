"""The output folder of a training run: repeated calls, foreign files, a full disk, and nonfinite numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import ID, imbalanced, run, weights

from ood_scores.atomic import LockedFile
from ood_scores.errors import (
    BadInput,
    CacheBusy,
    CacheWriteFailed,
    CheckpointError,
    NotFinite,
)
from ood_scores.training import Trained, train, trainer
from ood_scores.training.recipe_file import recipe_from
from ood_scores.training.setup import Prepared
from ood_scores.training.state import load_state


def test_repeating_a_finished_training_does_nothing(trained: Trained) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in trained.checkpoint.parent.glob("*.safetensors")}
    again = run(
        trained.checkpoint.parent,
        epochs=6,
        data={"validation": 0.2, "test": ID},
        checkpoint_every=2,
        optimizer={"lr": 0.1},
    )
    assert again == trained
    assert {path.name: path.stat().st_mtime_ns for path in trained.checkpoint.parent.glob("*.safetensors")} == before


def test_folder_with_another_recipe_or_other_data_is_refused(tmp_path: Path) -> None:
    spec = imbalanced(tmp_path, [20, 6, 3])
    first = run(tmp_path / "out", data={"train": spec})
    with pytest.raises(BadInput, match=r"another recipe \(seed was 0, is 1; optimizer\.lr was 0\.05, is 0\.5"):
        run(tmp_path / "out", data={"train": spec}, seed=1, optimizer={"lr": 0.5})
    imbalanced(tmp_path, [20, 6, 4])
    with pytest.raises(BadInput, match=r"other data \(images of each class was \[20, 6, 3\], is \[20, 6, 4\]"):
        run(tmp_path / "out", data={"train": spec})
    recipe = recipe_from(tiny.tables(data={"train": spec}, seed=1))
    second = train(recipe, tmp_path / "out", device="cpu", progress=False, overwrite=True)
    assert second.history != first.history
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("changed", ["train", "test", "auxiliary"])
def test_other_images_of_the_same_number_are_refused(changed: str, tmp_path: Path) -> None:
    def trained(invert: str) -> Trained:
        texts = {}
        for name in ("train", "test", "auxiliary"):
            (tmp_path / name).mkdir(exist_ok=True)
            texts[name] = imbalanced(tmp_path / name, [20, 6, 3])
            arrays = np.load(tmp_path / name / "data.npz")
            images = 255 - arrays["images"] if name == invert else arrays["images"]
            np.savez(tmp_path / name / "data.npz", images=images, labels=arrays["labels"])
        auxiliary = {"auxiliary": {"data": texts.pop("auxiliary")}, "objective": {"name": "oe"}}
        return run(tmp_path / "out", data=texts, **auxiliary)

    first = trained("")
    assert trained("") == first
    what = {"train": "training"}.get(changed, changed)
    with pytest.raises(BadInput, match=rf"other data \(checksum of the {what} images was [0-9a-f]{{16}}, is [0-9a-f]"):
        trained(changed)


def test_other_initial_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    initial = tmp_path / "initial" / "last.safetensors"
    run(initial.parent, epochs=1)
    first = run(tmp_path / "out", model={"checkpoint": str(initial)})
    assert run(tmp_path / "out", model={"checkpoint": str(initial)}) == first
    run(tmp_path / "other", epochs=1, seed=1).checkpoint.replace(initial)
    with pytest.raises(BadInput, match=r"other data \(checksum of the initial weights was [0-9a-f]{16}, is"):
        run(tmp_path / "out", model={"checkpoint": str(initial)})


def test_run_of_a_version_without_checksums_resumes(tmp_path: Path) -> None:
    spec = imbalanced(tmp_path, [20, 6, 3])
    whole = run(tmp_path / "whole", data={"train": spec})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "facts", lambda prepared: {"images of each class": [20, 6, 3], "auxiliary images": 0})
        patch.setattr(trainer, "save_state", interrupted_after(trainer.save_state))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", data={"train": spec})
    state = load_state(tmp_path / "out" / "state.safetensors")
    assert (state.progress.epoch, len(state.data)) == (1, 2)
    assert run(tmp_path / "out", data={"train": spec}).history == whole.history
    assert "checksum of the training images" in load_state(tmp_path / "out" / "state.safetensors").data


def interrupted_after(save: Any) -> Any:
    def saved(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    return saved


def test_environment_variables_of_the_data_may_be_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(tmp_path))
    spec = imbalanced(tmp_path, [20, 6, 3])
    first = run(tmp_path / "out", data={"train": spec.replace(str(tmp_path), "$DATA")})
    assert run(tmp_path / "out", data={"train": spec}) == first
    with pytest.raises(BadInput, match=r"another recipe \(data\.train was .*\$DATA.*, is .*/elsewhere"):
        run(tmp_path / "out", data={"train": spec.replace(str(tmp_path), "/elsewhere")})


def test_foreign_files_in_the_folder_are_not_changed(tmp_path: Path, trained: Trained) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="not the state of a training run"):
        run(tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == b"something else"
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a": torch.zeros(1)}, other / "last.safetensors")
    with pytest.raises(BadInput, match=r"no state\.safetensors to resume from"):
        run(other)


def test_file_in_the_place_of_the_folder_is_refused_before_the_images_are_read(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"something else")
    with pytest.raises(BadInput, match=r"out cannot be a folder, since a file is in its way: choose another\."):
        run(tmp_path / "out", data={"train": "npz:nowhere.npz"})
    assert (tmp_path / "out").read_bytes() == b"something else"


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    with LockedFile(tmp_path / ".lock", "a"), pytest.raises(CacheBusy, match="another process"):
        run(tmp_path)


def test_nonfinite_loss_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**6))
    honest = F.cross_entropy

    def failing(*arguments: Any) -> Tensor:
        return honest(*arguments) * (float("nan") if next(calls) == 23 else 1)  # one trial, then 20 per epoch

    monkeypatch.setattr("ood_scores.training.objectives.classification.F.cross_entropy", failing)
    with pytest.raises(NotFinite, match=r"in epoch 2, step 3, the loss became nan.*holds the weights of epoch 1"):
        run(tmp_path)
    monkeypatch.undo()
    assert all(value.isfinite().all() for value in weights(tmp_path / "last.safetensors").values())
    assert run(tmp_path).history == run(tmp_path / "peace").history


def test_nonfinite_weights_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = trainer.train_step

    def exploding(step: Any, head: nn.Linear, *arguments: Any) -> Tensor:
        sums = honest(step, head, *arguments)
        head.bias.data.fill_(float("inf"))
        return sums

    monkeypatch.setattr(trainer, "train_step", exploding)
    with pytest.raises(NotFinite, match=r"epoch 1 the weights became infinite or NaN.*no epoch was completed"):
        run(tmp_path, batch_size=2000)
    assert not (tmp_path / "last.safetensors").exists()


def test_full_disk_loses_no_training_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.replace
    calls = iter(range(100))

    def full(source: Path, target: Path) -> None:
        if next(calls) == 4:
            raise OSError(28, "No space left on device")
        honest(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheWriteFailed, match=r"No space left.*make room"):
        run(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob(".*") if path.name != ".lock"] == []
    assert run(tmp_path).history == run(tmp_path / "peace").history
