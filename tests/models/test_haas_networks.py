"""VGG-16, CCT and ConvNeXt of Haas et al.: published sizes, features, and training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from networks import SMALL, assert_extracted, create, images, labels, parameter_count, settle, small, train
from safetensors.torch import save_file
from torch import nn

import ood_scores
import ood_scores.models.networks
from ood_scores.extraction.layers import stages
from ood_scores.models.networks import L2Head
from ood_scores.models.opening import load_model

WIDTHS = {"haas_vgg16": 512, "haas_cct7_3x1": 256, "haas_convnext_tiny": 768}


@pytest.fixture(scope="module", params=SMALL)
def full(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, create(request.param).eval()


VGG_NOTOP = 14_714_688  # Keras, VGG16(include_top=False): convolutions with their biases


VGG_CHANNELS = 4_224  # the number of biases, of BatchNorm scales, and of offsets


CONVNEXT_TINY = 28_589_128  # torchvision, ConvNeXt_Tiny_Weights.IMAGENET1K_V1


PUBLISHED = {
    "haas_vgg16": VGG_NOTOP + VGG_CHANNELS + 513 * 10,
    "haas_cct7_3x1": 3_760_139,
    "haas_convnext_tiny": CONVNEXT_TINY - 769 * 990 - 3 * 96 * 7 - 6_624 * 40 - 2 * 768,
}


def test_parameter_counts_match_published_sizes(full: tuple[str, Any]) -> None:
    """CCT-7/3x1 is 3.760M in Table 2 of the authors' README; ConvNeXt's 6,624 kernels lose 40 of 49 weights."""
    name, model = full
    assert parameter_count(model) == PUBLISHED[name]
    assert f"{PUBLISHED['haas_cct7_3x1'] / 1e6:.3f}" == "3.760"
    assert f"{PUBLISHED[name]:,}" in str(timm.model_entrypoint(name).__doc__)


def test_shapes_of_32_pixel_images(full: tuple[str, Any]) -> None:
    name, model = full
    with torch.no_grad():
        feature_map = model.forward_features(images(2))
        features = model.forward_head(feature_map, pre_logits=True)
        assert model(images(2)).shape == (2, 10)
    assert features.shape == (2, WIDTHS[name])
    assert model.num_features == model.head_hidden_size == WIDTHS[name]
    assert feature_map.shape == ((2, 256, 256) if name == "haas_cct7_3x1" else (2, WIDTHS[name], 1, 1))


def test_default_configuration_names_real_layers(full: tuple[str, Any]) -> None:
    _, model = full
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert model.get_submodule(config["first_conv"]).in_channels == 3


def test_haas_networks_are_registered() -> None:
    assert set(WIDTHS) <= set(timm.list_models())
    assert set(WIDTHS) <= set(ood_scores.models.networks.__all__)


@pytest.mark.parametrize("name", SMALL)
def test_reset_classifier(name: str) -> None:
    for l2_head in (True, False):
        model = small(name, l2_head=l2_head).eval()
        model.reset_classifier(3)
        assert type(model.get_classifier()) is (L2Head if l2_head else nn.Linear)
        with torch.no_grad():
            assert model(images(2)).shape == (2, 3)
            model.reset_classifier(0)
            assert model(images(2)).shape == (2, model.num_features)
        assert model.num_classes == 0
        assert small(name, l2_head=l2_head, num_classes=0).num_classes == 0


@pytest.mark.parametrize("name", SMALL)
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    model = create(name, num_classes=5, in_chans=1)
    settle(model, channels=1)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    torch.manual_seed(99)
    opened = timm.create_model(name, num_classes=5, in_chans=1, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        expected = model(images(1, channels=1))
        assert torch.equal(opened(images(1, channels=1)), expected)
        assert torch.equal(load_model(name, path)(images(1, channels=1)), expected)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("switches", [{}, {"l2_head": False}])
def test_extract_finds_head_and_features_of_haas_networks(name: str, switches: dict[str, Any]) -> None:
    model = small(name, num_classes=5, **switches)
    settle(model)
    assert_extracted(model, model.get_classifier())


@pytest.mark.parametrize("name", SMALL)
def test_stages_of_haas_networks(name: str) -> None:
    expected = {
        "haas_vgg16": [f"features.{i}" for i in (6, 10, 14, 18, 22)],
        "haas_cct7_3x1": ["blocks.0", "blocks.1"],
        "haas_convnext_tiny": [f"stages.{i}" for i in range(4)],
    }
    assert list(stages(small(name).eval(), images(1))) == expected[name]


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = small(name, num_classes=5).train()
    nn.functional.cross_entropy(model(images()), labels(4)).backward()
    for key, parameter in model.named_parameters():
        if key != "attention_pool.bias":  # equal for all tokens, so softmax cancels it
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("l2_head", [True, False])
def test_a_few_steps_reduce_the_loss(name: str, l2_head: bool) -> None:
    model = small(name, num_classes=5, l2_head=l2_head)
    vgg = name == "haas_vgg16"  # the papers' optimizers
    weights = model.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1) if vgg else torch.optim.AdamW(weights, lr=5e-3)
    losses = train(model, optimizer, steps=10)
    assert losses[-1] < 0.9 * losses[0], losses
