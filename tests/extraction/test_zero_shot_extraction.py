"""Extraction of zero-shot classifiers: features, heads, and negatives in caches, resume, and the probe of places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torchvision
import transformers
from interrupted import Interrupted, InterruptedLoader
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize
from torch.utils.data import DataLoader, TensorDataset
from vision_language import ADJECTIVES, CLASSES, NOUNS, TEMPLATES, VISION, clip, images, siglip, spread, tokenizer

import ood_scores
from ood_scores import FeatureSet, NegativeWords, zero_shot_classifier
from ood_scores.errors import BadInput, MissingInput, ProbeDoesNotApply, StaleCache
from ood_scores.features.storage.layout import LONGEST_ATTRIBUTE
from ood_scores.probes import LocalMCM

INPUTS, LABELS = images(24), torch.arange(24) % len(CLASSES)
NEGATIVES = NegativeWords(NOUNS, ADJECTIVES, share=0.5)
TEXTS: dict[str, Any] = {"classes": CLASSES, "templates": TEMPLATES, "negatives": NEGATIVES, "tokenizer": tokenizer()}


def extracted(model: Any, cache: Path | None = None, loader: Any = None, **options: Any) -> FeatureSet:
    loader = loader or DataLoader(TensorDataset(INPUTS, LABELS), 4)
    return ood_scores.extract(model, loader, cache, progress=False, device="cpu", **options)


@pytest.mark.parametrize("make", [clip, siglip])
def test_cache_of_a_vision_language_model(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    feats = extracted(model, tmp_path / "c.h5", **TEXTS)
    with torch.no_grad():
        own = model.get_image_features(pixel_values=INPUTS)
    own = own if isinstance(own, Tensor) else own.pooler_output
    torch.testing.assert_close(feats.features, normalize(own, dim=1), rtol=0, atol=1e-6)
    assert feats.logits is not None
    assert feats.head is not None
    logits = zero_shot_classifier(model, CLASSES, TEMPLATES, tokenizer=tokenizer())(INPUTS)
    torch.testing.assert_close(feats.logits, logits)
    counts = {kind: len(words) for kind, words in feats.head.negatives.items()}
    assert counts == {"adjectives": 2, "conjugated": 2, "nouns": 5}
    assert feats.provenance is not None
    assert feats.provenance.arguments is not None
    assert feats.provenance.arguments["classes"] == list(CLASSES)
    assert feats.provenance.arguments["templates"] == list(TEMPLATES)
    again = feats[:7].head
    assert again is not None
    assert torch.equal(again.negatives["nouns"], feats.head.negatives["nouns"])


def test_every_score_of_logits_works() -> None:
    feats = extracted(clip(), **TEXTS, probes=["local_mcm"])
    for name in ("msp", "energy", "max_logit", "entropy", "gen", "residual", "mcm", "gl_mcm", "neglabel", "csp"):
        scorer = ood_scores.create_scorer(name)
        assert scorer.fit(feats).score(feats).isfinite().all(), name


def test_other_texts_are_refused(tmp_path: Path) -> None:
    extracted(clip(), tmp_path / "c.h5", **TEXTS)
    assert len(extracted(clip(), tmp_path / "c.h5", **TEXTS)) == 24
    others: list[tuple[dict[str, Any], str]] = [
        ({"classes": CLASSES[::-1]}, "'crane bird', 'fire truck', 'dog', 'cat'"),
        ({"templates": TEMPLATES[:2]}, "'templates': .'a photo of a {}.', 'the {}'.}"),
        ({"negatives": None}, "weights: cache "),
        ({"negatives": NegativeWords(NOUNS, ADJECTIVES, share=0.5, seed=1)}, "weights: cache "),
    ]
    for change, message in others:
        with pytest.raises(StaleCache, match=message):
            extracted(clip(), tmp_path / "c.h5", **{**TEXTS, **change})


def test_a_vision_language_model_without_classes_is_refused() -> None:
    with pytest.raises(BadInput, match=r"CLIPModel compares images with texts: pass the names of classes"):
        extracted(clip())


def test_resumed_after_an_interruption(tmp_path: Path) -> None:
    classifier = zero_shot_classifier(clip(), CLASSES, tokenizer=tokenizer(), negatives=NEGATIVES)
    probes = ["local_mcm"]
    expected = extracted(classifier, tmp_path / "whole.h5", probes=probes)
    with pytest.raises(Interrupted):
        extracted(classifier, tmp_path / "c.h5", InterruptedLoader(INPUTS, LABELS, stop=3), probes=probes)
    found = extracted(classifier, tmp_path / "c.h5", InterruptedLoader(INPUTS, LABELS), probes=probes)
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.extras["local_mcm.1.0"], expected.extras["local_mcm.1.0"])
    assert found.head is not None
    assert set(found.head.negatives) == {"nouns", "adjectives", "conjugated"}


def test_long_names_fit_into_a_cache(tmp_path: Path) -> None:
    words = [f"{name} {'x' * LONGEST_ATTRIBUTE}" for name in CLASSES]
    classifier = zero_shot_classifier(clip(), words, tokenizer=tokenizer())
    unknown_length = (batch for batch in DataLoader(TensorDataset(INPUTS, LABELS), 4))
    feats = extracted(classifier, tmp_path / "c.h5", unknown_length)
    assert feats.provenance is not None
    assert feats.provenance.arguments is not None
    assert feats.provenance.arguments["classes"] == words
    feats.save(tmp_path / "again.h5")
    copied = ood_scores.load(tmp_path / "again.h5").provenance
    assert copied is not None
    assert copied.arguments == feats.provenance.arguments
    with h5py.File(tmp_path / "c.h5") as h5:
        assert "arguments" in h5


# ---- places in the image


def test_places_of_clip_as_in_the_authors_code() -> None:
    model = clip()
    classifier = zero_shot_classifier(model, CLASSES, tokenizer=tokenizer())
    found = extracted(classifier, probes=[LocalMCM(temperatures=(1.0, 0.05))]).extras
    with torch.no_grad():
        tokens = model.vision_model(INPUTS, output_hidden_states=True).hidden_states[-2]
        state = {name.split("layers.1.")[-1]: values for name, values in model.vision_model.state_dict().items()}

        def norm(values: Tensor, name: str) -> Tensor:
            return layer_norm(values, values.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

        def affine(values: Tensor, name: str) -> Tensor:
            return linear(values, state[f"{name}.weight"], state[f"{name}.bias"])

        values = affine(affine(norm(tokens, "layer_norm1"), "self_attn.v_proj"), "self_attn.out_proj") + tokens
        inner = affine(norm(values, "layer_norm2"), "mlp.fc1")
        values = values + affine(inner * torch.sigmoid(1.702 * inner), "mlp.fc2")
        last = next(name for name in state if name.endswith("post_layernorm.weight")).removesuffix(".weight")
        places = norm(values, last)[:, 1:] @ model.visual_projection.weight.T
        cosines = normalize(places, dim=2).double() @ normalize(classifier.head.weight, dim=1).T.double()
    for temperature in (1.0, 0.05):
        shares = (cosines / temperature).softmax(dim=2).amax(dim=(1, 2))
        torch.testing.assert_close(found[f"local_mcm.{temperature}"].double(), shares, rtol=0, atol=1e-6 / temperature)
    expected = ood_scores.score("mcm", extracted(classifier)) + found["local_mcm.1.0"].double()
    torch.testing.assert_close(ood_scores.score("gl_mcm", extracted(classifier, probes=["local_mcm"])), expected)


def test_the_only_place_of_siglip_is_the_image() -> None:
    text = siglip().config.text_config.to_dict()
    config = transformers.SiglipConfig(text_config=text, vision_config={**VISION, "patch_size": 32})
    torch.manual_seed(0)
    classifier = zero_shot_classifier(spread(transformers.SiglipModel(config)), CLASSES, tokenizer=tokenizer())
    feats = extracted(classifier, probes=["local_mcm"])
    torch.testing.assert_close(
        feats.extras["local_mcm.1.0"].double(), ood_scores.score("mcm", feats), rtol=0, atol=1e-6
    )


def test_no_places_of_other_models() -> None:
    with pytest.raises(ProbeDoesNotApply, match="local_mcm: only zero-shot classifiers have texts"):
        extracted(torchvision.models.resnet18(num_classes=4).eval(), probes=["local_mcm"])
    model = clip()
    model.vision_model.encoder.layers[-1].self_attn = torch.nn.Identity()
    classifier = zero_shot_classifier(model, CLASSES, tokenizer=tokenizer())
    with pytest.raises(ProbeDoesNotApply, match="local features are known for the vision transformers of CLIP"):
        extracted(classifier, probes=["local_mcm"])
    with pytest.raises(BadInput, match="temperatures must be positive"):
        LocalMCM(temperatures=())
    with pytest.raises(MissingInput, match=r"temperatures=\(0.5,\)\)\]\) from a zero-shot classifier"):
        ood_scores.score("gl_mcm", FeatureSet(np.ones((2, 3)), head=ood_scores.Head(np.eye(3))), temperature=0.5)
