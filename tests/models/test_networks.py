"""The CIFAR networks: published sizes and weights, timm's conventions, and each switch against its definition."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ood_scores.models.networks
from ood_scores.errors import HeadNotFound
from ood_scores.models.networks import L2Head, SpectralConv2d, with_l2_head
from ood_scores.models.networks.ood_resnet import PooledShortcut

DATA = os.environ.get("OOD_SCORES_DATA")
WIDTHS = {
    "cifar_resnet20": 64,
    "cifar_resnet56": 64,
    "cifar_densenet100": 342,
    "haas_resnet18": 512,
    "haas_resnet50": 2048,
    "rna_resnet18": 512,
    "rna_resnet50": 2048,
}
SMALL = ["cifar_resnet20", "cifar_densenet100", "haas_resnet18", "rna_resnet18"]


def create(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(count: int = 4, size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def settle(model: nn.Module, **kwargs: int) -> None:
    """Move BatchNorm statistics and power-iteration vectors away from where they start."""
    with torch.no_grad():
        model.train()(images(**kwargs))
    model.eval()


# ---- sizes and weights that others published


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


# ---- timm's conventions


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_feature_widths(name: str, width: int) -> None:
    model = create(name, num_classes=7).eval()
    with torch.no_grad():
        feature_map = model.forward_features(images(2))
        features = model.forward_head(feature_map, pre_logits=True)
        logits = model(images(2))
    assert model.num_features == model.head_hidden_size == width
    assert features.shape == (2, width)
    torch.testing.assert_close(features, feature_map.mean(dim=(2, 3)))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "stride"), [("cifar_resnet20", 4), ("cifar_densenet100", 4), ("haas_resnet18", 8), ("rna_resnet18", 8)]
)
def test_feature_map_is_the_image_over_the_strides(name: str, stride: int) -> None:
    with torch.no_grad():
        feature_map = create(name).eval().forward_features(images(1, size=32))
    assert feature_map.shape == (1, WIDTHS[name], 32 // stride, 32 // stride)


@pytest.mark.parametrize("name", SMALL)
def test_classifier_input_is_the_penultimate_feature(name: str) -> None:
    model = create(name)
    settle(model)
    seen: list[Tensor] = []
    head = model.get_classifier()
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(images())
        features = model.forward_head(model.forward_features(images()), pre_logits=True)
    assert isinstance(head, nn.Linear)
    assert torch.equal(seen[0], features)
    torch.testing.assert_close(logits, features @ head.weight.T + head.bias)


@pytest.mark.parametrize("name", SMALL)
def test_checkpoint_round_trip_through_safetensors(name: str, tmp_path: Path) -> None:
    model = create(name, num_classes=5, in_chans=1)
    settle(model, channels=1)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    torch.manual_seed(99)
    restored = timm.create_model(name, num_classes=5, in_chans=1, checkpoint_path=str(path)).eval()
    with torch.no_grad():
        assert torch.equal(restored(images(channels=1)), model(images(channels=1)))


@pytest.mark.parametrize("name", SMALL)
def test_reset_classifier(name: str) -> None:
    model = create(name).eval()
    kind = type(model.get_classifier())
    model.reset_classifier(3)
    assert type(model.get_classifier()) is kind
    with torch.no_grad():
        assert model(images(2)).shape == (2, 3)
        model.reset_classifier(0)
        assert model(images(2)).shape == (2, WIDTHS[name])
    assert model.num_classes == 0


@pytest.mark.parametrize("name", SMALL)
def test_default_configuration_names_real_layers(name: str) -> None:
    model = create(name)
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    assert config["crop_pct"] == 1.0
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert model.get_submodule(config["first_conv"]).in_channels == 3


def test_preprocessing_is_that_of_the_published_weights() -> None:
    assert create("cifar_resnet20").pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert create("cifar_resnet20").pretrained_cfg["std"] == (0.229, 0.224, 0.225)
    assert create("cifar_densenet100").pretrained_cfg["mean"] == (0.4914, 0.4822, 0.4465)
    assert create("cifar_densenet100").pretrained_cfg["std"] == (0.2023, 0.1994, 0.2010)
    assert create("rna_resnet18").pretrained_cfg["std"] == (1.0, 1.0, 1.0)


def test_public_names_are_registered() -> None:
    assert set(WIDTHS) <= set(timm.list_models())
    assert set(WIDTHS) <= set(ood_scores.models.networks.__all__)


# ---- the L2 head


def head_and_features() -> tuple[L2Head, Tensor]:
    torch.manual_seed(0)
    return L2Head(6, 4).double(), torch.randn(5, 6, dtype=torch.float64)


def test_l2_head_normalises_each_row_in_training() -> None:
    head, z = head_and_features()
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    expected = (z.numpy() / np.sqrt((z.numpy() ** 2).sum(axis=1, keepdims=True))) @ weight.T + bias
    np.testing.assert_allclose(head.train()(z).detach().numpy(), expected, rtol=0, atol=1e-15)


def test_l2_head_is_affine_in_eval_unless_told() -> None:
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


def test_l2_head_gives_the_bias_for_a_zero_feature() -> None:
    head, _ = head_and_features()
    assert torch.equal(head.train()(torch.zeros(1, 6, dtype=torch.float64))[0], head.bias)


def test_l2_head_switch_reaches_the_model() -> None:
    assert isinstance(create("haas_resnet18").get_classifier(), L2Head)
    assert type(create("haas_resnet18", l2_head=False).get_classifier()) is nn.Linear
    assert create("rna_resnet18", l2_head=True, normalize_eval=True).get_classifier().normalize_eval


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv3_small_050"])
def test_with_l2_head_shares_the_weights(name: str) -> None:
    model = create(name, num_classes=4).eval()
    plain, keys = model.get_classifier(), list(model.state_dict())
    with torch.no_grad():
        before = model(images())
        assert with_l2_head(model) is model
        assert torch.equal(model(images()), before)
    head = model.get_classifier()
    assert isinstance(head, L2Head)
    assert not head.training
    assert head.weight is plain.weight
    assert head.bias is plain.bias
    assert list(model.state_dict()) == keys


def test_with_l2_head_refuses_a_model_without_a_linear_classifier() -> None:
    with pytest.raises(HeadNotFound, match="Identity"):
        with_l2_head(create("cifar_resnet20", num_classes=0))
    with pytest.raises(HeadNotFound, match="NoneType"):
        with_l2_head(nn.Linear(2, 2))


# ---- spectral normalisation


def spectral_conv(norm: float, coefficient: float = 3.0) -> SpectralConv2d:
    torch.manual_seed(0)
    conv = SpectralConv2d(8, 12, 3, padding=1, bias=False, coefficient=coefficient)
    with torch.no_grad():
        conv.weight.mul_(norm / largest_singular_value(conv.weight))
    return conv


def largest_singular_value(weight: Tensor) -> float:
    return torch.linalg.svdvals(weight.detach().flatten(1))[0].item()


@pytest.mark.parametrize("norm", [3.5, 30.0])
def test_spectral_norm_bounds_the_matrix(norm: float) -> None:
    conv = spectral_conv(norm)
    for _ in range(200):
        conv(images(1, size=4, channels=8))
    assert largest_singular_value(conv.constrained_weight()) == pytest.approx(3.0, rel=1e-4)
    assert largest_singular_value(conv.weight) == pytest.approx(norm, rel=1e-5)


def test_spectral_norm_leaves_small_weights_untouched() -> None:
    conv = spectral_conv(2.9)
    x = images(2, size=4, channels=8)
    assert torch.equal(conv(x), nn.functional.conv2d(x, conv.weight, padding=1))
    assert torch.equal(conv.constrained_weight(), conv.weight)


def test_spectral_norm_takes_one_power_iteration_per_training_forward() -> None:
    conv = spectral_conv(30.0)
    matrix, start = conv.weight.detach().flatten(1).double(), conv.u.double()
    conv(images(1, size=4, channels=8))
    step = matrix @ (matrix.T @ start)
    torch.testing.assert_close(conv.u.double(), step / step.norm(), rtol=0, atol=1e-6)
    kept = conv.u.clone()
    conv.eval()(images(1, size=4, channels=8))
    assert torch.equal(conv.u, kept)


def test_spectral_norm_gradient_is_that_of_weight_over_sigma() -> None:
    conv = spectral_conv(30.0)
    for _ in range(500):
        conv(images(1, size=4, channels=8))
    direction = torch.randn(conv.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    conv.double()
    (conv.constrained_weight() * direction).sum().backward()
    exact = conv.weight.detach().clone().requires_grad_()
    (3.0 * exact / torch.linalg.matrix_norm(exact.flatten(1), ord=2) * direction).sum().backward()
    torch.testing.assert_close(conv.weight.grad, exact.grad, rtol=1e-4, atol=1e-6)


def test_spectral_norm_allows_two_forwards_before_a_backward() -> None:
    conv = spectral_conv(30.0)
    x = images(1, size=4, channels=8)
    (conv(x) + conv(x)).sum().backward()
    assert conv.weight.grad is not None


def test_spectral_norm_holds_every_convolution_and_nothing_else() -> None:
    model = create("haas_resnet18")
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 17
    assert all(isinstance(conv, SpectralConv2d) and conv.coefficient == 3.0 for conv in convs)
    plain = create("haas_resnet18", spectral_norm=0)
    assert {key for key in model.state_dict() if not key.endswith(".u")} == set(plain.state_dict())


def test_eval_is_deterministic_under_spectral_norm() -> None:
    model = create("haas_resnet18", spectral_norm=0.5)
    settle(model)
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))


# ---- the other switches


def test_bn_affine_off_leaves_no_batchnorm_parameters() -> None:
    model = create("rna_resnet18")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 20
    assert all(norm.weight is None and norm.bias is None for norm in norms)
    assert not any("bn" in name or "shortcut.1" in name for name, _ in model.named_parameters())


def test_shortcut_affine_gives_scale_and_offset_to_the_shortcuts_alone() -> None:
    model = create("rna_resnet18", shortcut_affine=True)
    scaled = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and module.affine]
    assert scaled == [f"layer{stage}.0.shortcut.1" for stage in (2, 3, 4)]
    assert set(create("rna_resnet18", bn_affine=True, shortcut_affine=True).state_dict()) == set(
        create("rna_resnet18", bn_affine=True).state_dict()
    )


def test_pooled_shortcut_averages_pads_and_adds_no_parameters() -> None:
    shortcut = PooledShortcut(3, 5, stride=2)
    x = images(2, size=4)
    out = shortcut(x)
    assert out.shape == (2, 5, 2, 2)
    torch.testing.assert_close(out[:, :3], x.reshape(2, 3, 2, 2, 2, 2).mean(dim=(3, 5)))
    assert not out[:, 3:].any()
    assert not any("shortcut" in key for key in create("haas_resnet18").state_dict())


def test_pooled_shortcut_fits_odd_images() -> None:
    with torch.no_grad():
        assert create("haas_resnet18").eval()(images(1, size=28)).shape == (1, 10)


def test_negative_slope() -> None:
    x = torch.tensor([-2.0, 3.0])
    assert create("haas_resnet18").act(x).tolist() == pytest.approx([-0.02, 3.0])
    assert create("rna_resnet18").act(x).tolist() == [0.0, 3.0]


def test_zero_padded_shortcut_of_he() -> None:
    block = create("cifar_resnet20").layer2[0]
    x = images(1, size=4, channels=16)
    out = block.shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
