"""Preprocessing of detectors in the forms that people have, and its comparison with the calibration features."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detecting import Plain, extracted, network, same
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

import ood_scores
from ood_scores import Detector, calibrate
from ood_scores.cli.predict import results
from ood_scores.data import sources
from ood_scores.data.sources import open_dataset
from ood_scores.detector import image_check
from ood_scores.errors import BadInput, DamagedCache
from ood_scores.models.opening import preprocessing

transformers = pytest.importorskip("transformers")

RANDOM = np.random.default_rng(3)
IMAGES = [
    Image.fromarray(RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for size in [(40, 40), (70, 45), (33, 80), (64, 50), (32, 32)] * 12
]
"""Images of several sizes and of coarse structure."""


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3)


@pytest.fixture(scope="module")
def vit(processor: Any) -> nn.Module:
    """A Vision Transformer of Hugging Face with random weights, whose logits have a mean of zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=32, patch_size=8, num_labels=6, **sizes)
    ).eval()
    with torch.no_grad():
        model.classifier.weight.normal_(std=30)
        model.classifier.bias.sub_(model(inputs_of(processor)).logits.mean(dim=0))
    return model


def inputs_of(processor: Any) -> Tensor:
    return processor(images=IMAGES, return_tensors="pt")["pixel_values"]


def test_image_processor_gives_its_own_labels_and_decisions(vit: nn.Module, processor: Any, tmp_path: Path) -> None:
    inputs = inputs_of(processor)
    feats = ood_scores.extract(vit, [inputs], progress=False)
    detector = calibrate("energy", vit, id=feats, keep=0.8, preprocessing=processor)
    expected = detector.decide(feats)
    assert len(set(expected.label)) > 2
    assert 0 < expected.is_ood.sum() < len(IMAGES)
    assert same(detector.predict(inputs), expected)
    assert same(detector.predict(IMAGES), expected)
    assert same(detector.predict(processor(images=IMAGES, return_tensors="pt")), expected)

    with pytest.warns(UserWarning, match="the crop_mode, crop_pct, interpolation of its training are unknown"):
        unsized = calibrate(
            "energy", vit, id=feats, preprocessing={"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3}
        )
    with pytest.raises(BadInput, match="so images must be 32 x 32 pixels, got"):
        unsized.predict(IMAGES)
    timm_crop = {"crop_pct": 0.875, "crop_mode": "center", "interpolation": "bicubic"}
    guessed = {"input_size": (3, 32, 32), "mean": [0.5] * 3, "std": [0.5] * 3, **timm_crop}
    other = calibrate("energy", vit, id=feats, preprocessing=guessed).predict(IMAGES)
    assert (other.label != expected.label).any()

    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector", vit)
    assert same(loaded.predict(IMAGES), expected)
    table = results(loaded, _files(tmp_path), batch_size=16, workers=0)
    assert table["label"].tolist() == expected.label.tolist()
    assert table["is_ood"].tolist() == expected.is_ood.tolist()


def _files(folder: Path) -> list[str]:
    files = [folder / f"{number:02}.png" for number in range(len(IMAGES))]
    for file, image in zip(files, IMAGES, strict=True):
        image.save(file)
    return [str(file) for file in files]


def test_presets_of_torchvision_are_stored(tmp_path: Path) -> None:
    model = network()
    preset = ResNet18_Weights.IMAGENET1K_V1.transforms(crop_size=8, resize_size=10)
    inputs = torch.stack([preset(image) for image in IMAGES])
    detector = calibrate("energy", model, id=extracted(model, 100, 2), preprocessing=preset)
    assert same(detector.predict(IMAGES), detector.predict(inputs))
    detector.save(tmp_path / "detector")
    stored = json.loads((tmp_path / "detector" / "detector.json").read_text())["preprocessing"]
    assert stored["image_classification"]["interpolation"] == "bilinear"
    assert same(Detector.load(tmp_path / "detector").predict(IMAGES), detector.predict(inputs))


def test_functions_are_passed_to_load(tmp_path: Path) -> None:
    model = network()
    transform = Compose([Resize((8, 8)), ToTensor(), Normalize(0.5, 0.25)])
    detector = calibrate("energy", model, id=extracted(model, 100, 2), preprocessing=transform)
    expected = detector.predict(torch.stack([transform(image) for image in IMAGES]))
    assert same(detector.predict(IMAGES), expected)
    with pytest.warns(UserWarning, match=r"a function, Compose\(.*not saved with the detector: pass it to Detector"):
        detector.save(tmp_path / "detector")
    assert same(Detector.load(tmp_path / "detector", preprocessing=transform).predict(IMAGES), expected)
    with pytest.raises(BadInput, match=r"is unknown: pass tensors .* or pass preprocessing= to calibrate or Detector"):
        Detector.load(tmp_path / "detector").predict(IMAGES)
    other = Compose([Resize((8, 8)), ToTensor(), Normalize(0.4, 0.25)])
    with pytest.raises(BadInput, match=r"another input for an image of noise than .* \(values differ by up to 0\.4"):
        Detector.load(tmp_path / "detector", preprocessing=other)
    with pytest.raises(BadInput, match=r"\(shape \[3, 9, 9\] instead of \[3, 8, 8\]\)"):
        Detector.load(tmp_path / "detector", preprocessing=Compose([Resize((9, 9)), ToTensor()]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda image: np.asarray(image), r"must return a floating-point tensor \[C, H, W\].*, got ndarray"),
        (lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8), r"got torch.uint8 \[3, 8, 8\]"),
        (lambda image: torch.zeros(1, 3, 8, 8), r"got torch.float32 \[1, 3, 8, 8\]"),
        (ResNet18_Weights.IMAGENET1K_V1.transforms, "preprocessing failed on an RGB image of 400 x 320 pixels"),
        (3, "preprocessing cannot be of type int: pass a Hugging Face image processor, torchvision's"),
        ({"image_processor": {"image_processor_type": "AutoModel"}}, "has no image processor 'AutoModel'"),
        ({"image_processor": {"image_processor_type": "ViTImageProcessor", "x": "/etc"}}, "could name a file"),
    ],
    ids=["array", "uint8", "batch", "no preset", "number", "no processor", "text"],
)
def test_preprocessing_that_cannot_be_used(given: Any, message: str) -> None:
    plain = Plain().eval()
    feats = extracted(plain, 60, 2)
    with pytest.raises(BadInput, match=message):
        calibrate("energy", plain, id=feats, preprocessing=given)


