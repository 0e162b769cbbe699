"""VGG-16, CCT and ConvNeXt of Haas et al. against published sizes and others' code; L2 heads on timm's models."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
import ood_scores.models.networks
from ood_scores.errors import HeadNotFound, ShapeMismatch
from ood_scores.extraction.layers import stages
from ood_scores.models.networks import L2Head, SpectralConv2d, with_l2_head
from ood_scores.models.networks.cct import EncoderLayer
from ood_scores.models.opening import load_model

WIDTHS = {"haas_vgg16": 512, "haas_cct7_3x1": 256, "haas_convnext_tiny": 768}
SMALL: dict[str, dict[str, Any]] = {
    "haas_vgg16": {"stages": ((8, 8), (12,), (16,), (16,), (24,))},
    "haas_cct7_3x1": {"dim": 32, "depth": 2, "attn_drop_rate": 0.0, "drop_path_rate": 0.0},
    "haas_convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), "drop_path_rate": 0.0},
}
NAMES = list(WIDTHS)


def create(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def small(name: str, **kwargs: Any) -> Any:
    return create(name, **SMALL[name], **kwargs)


def images(count: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def labels(count: int, classes: int = 5) -> Tensor:
    return torch.arange(count) % classes


def settle(model: Any, channels: int = 3) -> None:
    """Move BatchNorm statistics and the weights of the classifier and of layer scale away from where they start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.1
                )
        model.train()(images(channels=channels))
    model.eval()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The loss on one batch before every step."""
    model.train()
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images(10)), labels(10))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def head_call(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the classifier receives and gives."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_classifier().register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


# ---- sizes that others published, and their code


@pytest.fixture(scope="module", params=NAMES)
def full(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, create(request.param).eval()


VGG_NOTOP = 14_714_688  # Keras, VGG16(include_top=False): convolutions with their biases
VGG_CHANNELS = 4_224  # as many biases, and BatchNorm scales, and offsets
CONVNEXT_TINY = 28_589_128  # torchvision, ConvNeXt_Tiny_Weights.IMAGENET1K_V1
PUBLISHED = {
    "haas_vgg16": VGG_NOTOP + VGG_CHANNELS + 513 * 10,
    "haas_cct7_3x1": 3_760_139,
    "haas_convnext_tiny": CONVNEXT_TINY - 769 * 990 - 3 * 96 * 7 - 6_624 * 40 - 2 * 768,
}


def test_parameter_counts(full: tuple[str, Any]) -> None:
    """CCT-7/3x1 is 3.760M in Table 2 of the authors' README; of ConvNeXt's 6,624 kernels 40 of 49 weights go."""
    name, model = full
    assert parameters(model) == PUBLISHED[name]
    assert f"{PUBLISHED['haas_cct7_3x1'] / 1e6:.3f}" == "3.760"
    assert f"{PUBLISHED[name]:,}" in str(timm.model_entrypoint(name).__doc__)


def test_shapes_at_32(full: tuple[str, Any]) -> None:
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


def test_public_names_are_registered() -> None:
    assert set(WIDTHS) <= set(timm.list_models())
    assert set(WIDTHS) <= set(ood_scores.models.networks.__all__)


def test_vgg_is_torchvisions_without_biases() -> None:
    model = create("haas_vgg16")
    reference = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"], batch_norm=True)
    settle(model)
    missing, unexpected = reference.load_state_dict(model.features.state_dict(), strict=False)
    assert not unexpected
    assert len(missing) == 13
    with torch.no_grad():
        for key in missing:
            reference.get_parameter(key).zero_()
        torch.testing.assert_close(model.forward_features(images()), reference.eval()(images()))


def test_convnext_is_torchvisions_with_the_papers_changes() -> None:
    """All weights, in the order of definition, give the same logits; with the LayerNorm, which both then have."""
    sizes, depths = (8, 12, 16, 24), (1, 1, 2, 1)
    settings = [
        torchvision.models.convnext.CNBlockConfig(size, following, depth)
        for size, following, depth in zip(sizes, (*sizes[1:], None), depths, strict=True)
    ]
    reference = torchvision.models.ConvNeXt(settings, num_classes=10)
    reference.features[0][0] = nn.Conv2d(3, 8, kernel_size=3, stride=2)
    for block in reference.modules():
        if isinstance(block, torchvision.models.convnext.CNBlock):
            width = block.block[0].in_channels
            block.block[0] = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
    model = small("haas_convnext_tiny", head_norm=True, num_classes=10)
    settle(model)
    assert parameters(model) == parameters(reference)
    with torch.no_grad():
        for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
            theirs.copy_(ours.reshape(theirs.shape))
        torch.testing.assert_close(model(images()), reference.eval()(images()), rtol=1e-4, atol=1e-5)


def test_convnext_draws_stochastic_depth_as_torchvision() -> None:
    model = create("haas_convnext_tiny", dims=(4, 4, 4, 4))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.1 * i / 17 for i in range(18)])


def test_convnext_stem_padding() -> None:
    with torch.no_grad():
        assert small("haas_convnext_tiny").stem(images(1)).shape[-1] == 15
        padded = small("haas_convnext_tiny", stem_padding=1)
        assert padded.stem(images(1)).shape[-1] == 16
        assert padded.forward_features(images(1)).shape[-1] == 2
    assert [stage["reduction"] for stage in padded.feature_info] == [2, 4, 8, 16]


def test_convnext_norm_varies_without_the_layer_norm_only() -> None:
    def spread(model: Any) -> float:
        settle(model)
        if isinstance(model.head.norm, nn.LayerNorm):
            nn.init.ones_(model.head.norm.weight)
            nn.init.zeros_(model.head.norm.bias)
        with torch.no_grad():
            x = images() * torch.tensor([0.1, 1, 3, 10]).reshape(4, 1, 1, 1)
            norms = model.forward_head(model.forward_features(x), pre_logits=True).norm(dim=1)
        return (norms.std() / norms.mean()).item()

    assert spread(small("haas_convnext_tiny")) > 0.01
    assert spread(small("haas_convnext_tiny", head_norm=True)) < 1e-4


# ---- the transformer's parts


def test_encoder_layer_against_its_definition() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(dim=6, heads=2, hidden=8, attn_drop=0.1, drop_path=0.1).double().eval()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    qkv = layer.pre_norm(x) @ layer.self_attn.qkv.weight.T
    heads = []
    for head in range(2):
        q, k, v = (qkv[..., 6 * i + 3 * head : 6 * i + 3 * head + 3] for i in range(3))
        heads.append((q @ k.transpose(1, 2) / 3**0.5).softmax(-1) @ v)
    attended = layer.norm1(x + layer.self_attn.proj(torch.cat(heads, -1)))
    expected = attended + layer.linear2(nn.functional.gelu(layer.linear1(attended)))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_sequence_pooling_is_a_weighted_average_of_tokens() -> None:
    model = small("haas_cct7_3x1").double()
    tokens = torch.randn(2, 7, 32, dtype=torch.float64)
    expected = []
    for row in tokens:
        weight = torch.exp(row @ model.attention_pool.weight[0] + model.attention_pool.bias)
        expected.append((weight / weight.sum()) @ row)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), torch.stack(expected), rtol=0, atol=1e-14)


def test_transformer_drops_in_training_only() -> None:
    model = create("haas_cct7_3x1", dim=32)
    assert [block.drop_path.drop_prob for block in model.blocks] == pytest.approx([i / 60 for i in range(7)])
    assert all(block.self_attn.drop == 0.1 for block in model.blocks)
    with torch.no_grad():
        assert not torch.equal(model.train()(images()), model(images()))
        assert torch.equal(model.eval()(images()), model(images()))


def test_transformer_says_which_images_it_takes() -> None:
    with pytest.raises(ShapeMismatch, match=r"24x24 pixels give 144 tokens.*256 positions"):
        small("haas_cct7_3x1")(images(1, size=24))
    assert small("haas_cct7_3x1", img_size=24).eval()(images(1, size=24)).shape == (1, 10)


# ---- timm's conventions


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("switches", [{}, {"l2_head": False}])
def test_extract_finds_head_and_features(name: str, switches: dict[str, Any]) -> None:
    model = small(name, num_classes=5, **switches)
    settle(model)
    assert_extracted(model, model.get_classifier())


def assert_extracted(model: Any, classifier: nn.Linear, size: int = 32) -> ood_scores.FeatureSet:
    """Features are the classifier's inputs, the head is the classifier, and it gives the model's logits."""
    data = DataLoader(TensorDataset(images(5, size), labels(5)), batch_size=3)
    feats = ood_scores.extract(model, data, progress=False)
    assert feats.head is not None
    assert feats.logits is not None
    assert feats.head.weight.equal(classifier.weight)
    assert feats.head.bias.equal(classifier.bias)
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images(5, size)), pre_logits=True)
        torch.testing.assert_close(feats.features, features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(feats.logits, model(images(5, size)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feats.head(feats.features), feats.logits, rtol=1e-4, atol=1e-5)
    return feats


@pytest.mark.parametrize("name", NAMES)
def test_stages(name: str) -> None:
    expected = {
        "haas_vgg16": [f"features.{i}" for i in (6, 10, 14, 18, 22)],
        "haas_cct7_3x1": ["blocks.0", "blocks.1"],
        "haas_convnext_tiny": [f"stages.{i}" for i in range(4)],
    }
    assert list(stages(small(name).eval(), images(1))) == expected[name]


# ---- training


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = small(name, num_classes=5).train()
    nn.functional.cross_entropy(model(images()), labels(4)).backward()
    for key, parameter in model.named_parameters():
        if key != "attention_pool.bias":  # the same for every token: softmax takes it out
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.any(), key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("l2_head", [True, False])
def test_a_few_steps_lower_the_loss(name: str, l2_head: bool) -> None:
    model = small(name, num_classes=5, l2_head=l2_head)
    vgg = name == "haas_vgg16"  # the papers' optimizers
    weights = model.parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1) if vgg else torch.optim.AdamW(weights, lr=5e-3)
    losses = train(model, optimizer, steps=10)
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize("name", NAMES)
def test_l2_head_normalises_in_training_and_not_in_eval(name: str) -> None:
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
    torch.testing.assert_close(logits, z / z.norm(dim=1, keepdim=True) @ head.weight.T + head.bias)


def test_vgg_spectral_norm_holds_while_training() -> None:
    model = small("haas_vgg16", num_classes=5, spectral_norm=0.5, negative_slope=0.01)
    train(model, torch.optim.SGD(model.parameters(), lr=0.02), steps=20)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 6
    for conv in convs:
        assert isinstance(conv, SpectralConv2d)
        used, free = (
            torch.linalg.matrix_norm(weight.detach().flatten(1), ord=2).item()
            for weight in (conv.constrained_weight(), conv.weight)
        )
        assert used < 0.51 < free  # one power iteration each step follows the weights closely


def test_vgg_switches() -> None:
    model = create("haas_vgg16")
    assert not any(isinstance(module, (SpectralConv2d, nn.LeakyReLU)) for module in model.modules())
    ddu = create("haas_vgg16", spectral_norm=3.0, negative_slope=0.01, l2_head=False)
    activations = [module for module in ddu.modules() if isinstance(module, (nn.ReLU, nn.LeakyReLU))]
    assert [getattr(module, "negative_slope", None) for module in activations] == [0.01] * 13
    assert sum(isinstance(module, SpectralConv2d) for module in ddu.modules()) == 13
    assert {key for key in ddu.state_dict() if not key.endswith(".u")} == set(model.state_dict())


# ---- L2 heads on timm's models

TIMM: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
    ("convnext_atto", {}),
    ("efficientnet_b0", {}),
    ("densenet121", {}),
]


@pytest.mark.parametrize(("name", "kwargs"), TIMM)
def test_wrapped_timm_model_opens_without_this_package(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
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
def test_wrapped_timm_model_normalises_in_training(name: str, kwargs: dict[str, Any]) -> None:
    model: Any = with_l2_head(create(name, num_classes=5, **kwargs))
    settle(model)
    head = model.get_classifier()
    z, logits = head_call(model.train(), images())
    torch.testing.assert_close(logits, z / z.norm(dim=1, keepdim=True) @ head.weight.T + head.bias)
    z, logits = head_call(model.eval(), images())
    torch.testing.assert_close(logits, z @ head.weight.T + head.bias)


@pytest.mark.parametrize(
    ("name", "kwargs", "found"),
    [
        ("resnetv2_50x1_bit", {"channels": (128,) * 4, "stem_chs": 32}, "Conv2d"),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}, "tuple"),
    ],
)
def test_with_l2_head_says_what_it_cannot_wrap(name: str, kwargs: dict[str, Any], found: str) -> None:
    model = create(name, num_classes=5, **kwargs)
    before = list(model.state_dict())
    with pytest.raises(
        HeadNotFound, match=rf"{type(model).__name__}.get_classifier\(\) gives {found}, not an nn.Linear"
    ):
        with_l2_head(model)
    assert list(model.state_dict()) == before


def test_l2_head_normalises_every_token() -> None:
    head = L2Head(4, 3).double().train()
    tokens = torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(head(tokens), torch.stack([head(row) for row in tokens]))
