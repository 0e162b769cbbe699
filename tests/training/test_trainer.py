"""The trainer compared with a handwritten loop, its objectives and stages, and its output."""

from __future__ import annotations

import csv
import io
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from training_runs import ID, OOD, digit_images, fresh_model, run, weights

import ood_scores
import ood_scores.training
from ood_scores.data.sources import open_dataset
from ood_scores.data.subsets import validation_split
from ood_scores.errors import (
    BadInput,
    CheckpointError,
)
from ood_scores.models.opening import load_model, preprocessing
from ood_scores.training import Trained, train
from ood_scores.training.augment import augmentation
from ood_scores.training.recipe_file import recipe_from
from ood_scores.training.stages import trainable_parameters
from ood_scores.training.state import load_state
from ood_scores.training.streams import cycled, order


def test_training_reduces_the_loss(trained: Trained) -> None:
    assert [entry["epoch"] for entry in trained.history] == [1, 2, 3, 4, 5, 6]
    assert trained.history[0]["loss"] > 1.2
    assert trained.history[-1]["loss"] < 0.6
    assert trained.accuracy["training"] == trained.history[-1]["accuracy"] > 0.85
    assert trained.accuracy["validation"] == trained.history[-1]["validation_accuracy"] > 0.7


def test_log_contains_the_history(trained: Trained) -> None:
    rows = list(csv.DictReader(io.StringIO((trained.checkpoint.parent / "log.csv").read_text())))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == trained.history
    assert list(rows[0]) == [
        "epoch", "stage", "loss", "accuracy", "feature_norm", "lr", "validation_accuracy",
        "validation_accuracy_normalized",
    ]  # fmt: skip


def test_timm_and_extract_open_the_checkpoint(trained: Trained, tmp_path: Path) -> None:
    model = timm.create_model("tiny_net", num_classes=7, checkpoint_path=str(trained.checkpoint)).eval()
    images, labels = digit_images()
    with torch.no_grad():
        logits = model(images)
    assert (logits.argmax(1) == labels).double().mean() == pytest.approx(trained.accuracy["test"])
    again = load_model("tiny_net", trained.checkpoint)
    data = open_dataset(ID, preprocessing(again))
    feats = ood_scores.extract(again, DataLoader(data, batch_size=256), tmp_path / "test.h5", progress=False)
    torch.testing.assert_close(torch.from_numpy(np.asarray(feats.logits)), logits)


def test_load_model_reads_the_network_arguments_from_the_checkpoint(tmp_path: Path) -> None:
    result = run(tmp_path, model={"norm": False}, epochs=1)
    assert isinstance(load_model("tiny_net", result.checkpoint).bn1, nn.Identity)


def test_checkpoint_contains_the_recipe(trained: Trained) -> None:
    with safe_open(trained.checkpoint, "pt") as file:
        facts = file.metadata()
    assert (json.loads(facts["architecture"]), json.loads(facts["epoch"])) == ("tiny_net", 6)
    assert json.loads(facts["arguments"]) == {"num_classes": 7}
    assert json.loads(facts["metrics"]) == trained.history[-1]
    assert recipe_from(json.loads(facts["recipe"])).data.validation == 0.2


def test_checkpoint_every_keeps_checkpoints(trained: Trained) -> None:
    folder = trained.checkpoint.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "epoch_004.safetensors", "last.safetensors", "log.csv", "state.safetensors",
    ]  # fmt: skip
    assert not torch.equal(
        weights(folder / "epoch_004.safetensors")["fc.weight"], weights(trained.checkpoint)["fc.weight"]
    )


def by_hand(model: Any, seed: int, epochs: int, lrs: list[float], batch: int, drop_last: bool) -> list[float]:
    """Train by the formula of SGD with momentum, in the trainer's order of images; return the mean loss of epochs."""
    images, labels = digit_images()
    velocity = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    losses = []
    for epoch in range(epochs):
        rows = order(seed, epoch, len(images), batch, drop_last)
        sums = 0.0
        for chosen in rows:
            loss = F.cross_entropy(model.train()(images[chosen]), labels[chosen])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            sums += loss.item() * len(chosen)
            with torch.no_grad():
                for (name, value), gradient in zip(model.named_parameters(), gradients, strict=True):
                    velocity[name] = 0.9 * velocity[name] + gradient + 5e-4 * value
                    value -= lrs[epoch] * velocity[name]
        losses.append(sums / sum(map(len, rows)))
    return losses


