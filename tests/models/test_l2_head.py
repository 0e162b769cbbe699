"""The L2-normalizing classifier alone, in the networks of this package, and in timm models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from networks import SMALL, assert_extracted, create, head_call, images, settle, small
from safetensors.torch import save_file
from torch import Tensor, nn

import ood_scores
from ood_scores.errors import HeadNotFound
from ood_scores.models.networks import L2Head, with_l2_head


def head_and_features() -> tuple[L2Head, Tensor]:
    torch.manual_seed(0)
    return L2Head(6, 4).double(), torch.randn(5, 6, dtype=torch.float64)


def test_l2_head_normalizes_each_row_in_training() -> None:
    head, z = head_and_features()
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    expected = (z.numpy() / np.sqrt((z.numpy() ** 2).sum(axis=1, keepdims=True))) @ weight.T + bias
    np.testing.assert_allclose(head.train()(z).detach().numpy(), expected, rtol=0, atol=1e-15)


def test_l2_head_is_affine_in_eval_mode_by_default() -> None:
    head, z = head_and_features()
    torch.testing.assert_close(head.eval()(z), z @ head.weight.T + head.bias, rtol=0, atol=1e-14)
    in_training = head.train()(z)
    head.normalize_eval = True
    assert torch.equal(head.eval()(z), in_training)


def test_l2_head_gradient_is_orthogonal_to_the_feature() -> None:
    head, z = head_and_features()
    z.requires_grad_()
    nn.functional.cross_entropy(head.train()(z), torch.tensor([0, 1, 2, 3, 0])).backward()
    assert z.grad is not None
    assert z.grad.norm(dim=1).min() > 1e-3
    assert (z.grad * z).sum(dim=1).abs().max() < 1e-16


def test_l2_head_maps_a_zero_feature_to_the_bias() -> None:
    head, _ = head_and_features()
    assert torch.equal(head.train()(torch.zeros(1, 6, dtype=torch.float64))[0], head.bias)


def test_l2_head_normalizes_every_token() -> None:
    head = L2Head(4, 3).double().train()
    tokens = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(head(tokens), torch.stack([head(row) for row in tokens]))


def test_l2_head_argument_selects_the_classifier() -> None:
    assert isinstance(create("haas_resnet18").get_classifier(), L2Head)
    assert type(create("haas_resnet18", l2_head=False).get_classifier()) is nn.Linear
    assert create("rna_resnet18", l2_head=True, normalize_eval=True).get_classifier().normalize_eval


@pytest.mark.parametrize("name", SMALL)
def test_l2_head_of_haas_networks_normalizes_only_in_training(name: str) -> None:
    model = small(name, num_classes=5)
    settle(model)
    head = model.get_classifier()
    assert isinstance(head, L2Head)
    z, logits = head_call(model.train(), images())
    torch.testing.assert_close(logits, z / z.norm(dim=1, keepdim=True) @ head.weight.T + head.bias)
    z, logits = head_call(model.eval(), images())
    torch.testing.assert_close(logits, z @ head.weight.T + head.bias)
    other = small(name, num_classes=5, normalize_eval=True).eval()
    z, logits = head_call(other, images())
    head = other.get_classifier()
    torch.testing.assert_close(z.norm(dim=1), torch.ones(len(z)))
    torch.testing.assert_close(logits, z @ head.weight.T + head.bias)
    kept = ood_scores.extract(other, [images()], progress=False).features
    torch.testing.assert_close(torch.as_tensor(kept[:]), z)


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv3_small_050"])
def test_with_l2_head_shares_the_weights(name: str) -> None:
    model = create(name, num_classes=4).eval()
    plain, keys = model.get_classifier(), list(model.state_dict())
    with torch.no_grad():
        before = model(images(size=16))
        assert with_l2_head(model) is model
        assert torch.equal(model(images(size=16)), before)
    head = model.get_classifier()
    assert isinstance(head, L2Head)
    assert not head.training
    assert head.weight is plain.weight
    assert head.bias is plain.bias
    assert list(model.state_dict()) == keys


TIMM: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ("convnext_atto", {}),
    ("efficientnet_b0", {}),
    ("densenet121", {}),
]


@pytest.mark.parametrize(("name", "kwargs"), TIMM)
def test_checkpoint_of_a_wrapped_timm_model_opens_with_plain_timm(
    name: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    model: Any = with_l2_head(create(name, num_classes=5, **kwargs))
    settle(model)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    torch.manual_seed(99)
    opened: Any = timm.create_model(name, num_classes=5, checkpoint_path=str(path), **kwargs).eval()
    assert not any(isinstance(module, L2Head) for module in opened.modules())
    assert opened.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(opened(images()), model(images()))
    kept = assert_extracted(opened, opened.get_classifier()).features
    assert kept.equal(assert_extracted(model, model.get_classifier()).features)


@pytest.mark.parametrize(("name", "kwargs"), TIMM)
def test_wrapped_timm_model_normalizes_only_in_training(name: str, kwargs: dict[str, Any]) -> None:
    model: Any = with_l2_head(create(name, num_classes=5, **kwargs))
    settle(model)
    head = model.get_classifier()
    z, logits = head_call(model.train(), images())
    torch.testing.assert_close(logits, z / z.norm(dim=1, keepdim=True) @ head.weight.T + head.bias)
    z, logits = head_call(model.eval(), images())
    torch.testing.assert_close(logits, z @ head.weight.T + head.bias)


def test_with_l2_head_refuses_a_model_without_a_linear_classifier() -> None:
    with pytest.raises(HeadNotFound, match="Identity"):
        with_l2_head(create("cifar_resnet20", num_classes=0))
    with pytest.raises(HeadNotFound, match="NoneType"):
        with_l2_head(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "kwargs", "found"),
    [
        ("resnetv2_50x1_bit", {"channels": (128,) * 4, "stem_chs": 32}, "Conv2d"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, "tuple"),
    ],
)
def test_with_l2_head_refuses_other_classifiers(name: str, kwargs: dict[str, Any], found: str) -> None:
    model = create(name, num_classes=5, **kwargs)
    before = list(model.state_dict())
    with pytest.raises(
        HeadNotFound, match=rf"{type(model).__name__}.get_classifier\(\) returns {found}, not an nn.Linear"
    ):
        with_l2_head(model)
    assert list(model.state_dict()) == before
