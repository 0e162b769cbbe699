"""A small member of every timm family: its head is found and computes the logits, or the error names the reason."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ood_scores import FeatureSet, extract
from ood_scores.errors import HeadNotFound

CLASSES = 10

FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", 32, {"depth": 1}),
    "byoanet": ("eca_botnext26ts_256", 64, {}),
    "byobnet": ("test_byobnet", 64, {}),
    "cait": ("cait_xxs24_224", 32, {"depth": 2}),
    "coat": ("coat_tiny", 32, {}),
    "convit": ("convit_tiny", 32, {}),
    "convmixer": ("convmixer_768_32", 32, {}),
    "convnext": ("test_convnext", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
    "csatv2": ("csatv2", 64, {}),
    "cspnet": ("cs3darknet_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1, 1, 1)}),
    "deepseek_vit": ("deepseek_vit_412m", 56, {"depth": 1}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, {"depth": 2}),
    "densenet": ("densenet121", 64, {}),
    "dla": ("dla46x_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 64, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "efficientvim": ("efficientvim_m1", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 128, {}),
    "eva": ("eva02_tiny_patch14_224", 56, {"depth": 2}),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "gcvit": ("gcvit_xxtiny", 64, {}),
    "gemma4_vit": ("gemma4_vit_167m", 96, {"depth": 1}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_a", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 64, {}),
    "hieradet_sam2": ("hieradet_small", 224, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_t", 64, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 80, {}),
    "inception_v3": ("inception_v3", 80, {}),
    "inception_v4": ("inception_v4", 80, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 64, {}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "maxxvit": ("test_coatnet", 64, {}),
    "metaformer": ("poolformer_s12", 64, {}),
    "mlp_mixer": ("gmlp_ti16_224", 32, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv5": ("mobilenetv5_base", 64, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {}),
    "naflexvit": ("naflexvit_base_patch16_gap", 64, {"depth": 1}),
    "nasnet": ("nasnetalarge", 64, {}),
    "nest": ("nest_tiny", 64, {}),
    "nextvit": ("nextvit_small", 64, {"depths": (1, 1, 5, 1)}),
    "nfnet": ("test_nfnet", 64, {}),
    "pit": ("pit_ti_distilled_224", 64, {}),
    "pnasnet": ("pnasnet5large", 64, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"depth": 1}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m1", 64, {}),
    "res2net": ("res2net50_48w_2s", 64, {"layers": (1, 1, 1, 1)}),
    "resnest": ("resnest14d", 64, {}),
    "resnet": ("test_resnet", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 64, {"layers": (1, 1, 1, 1)}),
    "shvit": ("shvit_s1", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 224, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 64, {"depths": (1, 1, 1, 1)}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64, {"depths": (1, 1, 1, 1)}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64, {"depths": (1, 1, 1, 1)}),
    "tiny_vit": ("tiny_vit_5m_224", 64, {}),
    "tnt": ("tnt_s_patch16_224", 64, {"depth": 1}),
    "tresnet": ("tresnet_m", 64, {"layers": (1, 1, 1, 1)}),
    "twins": ("twins_svt_small", 64, {"depths": (1, 1, 1, 1)}),
    "vgg": ("vgg11", 32, {}),
    "visformer": ("visformer_tiny", 64, {}),
    "vision_transformer": ("test_vit", 32, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64, {"depth": 1}),
    "vision_transformer_relpos": ("test_vit_relpos", 32, {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64, {"depth": 1}),
    "vitamin": ("vitamin_small_224", 64, {}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xception": ("legacy_xception", 64, {}),
    "xception_aligned": ("xception41p", 64, {}),
    "xcit": ("xcit_nano_12_p16_224", 64, {"depth": 2}),
}

"""For each timm module with an affine head: a member, its input size, and arguments that make it smaller."""

SEVERAL_HEADS = {
    "crossvit": 2,
    "deit": 2,
    "efficientformer": 2,
    "efficientformer_v2": 2,
    "efficientvim": 4,
    "levit": 2,
    "pit": 2,
    "repvit": 2,
    "swiftformer": 2,
}
"""Families whose logits are the mean of several heads, with their number."""

NORM_IN_CLASSIFIER = {"efficientvit_msra", "iformer", "levit", "repvit", "shvit"}
"""Families whose classifier is a batch norm and a linear layer: timm's features are those before the batch norm."""

VARIANTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "linear without a second head": ("deit_tiny_patch16_224", 32, {"depth": 2}),
    "1x1 convolution": ("resnetv2_50x1_bit", 64, {}),
    "MLP head": ("caformer_s18", 64, {}),
    "NormMlp head": ("test_maxvit", 64, {}),
    "attention pooling": ("vit_base_patch16_siglip_224", 32, {"depth": 1}),
    "convolutional LeViT": ("levit_conv_128s", 64, {}),
}
"""Other kinds of heads in these families."""

REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "volo_d1_224": (64, {"num_classes": CLASSES}, r"mean of several; modules with 10 outputs: head \(differs by"),
    "resnet50_clip": (224, {}, r"no affine module .* outputs 1024 values .*head='module.name'"),
    "gemma4_vit_167m_enc": (
        96,
        {"depth": 1},
        r"a tensor of shape \(2, 4, 768\), which is neither .*choose pool='mean'",
    ),
}
"""Models without an affine classifier: input size, arguments, and the error message."""


def build(name: str, size: int, kwargs: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """Create a model with random weights, all of which affect the logits, and two inputs."""
    torch.manual_seed(0)
    config = config_of(name)
    if config.fixed_input_size and size != config.input_size[1]:
        kwargs = {"img_size": size, **kwargs}
    model = timm.create_model(name, **kwargs).eval()
    inputs = torch.randn(2, 3, size, size)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.02)
    adapt_batch_norms(model, inputs)
    return model, inputs


def config_of(name: str) -> PretrainedCfg:
    config = get_pretrained_cfg(name)
    assert config is not None
    return config


def adapt_batch_norms(model: nn.Module, inputs: Tensor) -> None:
    """Set the statistics of batch norms to those of the inputs: with the initial ones, signals vanish in deep nets."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(inputs)
    model.eval()


def run(model: nn.Module, inputs: Tensor, head: bool | None = None) -> FeatureSet:
    return extract(model, [inputs], device="cpu", progress=False, head=head)


def found_heads(features: FeatureSet) -> list[str]:
    assert features.provenance is not None
    return features.provenance.head_modules.split(" + ")


def check_head(model: nn.Module, inputs: Tensor, heads: int = 1) -> FeatureSet:
    """Extract, and check that the head reproduces the model's logits and is timm's classifier."""
    features = run(model, inputs)
    head, logits = features.head, features.logits
    assert head is not None
    assert logits is not None
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(inputs))
    scale = logits.abs().max()
    assert (head(features.features) - logits).abs().max() <= 1e-4 * scale
    assert (logits[0] - logits[1]).abs().max() > 1e-2 * scale, "the logits hardly depend on the input"
    names = found_heads(features)
    assert len(names) == heads
    assert set(names) <= classifier_modules(model)
    widths = [model.get_submodule(name).weight.flatten(1).shape[1] for name in names]  # type: ignore[operator]
    assert features.features.shape == (len(inputs), sum(widths))
    assert head.weight.shape == (logits.shape[1], sum(widths))
    return features


def classifier_modules(model: nn.Module) -> set[str]:
    """Return the names of all modules in timm's classifier."""
    classifier = model.get_classifier()  # type: ignore[operator]
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    inside = {module for part in parts for module in part.modules()}
    return {name for name, module in model.named_modules() if module in inside}


