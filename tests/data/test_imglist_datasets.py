"""Lists of images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dataset_images import BLUE, RED, corner, items, save

from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, EmptyInput, MissingData


def test_imglist_lines_are_paths_and_labels(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a red one.png", RED)
    save(tmp_path / "images" / "b.png", BLUE)
    lines = "images/b.png 12\r\n\n  images/a red one.png   -1\nimages/b.png 0"
    (tmp_path / "test_set.txt").write_bytes(lines.encode())
    dataset = open_dataset(f"imglist:{tmp_path}/test_set.txt")
    assert [(corner(image), label) for image, label in items(dataset)] == [(BLUE, 12), (RED, -1), (BLUE, 0)]
    assert dataset.name == "test_set"


def test_imglist_with_a_root(tmp_path: Path) -> None:
    save(tmp_path / "data" / "x" / "b.png", BLUE)
    (tmp_path / "list.txt").write_text("x/b.png 1\n")
    image, label = open_dataset(f"imglist:{tmp_path}/list.txt?root={tmp_path}/data")[0]
    assert (corner(image), label) == (BLUE, 1)


def test_imglist_of_sc_ood(tmp_path: Path) -> None:
    save(tmp_path / "a b.png", RED)
    lines = ["a b.png {'label': 3, 'sc_label': -1}", "a b.png {'sc_label': 7}", "a b.png {'label': 2}", "a b.png 5"]
    (tmp_path / "test_tin.txt").write_text("\n".join(lines))
    dataset = open_dataset(f"imglist:{tmp_path}/test_tin.txt")
    assert [(corner(image), label) for image, label in items(dataset)] == [(RED, -1), (RED, 7), (RED, 2), (RED, 5)]


def test_byte_order_mark_is_not_part_of_the_first_name(tmp_path: Path) -> None:
    save(tmp_path / "b.png", BLUE)
    (tmp_path / "list.txt").write_text("b.png 1\n", encoding="utf-8-sig")
    image, label = open_dataset(f"imglist:{tmp_path}/list.txt")[0]
    assert (corner(image), label) == (BLUE, 1)


def test_imglist_errors(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(MissingData, match=f"there is no {path}"):
        open_dataset(f"imglist:{path}")
    path.write_text("\n \n")
    with pytest.raises(EmptyInput, match="lists no images"):
        open_dataset(f"imglist:{path}")
    path.write_text("a.png 0\n")
    with pytest.raises(
        MissingData, match=r"the first image of .* is not at .*/a\.png: name their folder with \?root=DIR"
    ):
        open_dataset(f"imglist:{path}")
    for line in ["a.png", "a.png cat", "a.png 1.5", "a.png {'sc_label': 1.5}", "a.png {'other': 1}", "a.png {1}"]:
        path.write_text(f"a.png 0\n{line}\n")
        with pytest.raises(BadInput, match=re.escape(f"line 2 of {path} is {line!r}")):
            open_dataset(f"imglist:{path}")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="as a text file"):
        open_dataset(f"imglist:{path}")
    with pytest.raises(BadInput, match="as a text file"):
        open_dataset(f"imglist:{tmp_path}")