@pytest.mark.parametrize("drop_last", [False, True])
def test_trained_weights_match_a_handwritten_loop(tmp_path: Path, drop_last: bool) -> None:
    schedule = {"name": "steps", "milestones": [1]}
    result = run(tmp_path, epochs=2, batch_size=100, seed=5, drop_last=drop_last, schedule=schedule)
    model = fresh_model(5)
    losses = by_hand(model, 5, 2, [0.05, 0.005], 100, drop_last)
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, rel=1e-5)
    assert [entry["lr"] for entry in result.history] == pytest.approx([0.05, 0.005])
    torch.testing.assert_close(weights(result.checkpoint), dict(model.state_dict()), rtol=1e-4, atol=1e-6)


def test_epoch_record_describes_the_samples_before_the_update(tmp_path: Path) -> None:
    images, labels = digit_images()
    record = run(tmp_path, epochs=1, batch_size=len(images)).history[0]
    model = fresh_model(0).train()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        logits = model.get_classifier()(features)
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert record["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert record["feature_norm"] == pytest.approx(features.norm(dim=1).mean().item(), rel=1e-5)
    assert record["lr"] == 0.05


def test_equal_seeds_give_equal_weights(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"epochs": 1, "model": {"drop": 0.3}, "data": {"augmentation": "crop_flip"}}
    first, second, other = (
        weights(run(tmp_path / name, seed=seed, **shared).checkpoint) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_training_does_not_change_the_global_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tmp_path, epochs=1, model={"drop": 0.3})
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_images_train_like_images_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: dict[str, Any] = {"epochs": 1, "data": {"augmentation": "crop_flip", "validation": 0.1}}
    held = run(tmp_path / "held", **shared)
    monkeypatch.setattr("ood_scores.training.streams.HELD_BYTES", 0)
    loaded = [run(tmp_path / f"{workers}", workers=workers, **shared) for workers in (0, 2)]
    for result in loaded:
        assert result.history == held.history
        assert all(
            torch.equal(value, weights(held.checkpoint)[name]) for name, value in weights(result.checkpoint).items()
        )


def test_random_crops_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"epochs": 1, "data": {"augmentation": "imagenet"}}
    histories = [run(tmp_path / f"{workers}", workers=workers, **shared).history for workers in (0, 2)]
    assert histories[0] == histories[1]


def test_mixed_precision_and_channels_last_match_full_precision(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact").history[-1]
    last = run(tmp_path / "last", channels_last=True).history[-1]
    mixed = run(tmp_path / "mixed", amp="bf16").history[-1]
    assert last["loss"] == pytest.approx(exact["loss"], rel=1e-3)
    assert mixed["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert mixed["loss"] != exact["loss"]


def test_accuracy_of_normalized_features_is_logged(tmp_path: Path) -> None:
    result = run(tmp_path, model={"l2_head": True}, data={"validation": 0.2})
    model: Any = timm.create_model("tiny_net", num_classes=7, checkpoint_path=str(result.checkpoint)).eval()
    images, labels = digit_images()
    _, rows = validation_split(labels.numpy(), 0.2)
    with torch.no_grad():
        z = model.forward_head(model.forward_features(images[rows]), pre_logits=True)
        plain, normalized = model.fc(z), model.fc(z / z.norm(dim=1, keepdim=True))
    accuracies = [(logits.argmax(1) == labels[rows]).double().mean().item() for logits in (plain, normalized)]
    assert accuracies[0] != accuracies[1]
    entry = result.history[-1]
    assert [entry["validation_accuracy"], entry["validation_accuracy_normalized"]] == pytest.approx(accuracies)


def test_rna_uses_ood_images_only_in_batch_statistics(tmp_path: Path) -> None:
    images, labels = digit_images()
    changes: dict[str, Any] = {"epochs": 1, "batch_size": len(images), "optimizer": {"lr": 1e-9, "momentum": 0.0}}
    result = run(tmp_path, objective={"name": "rna"}, auxiliary={**OOD, "batch_size": 500}, **changes)
    outside, _ = digit_images("7-9")
    model = fresh_model(0)
    together = torch.cat([images, outside[cycled(0, 0, 0, 1, len(outside), 500)[0]]])
    with torch.no_grad():
        features = model.train().forward_features(together)[: len(images)].mean(dim=(2, 3))
    assert result.history[0]["feature_norm"] == pytest.approx(features.norm(dim=1).mean().item(), rel=1e-5)
    assert result.history[0]["accuracy"] == pytest.approx(
        (model.fc(features).argmax(1) == labels).double().mean().item()
    )
    torch.testing.assert_close(weights(result.checkpoint)["bn1.running_mean"], model.bn1.running_mean)
    torch.testing.assert_close(weights(result.checkpoint)["bn2.running_var"], model.bn2.running_var)


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ({"name": "oe"}, {}),
        ({"name": "energy_oe", "base": "logit_adjustment"}, {}),
        ({"name": "pascl"}, {"data": {"augmentation": "crop_flip", "long_tail": 20.0}}),
        ({"name": "rna"}, {"auxiliary": {"data": "train", "augmentation": "small_crops"}}),
        ({"name": "rna"}, {"data": {"augmentation": "rna"}, "amp": "bf16"}),
        ({"name": "nc_loss"}, {"amp": "bf16"}),
    ],
)
def test_loss_decreases_with_every_kind_of_objective(
    tmp_path: Path, objective: dict[str, Any], changes: dict[str, Any]
) -> None:
    result = run(tmp_path, objective=objective, **{"auxiliary": OOD, "epochs": 3, **changes})
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_stages_train_the_same_weights_one_after_the_other(tmp_path: Path) -> None:
    second = {
        "epochs": 2,
        "batch_size": 128,
        "trainable": ["head"],
        "objective": {"name": "l2_norm"},
        "optimizer": {"name": "adam", "lr": 1e-3},
        "schedule": {"name": "cosine"},
    }
    result = run(tmp_path, epochs=1, checkpoint_every=1, stage=[second])
    assert [(entry["epoch"], entry["stage"]) for entry in result.history] == [(1, 1), (2, 2), (3, 2)]
    assert [entry["lr"] for entry in result.history] == pytest.approx([0.05, 1e-3, 5e-4])
    before, after = weights(tmp_path / "epoch_001.safetensors"), weights(result.checkpoint)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"} | {name for name in after if "running" in name or "num_batches" in name}