def timm_features(model: Any, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
    parts = features if isinstance(features, (tuple, list)) else [features]
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def family_of(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


@pytest.mark.parametrize("family", [family for family in FAMILIES if timm.is_model(FAMILIES[family][0])])
def test_family(family: str) -> None:
    name, size, kwargs = FAMILIES[family]
    assert family_of(name) == family
    model, inputs = build(name, size, {"num_classes": CLASSES, **kwargs})
    features = check_head(model, inputs, SEVERAL_HEADS.get(family, 1))
    expected = timm_features(model, inputs)
    if family not in NORM_IN_CLASSIFIER and expected.shape == features.features.shape:
        torch.testing.assert_close(features.features, expected)
    else:
        assert family in {*NORM_IN_CLASSIFIER, *SEVERAL_HEADS}


@pytest.mark.parametrize("kind", VARIANTS)
def test_other_kinds_of_head(kind: str) -> None:
    name, size, kwargs = VARIANTS[kind]
    model, inputs = build(name, size, {"num_classes": CLASSES, **kwargs})
    check_head(model, inputs, 2 if "LeViT" in kind else 1)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["vision_transformer", "deit", "crossvit", "repvit", "resnetv2", "efficientnet"])
def test_mixed_precision(family: str, amp: str) -> None:
    name, size, kwargs = FAMILIES[family]
    model, inputs = build(name, size, {"num_classes": CLASSES, **kwargs})
    features = extract(model, [inputs], device="cpu", progress=False, amp=amp)
    assert len(found_heads(features)) == SEVERAL_HEADS.get(family, 1)
    assert features.head is not None
    assert features.logits is not None
    difference = features.head(features.features) - features.logits
    assert difference.abs().max() <= 2e-2 * features.logits.abs().max()


@pytest.mark.parametrize("name", [name for name in REFUSED if timm.is_model(name)])
def test_models_without_an_affine_classifier_are_refused(name: str) -> None:
    size, kwargs, message = REFUSED[name]
    model, inputs = build(name, size, kwargs)
    with pytest.raises(HeadNotFound, match=message):
        run(model, inputs)


ENCODERS: dict[str, tuple[int, dict[str, Any], int]] = {
    "resnet18": (64, {"num_classes": 0}, 512),
    "eva02_tiny_patch14_224": (56, {"depth": 2}, 192),
    "aimv2_large_patch14_224": (56, {"depth": 1}, 1024),
    "samvit_base_patch16": (64, {"depth": 1}, 256),
    "sam2_hiera_tiny": (224, {}, 768),
}
"""Models without a classifier: input size, arguments, and the width of their output."""


@pytest.mark.parametrize("name", [name for name in ENCODERS if timm.is_model(name)])
def test_models_without_a_classifier_keep_their_output(name: str) -> None:
    size, kwargs, width = ENCODERS[name]
    model, inputs = build(name, size, kwargs)
    features = run(model, inputs)
    assert (features.head, features.logits) == (None, None)
    assert features.features.shape == (2, width)
    with torch.inference_mode():
        assert features.features.equal(model.eval()(inputs))


def test_volo_without_a_head() -> None:
    model, inputs = build("volo_d1_224", 64, {"num_classes": CLASSES})
    features = run(model, inputs, head=False)
    assert features.head is None
    assert features.features.shape == (2, 384)
    with torch.inference_mode():
        torch.testing.assert_close(features.logits, model(inputs))


def test_families_that_are_not_listed_here() -> None:
    """The smallest member of a family that a newer timm adds works, or is refused with the right error."""
    listed = {*FAMILIES, *(family_of(name) for name in (*REFUSED, *ENCODERS))}
    added = [family for family in timm.list_modules() if family not in listed]
    for family in [*added, "starnet"]:
        name = smallest_member(family)
        model, inputs = build(name, config_of(name).input_size[1], {"num_classes": CLASSES})
        try:
            features = run(model, inputs)
        except HeadNotFound:
            continue
        assert features.head is not None
        torch.testing.assert_close(features.head(features.features), features.logits, rtol=1e-4, atol=1e-4)


def smallest_member(family: str) -> str:
    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device("meta"):
            sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    return min(sizes, key=sizes.__getitem__)
