"""ResNet and DenseNet for CIFAR compared with published sizes and weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import create, images
from safetensors.torch import load_file

DATA = os.environ.get("OOD_SCORES_DATA")


@pytest.mark.parametrize(
    ("name", "switches", "expected"),
    [
        ("cifar_resnet20", {}, 269_722),
        ("cifar_resnet56", {}, 853_018),
        ("cifar_densenet100", {}, 769_162),
        ("rna_resnet18", {"bn_affine": True}, 11_173_962),
        ("rna_resnet50", {"bn_affine": True}, 23_520_842),
    ],
)
def test_published_parameter_counts(name: str, switches: dict[str, Any], expected: int) -> None:
    model = create(name, num_classes=10, **switches)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.skipif(DATA is None, reason="OOD_SCORES_DATA does not name the folder with the real checkpoints")
@pytest.mark.parametrize(
    ("name", "file", "classes"),
    [
        ("cifar_resnet20", "cifar10_resnet20", 10),
        ("cifar_densenet100", "cifar10_densenet100", 10),
        ("cifar_densenet100", "cifar100_densenet100", 100),
    ],
)
def test_published_checkpoints_load_strictly(name: str, file: str, classes: int) -> None:
    path = Path(str(DATA)) / "checkpoints" / f"{file}.safetensors"
    model = create(name, num_classes=classes, checkpoint_path=str(path))
    weights, state = load_file(path), model.state_dict()
    assert {key for key in state if not key.endswith("num_batches_tracked")} <= weights.keys() <= state.keys()
    for key, value in weights.items():
        assert torch.equal(state[key], value), key


def test_preprocessing_matches_the_published_weights() -> None:
    assert create("cifar_resnet20").pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert create("cifar_resnet20").pretrained_cfg["std"] == (0.229, 0.224, 0.225)
    assert create("cifar_densenet100").pretrained_cfg["mean"] == (0.4914, 0.4822, 0.4465)
    assert create("cifar_densenet100").pretrained_cfg["std"] == (0.2023, 0.1994, 0.2010)
    assert create("rna_resnet18").pretrained_cfg["std"] == (1.0, 1.0, 1.0)


def test_shortcut_of_cifar_resnet_pads_with_zeros() -> None:
    block = create("cifar_resnet20").layer2[0]
    x = images(1, size=4, channels=16)
    out = block.shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
