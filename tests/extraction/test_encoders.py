"""Encoders without a classifier: the kept features are the model's own pooled output, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from vision_language import CLASSES, TEXT, TOWER, spread, tokenizer

import ood_scores
from ood_scores import zero_shot_classifier, zero_shot_head
from ood_scores.data.sources import open_dataset
from ood_scores.detector.preprocessing import preprocessing_of
from ood_scores.errors import BadInput, HeadNotFound, MissingInput, ProbeDoesNotApply, ShapeMismatch, StaleCache
from ood_scores.features import FeatureSet, Head
from ood_scores.models.opening import load_model, preprocessing

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


def timm_model(name: str, **arguments: Any) -> nn.Module:
    return timm.create_model(name, num_classes=0, **arguments)


def hugging_face(name: str, **arguments: Any) -> nn.Module:
    config = getattr(transformers, f"{name.removesuffix('Model').removesuffix('ModelWithProjection')}Config")
    return getattr(transformers, name)(config(**VISION | arguments))


VIT: dict[str, Any] = {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2}
ENCODERS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[Any], Tensor]]] = {
    "DINOv2": (lambda: timm_model("vit_small_patch14_reg4_dinov2", **VIT | {"img_size": 28}), 28, lambda out: out),
    "DINOv3": (lambda: timm_model("vit_small_patch16_dinov3", **VIT), 32, lambda out: out),
    "SigLIP": (lambda: timm_model("vit_base_patch16_siglip_224", **VIT), 32, lambda out: out),
    "CLIP": (lambda: timm_model("vit_base_patch32_clip_224", **VIT), 32, lambda out: out),
    "EVA-02": (lambda: timm_model("eva02_tiny_patch14_224", img_size=28, depth=1), 28, lambda out: out),
    "SAM": (
        lambda: timm_model("samvit_base_patch16", **VIT, global_attn_indexes=(0,), window_size=0),
        32,
        lambda out: out,
    ),
    "ConvNeXt": (lambda: timm_model("test_convnext"), 64, lambda out: out),
    "ResNet": (lambda: timm_model("test_resnet"), 64, lambda out: out),
    "Swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=64, embed_dim=12, depths=(1, 1), num_heads=(1, 2), window_size=4
        ),
        64,
        lambda out: out,
    ),
    "transformers ViT": (lambda: hugging_face("ViTModel"), 32, lambda out: out.pooler_output),
    "transformers DINOv2": (lambda: hugging_face("Dinov2Model"), 32, lambda out: out.pooler_output),
    "transformers DINOv3": (
        lambda: hugging_face("DINOv3ViTModel", num_register_tokens=4),
        32,
        lambda out: out.pooler_output,
    ),
    "transformers SigLIP": (lambda: hugging_face("SiglipVisionModel"), 32, lambda out: out.pooler_output),
    "transformers CLIP": (lambda: hugging_face("CLIPVisionModel"), 32, lambda out: out.pooler_output),
    "transformers CLIP with projection": (
        lambda: hugging_face("CLIPVisionModelWithProjection", projection_dim=24),
        32,
        lambda out: out.image_embeds,
    ),
    "transformers ResNet": (
        lambda: transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
        32,
        lambda out: out.pooler_output.flatten(1),
    ),
}


def made(kind: str) -> tuple[nn.Module, Tensor, Callable[[Any], Tensor]]:
    make, size, pooled = ENCODERS[kind]
    torch.manual_seed(0)
    return make().eval(), torch.randn(6, 3, size, size), pooled


def extract(model: nn.Module, batches: list[Any], cache: Path | None = None, **options: Any) -> FeatureSet:
    return ood_scores.extract(model, batches, cache, device="cpu", progress=False, **options)


@pytest.mark.parametrize("kind", ENCODERS)
def test_features_are_the_pooled_output(kind: str, tmp_path: Path) -> None:
    model, x, pooled = made(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feats = extract(model, [x[:4], x[4:]], tmp_path / "c.h5")
    with torch.inference_mode():
        expected = torch.cat([pooled(model(part)) for part in (x[:4], x[4:])])
    assert feats.features.equal(expected)
    assert (feats.logits, feats.head, feats.num_classes) == (None, None, None)
    assert feats.features.std(dim=0).max() > 0


class StopsOnce:
    """Batches whose first reading stops after two of them."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.stops = batches, True

    def __iter__(self) -> Any:
        for number, batch in enumerate(self.batches):
            if number == 2 and self.stops:
                self.stops = False
                raise KeyboardInterrupt
            yield batch


