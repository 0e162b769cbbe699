"""The trainer against a loop written by hand, and everything that it refuses before any work."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import functional as vision

import ood_scores
import ood_scores.training
from ood_scores.atomic import LockedFile
from ood_scores.data.sources import open_dataset
from ood_scores.errors import (
    BadInput,
    BadLabels,
    CacheBusy,
    CacheWriteFailed,
    CheckpointError,
    EmptyInput,
    HeadNotFound,
    MissingInput,
    NotFinite,
    OodScoresError,
    UnknownName,
)
from ood_scores.models.opening import load_model, preprocessing
from ood_scores.training import Trained, state, train, trainer
from ood_scores.training.augment import AUGMENTATIONS, augmentation, jitter, random_resized_crop, seed_of, turn_hue
from ood_scores.training.recipe_file import recipe_from
from ood_scores.training.setup import input_of, trainable_parameters
from ood_scores.training.streams import cycled, order, share, validation_split

ID = "digits?classes=0-6"
OOD: dict[str, Any] = {"data": "digits?classes=7-9"}


def run(out: Path, **changes: Any) -> Trained:
    return train(recipe_from(tiny.tables(**changes)), out, device="cpu", progress=False)


def weights(path: Path) -> dict[str, Tensor]:
    return state.read_tensors(path)


def digit_images(classes: str = "0-6") -> tuple[Tensor, Tensor]:
    """Digits as the network wants them, and their labels."""
    data = open_dataset(f"digits?classes={classes}", preprocessing(timm.create_model("tiny_net")))
    images, labels = next(iter(DataLoader(data, batch_size=len(data))))
    return images, labels


def fresh_model(seed: int) -> Any:
    """The network that a training with this seed starts from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        return timm.create_model("tiny_net", num_classes=7)


def uint8(count: int = 6, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    out = tmp_path_factory.mktemp("trained")
    return run(out, epochs=6, data={"validation": 0.2, "test": ID}, checkpoint_every=4, optimizer={"lr": 0.1})


# ---- what comes out


def test_it_learns(trained: Trained) -> None:
    assert [entry["epoch"] for entry in trained.history] == [1, 2, 3, 4, 5, 6]
    assert trained.history[0]["loss"] > 1.2
    assert trained.history[-1]["loss"] < 0.6
    assert trained.accuracy["training"] == trained.history[-1]["accuracy"] > 0.85
    assert trained.accuracy["validation"] == trained.history[-1]["validation_accuracy"] > 0.7


def test_the_log_holds_the_history(trained: Trained) -> None:
    rows = list(csv.DictReader(io.StringIO((trained.checkpoint.parent / "log.csv").read_text())))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == trained.history
    assert list(rows[0]) == [
        "epoch", "stage", "loss", "accuracy", "feature_norm", "lr", "validation_accuracy",
        "validation_accuracy_normalized",
    ]  # fmt: skip


def test_the_checkpoint_opens_with_timm_and_goes_into_extract(trained: Trained, tmp_path: Path) -> None:
    model = timm.create_model("tiny_net", num_classes=7, checkpoint_path=str(trained.checkpoint)).eval()
    images, labels = digit_images()
    with torch.no_grad():
        logits = model(images)
    assert (logits.argmax(1) == labels).double().mean() == pytest.approx(trained.accuracy["test"])
    again = load_model("tiny_net", trained.checkpoint)
    data = open_dataset(ID, preprocessing(again))
    feats = ood_scores.extract(again, DataLoader(data, batch_size=256), tmp_path / "test.h5", progress=False)
    torch.testing.assert_close(torch.from_numpy(np.asarray(feats.logits)), logits)


def test_load_model_knows_the_arguments_of_the_network(tmp_path: Path) -> None:
    result = run(tmp_path, model={"norm": False}, epochs=1)
    assert isinstance(load_model("tiny_net", result.checkpoint).bn1, nn.Identity)


def test_the_recipe_is_inside_the_checkpoint(trained: Trained) -> None:
    with safe_open(trained.checkpoint, "pt") as file:
        facts = file.metadata()
    assert (json.loads(facts["architecture"]), json.loads(facts["epoch"])) == ("tiny_net", 6)
    assert json.loads(facts["arguments"]) == {"num_classes": 7}
    assert json.loads(facts["metrics"]) == trained.history[-1]
    assert recipe_from(json.loads(facts["recipe"])).data.validation == 0.2


def test_checkpoints_are_kept(trained: Trained) -> None:
    folder = trained.checkpoint.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", "epoch_004.safetensors", "last.safetensors", "log.csv", "state.safetensors",
    ]  # fmt: skip
    assert not torch.equal(
        weights(folder / "epoch_004.safetensors")["fc.weight"], weights(trained.checkpoint)["fc.weight"]
    )


