"""Arguments of ``calibrate`` in the forms that people have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import ood_scores
from ood_scores import Detector, FeatureSet
from ood_scores.errors import BadInput

X = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(0))
NAMES = ["cat", "dog", "frog"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


@pytest.fixture(scope="module")
def feats(model: nn.Module) -> FeatureSet:
    return ood_scores.extract(model, [X], progress=False)


@pytest.mark.parametrize(
    "classes",
    [
        NAMES,
        tuple(NAMES),
        {2: "frog", 0: "cat", 1: "dog"},
        {"2": "frog", "0": "cat", "1": "dog"},
        {"frog": 2, "cat": 0, "dog": 1},
        {"frog": np.int64(2), "cat": np.int64(0), "dog": np.int64(1)},
    ],
    ids=["list", "tuple", "id2label", "id2label of JSON", "class_to_idx", "NumPy"],
)
def test_names_of_classes_are_ordered_by_number(classes: Any, model: nn.Module, feats: FeatureSet) -> None:
    found = ood_scores.calibrate("energy", model, id=feats, classes=classes, device="cpu")
    assert found.classes == tuple(NAMES)
    assert list(found.predict(X).columns()["class_name"]) == [NAMES[row] for row in model(X).argmax(1)]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({1: "cat", 2: "dog", 3: "frog"}, "from 0 to 2, each once, got 1, 2, 3"),
        ({"cat": 0, "dog": 0, "frog": 2}, "from 0 to 2, each once, got 0, 0, 2"),
        ({"cat": "dog"}, "from 0 to 2, each once, got cat"),
        ("cat", "must be a list of names or a mapping, got 'cat'"),
        (3, "must be a list of names or a mapping, got 3"),
        (["cat", "dog"], "the model has 3 classes, but there are 2 names"),
    ],
)
def test_classes_that_do_not_name_each_class(classes: Any, message: str, model: nn.Module, feats: FeatureSet) -> None:
    with pytest.raises(BadInput, match=message):
        ood_scores.calibrate("energy", model, id=feats, classes=classes)


@pytest.mark.parametrize(
    "three",
    [np.array([0.5, 0.25, 0.5]), torch.tensor([0.5, 0.25, 0.5]), [np.float32(0.5), np.float32(0.25), 0.5]],
    ids=["array", "tensor", "np.float32"],
)
def test_preprocessing_in_other_types(three: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).eval()
    feats = ood_scores.extract(model, [torch.randn(40, 3, 32, 32)], progress=False)
    given = {"mean": three, "std": three, "crop_pct": np.float32(0.5), "input_size": np.array([3, 32, 32])}
    detector = ood_scores.calibrate("energy", model, id=feats, preprocessing=given)
    expected = {"mean": (0.5, 0.25, 0.5), "std": (0.5, 0.25, 0.5), "crop_pct": 0.5, "input_size": (3, 32, 32)}
    assert isinstance(detector.preprocessing, dict)
    assert {key: detector.preprocessing[key] for key in expected} == expected
    detector.save(tmp_path / "detector")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    assert (Detector.load(tmp_path / "detector").predict(pixels).score == detector.predict(pixels).score).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": (0.5, 0.5)},
        {"mean": 0.5},
        {"mean": ("a", "b", "c")},
        {"std": (0.5, 0.0, 0.5)},
        {"std": (0.5, float("nan"), 0.5)},
    ],
    ids=str,
)
def test_preprocessing_that_is_not_three_numbers(changes: dict[str, Any], model: nn.Module, feats: FeatureSet) -> None:
    crop = {"crop_pct": 1.0, "crop_mode": "center", "interpolation": "bilinear"}
    given = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)} | crop | changes
    with pytest.raises(BadInput, match="in preprocessing must be 3 numbers, one per channel"):
        ood_scores.calibrate("energy", model, id=feats, preprocessing=given)


def test_preprocessing_of_another_type(model: nn.Module, feats: FeatureSet) -> None:
    with pytest.raises(BadInput, match="preprocessing cannot be of type Compose: pass a Hugging Face"):
        ood_scores.calibrate("energy", model, id=feats, preprocessing=type("Compose", (), {})())


def test_a_detector_whose_scores_are_all_the_same_is_warned_of() -> None:
    last = nn.Linear(12, 3)
    nn.init.zeros_(last.weight)
    model = nn.Sequential(nn.Flatten(), last).eval()
    feats = ood_scores.extract(model, [X], progress=False)
    with pytest.warns(UserWarning, match="'msp' gives all ID images the same score"):
        ood_scores.calibrate("msp", model, id=feats)


class Named(nn.Module):
    """A classifier whose configuration names its classes, as in Hugging Face's transformers."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def test_names_of_classes_come_with_the_model(model: nn.Module) -> None:
    detector = ood_scores.calibrate("energy", Named(model, NAMES), id=[X])
    assert detector.classes == tuple(NAMES)
    found = detector.predict(X)
    assert found.class_name is not None
    assert found.class_name.tolist() == [NAMES[label] for label in found.label]
    others = ood_scores.calibrate("energy", Named(model, NAMES), id=[X], classes=["a", "b", "c"])
    assert others.classes == ("a", "b", "c")
    for names in (["LABEL_0", "LABEL_1", "LABEL_2"], [*NAMES, "one too many"]):
        assert ood_scores.calibrate("energy", Named(model, names), id=[X]).classes is None
