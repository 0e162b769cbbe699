"""Training in two processes, started as by ``torchrun``, compared with training in one."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from torch import Tensor
from training_runs import OOD, digit_images, fresh_model

from ood_scores.data.subsets import validation_split
from ood_scores.errors import BadInput
from ood_scores.training import state, train
from ood_scores.training.augment import seed_of
from ood_scores.training.distributed import Processes, fastest_convolutions
from ood_scores.training.networks import make_model
from ood_scores.training.recipe import ModelTable
from ood_scores.training.recipe_file import recipe_from
from ood_scores.training.setup import prepare
from ood_scores.training.streams import cycled, order
from ood_scores.user_code import import_referenced

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["ood_scores.training.trainer", "sklearn.datasets", "tiny"])


def work(out: str, changes: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    import_referenced(changes.get("model", {}).get("name", ""))
    train(recipe_from(tiny.tables(**changes)), out, device="cpu", progress=False)


def start(out: Path, changes: dict[str, Any], count: int = 2) -> list[Any]:
    """Start processes with the environment of ``torchrun``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [children.Process(target=work, args=(str(out), changes, rank)) for rank in ranks]
    for process in processes:
        process.start()
    return processes


def join(processes: list[Any]) -> None:
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [0, 0]


def weights(folder: Path) -> dict[str, Tensor]:
    return state.read_tensors(folder / "last.safetensors")


def test_gradients_are_means_over_the_whole_batch(tmp_path: Path) -> None:
    """The last batch of an epoch has 17 images, 9 for one process and 8 for the other."""
    changes: dict[str, Any] = {
        "model": {"name": "tiny_plain"},
        "data": {"train": "digits?classes=0-5", "validation": 0.1},
        "objective": {"name": "oe"},
        "auxiliary": {"data": "digits?classes=7-9"},
    }
    join(start(tmp_path / "two", changes))
    one = train(recipe_from(tiny.tables(**changes)), tmp_path / "one", device="cpu", progress=False)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    with (tmp_path / "two" / "log.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 2
    for row, entry in zip(rows, one.history, strict=True):
        assert row == pytest.approx(entry, rel=1e-4)


def test_parameters_that_the_loss_ignores_do_not_change(tmp_path: Path) -> None:
    """``nc_loss`` ignores the bias of the head."""
    changes: dict[str, Any] = {"model": {"name": "tiny_plain"}, "objective": {"name": "nc_loss"}, "drop_last": True}
    join(start(tmp_path, {**changes, "epochs": 1}))
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(0, "model"))
        model: Any = timm.create_model("tiny_plain", num_classes=7)
    assert torch.equal(weights(tmp_path)["fc.bias"], model.fc.bias)
    assert not torch.equal(weights(tmp_path)["fc.weight"], model.fc.weight)


TWO_HEADS = """
from torch import nn
from torchvision import transforms

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())
        self.last, self.second = nn.Linear(6, num_classes), nn.Linear(6, num_classes)
        steps = [transforms.Resize((8, 8)), transforms.Grayscale(), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize((0.5,), (0.5,))])

    def forward(self, images):
        features = self.body(images)
        return {"logits": self.last(features), "second": self.second(features)}
"""


def test_a_second_head_of_the_user_s_own_network_does_not_change(tmp_path: Path) -> None:
    (tmp_path / "two_heads.py").write_text(TWO_HEADS)
    name = f"{tmp_path}/two_heads.py:Net"
    changes: dict[str, Any] = {"model": {"name": name}, "epochs": 1, "drop_last": True}
    join(start(tmp_path / "two", changes))
    import_referenced(name)
    one = train(recipe_from(tiny.tables(**changes)), tmp_path / "one", device="cpu", progress=False)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-4, atol=1e-6)
    first: Any = make_model(ModelTable(name), {"num_classes": 7}, 0, tmp_path)
    assert torch.equal(weights(one.checkpoint.parent)["second.weight"], first.second.weight)
    assert not torch.equal(weights(one.checkpoint.parent)["last.weight"], first.last.weight)


