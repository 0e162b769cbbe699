"""Weights of BiT in Google's arrays and in GradNorm's names fill timm's network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from ood_scores.errors import CheckpointError
from ood_scores.models.checkpoints import read_checkpoint
from ood_scores.models.opening import load_model

NAME = "resnetv2_101x1_bit"
SMALL: dict[str, Any] = {"channels": (128, 128, 128, 128), "stem_chs": 32, "num_classes": 5}
BLOCKS = (3, 4, 23, 3)
LETTERS = "abc"


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(NAME, **SMALL).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
    return model


def of_google(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return the arrays that timm's own reader of Google's files expects, from the names in that reader."""
    arrays: dict[str, np.ndarray] = {}

    def put(name: str, values: Tensor) -> None:
        array = values.detach().numpy()
        arrays[f"resnet/{name}"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array

    net: dict[str, Tensor] = dict(model.named_parameters())
    put("root_block/standardized_conv2d/kernel", net["stem.conv.weight"])
    put("group_norm/gamma", net["norm.weight"])
    put("group_norm/beta", net["norm.bias"])
    put("head/conv2d/kernel", net["head.fc.weight"])
    put("head/conv2d/bias", net["head.fc.bias"])
    for stage in range(4):
        for block in range(BLOCKS[stage]):
            here, there = f"stages.{stage}.blocks.{block}", f"block{stage + 1}/unit{block + 1:02d}"
            for number, letter in enumerate(LETTERS, start=1):
                put(f"{there}/{letter}/standardized_conv2d/kernel", net[f"{here}.conv{number}.weight"])
                put(f"{there}/{letter}/group_norm/gamma", net[f"{here}.norm{number}.weight"])
                put(f"{there}/{letter}/group_norm/beta", net[f"{here}.norm{number}.bias"])
            if f"{here}.downsample.conv.weight" in net:
                put(f"{there}/a/proj/standardized_conv2d/kernel", net[f"{here}.downsample.conv.weight"])
    return arrays


def of_gradnorm(model: torch.nn.Module, final_norm: str) -> dict[str, Tensor]:
    """Return the weights under the names of the authors' ``resnetv2.py``, as saved from ``DataParallel``."""
    renamed = {}
    for name, values in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stages":
            layer = parts[4].replace("norm", "gn")
            name = f"body.block{int(parts[1]) + 1}.unit{int(parts[3]) + 1:02d}.{layer}.{parts[-1]}"
        name = name.replace("stem.conv", "root.conv").replace("head.fc", "head.conv")
        renamed[f"module.{name.replace('norm.', f'{final_norm}.')}"] = values
    return renamed


def assert_equal(path: Path, network: torch.nn.Module) -> None:
    found = load_model(NAME, path, **SMALL)
    expected = network.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in found.state_dict().items())


def test_arrays_of_google_fill_the_network_as_in_timm(network: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "BiT-S.npz"
    arrays: dict[str, Any] = {**of_google(network)}
    np.savez(path, **arrays)
    other: Any = timm.create_model(NAME, **SMALL)
    other.load_pretrained(str(path))
    assert all(torch.equal(values, other.state_dict()[name]) for name, values in network.state_dict().items())
    assert_equal(path, network)


@pytest.mark.parametrize("final_norm", ["before_head.gn", "head.gn"])
def test_weights_of_gradnorm_fill_the_network(network: torch.nn.Module, final_norm: str, tmp_path: Path) -> None:
    torch.save({"step": 3, "model": of_gradnorm(network, final_norm)}, tmp_path / "BiT-S.pth.tar")
    assert_equal(tmp_path / "BiT-S.pth.tar", network)


def test_arrays_of_other_networks_keep_their_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weight=np.ones((2, 2, 2, 2), np.float32))
    assert read_checkpoint(tmp_path / "other.npz")["weight"].shape == (2, 2, 2, 2)


def test_archives_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", weight=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="no archive of arrays of numbers"):
        read_checkpoint(tmp_path / "objects.npz")


def test_name_without_a_place_in_timm_is_named(network: torch.nn.Module, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {**of_google(network), "resnet/more/kernel": np.ones(3, np.float32)}
    np.savez(tmp_path / "more.npz", **arrays)
    with pytest.raises(CheckpointError, match="resnet/more/kernel is not of this model"):
        load_model(NAME, tmp_path / "more.npz", **SMALL)