# ---- against a loop by hand


def by_hand(model: Any, seed: int, epochs: int, lrs: list[float], batch: int, drop_last: bool) -> list[float]:
    """SGD with momentum as its formula has it, on the images in the order of the trainer; the mean loss of epochs."""
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
def test_the_weights_are_those_of_a_loop_by_hand(tmp_path: Path, drop_last: bool) -> None:
    schedule = {"name": "steps", "milestones": [1]}
    result = run(tmp_path, epochs=2, batch_size=100, seed=5, drop_last=drop_last, schedule=schedule)
    model = fresh_model(5)
    losses = by_hand(model, 5, 2, [0.05, 0.005], 100, drop_last)
    assert [entry["loss"] for entry in result.history] == pytest.approx(losses, rel=1e-5)
    assert [entry["lr"] for entry in result.history] == pytest.approx([0.05, 0.005])
    torch.testing.assert_close(weights(result.checkpoint), dict(model.state_dict()), rtol=1e-4, atol=1e-6)


def test_record_of_an_epoch_is_that_of_its_samples_before_the_update(tmp_path: Path) -> None:
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


def test_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run(tmp_path, epochs=1, model={"drop": 0.3})
    assert torch.equal(torch.get_rng_state(), before)


def test_images_that_are_loaded_train_as_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: dict[str, Any] = {"epochs": 1, "data": {"augmentation": "crop_flip", "validation": 0.1}}
    held = run(tmp_path / "held", **shared)
    monkeypatch.setattr("ood_scores.training.streams.HELD_BYTES", 0)
    loaded = [run(tmp_path / f"{workers}", workers=workers, **shared) for workers in (0, 2)]
    for result in loaded:
        assert result.history == held.history
        assert all(
            torch.equal(value, weights(held.checkpoint)[name]) for name, value in weights(result.checkpoint).items()
        )


def test_crops_at_opening_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"epochs": 1, "data": {"augmentation": "imagenet"}}
    histories = [run(tmp_path / f"{workers}", workers=workers, **shared).history for workers in (0, 2)]
    assert histories[0] == histories[1]


def test_mixed_precision_and_channels_last_come_close(tmp_path: Path) -> None:
    exact = run(tmp_path / "exact").history[-1]
    last = run(tmp_path / "last", channels_last=True).history[-1]
    mixed = run(tmp_path / "mixed", amp="bf16").history[-1]
    assert last["loss"] == pytest.approx(exact["loss"], rel=1e-3)
    assert mixed["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert mixed["loss"] != exact["loss"]


def test_accuracy_with_normalised_features_is_logged_too(tmp_path: Path) -> None:
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


# ---- objectives and stages


def test_ood_images_enter_the_batch_statistics_and_nothing_else_of_rna(tmp_path: Path) -> None:
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
def test_objectives_fall(tmp_path: Path, objective: dict[str, Any], changes: dict[str, Any]) -> None:
    result = run(tmp_path, objective=objective, **{"auxiliary": OOD, "epochs": 3, **changes})
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_stages(tmp_path: Path) -> None:
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


def test_what_is_trainable() -> None:
    model = timm.create_model("tiny_net", num_classes=7)
    everything = [name for name, _ in model.named_parameters()]
    assert trainable_parameters(model, ()) == everything
    assert trainable_parameters(model, ["batchnorm", "head"]) == [
        "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", "fc.weight", "fc.bias",
    ]  # fmt: skip
    assert trainable_parameters(model, ["conv*", "!conv2.*"]) == ["conv1.weight"]
    assert trainable_parameters(model, ["!batchnorm"]) == [name for name in everything if not name.startswith("bn")]
    with pytest.raises(BadInput, match="no parameter fits 'layer9"):
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


# ---- orders and augmentation


def test_an_epoch_has_every_image_once() -> None:
    rows = order(3, 1, 103, 25, drop_last=False)
    assert [len(batch) for batch in rows] == [25, 25, 25, 25, 3]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(103))
    assert [len(batch) for batch in order(3, 1, 103, 25, drop_last=True)] == [25] * 4
    assert len(order(3, 1, 100, 25, drop_last=True)) == 4
    assert not torch.equal(rows[0], order(3, 2, 103, 25, drop_last=False)[0])


