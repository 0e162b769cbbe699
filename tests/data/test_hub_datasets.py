"""Datasets of the Hugging Face hub, with a fake of its library."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest
from PIL import Image

from ood_scores.data.long_tail import labels_of
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingData, UnknownName


class Value:
    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class ClassLabel(Value):
    pass


def encoded(image: Any) -> dict[str, Any] | None:
    """Return a stored image as the library does; a dictionary and None stand for themselves."""
    if not isinstance(image, Image.Image):
        return image
    data = io.BytesIO()
    image.save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


class FakeRows:
    """A fake of the library's ``Dataset``, whose images are decoded by row only."""

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

    def cast_column(self, name: str, feature: Any) -> FakeRows:
        assert feature == {"decode": False}
        return FakeRows(self.features, self.columns | {name: [encoded(image) for image in self.columns[name]]})

    def with_format(self, kind: str) -> Any:
        assert kind == "arrow"
        return ArrowRows(self.columns)

    def select_columns(self, names: list[str]) -> FakeRows:
        return FakeRows({n: self.features[n] for n in names}, {n: self.columns[n] for n in names})


class ArrowRows:
    """The same columns as Arrow arrays, without decoding images."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __getitem__(self, rows: slice) -> dict[str, Any]:
        assert rows == slice(None)
        return {name: pyarrow.array(values) for name, values in self.columns.items()}


PICTURE = type("Image", (), {})()
PICTURES = [Image.new("L", (2, 2), value) for value in (10, 20, 30)]


def serve(monkeypatch: pytest.MonkeyPatch, features: dict[str, Any], **columns: list[Any]) -> list[Any]:
    """Make ``datasets.load_dataset`` return these columns; return a list that records its calls."""
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
    module.Image = dict
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_hub_columns_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"id": Value("int64"), "img": PICTURE, "kind": ClassLabel("int64")}
    asked = serve(monkeypatch, features, id=[7, 8, 9], img=PICTURES, kind=[2, -1, 0])
    dataset = open_dataset("hf:owner/pictures")
    assert asked == [("owner/pictures", None, "test")]
    assert (len(dataset), dataset.name) == (3, "pictures[test]")
    assert dataset.ids == [7, 8, 9]
    assert [(image.getpixel((0, 0)), label) for image, label in (dataset[i] for i in range(3))] == [
        ((10, 10, 10), 2),
        ((20, 20, 20), -1),
        ((30, 30, 30), 0),
    ]
    assert labels_of(dataset).tolist() == [2, -1, 0]
    assert open_dataset("hf:pictures?split=train&config=big&rows=1:").name == "pictures[big,train][rows=1:]"
    assert asked[-1] == ("pictures", "big", "train")


@pytest.mark.parametrize(("dtype", "labeled"), [("int64", True), ("uint8", True), ("string", False)])
def test_hub_column_of_integers_called_label(dtype: str, labeled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[Any] = [1, 0, 1] if labeled else ["b", "a", "b"]
    serve(monkeypatch, {"image": PICTURE, "label": Value(dtype)}, image=PICTURES, label=values)
    dataset = open_dataset("hf:a/b")
    assert isinstance(dataset[0], tuple) is labeled
    if not labeled:
        with pytest.raises(BadLabels, match="labels have dtype <U1"):
            open_dataset("hf:a/b?label=label")


def test_hub_columns_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"left": PICTURE, "right": PICTURE, "fine": ClassLabel("int64"), "coarse": ClassLabel("int64")}
    serve(monkeypatch, features, left=PICTURES, right=PICTURES[::-1], fine=[5, 6, 7], coarse=[1, 1, 2])
    image, label = open_dataset("hf:a/b?image=right&label=coarse")[0]
    assert (image.getpixel((0, 0))[0], label) == (30, 1)
    with pytest.raises(BadInput, match="several columns may be the image, left, right: write image=NAME"):
        open_dataset("hf:a/b?label=fine")
    with pytest.raises(BadInput, match="several columns may be the label, fine, coarse: write label=NAME"):
        open_dataset("hf:a/b?image=left")
    with pytest.raises(UnknownName, match="no column 'middle': choose from left, right, fine, coarse"):
        open_dataset("hf:a/b?image=middle")


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_hub_row_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoded(Image.effect_noise((64, 64), 60))
    assert whole is not None
    cut = whole["bytes"][: len(whole["bytes"]) // 2]
    stored = [{"bytes": cut, "path": "a.png"}, None, {"bytes": None, "path": str(tmp_path / "b.png")}, whole]
    serve(monkeypatch, {"image": PICTURE}, image=stored)
    dataset = open_dataset("hf:a/b")
    with pytest.raises(BadInput, match=r"cannot read the image in row 0 of b\[test\] \("):
        dataset[0]
    with pytest.raises(BadInput, match=r"image in row 1 of b\[test\] \(it is empty\)"):
        dataset[1]
    with pytest.raises(MissingData, match=r"no image in row 2 of b\[test\], .*/b\.png"):
        dataset[2]
    assert dataset[3].size == (64, 64)


def test_hub_row_without_a_label_has_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"image": PICTURE, "label": ClassLabel("int64")}
    serve(monkeypatch, features, image=PICTURES, label=[1, None, 0])
    dataset = open_dataset("hf:a/b")
    assert [dataset[row][1] for row in range(3)] == [1, -1, 0]
    serve(monkeypatch, features, image=PICTURES, label=[None, None, None])
    assert isinstance(open_dataset("hf:a/b")[0], Image.Image)


@pytest.mark.parametrize("module", [None, ModuleType("datasets")])
def test_hub_without_the_datasets_library(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", module)  # not installed, or a folder of that name shadows it
    with pytest.raises(MissingData, match=r"which is not installed\. To get it: pip install datasets && ") as missing:
        open_dataset("hf:owner/pictures?config=big")
    assert missing.value.remedy.endswith('; load_dataset("owner/pictures", "big")\'')


def stored(image: Image.Image, path: str) -> dict[str, Any]:
    return {"bytes": (encoded(image) or {})["bytes"], "path": path}


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"img": PICTURE, "id": Value("string"), "code": Value("int64")}

    def ids(paths: list[str], id: list[str], text: str = "hf:a/b") -> Any:
        pictures = [stored(*each) for each in zip(PICTURES, paths, strict=True)]
        serve(monkeypatch, features, img=pictures, id=id, code=[4, 5, 5])
        return open_dataset(text).ids

    assert ids(["a.png", "b.png", "c.png"], ["x", "y", "z"]) == ["x", "y", "z"]
    assert ids(["a.png", "b.png", "c.png"], ["x", "y", "y"]) == ["a.png", "b.png", "c.png"]
    assert ids(["/d/cat/a.png", "/d/cat/b.png", "/d/dog/a.png"], ["", "", ""]) == [
        "cat/a.png",
        "cat/b.png",
        "dog/a.png",
    ]
    assert ids(["image.png"] * 3, ["x"] * 3) is None
    assert ids(["a.png", "b.png", "c.png"], ["x"] * 3, "hf:a/b?id=code") == [4, 5, 5]
    with pytest.raises(UnknownName, match="there is no column 'cod'"):
        ids(["a.png", "b.png", "c.png"], ["x"] * 3, "hf:a/b?id=cod")
