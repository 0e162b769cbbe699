"""Images on sheets and datasets of the Hugging Face hub."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from ood_scores.data.images import ImageArrays
from ood_scores.data.long_tail import labels_of
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingData, ShapeMismatch, UnknownName

# --- sheets ---------------------------------------------------------------------------------------------------------


def pack(folder: Path, images: np.ndarray, columns: int, per_file: int, labels: list[int] | None = None) -> Path:
    """Writes `folder/name.json` and its sheets."""
    count, size = images.shape[:2]
    for number, first in enumerate(range(0, count, per_file)):
        part = images[first : first + per_file]
        sheet = np.zeros((-(-len(part) // columns) * size, columns * size, 3), dtype=np.uint8)
        for place, image in enumerate(part):
            top, left = place // columns * size, place % columns * size
            sheet[top : top + size, left : left + size] = image
        Image.fromarray(sheet).save(folder / f"name.{number:02d}.webp", lossless=True)
    said = {"size": size, "columns": columns, "per_file": per_file, "count": count, "labels": labels}
    (folder / "name.json").write_text(json.dumps(said))
    return folder / "name"


@settings(deadline=None, max_examples=25)
@given(
    images=st.tuples(st.integers(1, 11), st.integers(1, 5)).flatmap(lambda n: arrays(np.uint8, (n[0], n[1], n[1], 3))),
    columns=st.integers(1, 4),
    per_file=st.integers(1, 12),
)
def test_sheets_give_back_every_pixel(
    images: np.ndarray, columns: int, per_file: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = pack(tmp_path_factory.mktemp("sheets"), images, columns, per_file)
    dataset = open_dataset(f"sheets:{path}")
    assert isinstance(dataset, ImageArrays)
    np.testing.assert_array_equal(dataset.images, images)
    assert (dataset.labels, dataset.name) == (None, "name")


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    return pack(tmp_path, images, columns=3, per_file=6, labels=list(range(10)))


def test_sheets_with_labels(packed: Path) -> None:
    assert labels_of(open_dataset(f"sheets:{packed}?rows=2:4")).tolist() == [2, 3]
    assert len(open_dataset("sheets:name", root=packed.parent)) == 10


def test_missing_and_broken_sheets(packed: Path) -> None:
    with pytest.raises(BadInput, match="write sheets:DIR/NAME"):
        open_dataset("sheets")
    with pytest.raises(MissingData, match=r"there is no .*/other\.json"):
        open_dataset(f"sheets:{packed.parent}/other")
    second = packed.parent / "name.01.webp"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"cannot read the image .*name\.01\.webp"):
        open_dataset(f"sheets:{packed}")
    second.unlink()
    with pytest.raises(MissingData, match=r"there is no image .*name\.01\.webp"):
        open_dataset(f"sheets:{packed}")


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"columns": 4}, BadInput, "12 x 8 pixels, which are not 6 images of 4 x 4 in rows of 4"),
        ({"size": 3}, BadInput, "12 x 8 pixels, which are not 6 images of 3 x 3"),
        ({"per_file": 7}, BadInput, "which are not 7 images"),
        ({"count": 0}, BadInput, "count of .* is 0; it must be a whole number from 1"),
        ({"size": 4.0}, BadInput, "size of .* is 4.0; it must be a whole number"),
        ({"columns": True}, BadInput, "columns of .* is True"),
        ({"labels": [0] * 9}, ShapeMismatch, "beside 10 images"),
        ({"labels": ["cat"] * 10}, BadInput, "labels of .* must be a list of class indices, or null"),
        ({"labels": 3}, BadInput, "labels of .* must be a list"),
    ],
)
def test_an_index_that_does_not_fit(packed: Path, changed: Any, error: type[Exception], message: str) -> None:
    path = packed.with_name("name.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(error, match=message):
        open_dataset(f"sheets:{packed}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "as JSON"), ("[1]", "an object of size, columns, per_file, count, labels"), ('{"size": 4}', "no index")],
)
def test_an_index_that_is_none(packed: Path, text: str, message: str) -> None:
    packed.with_name("name.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        open_dataset(f"sheets:{packed}")


@pytest.mark.skipif("OOD_SCORES_DATA" not in os.environ, reason="OOD_SCORES_DATA does not name a folder of real images")
def test_real_sheets() -> None:
    cifar = open_dataset("sheets:$OOD_SCORES_DATA/images/cifar10_test?take=2000")
    assert (len(cifar), cifar.name) == (2000, "cifar10_test[take=2000]")
    assert np.bincount(labels_of(cifar)).min() > 150
    assert cifar[0][0].size == (32, 32)
    grey = open_dataset("sheets:$OOD_SCORES_DATA/images/mnist_test")
    pixels = np.asarray(grey[9999])
    assert len(grey) == 10000
    assert pixels.max() > 200
    assert (pixels == pixels[:, :, :1]).all()


# --- the Hugging Face hub, with a stand-in for its library ----------------------------------------------------------


class Value:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class ClassLabel(Value):
    pass


class FakeRows:
    """What the library's `Dataset` does of what is asked of it here; images are decoded by row only."""

    def __init__(self, features: dict[str, Any], columns: dict[str, list[Any]]) -> None:
        self.features = features
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            assert type(self.features[key]).__name__ != "Image", "the whole column would be decoded"
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}

    def select_columns(self, names: list[str]) -> FakeRows:
        return FakeRows({n: self.features[n] for n in names}, {n: self.columns[n] for n in names})


