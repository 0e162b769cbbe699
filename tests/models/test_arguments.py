"""The arguments with which a network of a stranger's file may be created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import tiny  # noqa: F401  registers tiny_net
import torch
from networks import resnet
from safetensors.torch import save_file

import ood_scores
from ood_scores.errors import BadInput, CheckpointError
from ood_scores.models.arguments import check_arguments
from ood_scores.models.kinds.timm_names import make
from ood_scores.models.opening import load_model

FETCHING: dict[str, Any] = {
    "pretrained": True,
    "pretrained_cfg": {"url": "http://127.0.0.1/x.py"},
    "pretrained_cfg_overlay": {"url": "http://127.0.0.1/x.py"},
    "checkpoint_path": "/etc/passwd",
    "cache_dir": ".",
    "pretrained_strict": False,
    "pretrained_model_args": {"a": 1},
    "model_cfg": "x",
    "scriptable": True,
    "device": "meta",
    "name": "resnet18",
    "kwargs": 1,
}


def test_every_network_of_timm_accepts_the_sizes_that_checkpoints_determine() -> None:
    for name in timm.list_models():
        check_arguments(name, {"num_classes": 10, "in_chans": 1})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1, "weight_init": "skip"}),
        ("vit_base_patch16_224", {"img_size": [96, 64], "drop_path_rate": 0.1, "class_token": True}),
        ("resnet18", {"act_layer": "silu", "output_stride": 8, "drop_rate": 0.2, "norm_layer": None}),
        ("efficientnet_b0", {"drop_path_rate": 0.1}),
        ("swin_tiny_patch4_window7_224", {"depths": (2, 2, 2, 2), "window_size": 7}),
        ("regnetx_002", {"depth": 13}),  # a field of its configuration
        ("tiny_net", {"norm": False, "l2_head": True}),
        ("haas_resnet18", {"l2_head": True}),
        ("convnext_tiny_in22ft1k", {"num_classes": 3}),  # an old name
    ],
)
def test_arguments_of_networks_are_accepted(name: str, arguments: dict[str, Any]) -> None:
    check_arguments(name, arguments)


@pytest.mark.parametrize("key", FETCHING)
def test_arguments_that_fetch_or_name_a_place_are_refused_by_name(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", pytest.fail)
    with pytest.raises(BadInput, match=f"'{key}' is not an argument of the network 'resnet18': remove it"):
        make("resnet18", {key: FETCHING[key]})


@pytest.mark.parametrize(
    "value",
    ["/etc/passwd", "http://x", "a:b", "..\\x", "~", {"a": 1}, [["/x"]], object(), 10**12, "x\x1b[2J", b"x"],
)
def test_values_that_are_not_plain_are_refused(value: Any) -> None:
    with pytest.raises(BadInput, match=r"'act_layer' of the network 'resnet18' is .* not a plain value"):
        make("resnet18", {"act_layer": value})


def test_errors_of_constructors_are_bad_input() -> None:
    for arguments in ({"output_stride": 5}, {"act_layer": "none_such"}, {"num_classes": "many"}):
        with pytest.raises(BadInput, match=r"'resnet18' cannot be created with .*: change its arguments"):
            make("resnet18", arguments)
    for value in (-1, 0, 1.5, True):
        with pytest.raises(
            BadInput, match=f"in_chans of the network 'resnet18' is {value}: give the number of channels"
        ):
            make("resnet18", {"in_chans": value})


@pytest.mark.parametrize("stored", ['{"pretrained": true, "cache_dir": "."}', '{"checkpoint_path": "/etc/passwd"}'])
def test_checkpoint_decides_no_place(tmp_path: Path, stored: str) -> None:
    facts = {"architecture": '"cifar_resnet20"', "arguments": stored}
    save_file(resnet(num_classes=7).state_dict(), tmp_path / "a.safetensors", facts)
    with pytest.raises(CheckpointError, match="is not an argument of the network"):
        load_model("cifar_resnet20", tmp_path / "a.safetensors")


@pytest.mark.parametrize("stored", ["[1]", "{", "5", "null", "[" * 100_000, '{"num_classes": "x"}', '{"name": "x"}'])
def test_damaged_metadata_is_a_checkpoint_error(tmp_path: Path, stored: str) -> None:
    facts = {"architecture": '"resnet18"', "arguments": stored}
    save_file({"weights": torch.ones(3)}, tmp_path / "a.safetensors", facts)
    with pytest.raises(CheckpointError, match=r"metadata|stores arguments of its network that cannot be used"):
        load_model("resnet18", tmp_path / "a.safetensors")


def test_detector_is_not_saved_with_arguments_that_fetch(tmp_path: Path) -> None:
    detector = ood_scores.calibrate("energy", timm.create_model("tiny_net").eval(), id=[torch.rand(64, 3, 8, 8)])
    with pytest.raises(BadInput, match="'cache_dir' is not an argument of the network 'tiny_net'"):
        detector.save(tmp_path / "detector", arguments={"cache_dir": "."})
    assert not list(tmp_path.rglob("*.json"))
