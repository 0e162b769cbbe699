"""Images packed on sheets."""

from __future__ import annotations

import json
import os
from pathlib import Path
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
from ood_scores.errors import BadInput, MissingData, ShapeMismatch


def pack(folder: Path, images: np.ndarray, columns: int, per_file: int, labels: list[int] | None = None) -> Path:
    """Write ``folder/name.json`` and its sheets."""
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
def test_sheets_preserve_every_pixel(
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


def test_sheets_that_are_missing_or_broken(packed: Path) -> None:
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
        ({"count": 0}, BadInput, "count of .* is 0: it must be a whole number from 1"),
        ({"size": 4.0}, BadInput, "size of .* is 4.0: it must be a whole number"),
        ({"columns": True}, BadInput, "columns of .* is True"),
        ({"labels": [0] * 9}, ShapeMismatch, "for 10 images"),
        ({"labels": ["cat"] * 10}, BadInput, "labels of .* must be a list of class indices, or null"),
        ({"labels": 3}, BadInput, "labels of .* must be a list"),
    ],
)
def test_sheets_index_that_does_not_fit(packed: Path, changed: Any, error: type[Exception], message: str) -> None:
    path = packed.with_name("name.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(error, match=message):
        open_dataset(f"sheets:{packed}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "as JSON"), ("[1]", "an object of size, columns, per_file, count, labels"), ('{"size": 4}', "not an index")],
)
def test_sheets_index_that_is_not_an_index(packed: Path, text: str, message: str) -> None:
    packed.with_name("name.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        open_dataset(f"sheets:{packed}")


@pytest.mark.skipif("OOD_SCORES_DATA" not in os.environ, reason="OOD_SCORES_DATA does not name a folder of real images")
def test_real_sheets() -> None:
    cifar = open_dataset("sheets:$OOD_SCORES_DATA/images/cifar10_test?take=2000")
    assert (len(cifar), cifar.name) == (2000, "cifar10_test[take=2000]")
    assert np.bincount(labels_of(cifar)).min() > 150
    assert cifar[0][0].size == (32, 32)
    gray = open_dataset("sheets:$OOD_SCORES_DATA/images/mnist_test")
    pixels = np.asarray(gray[9999])
    assert len(gray) == 10000
    assert pixels.max() > 200
    assert (pixels == pixels[:, :, :1]).all()
