"""Recipes with networks that are not timm's: torchvision's, Hugging Face's, and those of the user's own functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import ood_scores
from ood_scores.errors import BadInput, HeadNotFound
from ood_scores.models.networks.classifier import linear_classifier, penultimate
from ood_scores.models.opening import load_model, preprocessing
from ood_scores.training import train
from ood_scores.training.networks import input_of, make_model
from ood_scores.training.recipe import ModelTable
from ood_scores.training.recipe_file import recipe_from
from ood_scores.user_code import import_code

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))

OWN = """
from torch import nn
from torchvision import transforms

class Net(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1))
        self.last = nn.Linear(width, num_classes)
        self.auxiliary = nn.Linear(width, num_classes)
        self.transform = transforms.Compose(
            [transforms.Resize((8, 8)), transforms.ToTensor(), transforms.Normalize((0.3,) * 3, (0.4,) * 3)])

    def forward(self, images):
        features = self.body(images)
        self.auxiliary(features)
        return {"logits": self.last(features)}

def own(width=6, num_classes=10):
    return Net(width, num_classes)

def fixed():
    return Net(4, 7)

class Square(Net):
    def forward(self, images):
        return super().forward(images)["logits"] ** 2

def square(num_classes=10):
    return Square(4, num_classes)

def unknown():
    model = Net(4, 7)
    del model.transform
    return model

def untold():
    model = Net(4, 7)
    model.transform = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    return model
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("code") / "recipe_networks.py"
    file.write_text(OWN)
    import_code(str(file))
    return file


def trained(folder: Path, name: str, **changes: Any) -> Any:
    tables = tiny.tables(epochs=1, model={"name": name}, data={"train": "digits?classes=0-6&take=128"}, **changes)
    return train(recipe_from(tables), folder / "run", device="cpu", progress=False)


def test_a_function_of_the_user(code: Path, tmp_path: Path) -> None:
    found = trained(tmp_path, f"{code}:own")
    model: Any = load_model(f"{code}:own", found.checkpoint, num_classes=7)
    start: Any = make_model(ModelTable(f"{code}:own"), {"num_classes": 7}, 0, tmp_path)
    assert not torch.equal(model.last.weight, start.last.weight)
    assert torch.equal(model.auxiliary.weight, start.auxiliary.weight)  # the objective does not read it
    x = torch.stack([preprocessing(model)(IMAGE)] * 3)
    feats = ood_scores.extract(model, [x], progress=False)
    assert feats.head is not None
    assert torch.equal(feats.head.weight, model.last.weight.detach())


def test_a_function_without_a_number_of_classes(code: Path, tmp_path: Path) -> None:
    found = trained(tmp_path, f"{code}:fixed")
    assert load_model(f"{code}:fixed", found.checkpoint).last.out_features == 7  # type: ignore[union-attr]


def test_the_gradient_is_that_of_the_whole_network(code: Path, tmp_path: Path) -> None:
    model: Any = make_model(ModelTable(f"{code}:own"), {"num_classes": 3}, 0, tmp_path).eval()
    assert linear_classifier(model) is model.last
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(linear_classifier(model)(penultimate(model, x)), y).backward()
    found = [parameter.grad.clone() for parameter in model.body.parameters()]
    model.zero_grad()
    F.cross_entropy(model(x)["logits"], y).backward()
    for gradient, parameter in zip(found, model.body.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_what_cannot_be_trained_is_refused(code: Path, tmp_path: Path) -> None:
    with pytest.raises(
        HeadNotFound, match="no linear layer returns the logits of Square: recipes train networks whose"
    ):
        trained(tmp_path, f"{code}:square")
    with pytest.raises(BadInput, match=r"crop_mode of the preprocessing of .*:unknown are unknown"):
        trained(tmp_path, f"{code}:unknown")
    with pytest.raises(BadInput, match=r"the transform of Net has no step transforms\.Normalize"):
        trained(tmp_path, f"{code}:untold")
    with pytest.raises(BadInput, match=r"compile = true is for timm's models, and .*own is not one"):
        trained(tmp_path, f"{code}:own", compile=True)
    with pytest.raises(BadInput, match="names code, which runs only if you ask for it"):
        trained(tmp_path, "elsewhere.py:own")


def test_a_network_of_torchvision(tmp_path: Path) -> None:
    model: Any = make_model(ModelTable("torchvision:shufflenet_v2_x0_5"), {"num_classes": 7}, 0, tmp_path)
    assert linear_classifier(model) is model.fc
    assert (model.fc.out_features, input_of(model).size) == (7, (224, 224))
    assert_same_input(model)


@pytest.mark.filterwarnings("ignore")
def test_a_network_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=8, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    name = f"hf:{tmp_path}/vit"
    found = trained(tmp_path, name)
    model: Any = load_model(name, found.checkpoint)
    assert model.classifier.out_features == 7
    assert_same_input(model)


def assert_same_input(model: nn.Module) -> None:
    """The two parts of the preprocessing do the same as the whole."""
    to_input = input_of(model)
    pixels = torch.from_numpy(np.array(to_input.open(IMAGE, 0))).permute(2, 0, 1) / 255
    torch.testing.assert_close(to_input.standardized(pixels), preprocessing(model)(IMAGE))
