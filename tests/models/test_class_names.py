"""Names of a model's classes, and labels of datasets in their order."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import tiny  # noqa: F401  makes timm know the networks
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app
from ood_scores.data.class_names import numbers_of, ordered, read_classes
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.long_tail import labels_of
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, MissingData, StaleCache
from ood_scores.models.class_names import class_names, in_models_order, listed_class_names
from ood_scores.models.opening import preprocessing

WORDNET_IDS = {"n01440764": 0, "n02123045": 281, "n03000684": 491, "n13133613": 998}
DATA = os.environ.get("OOD_SCORES_DATA")


def folders(top: Path, names: Any, images: int = 2) -> Path:
    """Write images, each class of another brightness, in one folder per name."""
    for number, name in enumerate(names):
        (top / name).mkdir(parents=True)
        for image in range(images):
            pixels = np.full((8, 8, 3), 20 * number + image, dtype=np.uint8)
            Image.fromarray(pixels).save(top / name / f"{image}.png")
    return top


def labels(dataset: Any) -> list[int]:
    listed = labels_of(dataset).tolist()
    assert listed == [dataset[row][1] for row in range(len(dataset))]
    return listed[::2]


def with_names(names: dict[int, str]) -> Any:
    """Return a model with names of its classes, as those of Hugging Face have them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, len(names)))
    model.config = SimpleNamespace(id2label=names)  # type: ignore[assignment]
    return model


def network(classes: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("tiny_net", num_classes=classes).eval()


# ---- folders and lists of names


def test_folders_named_by_numbers_are_in_numerical_order(tmp_path: Path) -> None:
    dataset = open_dataset(f"folder:{folders(tmp_path / 'a', map(str, range(12)))}")
    assert labels(dataset) == list(range(12))
    assert [dataset[2 * row][0].getpixel((0, 0))[0] for row in range(12)] == [
        20 * int(name) for name in map(str, range(12))
    ]
    assert dataset.label_order is not None
    few = open_dataset(f"folder:{folders(tmp_path / 'b', map(str, range(10)))}")
    assert (labels(few), few.label_order) == (list(range(10)), None)
    mixed = open_dataset(f"folder:{folders(tmp_path / 'c', ['2', '10', 'x'])}")
    assert mixed.class_names == ["10", "2", "x"]


def test_a_cache_with_labels_in_textual_order_is_refused(tmp_path: Path) -> None:
    model = network(12)
    folders(tmp_path / "set", map(str, range(12)), images=16)

    def extract(order: str | None) -> Any:
        dataset = open_dataset("folder:set", preprocessing(model), root=tmp_path)
        dataset.label_order = order
        return ood_scores.extract(model, DataLoader(dataset, 16), tmp_path / "val.h5", progress=False)

    extract(None)  # the first 16 inputs and labels are the same in both orders
    with pytest.raises(StaleCache, match="classes: cache the dataset's own, now folders by number, not as text"):
        extract(open_dataset("folder:set", root=tmp_path).label_order)


def test_classes_option_names_labels_that_are_numbers(tmp_path: Path) -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "some.npz", images=images, labels=[2, 0, 1, 2])
    (tmp_path / "names.txt").write_text("ant\ncow\ndog\n")
    dataset = open_dataset("npz:some.npz?classes=names.txt&rows=1:", root=tmp_path)
    assert dataset.class_names == ("ant", "cow", "dog")
    assert (labels_of(dataset).tolist(), dataset.label_order) == ([0, 1, 2], None)
    assert open_dataset("npz:some.npz", root=tmp_path).class_names is None
    np.savez(tmp_path / "more.npz", images=images, labels=[2, 0, 3, 2])
    with pytest.raises(BadInput, match=r"more has the label 3, but .*names\.txt has 3 names"):
        open_dataset("npz:more.npz?classes=names.txt", root=tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("names.txt", "dog\n\ncat\nox\nant\n"),
        ("names.txt", "\ufeffDog\r\nCat\r\nOx\r\nAnt\r\n"),
        ("synsets.txt", "n00000001 dog, domestic dog\nn00000002 cat\nn00000003 ox\nn00000004 ant"),
        ("list.json", json.dumps(["dog", "cat", "ox", "ant"])),
        ("id2label.json", json.dumps({"0": "dog", "1": "cat", "2": "ox", "3": "ant"})),
        ("class_to_idx.json", json.dumps({"ox": 2, "ant": 3, "dog": 0, "cat": 1})),
    ],
)
def test_classes_option_numbers_labels_by_a_list(file: str, content: str, tmp_path: Path) -> None:
    folders(tmp_path / "set", ["ant", "cat", "dog"])
    (tmp_path / file).write_text(content, encoding="utf-8")
    dataset = open_dataset(f"folder:set?classes={file}", root=tmp_path)
    assert labels(dataset) == [3, 1, 0]
    assert dataset.name == "set"
    assert labels(open_dataset(f"folder:set?take=2&classes={file}", root=tmp_path)) == [3]
    some = open_dataset(f"folder:set?rows=2:&classes={file}", root=tmp_path)
    assert (labels(some), some.label_order) == ([1, 0], dataset.label_order)
    assert listed_class_names(Subset(some, [0])) == list(read_classes(tmp_path / file))
    assert listed_class_names(open_dataset("folder:set", root=tmp_path)) is None