def test_the_auxiliary_stream_cycles_in_new_orders() -> None:
    rows = torch.cat(cycled(7, 0, 0, 9, 20, 8))
    assert len(rows) == 72
    rounds = rows[:60].reshape(3, 20)
    assert torch.equal(rounds.sort(dim=1).values, torch.arange(20).expand(3, 20))
    assert not torch.equal(rounds[0], rounds[1])
    assert torch.equal(torch.cat(cycled(7, 0, 4, 5, 20, 8)), rows[32:])
    assert [len(batch) for batch in cycled(7, 0, 0, 3, 5, 8)] == [8, 8, 8]


def test_shares_of_processes_make_the_batch() -> None:
    batch = order(0, 0, 64, 64, drop_last=False)[0]
    parts = [share([batch], rank, 4)[0] for rank in range(4)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(), batch)


def test_validation_takes_its_share_of_each_class_and_never_the_only_image() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 45, 9, 1])
    kept, aside = validation_split(labels, 0.1)
    assert np.bincount(labels[aside], minlength=4).tolist() == [10, 4, 0, 0]
    assert sorted([*kept, *aside]) == list(range(155))
    assert aside.tolist() == validation_split(labels, 0.1)[1].tolist()
    assert len(validation_split(labels, 0.0)[1]) == 0


def test_input_is_that_of_evaluation() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    for model in (
        timm.create_model("tiny_net"),
        timm.create_model("tiny_net", in_chans=1),
        timm.create_model("resnet18"),
    ):
        to_input = input_of(model)
        pixels = vision.pil_to_tensor(to_input.open(image, 0))[None]
        ready = to_input.augmented(pixels, AUGMENTATIONS["none"], Generator(), False)
        torch.testing.assert_close(ready[0], preprocessing(model)(image))


def test_crop_and_flip_are_windows_of_the_image() -> None:
    images = uint8(200)
    changed = (AUGMENTATIONS["crop_flip"](images, Generator().manual_seed(1)) * 255).round().to(torch.uint8)
    seen = set()
    for image, padded in zip(changed, F.pad(images, (1, 1, 1, 1)), strict=True):
        windows = {
            (top, left, mirrored): (window.flip(2) if mirrored else window)
            for top in range(3) for left in range(3) for mirrored in (False, True)
            for window in [padded[:, top : top + 8, left : left + 8]]
        }  # fmt: skip
        (place,) = [place for place, window in windows.items() if torch.equal(window, image)]
        seen.add(place)
    assert len(seen) == 18


def test_hue_is_turned_as_torchvision_does() -> None:
    images = uint8(4, size=16).float() / 255
    images[0] = images[0].mean(dim=0)
    images[1, :, :4] = 0
    turns = torch.tensor([0.1, -0.1, 0.03, 0.5]).reshape(4, 1, 1, 1)
    expected = [vision.adjust_hue(image, float(turn)) for image, turn in zip(images, turns, strict=True)]
    torch.testing.assert_close(turn_hue(images, turns), torch.stack(expected), atol=2e-6, rtol=0)


def test_jitter_changes_most_images_each_in_its_own_way() -> None:
    images = (uint8(1, size=16).float() / 255).expand(500, 3, 16, 16)
    changed = jitter(images, Generator().manual_seed(0))
    different = (changed != images).flatten(1).any(dim=1)
    assert 0.74 < different.double().mean() < 0.86
    assert len(changed[different].flatten(1).unique(dim=0)) == different.sum()
    assert changed.min() >= 0
    assert changed.max() <= 1


