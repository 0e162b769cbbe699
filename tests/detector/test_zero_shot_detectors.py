"""Detectors of zero-shot classifiers: calibrated, saved with their texts, loaded, and used."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from vision_language import ADJECTIVES, CLASSES, NOUNS, clip, images, saved, siglip, tokenizer

from ood_scores import Detector, NegativeWords, calibrate, zero_shot_classifier
from ood_scores.errors import BadInput, UnknownName
from ood_scores.models.opening import load_model, require_known

LOADER = DataLoader(TensorDataset(images(40), torch.arange(40) % 4), 20)
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("make", "scorer"), [(clip, "neglabel"), (siglip, "csp"), (clip, "gl_mcm"), (siglip, "energy")]
)
def test_saved_and_loaded(make: Callable[[], Any], scorer: str, tmp_path: Path) -> None:
    negatives = NegativeWords(NOUNS, ADJECTIVES, share=0.5)
    classifier = zero_shot_classifier(make(), CLASSES, tokenizer=tokenizer(), negatives=negatives)
    detector = calibrate(scorer, classifier, id=LOADER, device="cpu", keep=0.9)
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", device="cpu")
    expected, found = detector.predict(images(5, seed=3)), loaded.predict(images(5, seed=3))
    assert np.array_equal(found.score, expected.score)
    assert found.class_name is not None
    assert set(found.class_name) <= set(CLASSES)
    assert np.array_equal(np.array(CLASSES)[found.label], found.class_name)
    copy = pickle.loads(pickle.dumps(loaded))
    assert np.array_equal(copy.predict(images(5, seed=3)).score, expected.score)


def test_of_a_folder_with_its_image_processor(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", clip())
    classifier = load_model(f"hf:{folder}", classes=CLASSES)
    detector = calibrate("mcm", classifier, id=LOADER, device="cpu")
    detector.save(tmp_path / "detector")
    for file in folder.iterdir():
        file.unlink()
    loaded = Detector.load(tmp_path / "detector", device="cpu")
    assert loaded.classes == CLASSES
    assert np.array_equal(loaded.predict([PHOTO]).score, detector.predict([PHOTO]).score)


def test_names_of_classes_of_the_wrong_length() -> None:
    classifier = zero_shot_classifier(clip(), CLASSES, tokenizer=tokenizer())
    with pytest.raises(BadInput, match="the model has 4 classes, but there are 3 names"):
        calibrate("mcm", classifier, id=LOADER, classes=CLASSES[:3], device="cpu")


def test_stored_networks_are_checked() -> None:
    with pytest.raises(BadInput, match="the sizes of a bank of texts must be positive numbers, got 0"):
        require_known("zero-shot:transformers:CLIPModel", {"width": 0})
    for name in ("zero-shot:hf:OWNER/NAME", "zero-shot:zero-shot:transformers:CLIPModel", "zero-shot:nothing:x"):
        with pytest.raises(UnknownName, match="there is no network zero-shot:"):
            require_known(name)
    with pytest.raises(BadInput, match="has no weights of its own"):
        load_model("zero-shot:transformers:CLIPModel")