def test_classes_without_images_need_no_name(tmp_path: Path) -> None:
    folders(tmp_path / "set", ["ant", "cat", "dog"])
    (tmp_path / "set" / "bat").mkdir()
    (tmp_path / "names.txt").write_text("dog\nant\ncat\n")
    with pytest.warns(UserWarning, match="has no images of bat, but counts these subfolders as classes"):
        plain = open_dataset("folder:set", root=tmp_path)
    assert labels(plain) == [0, 2, 3]
    with pytest.warns(UserWarning, match="no images of bat"):
        listed = open_dataset("folder:set?classes=names.txt", root=tmp_path)
    assert labels(listed) == [1, 2, 0]
    assert labels(in_models_order(plain, with_names({0: "dog", 1: "ant", 2: "cat"}))) == [1, 2, 0]


def test_classes_option_errors(tmp_path: Path) -> None:
    folders(tmp_path / "set", ["ant", "cat", "dog"])
    (tmp_path / "names.txt").write_text("ant\ncow\n")
    with pytest.raises(
        BadInput, match=r"2 of the 3 classes of set are not in .*names.txt: cat, dog; it has 2 names, ant"
    ):
        open_dataset("folder:set?classes=names.txt", root=tmp_path)
    with pytest.raises(MissingData, match=r"there is no file .*none\.txt with the names of classes"):
        open_dataset("folder:set?classes=none.txt", root=tmp_path)
    with pytest.raises(BadInput, match="the images of uniform_noise have no labels: leave out classes="):
        open_dataset("noise:uniform?classes=names.txt", root=tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.json").write_text("[")
    for file, message in {"empty.txt": "contains no names", "bad.json": "cannot read the names"}.items():
        with pytest.raises(BadInput, match=message):
            read_classes(tmp_path / file)
    with pytest.raises(BadInput, match=r"there is no file .*/gone\.txt of names of classes: correct the path"):
        read_classes(tmp_path / "gone.txt")


def test_a_list_shorter_than_the_classes_of_the_model_is_refused(tmp_path: Path) -> None:
    top = folders(tmp_path / "set", ["ant", "cat", "dog"])
    (tmp_path / "names.txt").write_text("ant\ncat\ndog\n")
    torch.save(network(4).state_dict(), tmp_path / "tiny.pth")
    message = "has 3 names, but the model has 4 classes: list the names of all of them"
    for options in ("", "&take=3", "&rows=1:"):
        dataset = open_dataset(f"folder:{top}?classes={tmp_path}/names.txt{options}", preprocessing(network(4)))
        for each in (dataset, Subset(dataset, range(2))):
            with pytest.raises(BadInput, match=message):
                ood_scores.extract(network(4), DataLoader(each, 2), tmp_path / "c.h5", progress=False)
    assert not (tmp_path / "c.h5").exists()
    words = ["extract", "tiny_net", f"folder:{top}?classes={tmp_path}/names.txt", str(tmp_path / "c.h5")]
    done = CliRunner().invoke(app, [*words, "--checkpoint", str(tmp_path / "tiny.pth"), "--workers", "0"])
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
    (tmp_path / "names.txt").write_text("ant\ncat\ndog\nox\n")
    dataset = open_dataset(f"folder:{top}?classes={tmp_path}/names.txt", preprocessing(network(4)))
    assert len(ood_scores.extract(network(4), DataLoader(dataset, 2), progress=False)) == 6
    assert listed_class_names(dataset) is None  # the set has three of the classes


def test_names_and_synonyms() -> None:
    classes = ["n00000001 crane, bird", "n00000002 crane, machine", "golden_retriever", "bird"]
    asked = ["n00000001", "crane", "Machine", "golden retriever", "bird", "cow"]
    assert numbers_of(asked, classes) == {"n00000001": 0, "Machine": 1, "golden retriever": 2, "bird": 3}
    assert ordered({"b": 1, "a": 0}) == ("a", "b")


# ---- classes of models


def test_class_names_of_models() -> None:
    assert class_names(with_names({0: "cat", 1: "dog"})) == ["cat", "dog"]
    assert class_names(with_names({0: "LABEL_0", 1: "LABEL_1"})) is None
    assert class_names(network(10)) is None
    assert class_names(nn.Flatten()) is None
    for model in (network(1000), resnet18().eval(), nn.DataParallel(nn.Sequential(nn.Linear(3, 1000), nn.Softmax()))):
        synsets = class_names(model)
        assert synsets is not None
        assert {name: synsets.index(name) for name in WORDNET_IDS} == WORDNET_IDS


def test_labels_in_the_order_of_the_model(tmp_path: Path) -> None:
    animals = open_dataset(f"folder:{folders(tmp_path / 'animals', ['ant', 'cat', 'dog'])}")
    assert labels(in_models_order(animals, with_names({0: "Dog", 1: "ox", 2: "cat, house cat", 3: "ant"}))) == [3, 2, 0]
    assert in_models_order(animals, with_names({0: "ant", 1: "cat", 2: "dog"})) is animals
    assert in_models_order(animals, with_names({0: "x", 1: "y", 2: "z"})) is animals
    assert in_models_order(animals, with_names({0: "dog", 1: "cat", 2: "ox"})) is animals
    assert in_models_order(animals, with_names({0: "ant", 1: "cat", 2: "hound"})) is animals
    some = open_dataset(f"folder:{folders(tmp_path / 'some', WORDNET_IDS)}")
    assert labels(some) == [0, 1, 2, 3]
    assert labels(in_models_order(some, network(1000))) == list(WORDNET_IDS.values())
    numbers = open_dataset(f"folder:{folders(tmp_path / 'numbers', ['0', '3', '11'])}")
    assert labels(in_models_order(numbers, network(12))) == [0, 3, 11]
    assert in_models_order(numbers, network(11)) is numbers  # 11 is no class of it
    ranks = open_dataset(f"folder:{folders(tmp_path / 'ranks', ['1', '2', '3'])}")
    assert in_models_order(ranks, network(12)) is ranks  # perhaps numbered from 1


def test_extract_and_calibrate_commands_number_labels_as_the_model(tmp_path: Path) -> None:
    folders(tmp_path / "some", WORDNET_IDS, images=30)
    torch.save(network(1000).state_dict(), tmp_path / "tiny.pth")
    words = ["tiny_net", f"folder:{tmp_path / 'some'}", str(tmp_path / "some.h5"), "--checkpoint"]
    result = CliRunner().invoke(app, ["extract", *words, str(tmp_path / "tiny.pth"), "--workers", "0"])
    assert result.exit_code == 0, result.output
    found = ood_scores.load(tmp_path / "some.h5")
    assert found.labels is not None
    assert found.labels.unique().tolist() == list(WORDNET_IDS.values())


def test_extract_warns_of_labels_in_another_order(tmp_path: Path) -> None:
    top = str(folders(tmp_path, ["ant", "cat", "dog"]))
    model = with_names({0: "dog", 1: "cat", 2: "ant"})
    dataset = ImageFolder(top, to_tensor)
    for each in (dataset, Subset(dataset, range(4)), open_dataset(f"folder:{top}", to_tensor)):
        with pytest.warns(UserWarning, match="of the model's classes: 'ant' has the label 0, but is class 2"):
            ood_scores.extract(model, DataLoader(each, 2), progress=False)
    some = with_names({0: "dog", 1: "cat", 2: "ox"})
    with pytest.warns(UserWarning, match=r"1 of the 3 classes of the dataset are not classes of the model \(ant\)"):
        ood_scores.extract(some, DataLoader(dataset, 2), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perhaps = with_names({0: "ant", 1: "cat", 2: "hound"})  # which may be the dogs
        ood_scores.extract(perhaps, DataLoader(dataset, 2), progress=False)
    right = [
        ImageFolder(top, to_tensor, target_transform=[2, 1, 0].__getitem__),
        in_models_order(open_dataset(f"folder:{top}", to_tensor), model),
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the labels of the dataset")
        for each in right:
            found = ood_scores.extract(model, DataLoader(each, 2), progress=False)
            assert found.labels is not None
            assert found.labels.tolist() == [2, 2, 1, 1, 0, 0]


@pytest.mark.skipif(not DATA, reason="OOD_SCORES_DATA is not set")
def test_a_few_classes_of_imagenet_have_their_own_labels(tmp_path: Path) -> None:
    names = sorted(os.listdir(f"{DATA}/imagenet/sample"))[::71]  # 15 of 1,000
    for name in names:
        (tmp_path / "few" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "few" / name).symlink_to(f"{DATA}/imagenet/sample/{name}")
    checkpoint = f"{DATA}/checkpoints/imagenet_efficientnet_lite0.safetensors"
    words = ["extract", "tf_efficientnet_lite0", f"folder:{tmp_path / 'few'}", str(tmp_path / "few.h5")]
    result = CliRunner().invoke(app, [*words, "--checkpoint", checkpoint, "--workers", "0"])
    assert result.exit_code == 0, result.output
    found = ood_scores.load(tmp_path / "few.h5")
    assert found.labels is not None
    assert found.logits is not None
    assert found.labels.tolist() == list(range(0, 1000, 71))
    assert (found.logits.argmax(dim=1) == found.labels).float().mean() > 0.7


def test_a_kind_of_dataset_is_not_replaced_by_another() -> None:
    with pytest.raises(BadInput, match=r"the kind of dataset 'folder' exists already: ood_scores\.data\.kinds\.folder"):

        @register_dataset_kind("folder")
        def open_other(target: str, base: Path) -> Any: ...