def test_trainable_patterns_select_parameters() -> None:
    model = timm.create_model("tiny_net", num_classes=7)
    everything = [name for name, _ in model.named_parameters()]
    assert trainable_parameters(model, ()) == everything
    assert trainable_parameters(model, ["batchnorm", "head"]) == [
        "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", "fc.weight", "fc.bias",
    ]  # fmt: skip
    assert trainable_parameters(model, ["conv*", "!conv2.*"]) == ["conv1.weight"]
    assert trainable_parameters(model, ["!batchnorm"]) == [name for name in everything if not name.startswith("bn")]
    with pytest.raises(BadInput, match="no parameter matches 'layer9"):
        trainable_parameters(model, ["layer9.*"])
    with pytest.raises(BadInput, match="leaves no parameter"):
        trainable_parameters(model, ["head", "!head"])


def test_fine_tuning_starts_from_a_checkpoint(trained: Trained, tmp_path: Path) -> None:
    still: dict[str, Any] = {"epochs": 1, "optimizer": {"lr": 1e-12}}
    same = run(tmp_path / "same", model={"checkpoint": str(trained.checkpoint)}, **still)
    for name in ("conv1.weight", "fc.weight"):
        torch.testing.assert_close(weights(same.checkpoint)[name], weights(trained.checkpoint)[name])
    fewer = run(tmp_path / "few", model={"checkpoint": str(trained.checkpoint)}, data={"train": "digits"}, **still)
    torch.testing.assert_close(weights(fewer.checkpoint)["conv1.weight"], weights(trained.checkpoint)["conv1.weight"])
    assert len(weights(fewer.checkpoint)["fc.weight"]) == 10
    with pytest.raises(CheckpointError, match=r"does not fit .cifar_resnet20"):
        run(tmp_path / "other", model={"name": "cifar_resnet20", "checkpoint": str(trained.checkpoint)})
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run(tmp_path / "none", model={"checkpoint": str(tmp_path / "none.safetensors")})


def test_public_names_of_the_training_package() -> None:
    assert ood_scores.training.train is train
    assert augmentation("none", 1).pixels == ()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ood_scores.training.nothing


def test_tensorboard_log_contains_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "tensorboard"), 1)

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            written.append((name, value, epoch))

        def flush(self) -> None: ...

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = type(nn)("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    module.__spec__ = ModuleSpec("tensorboard", None)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, module)
    result = run(tmp_path, tensorboard=True)
    assert ("loss", result.history[1]["loss"], 2) in written
    assert {name for name, _, _ in written} == {"loss", "accuracy", "feature_norm", "lr", "closed"}


def test_epoch_ends_with_the_auxiliary_images_unless_they_repeat(tmp_path: Path) -> None:
    """20 auxiliary images in batches of 8 are two steps of 16 images."""
    lengths = {}
    for repeat in (True, False):
        ood = {"data": "digits?classes=7-9&rows=0:20", "batch_size": 8, "repeat": repeat}
        result = run(tmp_path / str(repeat), epochs=1, batch_size=16, objective={"name": "oe"}, auxiliary=ood)
        state = load_state(result.checkpoint.parent / "state.safetensors")
        lengths[repeat] = int(state.part("model")["bn1.num_batches_tracked"])
    assert lengths[False] == 2
    assert lengths[True] > 50
