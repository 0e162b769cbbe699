"""Which layers end the stages of a model, and their outputs as channels and positions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import ood_scores.models.networks  # noqa: F401 (registers models with timm)
from ood_scores.errors import BadInput
from ood_scores.extraction.layers import as_maps, resolve_layers, stages, watching


class Tiny(nn.Module):
    """A network with maps of sizes 16, 8, and 4, an activation that is used twice, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Sequential(nn.Conv2d(4, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5))
        self.fc = nn.Linear(5, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.stem(x)))
        return self.fc(self.act(self.body(x)).mean((2, 3)))


def huggingface_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return transformers.ViTForImageClassification(config)


def run(model: nn.Module, size: int) -> tuple[str, ...]:
    """Return the stages, after checking that they run and return maps."""
    model = model.eval()
    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        names = stages(model, inputs)
        with watching(model, names, lambda maps: maps.mean(dim=2)) as seen:
            model(inputs)
    assert tuple(seen) == names  # in the order in which they run
    assert all(values.shape[0] == 2 and values.shape[1] > 1 for values in seen.values())
    return names


TIMM = {
    "resnet50": (64, "act1 layer1 layer2 layer3 layer4"),
    "densenet121": (64, "features.norm0 features.denseblock1 features.denseblock2 features.denseblock3 features.norm5"),
    "convnext_atto": (64, "stages.0 stages.1 stages.2 stages.3"),
    "vit_tiny_patch16_224": (224, "blocks.2 blocks.5 blocks.8 blocks.11"),
    "swin_tiny_patch4_window7_224": (224, "layers.0 layers.1 layers.2 layers.3"),
    "efficientnet_b0": (64, "blocks.0 blocks.1 blocks.2 blocks.4 blocks.6"),
    "cifar_densenet100": (32, "block1 block2 bn1"),
    "cifar_resnet20": (32, "layer1 layer2 layer3"),
    "haas_resnet18": (32, "layer1 layer2 layer3 layer4"),
}


@pytest.mark.parametrize("name", TIMM)
def test_stages_of_timm_models_and_models_of_this_package(name: str) -> None:
    size, expected = TIMM[name]
    assert run(timm.create_model(name, num_classes=5), size) == tuple(expected.split())


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "resnet18": (torchvision.models.resnet18, 64, "relu layer1 layer2 layer3 layer4"),
    "vgg11_bn": (
        lambda: torchvision.models.vgg11_bn(num_classes=5),
        64,
        "features.2 features.6 features.13 features.20 features.27 features",
    ),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 64, "features.1 features.3 features.6 features.13 features"),
    "convnext_tiny": (torchvision.models.convnext_tiny, 64, "features.2.0 features.4.0 features.6.0 features"),
    "swin_t": (torchvision.models.swin_t, 64, "features.1 features.3 features.5 permute"),
    "vit_b_16": (
        lambda: torchvision.models.VisionTransformer(32, 8, 12, 2, 16, 32, num_classes=5),  # its 12 blocks, but narrow
        32,
        "encoder.layers.encoder_layer_2 encoder.layers.encoder_layer_5 encoder.layers.encoder_layer_8 "
        "encoder.layers.encoder_layer_11",
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_stages_of_torchvision_models(name: str) -> None:
    make, size, expected = TORCHVISION[name]
    assert run(make(), size) == tuple(expected.split())


def test_stages_of_a_hugging_face_transformer() -> None:
    blocks = list(run(huggingface_vit(), 32))
    assert [name.rpartition(".")[2] for name in blocks] == ["0", "2", "3", "5"]
    assert {name.rpartition(".")[0] for name in blocks} <= {"vit.layers", "vit.layer", "vit.encoder.layer"}


def test_stages_of_a_custom_model() -> None:
    model = Tiny().eval()
    assert stages(model, torch.randn(4, 3, 16, 16)) == ("stem", "pool", "body")


def test_stages_run_the_model_on_one_input() -> None:
    model, sizes = Tiny().eval(), []
    model.stem.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    stages(model, torch.randn(4, 3, 16, 16))
    assert sizes == [1]
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1


def test_hooks_are_removed_if_the_model_fails() -> None:
    model = Tiny().eval()
    with pytest.raises(RuntimeError):
        stages(model, torch.randn(4, 2, 16, 16))
    with pytest.raises(RuntimeError), watching(model, ["stem"], lambda maps: maps):
        model(torch.randn(4, 2, 16, 16))
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))])
def test_no_stages(model: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"no stages were found in the model: name layers"):
        stages(model, torch.randn(2, 3))


def test_more_than_six_stages_are_reduced_to_four() -> None:
    model: Any = Tiny()
    model.feature_info = [{"module": name} for name in ("stem", "act", "pool", "body.0", "body.1", "body", "fc")]
    assert stages(model, torch.randn(1, 3, 16, 16)) == ("stem", "pool", "body.1", "fc")