def test_batch_statistics_cover_each_process_s_share_of_id_and_ood_images(tmp_path: Path) -> None:
    (images, _), (outside, _) = digit_images(), digit_images("7-9")
    changes: dict[str, Any] = {
        "epochs": 1,
        "batch_size": 1200,
        "drop_last": True,
        "objective": {"name": "rna"},
        "auxiliary": {**OOD, "batch_size": 400},
    }
    join(start(tmp_path, changes))
    model = fresh_model(0).train()
    inside = order(0, 0, len(images), 1200, drop_last=True)[0][::2]
    others = cycled(0, 0, 0, 1, len(outside), 400)[0][::2]
    assert (len(inside), len(others)) == (600, 200)
    with torch.no_grad():
        model(torch.cat([images[inside], outside[others]]))
    torch.testing.assert_close(weights(tmp_path)["bn1.running_mean"], model.bn1.running_mean)
    torch.testing.assert_close(weights(tmp_path)["bn2.running_var"], model.bn2.running_var)


def test_killed_processes_resume_to_the_same_weights(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 6, "model": {"drop": 0.2}, "data": {"augmentation": "rna"}, "state_every": 3}
    join(start(tmp_path / "peace", changes))
    processes = start(tmp_path / "killed", changes)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    progress = state.load_state(tmp_path / "killed" / "state.safetensors").progress
    assert progress.epoch < 6
    join(start(tmp_path / "killed", changes))
    peace, killed = weights(tmp_path / "peace"), weights(tmp_path / "killed")
    assert all(torch.equal(peace[name], killed[name]) for name in peace)
    assert (tmp_path / "peace" / "log.csv").read_text() == (tmp_path / "killed" / "log.csv").read_text()


@pytest.mark.parametrize(("device", "deterministic"), [("cuda", False), ("cuda", True), ("cpu", False)])
def test_cudnn_chooses_by_trial_on_a_gpu_unless_algorithms_are_to_be_deterministic(
    device: str, deterministic: bool
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        with fastest_convolutions(torch.device(device)):
            assert torch.backends.cudnn.benchmark == (device == "cuda" and not deterministic)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not torch.backends.cudnn.benchmark


def test_sync_batchnorm_keeps_names_and_weights() -> None:
    model = timm.create_model("tiny_net", num_classes=7)
    before = model.state_dict()
    pair = Processes(rank=1, count=2)
    synchronised = pair.with_sync_batchnorm(model)
    assert [type(module) for module in synchronised.modules()].count(torch.nn.SyncBatchNorm) == 2
    assert all(torch.equal(value, before[name]) for name, value in synchronised.state_dict().items())
    assert synchronised.state_dict().keys() == before.keys()
    assert Processes().with_sync_batchnorm(model) is model


def test_settings_that_two_processes_cannot_use_are_refused(tmp_path: Path) -> None:
    pair = Processes(rank=1, count=2)
    with pytest.raises(BadInput, match="a batch of 63 cannot be split among 2 processes"):
        prepare(recipe_from(tiny.tables(batch_size=63)), pair, tmp_path)
    with pytest.raises(BadInput, match="sync_batchnorm needs GPUs"):
        prepare(recipe_from(tiny.tables(sync_batchnorm=True)), pair, tmp_path)
    with pytest.raises(BadInput, match="the device 'nothing' is not available"):
        train(recipe_from(tiny.tables()), tmp_path, device="nothing")


def test_validation_uses_the_saved_batch_statistics(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data": {"validation": 0.3}, "epochs": 2, "batch_size": 16, "optimizer": {"lr": 0.3}}
    join(start(tmp_path, changes))
    model = timm.create_model("tiny_net", num_classes=7, checkpoint_path=str(tmp_path / "last.safetensors")).eval()
    images, labels = digit_images()
    _, aside = validation_split(labels.numpy(), 0.3)
    with torch.no_grad():
        right = (model(images[aside]).argmax(1) == labels[aside]).double()
    with (tmp_path / "log.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    assert float(last["validation_accuracy"]) == pytest.approx(right.mean().item())