def test_an_interrupted_extraction_of_an_encoder_is_resumed(tmp_path: Path) -> None:
    model, _, _ = made("transformers DINOv2")
    batches = list(torch.randn(3, 16, 3, 32, 32))
    loader = StopsOnce(batches)
    with pytest.raises(KeyboardInterrupt):
        extract(model, loader, tmp_path / "c.h5", pool="cls+mean")  # type: ignore[arg-type]
    with pytest.raises(StaleCache, match="pooling: cache cls\\+mean, now the model's own"):
        extract(model, loader, tmp_path / "c.h5")  # type: ignore[arg-type]
    feats = extract(model, loader, tmp_path / "c.h5", pool="cls+mean")  # type: ignore[arg-type]
    assert feats.features.equal(extract(model, batches, pool="cls+mean").features)


@pytest.mark.parametrize("kind", ["DINOv2", "transformers DINOv3", "transformers ResNet", "SigLIP"])
def test_a_detector_of_an_encoder_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, x, pooled = made(kind)
    fit, held_out = torch.randn(60, *x.shape[1:]), torch.randn(40, *x.shape[1:])
    detector = ood_scores.calibrate("knn", model, fit=[fit], id=[held_out], device="cpu", pool=None)
    found = detector.predict(x * 9)
    with torch.inference_mode():
        reference = nn.functional.normalize(pooled(model(fit)).double(), dim=1).numpy()
        rows = nn.functional.normalize(pooled(model(x * 9)).double(), dim=1).numpy()
    distances = np.sort(np.linalg.norm(rows[:, None] - reference[None], axis=2), axis=1)
    np.testing.assert_allclose(found.score, -distances[:, 49], atol=1e-5)
    assert (found.label, found.probability, found.class_name) == (None, None, None)
    assert set(found.columns()) == {"score", "p_value", "is_ood"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model is not saved: it has arguments of its own
        detector.save(tmp_path / "d", with_model=False)
    again = ood_scores.Detector.load(tmp_path / "d", model, device="cpu").predict(x * 9)
    assert np.array_equal(again.score, found.score)


@pytest.mark.parametrize("kind", ["DINOv2", "transformers DINOv3"])
def test_pooling_of_tokens(kind: str) -> None:
    model, x, _ = made(kind)
    with torch.inference_mode():
        tokens = model.forward_features(x) if kind == "DINOv2" else model(x).last_hidden_state  # type: ignore[operator]
    first, patches = tokens[:, 0], tokens[:, 5:]  # after a class token and 4 registers
    expected = {"cls": first, "mean": patches.mean(1), "cls+mean": torch.cat([first, patches.mean(1)], 1)}
    for pool, features in expected.items():
        torch.testing.assert_close(extract(model, [x], pool=pool).features, features, rtol=1e-6, atol=1e-6)
    assert "forward" not in vars(model)


class Maps(nn.Module):
    """An encoder that returns maps ``[B, C, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Projected(Maps):
    """A model with the methods of timm that returns projected tokens ``[B, T, 2]``."""

    num_prefix_tokens = 0

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(2).transpose(1, 2)

    def forward_head(self, tokens: Tensor) -> Tensor:
        return tokens[:, :, :2]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def test_returned_tokens_are_pooled_rather_than_those_before() -> None:
    model, x = Projected().eval(), torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(extract(model, [x], pool="mean").features, model(x).mean(1))


def test_tokens_without_a_class_token_have_only_a_mean() -> None:
    model, x, _ = made("transformers SigLIP")
    with torch.inference_mode():
        tokens = model(x).last_hidden_state
    torch.testing.assert_close(extract(model, [x], pool="mean").features, tokens.mean(1))
    with pytest.raises(BadInput, match=r"no class token among its 16 tokens: use pool='mean'"):
        extract(model, [x], pool="cls")


def largest(output: Tensor) -> Tensor:
    return output.amax(dim=(2, 3))


def several_rows(output: Tensor) -> Tensor:
    return output.flatten(0, 1)


def test_pooling_of_maps() -> None:
    model, x = Maps().eval(), torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        maps = model(x)
    torch.testing.assert_close(extract(model, [x], pool="mean").features, maps.mean((2, 3)))
    feats = extract(model, [x], pool=largest)
    assert feats.features.equal(maps.amax((2, 3)))
    assert feats.provenance is not None
    assert feats.provenance.pool == f"{__name__}:largest"
    again = ood_scores.calibrate("feature_norm", model, id=feats, device="cpu").forward.options
    assert again.pooling is largest
    with pytest.raises(HeadNotFound, match=r"shape \(4, 5, 6, 6\), which is neither logits .* pool='mean', 'cls', or"):
        extract(model, [x])
    with pytest.raises(BadInput, match=r"maps \[4, 5, 6, 6\] have no class token: use pool='mean'"):
        extract(model, [x], pool="cls")
    with pytest.raises(BadInput, match=r"pool must return one vector per input, a tensor \[4, features\]"):
        extract(model, [x], pool=several_rows)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ("max", r"pool must be 'mean', 'cls', 'cls\+mean', a function, or FILE.py:FUNCTION, got 'max'"),
        (3, "that a module defines under a name, got 3"),
        (lambda output: output, "that a module defines under a name, got <function"),
        ("strange.py:pool", "names code, which runs only if you ask for it"),
    ],
)
def test_a_pooling_that_is_none_is_refused(pool: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        extract(Maps(), [torch.randn(2, 3, 8, 8)], pool=pool)


def test_a_tower_with_a_projection_is_opened_by_its_folder(tmp_path: Path) -> None:
    model, x, pooled = made("transformers CLIP with projection")
    model.save_pretrained(tmp_path / "tower")  # type: ignore[operator]
    opened = load_model(str(tmp_path / "tower"))
    with torch.inference_mode():
        assert extract(opened, [x]).features.equal(pooled(model(x)))


def test_pooling_of_vectors_and_of_logits_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    with pytest.raises(BadInput, match=r"the model returned \[2, 5\]: leave out pool"):
        extract(model, [torch.randn(2, 3, 8, 8)], pool="mean")
    classifier = hugging_face("ViTModel").config
    classifier = transformers.ViTForImageClassification(classifier)
    with pytest.raises(BadInput, match=r"the model returned ImageClassifierOutput: leave out pool"):
        extract(classifier, [torch.randn(2, 3, 32, 32)], pool="mean")


def test_a_pooled_map_of_one_position_is_flattened() -> None:
    trunk = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]).eval()
    trunk.num_classes = 0  # type: ignore[assignment]
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert extract(trunk, [x]).features.equal(trunk(x)[:, :, 0, 0])
    classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1)).eval()
    feats = extract(classifier, [x])
    assert feats.head is not None
    torch.testing.assert_close(feats.logits, classifier(x)[:, :, 0, 0].detach())


# --- encoders that nothing declares --------------------------------------------------------------------------------


def test_a_trunk_is_taken_for_an_encoder_with_a_warning() -> None:
    trunk = torchvision.models.resnet18()
    trunk.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="taken for an encoder.*Set model.num_classes = 0 to confirm it"):
        feats = extract(trunk.eval(), [x])
    with torch.inference_mode():
        assert feats.features.equal(trunk(x))
    assert feats.logits is None
    trunk.num_classes = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert extract(trunk, [x]).features.equal(feats.features)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.layer(x.flatten(1)))


def test_a_classifier_is_not_taken_for_an_encoder() -> None:
    x = torch.randn(3, 3, 8, 8)
    pooled = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    for model in (Normalized(), nn.Sequential(*pooled, nn.Flatten())):
        with pytest.raises(HeadNotFound, match=r"set model\.num_classes = 0 if the model is an encoder"):
            extract(model.eval(), [x])
        model.num_classes = 0  # type: ignore[assignment]
        with torch.inference_mode():
            assert extract(model, [x]).features.equal(model(x))
    declared = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    declared.num_classes = 5  # type: ignore[assignment]
    with pytest.raises(HeadNotFound):
        extract(declared, [x])
    with pytest.raises(HeadNotFound, match="not an affine map whose output is the logits"):
        extract(declared, [x], head="0")


# --- heads of encoders ---------------------------------------------------------------------------------------------


def test_a_given_head_computes_the_logits(tmp_path: Path) -> None:
    model, x, _ = made("transformers ViT")
    head = Head(torch.randn(4, 32), torch.randn(4))
    plain = extract(model, [x])
    feats = extract(model, [x], tmp_path / "c.h5", head=head)
    assert feats.logits is not None
    assert feats.features.equal(plain.features)
    torch.testing.assert_close(feats.logits, head(plain.features))
    view = plain.with_head(head)
    assert view.logits is not None
    assert view.logits.equal(feats.logits)
    assert view.provenance is not None
    assert feats.provenance is not None
    assert not view.provenance.differences(feats.provenance)
    with pytest.raises(StaleCache, match="requested head"):
        extract(model, [x], tmp_path / "c.h5", head=Head(head.weight + 1, head.bias))
    with pytest.raises(ShapeMismatch, match="the head is for 31 features, got 32: use features of the same model"):
        extract(model, [x], head=Head(torch.randn(4, 31)))
    with pytest.raises(ShapeMismatch, match="the head is for 31 features, got 32"):
        plain.with_head(Head(torch.randn(4, 31)))


def test_a_detector_keeps_a_given_head(tmp_path: Path) -> None:
    model, x, _ = made("transformers ViT")
    head = Head(torch.randn(4, 32), torch.randn(4))
    held_out = extract(model, [torch.randn(40, 3, 32, 32)]).with_head(head)
    detector = ood_scores.calibrate("energy", model, id=held_out, device="cpu", per_class=False)
    found = detector.predict(x)
    logits = head(extract(model, [x]).features).double()
    np.testing.assert_allclose(found.score, logits.logsumexp(1).numpy(), rtol=1e-6)
    assert np.array_equal(found.label, logits.argmax(1).numpy())
    detector.save(tmp_path / "d", with_model=False)
    again = ood_scores.Detector.load(tmp_path / "d", model, device="cpu").predict(x)
    assert np.array_equal(again.score, found.score)


def test_errors_say_what_an_encoder_lacks() -> None:
    model, x, _ = made("transformers ViT")
    feats = extract(model, [x.repeat(10, 1, 1, 1)], layers=["layernorm"])
    assert feats.extras["layers.layernorm"].shape == (60, 32)
    with pytest.raises(BadInput, match="the probe 'odin' reads the logits of the model, which returns none"):
        extract(model, [x], probes=["odin"])
    with pytest.raises(MissingInput, match="a threshold per class needs predicted classes"):
        ood_scores.calibrate("feature_norm", model, id=feats, device="cpu", per_class=True)
    detector = ood_scores.calibrate("feature_norm", model, id=feats, device="cpu")
    with pytest.raises(BadInput, match="an encoder has no logits to export"):
        detector.export(x)


def test_a_head_of_texts_needs_features_of_length_1() -> None:
    model, x, _ = made("transformers CLIP with projection")
    head = zero_shot_head(torch.randn(4, 24), 10.0)
    plain = extract(model, [x])
    for wrong in (lambda: extract(model, [x], head=head), lambda: plain.with_head(head)):
        with pytest.raises(BadInput, match=r"the features must have length 1, but one has .*: normalize the output"):
            wrong()

    class Unit(nn.Module):
        num_classes = 0

        def __init__(self) -> None:
            super().__init__()
            self.encoder = model

        def forward(self, pixel_values: Tensor) -> Tensor:
            return nn.functional.normalize(self.encoder(pixel_values).image_embeds)

    feats = extract(Unit().eval(), [x], head=head)
    assert feats.logits is not None
    cosines = nn.functional.normalize(plain.features) @ nn.functional.normalize(head.weight).T
    torch.testing.assert_close(feats.logits, 10 * cosines)
    unit = FeatureSet(feats.features).with_head(head).logits
    assert unit is not None
    torch.testing.assert_close(unit, 10 * cosines)


# --- inputs of which some are padding, or hidden --------------------------------------------------------------------


def test_a_text_of_padding_alone_has_no_mean() -> None:
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, max_position_embeddings=8, **SMALL)).eval()
    batches = [
        {"input_ids": torch.randint(1, 50, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.int64)}
        for _ in range(2)
    ]
    batches[1]["attention_mask"][:, 3:] = 0
    with torch.inference_mode():
        expected = torch.cat(
            [model(**batches[0]).last_hidden_state.mean(1), model(**batches[1]).last_hidden_state[:, :3].mean(1)]
        )
    torch.testing.assert_close(extract(model, batches, pool="mean").features, expected)
    batches[1]["attention_mask"][2] = 0
    with pytest.raises(BadInput, match="row 6 has no tokens but padding, whose mean is undefined: remove the row"):
        extract(model, batches, pool="mean")
    batches[1]["attention_mask"][2, 0] = 1
    with pytest.raises(BadInput, match="row 6 has no tokens but padding"):
        extract(model, batches, pool="cls+mean")


def naflex(rows: int = 6) -> dict[str, Tensor]:
    """Images of different sizes as patches of 8 x 8 pixels, padded to 16 patches."""
    shapes = torch.tensor([[4, 4], [2, 3], [1, 5], [3, 3], [4, 2], [5, 3]])[:rows]
    mask = (torch.arange(16) < shapes.prod(dim=1, keepdim=True)).long()
    pixels = torch.randn(rows, 16, 192, generator=torch.Generator().manual_seed(0)) * mask[:, :, None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


NAFLEX: dict[str, Any] = {**SMALL, "patch_size": 8, "num_patches": 16}


def test_images_of_any_size_as_patches() -> None:
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**NAFLEX)).eval()
    batch = naflex()
    with torch.inference_mode():
        output = model(**batch)
    assert extract(model, [batch]).features.equal(output.pooler_output)
    counts = batch["pixel_attention_mask"].sum(dim=1).tolist()
    means = [tokens[:count].mean(0) for tokens, count in zip(output[0], counts, strict=True)]
    torch.testing.assert_close(extract(model, [batch], pool="mean").features, torch.stack(means))
    with pytest.raises(BadInput, match=r"no class token among its 16 tokens: use pool='mean'"):
        extract(model, [batch], pool="cls")
    with pytest.raises(BadInput, match=r"the model cannot take a batch .*spatial_shapes"):
        extract(model, [batch["pixel_values"]])


def test_images_of_any_size_by_the_name_of_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given: Any = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**NAFLEX)).eval()
    given.save_pretrained(tmp_path / "naflex")
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    processor.save_pretrained(tmp_path / "naflex")
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for width, height in ((40, 20), (16, 90), (33, 33)):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{width}.png")
    model = load_model(f"hf:{tmp_path}/naflex")
    dataset = open_dataset(f"folder:{tmp_path}/photos", preprocessing(model))
    loader: Any = DataLoader(dataset, batch_size=2)
    found = extract(model, loader).features
    images = [Image.open(tmp_path / "photos" / name) for name in ("16.png", "33.png", "40.png")]
    with torch.inference_mode():
        expected = given(**processor(images=images, return_tensors="pt")).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="got pixel_values, pixel_attention_mask, spatial_shapes: detectors take images"):
        preprocessing_of(model, None)


def test_zero_shot_classification_of_images_of_any_size() -> None:
    torch.manual_seed(0)
    model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=TEXT, vision_config=NAFLEX | TOWER)).eval()
    classifier = zero_shot_classifier(spread(model), CLASSES, tokenizer=tokenizer())
    batch = naflex()
    feats = extract(classifier, [batch])
    texts = [f"a photo of a {name}." for name in CLASSES]
    words = tokenizer()(texts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.inference_mode():
        output = model(**batch, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    assert feats.logits is not None
    torch.testing.assert_close(feats.logits, output.logits_per_image, rtol=1e-5, atol=1e-5)
    assert ood_scores.score("mcm", feats).shape == (6,)
    with pytest.raises(ProbeDoesNotApply, match=r"local features are known for .* use the scorer mcm instead"):
        extract(classifier, [batch], probes=["local_mcm"])


def test_a_model_that_hides_random_patches_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION)).eval()
    x = torch.randn(4, 3, 32, 32)
    with pytest.raises(BadInput, match="ViTMAEModel hides 75% of the patches of each image at random"):
        extract(model, [x], pool="cls")
    model.save_pretrained(tmp_path / "mae")
    whole = transformers.ViTModel.from_pretrained(tmp_path / "mae", add_pooling_layer=False).eval()
    feats = extract(whole, [x], pool="cls")
    model.config.mask_ratio = 0.0
    torch.testing.assert_close(extract(model, [x], pool="cls").features, feats.features, rtol=1e-4, atol=1e-5)