@pytest.mark.parametrize(
    "info", [[{"module": "nowhere"}], [{"num_chs": 3}], [], ["stem"], 7, [{"module": ""}], [{"module": "blocks"}]]
)
def test_feature_info_that_does_not_match_is_ignored(info: Any) -> None:
    model = Tiny().eval()
    model.blocks = nn.ModuleList([nn.Identity()])  # a list of modules does not run
    model.feature_info = info
    assert stages(model, torch.randn(1, 3, 16, 16)) == ("stem", "pool", "body")


def test_the_model_itself_and_repeated_layers_are_not_stages() -> None:
    """The feature_info of timm's tresnet and crossvit lists such layers."""
    model = Tiny().eval()
    model.feature_info = [{"module": name} for name in ("", "stem", "body", "stem")]  # type: ignore[assignment]
    assert stages(model, torch.randn(1, 3, 16, 16)) == ("stem", "body")


@pytest.mark.parametrize(("name", "size"), [("tresnet_m", 224), ("coat_lite_tiny", 224), ("crossvit_tiny_240", 240)])
def test_stages_that_timm_does_not_name(name: str, size: int) -> None:
    assert len(run(timm.create_model(name, num_classes=5), size)) >= 3


def test_named_layers() -> None:
    model, inputs = Tiny(), torch.randn(2, 3, 16, 16)
    assert resolve_layers(model, ["body.0", "fc"], inputs) == ("body.0", "fc")
    with pytest.raises(BadInput, match=r"the model has no layer 'layer4'; its children are stem, act, pool, body"):
        resolve_layers(model, ["fc", "layer4"], inputs)


# --- as_maps ----------------------------------------------------------------------------------------------------------

RANDOM = torch.Generator().manual_seed(0)


def test_maps() -> None:
    values = torch.randn(2, 5, 3, 4, generator=RANDOM)
    maps = as_maps(values)
    assert maps.shape == (2, 5, 12)
    assert maps[1, 4, 2 * 4 + 3] == values[1, 4, 2, 3]


def test_maps_with_channels_last() -> None:
    values = torch.randn(2, 3, 3, 5, generator=RANDOM)
    maps = as_maps(values)
    assert maps.shape == (2, 5, 9)
    assert maps[1, 4, 2 * 3 + 1] == values[1, 2, 1, 4]
    assert torch.equal(maps, as_maps(values.permute(0, 3, 1, 2)))


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (2, 5, 4, 4), (2, 5, 1, 1), (2, 4, 2, 4)])
def test_ambiguous_maps_are_channels_first(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=RANDOM)
    assert torch.equal(as_maps(values), values.flatten(2))


def test_one_position_with_channels_last() -> None:
    values = torch.randn(2, 1, 1, 7, generator=RANDOM)
    assert torch.equal(as_maps(values), values.reshape(2, 7, 1))


def test_tokens() -> None:
    values = torch.randn(2, 6, 5, generator=RANDOM)
    assert torch.equal(as_maps(values), values.transpose(1, 2))


def test_vectors() -> None:
    values = torch.randn(2, 5, generator=RANDOM)
    assert torch.equal(as_maps(values), values[:, :, None])


def test_volumes() -> None:
    values = torch.randn(2, 5, 2, 3, 4, generator=RANDOM)
    assert torch.equal(as_maps(values), values.flatten(2))


def test_the_first_of_several_outputs() -> None:
    values = torch.randn(2, 5, 3, 4, generator=RANDOM)
    assert torch.equal(as_maps((values, None)), values.flatten(2))
    assert torch.equal(as_maps([values, values + 1]), values.flatten(2))


@pytest.mark.parametrize(
    "output",
    [None, 3.0, (), "maps", torch.tensor(1.0), torch.randn(3), torch.ones(2, 3, 4, dtype=torch.int64), (None, 1)],
    ids=["none", "number", "empty", "text", "scalar", "one dimension", "integers", "a pair"],
)
def test_outputs_that_are_not_maps(output: Any) -> None:
    with pytest.raises(
        BadInput, match=r"a layer does not output a floating-point tensor \[batch, ...\]: choose another"
    ):
        as_maps(output)


def test_a_dictionary_is_not_a_map() -> None:
    with pytest.raises(BadInput, match="choose another layer"):
        as_maps(OrderedDict(last_hidden_state=torch.randn(2, 3)))


def test_watching_stores_the_outputs_of_every_pass() -> None:
    model = Tiny().eval()
    inputs = torch.randn(2, 3, 16, 16, generator=RANDOM)
    with torch.no_grad(), watching(model, ["act", "unused"], lambda maps: maps.amax(dim=2)) as seen:
        model(inputs)
        first = seen["act"]
        model(2 * inputs)
    assert list(seen) == ["act"]  # the last time that it ran
    assert first.shape == (2, 5)
    assert not torch.equal(seen["act"], first)
