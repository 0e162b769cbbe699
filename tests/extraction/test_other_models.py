"""Finding the head of models that are not from timm: torchvision, Hugging Face, and custom ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import ood_scores
from ood_scores import FeatureSet, extract
from ood_scores.errors import BadInput, HeadMismatch, HeadNotFound

CLASSES = 7


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def images(size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> nn.Module:
    """Randomize parameters that start at zero (classifier biases), so that a head that omits them is noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model


def adapt_batch_norms(model: nn.Module, inputs: Tensor) -> None:
    """Set the statistics of batch norms to those of the inputs: with the initial ones, signals vanish in deep nets."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        model(inputs)
    model.eval()


def check(model: nn.Module, batch: Any, head: Any = None) -> FeatureSet:
    """Extract, and compare with the head's equation and with the model's own output."""
    inputs = batch["pixel_values"] if isinstance(batch, dict) else batch
    adapt_batch_norms(model, inputs)
    features = extract(model, [batch, batch], device="cpu", progress=False, head=head)
    with torch.inference_mode():
        said = model.eval()(inputs)
    expected = said if isinstance(said, Tensor) else said["logits"] if isinstance(said, dict) else said.logits
    assert features.head is not None
    assert features.logits is not None
    torch.testing.assert_close(features.logits, torch.cat([expected, expected]))
    torch.testing.assert_close(features.head(features.features), features.logits, rtol=1e-4, atol=1e-5)
    difference, scale = (features.logits[0] - features.logits[1]).abs().max(), features.logits.abs().max()
    assert difference > 1e-2 * scale, "the logits hardly depend on the input"
    return features


def head_of(features: FeatureSet) -> str:
    assert features.provenance is not None
    return features.provenance.head_modules


TORCHVISION: dict[str, tuple[dict[str, Any], int, str, int]] = {
    "resnet18": ({}, 64, "fc", 512),
    "resnext50_32x4d": ({}, 64, "fc", 2048),
    "regnet_y_400mf": ({}, 64, "fc", 440),
    "shufflenet_v2_x0_5": ({}, 64, "fc", 1024),
    "googlenet": ({"aux_logits": True, "init_weights": False}, 64, "fc", 1024),
    "inception_v3": ({"aux_logits": True, "init_weights": False}, 75, "fc", 2048),
    "densenet121": ({}, 64, "classifier", 1024),
    "mnasnet0_5": ({}, 64, "classifier.1", 1280),
    "mobilenet_v2": ({}, 64, "classifier.1", 1280),
    "mobilenet_v3_small": ({}, 64, "classifier.3", 1024),
    "efficientnet_b0": ({}, 64, "classifier.1", 1280),
    "convnext_tiny": ({}, 64, "classifier.2", 768),
    "alexnet": ({}, 64, "classifier.6", 4096),
    "vgg11_bn": ({"init_weights": False}, 32, "classifier.6", 4096),
    "swin_t": ({}, 64, "head", 768),
    "swin_v2_t": ({}, 64, "head", 768),
    "maxvit_t": ({"input_size": (64, 64)}, 64, "classifier.5", 512),
    "vit_b_16": ({"image_size": 32}, 32, "heads.head", 768),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    kwargs, size, head, width = TORCHVISION[name]
    if name == "maxvit_t":
        kwargs = kwargs | {"partition_size": 2}
        model = torchvision.models.MaxVit(
            stem_channels=64, block_channels=[64, 128, 256, 512], block_layers=[1, 1, 1, 1], head_dim=32,
            num_classes=CLASSES, stochastic_depth_prob=0.2, **kwargs,
        )  # fmt: skip
    else:
        model = torchvision.models.get_model(name, num_classes=CLASSES, **kwargs)
    features = check(randomised(model), images(size))
    assert head_of(features) == head
    assert features.features.shape == (4, width)


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1"])
def test_squeezenet_has_no_affine_head(name: str) -> None:
    model = torchvision.models.get_model(name, num_classes=CLASSES)
    with pytest.raises(HeadNotFound, match=r"no affine module .* outputs 7 values.*head='module.name'.*head=False"):
        extract(model, [images()], device="cpu", progress=False)


def test_a_segmentation_model_is_refused() -> None:
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES)
    with pytest.raises(HeadNotFound, match="a classifier returns a tensor of logits"):
        extract(model, [images()], device="cpu", progress=False)


def hugging_face(name: str) -> tuple[nn.Module, str, int]:
    """Create a classifier with random weights; return it with the name of its head and the width of its features."""
    transformers = pytest.importorskip("transformers")
    common: dict[str, Any] = {"num_labels": CLASSES, "initializer_range": 0.2}
    attention = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    stages = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}
    configs: dict[str, tuple[dict[str, Any], str, int]] = {
        "ViT": ({"image_size": 32, "patch_size": 8, **attention}, "classifier", 16),
        "Dinov2": ({"image_size": 32, "patch_size": 8, **attention}, "classifier", 32),
        "ResNet": ({"embedding_size": 8, **stages}, "classifier.1", 20),
        "ConvNext": (stages, "classifier", 20),
        "Swin": (
            {
                "image_size": 32,
                "patch_size": 4,
                "window_size": 4,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [1, 2],
            },
            "classifier",
            16,
        ),
        "MobileViT": (
            {
                "image_size": 64,
                "hidden_sizes": [8, 12, 16],
                "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 32],
                "num_attention_heads": 2,
            },
            "classifier",
            32,
        ),
    }
    kwargs, head, width = configs[name]
    config = getattr(transformers, f"{name}Config")(**kwargs, **common)
    return randomised(getattr(transformers, f"{name}ForImageClassification")(config)), head, width


@pytest.mark.parametrize("name", ["ViT", "Dinov2", "ResNet", "ConvNext", "Swin", "MobileViT"])
def test_hugging_face(name: str) -> None:
    model, head, width = hugging_face(name)
    size = 64 if name in ("ResNet", "ConvNext", "MobileViT") else 32
    features = check(model, {"pixel_values": images(size), "labels": torch.tensor([3, 1])})
    assert head_of(features) == head
    assert features.features.shape == (4, width)
    assert features.labels is not None
    assert features.labels.tolist() == [3, 1, 3, 1]


def test_hugging_face_double_head() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        image_size=32, patch_size=8, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, num_labels=CLASSES
    )
    features = check(randomised(transformers.DeiTForImageClassificationWithTeacher(config)), images(32))
    assert head_of(features) == "cls_classifier + distillation_classifier"
    assert features.features.shape == (4, 32)


def backbone(width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, width), nn.ReLU())


class Own(nn.Module):
    """A classifier whose last step is a function of the features and the linear layer."""

    def __init__(self, last: Callable[[Tensor, nn.Linear], Any] | None = None, bias: bool = True) -> None:
        super().__init__()
        self.body = backbone()
        self.head = nn.Linear(12, CLASSES, bias=bias)
        self.auxiliary = nn.Linear(12, CLASSES)
        self.last = last or (lambda features, head: head(features))

    def forward(self, inputs: Tensor) -> Any:
        features = self.body(inputs)
        self.auxiliary(features.flip(1))
        return self.last(features, self.head)


def test_a_plain_sequential() -> None:
    features = check(nn.Sequential(*backbone(), nn.Dropout(), nn.Linear(12, CLASSES)), images(8))
    assert head_of(features) == "4"
    assert features.features.shape == (4, 12)


def test_a_convolution_as_head() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, CLASSES, 1), nn.Flatten())
    features = check(model, images(8))
    assert head_of(features) == "2"
    assert features.features.shape == (4, 12)


@pytest.mark.parametrize("bias", [True, False])
def test_another_layer_of_the_same_width_is_not_chosen(bias: bool) -> None:
    features = check(Own(bias=bias), images(8))
    assert head_of(features) == "head"
    assert features.head is not None
    assert bool(features.head.bias.any()) == bias


@pytest.mark.parametrize(
    "wrap",
    [
        lambda features, head: {"logits": head(features), "features": features},
        lambda features, head: SimpleNamespace(logits=head(features)),
    ],
    ids=["dict", "object"],
)
def test_outputs_that_contain_logits(wrap: Callable[[Tensor, nn.Linear], Any]) -> None:
    assert head_of(check(Own(wrap), images(8))) == "head"


@pytest.mark.parametrize(
    "last",
    [
        lambda features, head: head(features).tanh(),
        lambda features, head: head(features) + features.mean(),
        lambda features, head: head(features) + features.square().sum(1, keepdim=True),
        lambda features, head: head(features) / head(features).norm(dim=1, keepdim=True),
    ],
    ids=["tanh", "mean of the batch", "a square", "a norm"],
)
def test_operations_after_the_linear_layer_are_not_ignored(last: Callable[[Tensor, nn.Linear], Any]) -> None:
    expected = r"neither the output of an affine module.*head \(differs by up to .*head='module.name'"
    with pytest.raises(HeadNotFound, match=expected):
        extract(Own(last), [images(8)], device="cpu", progress=False)


def test_logits_changed_in_place_are_noticed() -> None:
    with pytest.raises(HeadMismatch, match=r"head outputs the logits, but not as weight @ input \+ bias"):
        extract(Own(lambda features, head: head(features).tanh_()), [images(8)], device="cpu", progress=False)


class Cosine(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(inputs), nn.functional.normalize(self.weight))


def test_a_cosine_classifier_is_not_affine_in_what_it_receives() -> None:
    model = nn.Sequential(*backbone(), Cosine(12, CLASSES))
    with pytest.raises(HeadMismatch, match=r"3 outputs the logits, but not as weight @ input.*head='module.name'"):
        extract(model, [images(8)], device="cpu", progress=False)
    with pytest.raises(HeadMismatch):
        extract(model, [images(8)], device="cpu", progress=False, head="3")
    assert extract(model, [images(8)], device="cpu", progress=False, head=False).head is None


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = backbone()
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 12))

    def forward(self, inputs: Tensor) -> Tensor:
        return -torch.cdist(self.body(inputs), self.prototypes)


def test_distances_to_prototypes_have_no_affine_head() -> None:
    expected = r"no affine module .* outputs 7 values per input .*; the last layers .*: body.1\. Name the affine map"
    with pytest.raises(HeadNotFound, match=expected):
        extract(Prototypes(), [images(8)], device="cpu", progress=False)


def test_no_classes_and_no_pooling() -> None:
    timm = pytest.importorskip("timm")
    unpooled = timm.create_model("resnet18", num_classes=0, global_pool="")
    with pytest.raises(HeadNotFound, match=r"tensor of shape \(\d, 512, 2, 2\), which is neither .*num_classes=0"):
        extract(unpooled, [images()], device="cpu", progress=False)


OTHER_OUTPUTS: dict[str, tuple[Callable[[Tensor, nn.Linear], Any], str]] = {
    "a tuple of 2 values": (lambda features, head: (head(features), features), "[0]"),
    "a dict with the keys out, aux": (lambda features, head: {"out": head(features), "aux": features}, '["out"]'),
    "an object of type SimpleNamespace": (lambda features, head: SimpleNamespace(out=head(features)), ".out"),
}


@pytest.mark.parametrize("head", [None, "head"])
@pytest.mark.parametrize("words", OTHER_OUTPUTS)
def test_models_that_return_more_than_logits_are_refused_in_words(words: str, head: str | None) -> None:
    with pytest.raises(HeadNotFound, match=f"the model returned {words}, but .*'Models that return more than logits'"):
        extract(Own(OTHER_OUTPUTS[words][0]), [images(8)], device="cpu", progress=False, head=head)


@pytest.mark.parametrize("words", OTHER_OUTPUTS)
def test_the_wrapper_of_the_documentation_returns_the_logits_alone(words: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    block = page.partition("## Models that return more than logits")[2].partition("```python\n")[2].partition("```")[0]
    last, place = OTHER_OUTPUTS[words]
    model, data = Own(last).eval(), images(8)
    known: dict[str, Any] = {"torch": torch, "ood_scores": ood_scores, "model": model, "loader": [data]}
    exec(block.replace("(x)[0]", f"(x){place}"), known)
    with torch.no_grad():
        torch.testing.assert_close(known["feats"].logits, model.head(model.body(data)))
        torch.testing.assert_close(known["feats"].features, model.body(data))
    assert known["feats"].provenance.head_modules == "0.head"


def test_naming_the_module() -> None:
    model = Own()
    by_name = check(model, images(8), head="head")
    by_object = check(model, images(8), head=model.head)
    assert head_of(by_name) == head_of(by_object) == "head"
    assert torch.equal(by_name.features, by_object.features)


def test_naming_a_wrapper_of_the_module() -> None:
    wrapped = nn.Sequential(*backbone(), nn.Sequential(nn.Dropout(), nn.Linear(12, CLASSES)))
    assert head_of(check(wrapped, images(8), head="3")) == "3.1"


def test_naming_the_wrong_module() -> None:
    for head in ("auxiliary", "body.1"):
        with pytest.raises(HeadMismatch, match=f"module '{head}' is not an affine map whose output is the logits"):
            extract(Own(), [images(8)], device="cpu", progress=False, head=head)
    with pytest.raises(BadInput, match=r"no module 'fc'; its last modules with weights: body.1, head, auxiliary"):
        extract(Own(), [images(8)], device="cpu", progress=False, head="fc")


def test_without_a_head() -> None:
    model = Own(lambda features, head: head(features) / 1.5)
    features = extract(model, [images(8)], device="cpu", progress=False, head=False)
    assert features.head is None
    assert head_of(features) == "head"
    with torch.inference_mode():
        torch.testing.assert_close(features.features, model.body(images(8)))
        torch.testing.assert_close(features.logits, model(images(8)))


def test_two_heads_that_are_averaged() -> None:
    class Double(Own):
        def forward(self, inputs: Tensor) -> Tensor:
            features = self.body(inputs)
            return (self.head(features) + self.auxiliary(features.flip(1))) / 2

    features = check(Double(), images(8))
    assert head_of(features) == "head + auxiliary"
    assert features.features.shape == (4, 24)
    torch.testing.assert_close(features.features[:, 12:], features.features[:, :12].flip(1))
