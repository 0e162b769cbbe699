"""Conventions of timm that every network of the package follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from networks import create, images, settle
from safetensors.torch import save_file
from torch import Tensor, nn

import ood_scores
import ood_scores.models.networks

WIDTHS = {
    "cifar_resnet20": 64,
    "cifar_resnet56": 64,
    "cifar_densenet100": 342,
    "haas_resnet18": 512,
    "haas_resnet50": 2048,
    "rna_resnet18": 512,
    "rna_resnet50": 2048,
}


CIFAR = ["cifar_resnet20", "cifar_densenet100", "haas_resnet18", "rna_resnet18"]


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_feature_widths(name: str, width: int) -> None:
    model = create(name, num_classes=7).eval()
    with torch.no_grad():
        feature_map = model.forward_features(images(2, size=16))
        features = model.forward_head(feature_map, pre_logits=True)
        logits = model(images(2, size=16))
    assert model.num_features == model.head_hidden_size == width
    assert features.shape == (2, width)
    torch.testing.assert_close(features, feature_map.mean(dim=(2, 3)))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "stride"), [("cifar_resnet20", 4), ("cifar_densenet100", 4), ("haas_resnet18", 8), ("rna_resnet18", 8)]
)
def test_feature_map_size_is_the_image_size_over_the_stride(name: str, stride: int) -> None:
    with torch.no_grad():
        feature_map = create(name).eval().forward_features(images(1, size=32))
    assert feature_map.shape == (1, WIDTHS[name], 32 // stride, 32 // stride)


@pytest.mark.parametrize("name", CIFAR)
def test_classifier_input_is_the_penultimate_feature(name: str) -> None:
    model = create(name)
    settle(model, size=16)
    seen: list[Tensor] = []
    head = model.get_classifier()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(images(size=16))
        features = model.forward_head(model.forward_features(images(size=16)), pre_logits=True)
    assert isinstance(head, nn.Linear)
    assert torch.equal(seen[0], features)
    torch.testing.assert_close(logits, features @ head.weight.T + head.bias)


@pytest.mark.parametrize("name", CIFAR)
def test_checkpoint_round_trip_through_safetensors(name: str, tmp_path: Path) -> None:
    model = create(name, num_classes=5, in_chans=1)
    settle(model, size=16, channels=1)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    torch.manual_seed(99)
    restored = timm.create_model(name, num_classes=5, in_chans=1, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(restored(images(size=16, channels=1)), model(images(size=16, channels=1)))


@pytest.mark.parametrize("name", CIFAR)
def test_reset_classifier(name: str) -> None:
    model = create(name).eval()
    kind = type(model.get_classifier())
    model.reset_classifier(3)
    assert type(model.get_classifier()) is kind
    with torch.no_grad():
        assert model(images(2, size=16)).shape == (2, 3)
        model.reset_classifier(0)
        assert model(images(2, size=16)).shape == (2, WIDTHS[name])
    assert model.num_classes == 0


@pytest.mark.parametrize("name", CIFAR)
def test_default_configuration_names_real_layers(name: str) -> None:
    model = create(name)
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 1.0
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert model.get_submodule(config["first_conv"]).in_channels == 3


def test_cifar_networks_are_registered() -> None:
    assert set(WIDTHS) <= set(timm.list_models())
    assert set(WIDTHS) <= set(ood_scores.models.networks.__all__)