def test_a_fifth_of_the_rna_images_is_grey() -> None:
    changed = AUGMENTATIONS["rna"](uint8(1000), Generator().manual_seed(0))
    grey = (changed - changed.mean(dim=1, keepdim=True)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert 0.16 < grey.double().mean() < 0.24


def test_small_crops_show_a_part_of_the_image() -> None:
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(400, 3, 32, 32)
    shown = AUGMENTATIONS["small_crops"](ramp, Generator().manual_seed(0))
    spans = (shown[:, 0, 0, :].amax(dim=1) - shown[:, 0, 0, :].amin(dim=1)) * 255 / 248
    assert 0.15 < spans.min() < 0.22
    assert 0.45 < spans.max() < 0.6


def test_random_resized_crops() -> None:
    image = Image.fromarray(np.arange(100, dtype=np.uint8)[None].repeat(60, 0))
    crops = [np.asarray(random_resized_crop(image, (8, 12), Image.Resampling.NEAREST, seed)) for seed in range(200)]
    assert {crop.shape for crop in crops} == {(8, 12)}
    spans = np.array([float(crop.max()) - float(crop.min()) for crop in crops])
    assert spans.min() < 35 < 65 < spans.max()
    assert np.array_equal(crops[3], np.asarray(random_resized_crop(image, (8, 12), Image.Resampling.NEAREST, 3)))
    stripe = random_resized_crop(Image.new("L", (500, 2)), (4, 4), Image.Resampling.BILINEAR, 0)
    assert stripe.size == (4, 4)


# ---- what is refused before any work


def imbalanced(folder: Path, counts: list[int], first: int = 0) -> str:
    labels = np.repeat(np.arange(first, first + len(counts)), counts)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=labels)
    return f"npz:{folder}/data.npz"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"objective": {"name": "rna"}}, MissingInput, "add \\[auxiliary\\] with data"),
        ({"objective": {"name": "rna"}, "auxiliary": OOD, "model": {"name": "tiny_plain"}}, BadInput, "BatchNorm"),
        ({"objective": {"name": "rnaa"}}, UnknownName, "there are: .*rna"),
        ({"objective": {"name": "oe", "wait": 3}, "auxiliary": OOD}, UnknownName, "no setting 'wait'"),
        ({"objective": {"name": "oe", "weight": "x"}, "auxiliary": OOD}, BadInput, "'oe' does not work with.*'x'"),
        ({"model": {"name": "tiny_nett"}}, UnknownName, "did you mean .tiny_net.\\?"),
        ({"model": {"layers": 3}}, BadInput, "unexpected keyword argument 'layers'"),
        ({"model": {"num_classes": 3}}, BadLabels, "labels up to 6, but num_classes of \\[model\\] is 3"),
        ({"model": {"num_classes": 9}}, BadLabels, "no training images of 2 of 9 classes, such as class 7"),
        ({"model": {"name": "resnetv2_50x1_bit"}}, HeadNotFound, "not an nn.Linear"),
        ({"data": {"train": "npz:nowhere.npz"}}, BadInput, "there is no nowhere.npz"),
        ({"data": {"train": "torchvision:CIFAR10?split=train&root=nowhere"}}, BadInput, "add download=true"),
        ({"data": {"train": "cifar"}}, UnknownName, "no kind of dataset 'cifar'"),
        ({"data": {"train": "digits?rows=0:0"}}, EmptyInput, "no images"),
        ({"data": {"test": "digits"}}, BadLabels, "labels up to 9"),
        ({"data": {"augmentation": "rnd"}}, UnknownName, "there are: crop_flip, flip"),
        ({"data": {"augmentation": "rna"}, "model": {"in_chans": 1}}, BadInput, "for colour images"),
        ({"batch_size": 5000, "drop_last": True}, BadInput, "make no batch of 5000"),
        ({"trainable": ["nothing"]}, BadInput, "no parameter fits 'nothing'"),
        ({"tensorboard": True}, BadInput, "pip install tensorboard"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], error: type[OodScoresError], words: str) -> None:
    if "tensorboard" in changes:
        pytest.MonkeyPatch().setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(error, match=words):
        run(tmp_path, **changes)
    assert not list(tmp_path.glob("*.*safetensors"))