def test_image_processors_that_name_files_are_not_stored(vit: nn.Module, tmp_path: Path) -> None:
    naming = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, repo_path="owner/name")
    feats = ood_scores.extract(vit, [inputs_of(naming)], progress=False)
    detector = calibrate("energy", vit, id=feats, preprocessing=naming)
    assert same(detector.predict(IMAGES), detector.decide(feats))
    with pytest.warns(UserWarning, match="the preprocessing is a function, ProcessorTransform"):
        detector.save(tmp_path / "detector", with_model=False)
    assert json.loads((tmp_path / "detector" / "detector.json").read_text())["preprocessing"] is None


# ---- comparison with the calibration features


class Pictures(Dataset[Any]):
    """Somebody's dataset of images and labels."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, row: int) -> Any:
        return self.transform(IMAGES[row]), row % 4


def test_preprocessing_must_reproduce_the_features_of_a_loader() -> None:
    model = network()
    own, wrong = preprocessing(model), preprocessing(model, crop_pct=0.5)
    for dataset in (Pictures(own), Subset(Pictures(own), list(range(59, 9, -1)))):
        loader = DataLoader(dataset, 16)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*preprocessing")
            calibrate("energy", model, id=loader)
        with pytest.raises(BadInput, match="does not reproduce the features of the ID set: of 8 of its images"):
            calibrate("energy", model, id=loader, preprocessing=wrong)


def test_preprocessing_must_reproduce_the_features_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    (tmp_path / "images").mkdir()
    _files(tmp_path / "images")
    wrong = preprocessing(model, crop_pct=0.5)
    dataset = open_dataset("folder:images", wrong, root=tmp_path)
    feats = ood_scores.extract(model, DataLoader(dataset, 16), tmp_path / "val.h5", progress=False)
    assert feats.provenance is not None
    assert (feats.provenance.data_text, feats.provenance.data_root) == ("folder:images", str(tmp_path))
    cached = ood_scores.load(tmp_path / "val.h5")
    with pytest.raises(BadInput, match=r"features differ by .* extracted with \(Compose.*as preprocessing="):
        calibrate("energy", model, id=cached)
    calibrate("energy", model, id=cached, preprocessing={"crop_pct": 0.5})
    with pytest.warns(UserWarning, match="preprocessing of the calibration images was Compose"):
        calibrate("energy", model, id=cached[::-1])  # whose rows are no longer those of the dataset
    monkeypatch.setattr(sources, "_OPENED", set())  # as in another process
    opened: list[str] = []
    monkeypatch.setattr(image_check, "open_dataset", lambda text, **_: opened.append(text))
    with pytest.warns(UserWarning, match=r"calibration images was Compose.* pass images='folder:images'"):
        calibrate("energy", model, id=cached)
    assert opened == []  # the cache may be a stranger's
    monkeypatch.undo()
    for images in (f"folder:{tmp_path / 'images'}", dataset, DataLoader(dataset, 16)):
        with pytest.raises(BadInput, match=r"features differ by .* extracted with \(Compose.*as preprocessing="):
            calibrate("energy", model, id=cached, images=images)
        calibrate("energy", model, id=cached, images=images, preprocessing={"crop_pct": 0.5})
    with pytest.raises(BadInput, match=r"the dataset of \d+ images that the ID set was extracted from, .* with 5 rows"):
        calibrate("energy", model, id=cached, images=f"folder:{tmp_path / 'images'}?rows=:5")
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="preprocessing of the calibration images was Compose"):
        calibrate("energy", model, id=cached)


def test_image_folders_of_torchvision_are_compared(tmp_path: Path) -> None:
    model = network()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for row, image in enumerate(IMAGES):
        image.save(tmp_path / "ab"[row % 2] / f"{row}.png")
    loader = DataLoader(ImageFolder(str(tmp_path), preprocessing(model)), 16)
    calibrate("energy", model, id=loader)
    with pytest.raises(BadInput, match="does not reproduce"):
        calibrate("energy", model, id=loader, preprocessing={"mean": (0.9, 0.9, 0.9)})


def test_altered_preprocessing_in_the_folder_is_noticed(tmp_path: Path) -> None:
    model = network()
    calibrate("energy", model, id=extracted(model, 100, 2)).save(tmp_path / "detector")
    file = tmp_path / "detector" / "detector.json"
    file.write_text(file.read_text().replace('"crop_mode": "center"', '"crop_mode": "squash"'))
    with pytest.raises(DamagedCache, match="altered"):
        Detector.load(tmp_path / "detector")
