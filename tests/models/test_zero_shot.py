"""Zero-shot classifiers of small random CLIP and SigLIP models: logits, texts, negatives, and refused input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vision_language import ADJECTIVES, CLASSES, NOUNS, TEMPLATES, clip, images, saved, siglip, tokenizer

import ood_scores
from ood_scores import NegativeWords, zero_shot_classifier, zero_shot_head
from ood_scores.errors import BadInput, CheckpointError, MissingInput, UnknownName
from ood_scores.models.class_names import class_names
from ood_scores.models.opening import load_model
from ood_scores.models.zero_shot.classifier import ZeroShotClassifier
from ood_scores.models.zero_shot.negatives import SUPERCLASSES, mined
from ood_scores.models.zero_shot.prompts import checked_classes, checked_templates, read_words

Make = Callable[[], Any]
NO_OPEN_CLIP = "open_clip_torch is not installed: pip install ood_scores[clip]"


def texts_of(model: Any, texts: list[str]) -> Tensor:
    """The features ``[T, D]`` that the model itself gives texts, in the form in which it was trained."""
    padding: Any = "max_length" if model.config.model_type == "siglip" else True
    tokens = tokenizer()(texts, padding=padding, max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=images(1))[
            "text_embeds"
        ]


@pytest.mark.parametrize("make", [clip, siglip])
def test_logits_are_those_of_the_model(make: Make) -> None:
    model = make()
    padding: Any = "max_length" if make is siglip else True
    texts = [f"a photo of a {name}." for name in CLASSES]
    tokens = tokenizer()(texts, padding=padding, max_length=16, truncation=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model(pixel_values=images(), **tokens).logits_per_image
        found = zero_shot_classifier(model, CLASSES, tokenizer=tokenizer())(images())
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("make", [clip, siglip])
def test_templates_are_averaged_by_direction(make: Make) -> None:
    model = make()
    classifier = zero_shot_classifier(model, CLASSES, TEMPLATES, tokenizer=tokenizer())
    for number, name in enumerate(CLASSES):
        units = texts_of(model, [template.format(name) for template in TEMPLATES])
        mean = torch.nn.functional.normalize(units, dim=1).mean(dim=0)
        expected = float(model.logit_scale.detach().exp()) * mean / mean.norm()
        torch.testing.assert_close(classifier.head.weight[number].detach(), expected.flatten(), rtol=1e-5, atol=1e-5)
    assert class_names(classifier) == list(CLASSES)
    assert classifier.num_classes == len(CLASSES)


def test_half_precision_keeps_float32_features() -> None:
    classifier = zero_shot_classifier(clip().to(torch.bfloat16), CLASSES, tokenizer=tokenizer())
    feats = ood_scores.extract(classifier, [images()], progress=False, device="cpu")
    torch.testing.assert_close(feats.features.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    assert feats.logits is not None
    assert feats.head is not None
    assert torch.equal(feats.logits, feats.head(feats.features))


def test_the_model_keeps_its_mode() -> None:
    model = clip().train()
    zero_shot_classifier(model, CLASSES, tokenizer=tokenizer())
    assert model.text_model.training


# ---- negatives


def unit_texts(model: Any, texts: list[str]) -> np.ndarray:
    values = texts_of(model, texts).double().numpy()
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_negatives_are_mined_as_in_the_paper() -> None:
    model = clip()
    words = NegativeWords([*NOUNS, "river"], ADJECTIVES, share=0.5)
    found = zero_shot_classifier(model, CLASSES, tokenizer=tokenizer(), negatives=words).negatives
    nouns = [word for word in NOUNS if word not in CLASSES]
    classes = unit_texts(model, [f"a photo of a {name}." for name in CLASSES])
    for kind, texts in {
        "nouns": [f"the nice {word}" for word in nouns],
        "adjectives": [f"This is a {word} photo" for word in ADJECTIVES],
    }.items():
        candidates = unit_texts(model, texts)
        distance = np.quantile(-candidates @ classes.T, 0.05, axis=1)
        chosen = np.argsort(-distance, kind="stable")[: int(0.5 * len(texts))]
        np.testing.assert_allclose(found[kind], candidates[chosen], atol=1e-6)


def test_conjugated_words_are_adjectives_with_superclasses() -> None:
    asked: list[str] = []
    own = tokenizer()

    def spy(texts: list[str], **options: Any) -> Any:
        asked.extend(texts)
        return own(texts, **options)

    words = NegativeWords(NOUNS, ADJECTIVES, share=1.0, conjugated_templates=("a photo of {}",), seed=3)
    found = zero_shot_classifier(clip(), CLASSES, tokenizer=spy, negatives=words).negatives
    joined = [text.removeprefix("a photo of ").split() for text in asked[-len(ADJECTIVES) :]]
    assert [word for word, _ in joined] == list(ADJECTIVES)
    assert {superclass for _, superclass in joined} <= set(SUPERCLASSES)
    assert {kind: len(values) for kind, values in found.items()} == {"nouns": 11, "adjectives": 4, "conjugated": 4}


def test_too_similar_words_are_left_out() -> None:
    classes = torch.eye(3)
    words = torch.nn.functional.normalize(torch.tensor([[1, 0, 0.1], [1, 1, 1], [-1, 0, 0], [0, -1, 0.5]]), dim=1)
    assert mined(words, classes, share=1.0, quantile=0.0).tolist() == [2, 3, 0, 1]
    assert mined(words, classes, share=0.5, quantile=1.0).tolist() == [2, 3]
    assert mined(words, classes, share=1.0, quantile=0.0, too_similar=0.95).tolist() == [2, 3, 1]
    with pytest.raises(BadInput, match="all of the 3 words have a cosine above too_similar=-2"):
        NegativeWords(["u", "v", "w"], too_similar=-2).bank(["a", "b"], classes, lambda *_: classes)


def test_lists_of_words_are_read_from_files(tmp_path: Path) -> None:
    file = tmp_path / "nouns.txt"
    file.write_text("ice_cream\n\n  tower \ntower\n", encoding="utf-8")
    assert read_words(file) == ("ice cream", "tower")
    assert NegativeWords(str(file)).nouns == ("ice cream", "tower")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, r"share must be in \(0, 1\], got 0"),
        ({"quantile": 1.5}, r"quantile must be in \[0, 1\], got 1.5"),
        ({"templates": ["the nice"]}, "the template 'the nice' has no placeholder {}"),
        ({"nouns": []}, "the list of words is empty"),
        ({"nouns": "/nowhere/words.txt"}, "cannot read the words in '/nowhere/words.txt'"),
    ],
)
def test_wrong_negatives(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        NegativeWords(**{"nouns": NOUNS, **wrong})


def test_negatives_that_are_all_classes() -> None:
    with pytest.raises(BadInput, match="every noun is the name of a class"):
        zero_shot_classifier(clip(), CLASSES, tokenizer=tokenizer(), negatives=["Cat", "dog"])
    with pytest.raises(BadInput, match="negatives must be a table with nouns"):
        zero_shot_classifier(clip(), CLASSES, tokenizer=tokenizer(), negatives={"noun": ["x"]})


# ---- refused input


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog", "Cat"], "classes have the same name .'cat', 'Cat'"),
        (["cat", " "], "the name of class 1 is empty"),
        (["cat"], "needs at least two classes, got 1"),
        ({1: "cat", 2: "dog"}, "classes must number the model's 2 classes from 0 to 1"),
        ("/nowhere/classes.txt", "there is no file /nowhere/classes.txt of names of classes"),
    ],
)
def test_wrong_classes(classes: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        zero_shot_classifier(clip(), classes, tokenizer=tokenizer())


def test_forms_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("cat\nfire  truck\n", encoding="utf-8")
    assert checked_classes(file) == checked_classes({"cat": 0, "fire truck": 1}) == ("cat", "fire truck")


def test_templates_need_a_placeholder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the template 'a photo' has no placeholder"):
        zero_shot_classifier(clip(), CLASSES, ["a photo"], tokenizer=tokenizer())
    with pytest.raises(BadInput, match="there are no templates"):
        checked_templates([])
    with pytest.raises(
        BadInput, match=r"cannot read the templates in 'a photo of .*or a template with the placeholder"
    ):
        checked_templates("a photo of {c}")
    file = tmp_path / "templates.txt"
    file.write_text("the {}\na {}\n", encoding="utf-8")
    assert checked_templates(str(file)) == ("the {}", "a {}")


def test_wrong_number_of_names() -> None:
    head = zero_shot_head(torch.randn(3, 12), 100.0)
    with pytest.raises(BadInput, match="the head has 3 classes, but there are 4 names"):
        ZeroShotClassifier(clip(), head, CLASSES)


def test_text_features_of_another_model() -> None:
    classifier = ZeroShotClassifier(clip(), zero_shot_head(torch.randn(4, 10), 100.0), CLASSES)
    with pytest.raises(BadInput, match="the image features have 12 values, but the text features 10"):
        classifier(images())


def test_wrong_models() -> None:
    with pytest.raises(BadInput, match="Linear has no text encoder"):
        zero_shot_classifier(nn.Linear(2, 2), CLASSES, tokenizer=tokenizer())
    classifier = zero_shot_classifier(clip(), CLASSES, tokenizer=tokenizer())
    with pytest.raises(BadInput, match="is a zero-shot classifier already"):
        zero_shot_classifier(classifier, CLASSES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda texts, **_: {"input_ids": torch.full((len(texts), 4), 999)}, "returned the token 999, but .* has 55"),
        (lambda texts, **_: {"input_ids": torch.ones(1, 4).long()}, r"returned \[1, 4\] for 4 texts"),
        (
            lambda texts, **_: {"input_ids": torch.ones(len(texts), 4).long()},
            "does not tell apart the classes 'cat', 'dog', 'fire truck', 'crane bird': pass the tokenizer",
        ),
    ],
)
def test_wrong_tokenizers(wrong: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        zero_shot_classifier(clip(), CLASSES, tokenizer=wrong)


def test_missing_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="the tokenizer of this CLIPModel is unknown: pass tokenizer="):
        zero_shot_classifier(clip(), CLASSES)
    model = clip()
    model.save_pretrained(tmp_path)
    with pytest.raises((MissingInput, BadInput), match=r"cannot load a tokenizer from|does not tell apart the classes"):
        load_model(f"hf:{tmp_path}", classes=CLASSES)  # transformers 5 makes an empty tokenizer


# ---- by name


def test_by_the_name_of_a_folder(tmp_path: Path) -> None:
    model = clip()
    saved(tmp_path / "model", model)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    expected = zero_shot_classifier(model, CLASSES, TEMPLATES, tokenizer=tokenizer())
    found = load_model(f"hf:{tmp_path / 'model'}", classes=str(tmp_path / "classes.txt"), templates=list(TEMPLATES))
    assert isinstance(found, ZeroShotClassifier)
    torch.testing.assert_close(found(images()), expected(images()))
    with pytest.raises(BadInput, match="templates belong to a zero-shot classifier: pass the names of its classes"):
        load_model(f"hf:{tmp_path / 'model'}", templates=["a {}"])


def test_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip", reason=NO_OPEN_CLIP)
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=16, vocab_size=49408, width=32, heads=2, layers=2)
    model = open_clip.CLIP(12, vision, text).eval()
    own = open_clip.SimpleTokenizer(context_length=16)
    classifier = zero_shot_classifier(model, CLASSES, tokenizer=own)
    with torch.no_grad():
        expected, _ = model.get_logits(images(), own([f"a photo of a {name}." for name in CLASSES]))
    feats = ood_scores.extract(classifier, [images()], progress=False, device="cpu", probes=["local_mcm"])
    assert feats.logits is not None
    torch.testing.assert_close(feats.logits, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        tokens = model.visual._embeds(images())
        tokens = model.visual.transformer.resblocks[0](tokens)
        block = model.visual.transformer.resblocks[1]
        length = tokens.shape[1]
        alone = torch.full((length, length), float("-inf")).fill_diagonal_(0.0)
        places = model.visual.ln_post(block(tokens, attn_mask=alone))[:, 1:] @ model.visual.proj
        weight = torch.nn.functional.normalize(classifier.head.weight, dim=1)
        cosines = torch.nn.functional.normalize(places, dim=2) @ weight.T
    torch.testing.assert_close(feats.extras["local_mcm.1.0"], cosines.softmax(2).amax((1, 2)), rtol=0, atol=1e-6)


def test_names_of_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason=NO_OPEN_CLIP)
    with pytest.raises(UnknownName, match="open_clip has no model 'ViT-B-33'"):
        load_model("open_clip:ViT-B-33/openai")
    with pytest.raises(UnknownName, match="open_clip has no weights of ViT-B-32 'laion3b'"):
        load_model("open_clip:ViT-B-32/laion3b")
    with pytest.raises(BadInput, match="write open_clip:ViT-B-32/WEIGHTS; open_clip has the weights openai"):
        load_model("open_clip:ViT-B-32")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_model("open_clip:ViT-B-32", tmp_path / "missing.safetensors")


def test_open_clip_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(
        MissingInput,
        match=r'models of open_clip need open_clip, which is not installed: pip install "ood_scores\[clip\]"',
    ):
        load_model("open_clip:ViT-B-32/openai")
