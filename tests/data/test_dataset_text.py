"""Texts that name datasets: kinds, options, environment variables, relative paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dataset_images import corner, rows_of
from PIL import Image

from ood_scores.data import sources
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds import base
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.long_tail import labels_of
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, MissingData, UnknownName
from ood_scores.registry import Registry


def test_registered_dataset_kind_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DATASET_KINDS", Registry("kind of dataset"))
    monkeypatch.setattr(base, "DATASET_KINDS", sources.DATASET_KINDS)

    @register_dataset_kind("gray", remedy=lambda text, root: f"paint {text}")
    def open_gray(target: str, base: Path, *, level: str = "1") -> ImageArrays:
        if not target:
            raise MissingData("there is no paint")
        return ImageArrays(np.full((int(target), 2, 2), int(level), dtype=np.uint8), name="gray")

    dataset = open_dataset("gray:3?level=7&take=2")
    assert (len(dataset), dataset.name, corner(dataset[1])) == (2, "gray[take=2]", (7, 7, 7))
    with pytest.raises(UnknownName, match=r"'levle' \(did you mean 'level'\?\): choose from level, classes, scramble"):
        open_dataset("gray:3?levle=7")
    with pytest.raises(MissingData, match=r"there is no paint\. To get it: paint gray"):
        open_dataset("gray")


def test_invalid_dataset_texts_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"kind of dataset 'zip': choose from .*folder, .*torchvision"):
        open_dataset("zip:a")
    with pytest.raises(UnknownName, match=r"no option 'class' \(did you mean 'classes'\?\): choose from classes"):
        open_dataset("digits?class=1")
    with pytest.raises(UnknownName, match="folder has no option 'split': choose from classes, scramble, only, rows"):
        open_dataset("folder:x?split=test")
    with pytest.raises(UnknownName, match=r"'target'.*: choose from split, root, download"):
        open_dataset("torchvision:CIFAR10?target=1")
    for spec in ["digits?classes", "digits?classes=", "digits?=3", "digits?classes=1&"]:
        with pytest.raises(BadInput, match=r"write \?name=value&name=value"):
            open_dataset(spec)


def test_path_without_its_kind_is_suggested_with_it(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(three)
    np.savez(three / "arrays.npz", images=np.zeros((2, 4, 4), dtype=np.uint8))
    for text, suggested in {
        "pictures": "folder:pictures",
        "pictures?take=2": "folder:pictures?take=2",
        str(three / "pictures"): f"folder:{three / 'pictures'}",
        "list.txt": "imglist:list.txt",
        "arrays.npz": "npz:arrays.npz",
    }.items():
        with pytest.raises(
            UnknownName, match=re.escape(f"{text!r} is a path without its kind (did you mean {suggested!r}?)")
        ):
            open_dataset(text)
    with pytest.raises(UnknownName, match=r"a path without its kind \(did you mean 'folder:pictures'\?\)"):
        open_dataset("pictures", root=three)
    with pytest.raises(UnknownName, match="there is no kind of dataset 'elsewhere'"):
        open_dataset("elsewhere")


def test_importing_the_package_imports_no_dataset_library() -> None:
    code = "import ood_scores, sys; assert not {'torchvision', 'sklearn', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "list.txt").write_text("0.png 4\n2.png 5\n")
    return tmp_path


def test_environment_variables_are_expanded(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", str(three))
    monkeypatch.setenv("ROWS", "1:")
    for spec in ["folder:$MY_DATA/pictures?rows=$ROWS", "folder:${MY_DATA}/pictures?rows=${ROWS}"]:
        assert rows_of(open_dataset(spec)) == [256, 512]
    assert labels_of(open_dataset("imglist:$MY_DATA/list.txt?root=${MY_DATA}/pictures")).tolist() == [4, 5]


def test_two_dollar_signs_are_one(three: Path) -> None:
    (three / "pictures").rename(three / "$x")
    assert len(open_dataset(f"folder:{three}/$$x")) == 3
    with pytest.raises(BadInput, match=r"write \$NAME or \$\{NAME\}, and \$\$ for a dollar sign"):
        open_dataset(f"folder:{three}/$")


@pytest.mark.parametrize("value", [None, ""])
def test_unset_environment_variable_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_SUCH_DATA", value)
    for spec in ["folder:$NO_SUCH_DATA/x", "digits?rows=${NO_SUCH_DATA}:"]:
        with pytest.raises(MissingData, match=r"the environment variable NO_SUCH_DATA of .* is not set"):
            open_dataset(spec)


def test_relative_paths_start_from_root(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(three / "a.npz", images=np.zeros((5, 2, 2), dtype=np.uint8))
    assert len(open_dataset("folder:pictures", root=three)) == 3
    assert len(open_dataset("npz:a.npz", root=str(three))) == 5
    assert len(open_dataset("imglist:list.txt?root=pictures", root=three)) == 2
    assert len(open_dataset(f"folder:{three}/pictures", root="/nowhere")) == 3
    monkeypatch.setenv("HOME", str(three))
    assert len(open_dataset("folder:~/pictures", root="/nowhere")) == 3
    with pytest.raises(MissingData, match=f"cannot open CIFAR10 in {three}/pictures: "):
        open_dataset("torchvision:CIFAR10?root=pictures", root=three)
    monkeypatch.chdir(three)
    assert len(open_dataset("folder:pictures")) == 3