def test_classes_need_images_and_one_is_enough(tmp_path: Path) -> None:
    spec = imbalanced(tmp_path, [20, 0, 5])
    with pytest.raises(BadLabels, match="no training images of 1 of 3 classes, such as class 1"):
        run(tmp_path, data={"train": spec})
    single = imbalanced(tmp_path, [20, 6, 1])
    for objective in ("logit_adjustment", "pascl"):
        result = run(
            tmp_path / objective,
            data={"train": single, "validation": 0.5},
            objective={"name": objective},
            auxiliary=OOD,
        )
        assert len(result.history) == 2


def test_images_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((5, 8, 8), dtype=np.uint8))
    with pytest.raises(BadLabels, match="images without a label"):
        run(tmp_path, data={"train": f"npz:{tmp_path}/data.npz"})


# ---- interrupted, repeated, overwritten


def test_the_same_call_again_does_nothing(trained: Trained) -> None:
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


def test_another_recipe_or_other_data_in_the_folder(tmp_path: Path) -> None:
    spec = imbalanced(tmp_path, [20, 6, 3])
    first = run(tmp_path / "out", data={"train": spec})
    with pytest.raises(BadInput, match=r"another recipe: seed was 0, is 1; optimizer\.lr was 0\.05, is 0\.5"):
        run(tmp_path / "out", data={"train": spec}, seed=1, optimizer={"lr": 0.5})
    imbalanced(tmp_path, [20, 6, 4])
    with pytest.raises(BadInput, match=r"another data: images of each class was \[20, 6, 3\], is \[20, 6, 4\]"):
        run(tmp_path / "out", data={"train": spec})
    recipe = recipe_from(tiny.tables(data={"train": spec}, seed=1))
    second = train(recipe, tmp_path / "out", device="cpu", progress=False, overwrite=True)
    assert second.history != first.history
    assert len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 3


def test_foreign_files_are_not_touched(tmp_path: Path, trained: Trained) -> None:
    (tmp_path / "state.safetensors").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="not the state of a training"):
        run(tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == b"something else"
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a": torch.zeros(1)}, other / "last.safetensors")
    with pytest.raises(BadInput, match=r"no state\.safetensors to continue from"):
        run(other)


def test_two_trainings_cannot_share_a_folder(tmp_path: Path) -> None:
    with LockedFile(tmp_path / ".lock", "a"), pytest.raises(CacheBusy, match="another process"):
        run(tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**6))
    honest = F.cross_entropy

    def failing(*arguments: Any) -> Tensor:
        return honest(*arguments) * (float("nan") if next(calls) == 23 else 1)  # after one on trial, 20 in each epoch

    monkeypatch.setattr("ood_scores.training.objectives.classification.F.cross_entropy", failing)
    with pytest.raises(NotFinite, match=r"in epoch 2, step 3, the loss became nan.*keeps those of epoch 1"):
        run(tmp_path)
    monkeypatch.undo()
    assert all(value.isfinite().all() for value in weights(tmp_path / "last.safetensors").values())
    assert run(tmp_path).history == run(tmp_path / "peace").history


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = trainer.train_step

    def exploding(step: Any, head: nn.Linear, *arguments: Any) -> Tensor:
        sums = honest(step, head, *arguments)
        head.bias.data.fill_(float("inf"))
        return sums

    monkeypatch.setattr(trainer, "train_step", exploding)
    with pytest.raises(NotFinite, match=r"epoch 1 the weights became infinite or NaN.*no epoch was finished"):
        run(tmp_path, batch_size=2000)
    assert not (tmp_path / "last.safetensors").exists()


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_train_is_a_public_name() -> None:
    assert ood_scores.training.train is train
    assert augmentation("none", 1).pixels == ()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ood_scores.training.nothing


def test_log_on_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", module)
    result = run(tmp_path, tensorboard=True)
    assert ("loss", result.history[1]["loss"], 2) in written
    assert {name for name, _, _ in written} == {"loss", "accuracy", "feature_norm", "lr", "closed"}