PICTURE = type("Image", (), {})()
PICTURES = [Image.new("L", (2, 2), value) for value in (10, 20, 30)]


def serve(monkeypatch: pytest.MonkeyPatch, features: dict[str, Any], **columns: list[Any]) -> list[Any]:
    """Lets `datasets.load_dataset` give these columns; the list holds what it is asked for."""
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None = None, *, split: str) -> FakeRows:
        asked.append((path, name, split))
        if split == "val":
            raise ValueError('Unknown split "val". Should be one of [test].')
        if path == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub or cannot be accessed.")
        return FakeRows(features, columns)

    module: Any = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_columns_of_the_hub_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"id": Value("int64"), "img": PICTURE, "kind": ClassLabel("int64")}
    asked = serve(monkeypatch, features, id=[7, 8, 9], img=PICTURES, kind=[2, -1, 0])
    dataset = open_dataset("hf:owner/pictures")
    assert asked == [("owner/pictures", None, "test")]
    assert (len(dataset), dataset.name) == (3, "pictures[test]")
    assert [(image.getpixel((0, 0)), label) for image, label in (dataset[i] for i in range(3))] == [
        ((10, 10, 10), 2),
        ((20, 20, 20), -1),
        ((30, 30, 30), 0),
    ]
    assert labels_of(dataset).tolist() == [2, -1, 0]
    assert open_dataset("hf:pictures?split=train&config=big&rows=1:").name == "pictures[big,train][rows=1:]"
    assert asked[-1] == ("pictures", "big", "train")


@pytest.mark.parametrize(("dtype", "labelled"), [("int64", True), ("uint8", True), ("string", False)])
def test_a_column_of_integers_called_label(dtype: str, labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[Any] = [1, 0, 1] if labelled else ["b", "a", "b"]
    serve(monkeypatch, {"image": PICTURE, "label": Value(dtype)}, image=PICTURES, label=values)
    dataset = open_dataset("hf:a/b")
    assert isinstance(dataset[0], tuple) is labelled
    if not labelled:
        with pytest.raises(BadLabels, match="labels have dtype <U1"):
            open_dataset("hf:a/b?label=label")


def test_columns_of_the_hub_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"left": PICTURE, "right": PICTURE, "fine": ClassLabel("int64"), "coarse": ClassLabel("int64")}
    serve(monkeypatch, features, left=PICTURES, right=PICTURES[::-1], fine=[5, 6, 7], coarse=[1, 1, 2])
    image, label = open_dataset("hf:a/b?image=right&label=coarse")[0]
    assert (image.getpixel((0, 0))[0], label) == (30, 1)
    with pytest.raises(BadInput, match="several columns for image: left, right; write image=NAME"):
        open_dataset("hf:a/b?label=fine")
    with pytest.raises(BadInput, match="several columns for label: fine, coarse; write label=NAME"):
        open_dataset("hf:a/b?image=left")
    with pytest.raises(UnknownName, match="no column 'middle'; there are: left, right, fine, coarse"):
        open_dataset("hf:a/b?image=middle")


def test_what_the_hub_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"text": Value("string")}, text=["a"])
    with pytest.raises(BadInput, match="no column of images; it has: text"):
        open_dataset("hf:a/b")
    with pytest.raises(BadInput, match=r"column 'text' of .* holds str, not images"):
        open_dataset("hf:a/b?image=text")[0]
    with pytest.raises(BadInput, match="cannot open split 'val' of hf:a/b: Unknown split"):
        open_dataset("hf:a/b?split=val")
    with pytest.raises(MissingData, match="cannot open hf:no/such: Dataset 'no/such' doesn't exist"):
        open_dataset("hf:no/such")
    with pytest.raises(BadInput, match="write hf:OWNER/NAME"):
        open_dataset("hf")
    serve(monkeypatch, {"image": PICTURE}, image=[])
    with pytest.raises(EmptyInput, match=r"b\[test\] has no images"):
        open_dataset("hf:a/b")


@pytest.mark.parametrize("module", [None, ModuleType("datasets")])
def test_without_the_library(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", module)  # not there, or a folder of that name in the way
    with pytest.raises(MissingData, match=r"which is not installed\. To get it: pip install datasets && ") as missing:
        open_dataset("hf:owner/pictures?config=big")
    assert missing.value.remedy.endswith("; load_dataset('owner/pictures', 'big')\"")
