"""Folders of images."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from dataset_images import BLUE, GREEN, RED, corner, items, save
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.images import ImageDataset, ImageFiles
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, EmptyInput, MissingData


def files(dataset: ImageDataset) -> list[str]:
    assert isinstance(dataset, ImageFiles)
    return list(dataset.paths)


def test_folder_of_classes(tmp_path: Path) -> None:
    save(tmp_path / "set" / "cat" / "b.png", GREEN)
    save(tmp_path / "set" / "cat" / "a.PNG", RED)
    save(tmp_path / "set" / "ape" / "deep" / "c.png", BLUE)
    save(tmp_path / "set" / "ape" / "z.bmp", 77, mode="L")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    dataset = open_dataset(f"folder:{tmp_path}/set")
    assert [(corner(image), label) for image, label in items(dataset)] == [
        ((77, 77, 77), 0),
        (BLUE, 0),
        (RED, 1),
        (GREEN, 1),
    ]
    assert dataset.name == "set"
    assert dataset.transform is None
    assert len(dataset) == 4
    reference = ImageFolder(str(tmp_path / "set"))
    assert [(image.tobytes(), label) for image, label in items(dataset)] == [(i.tobytes(), n) for i, n in reference]


def test_folder_skips_hidden_subfolders_and_keeps_the_number_of_an_empty_class(tmp_path: Path) -> None:
    (tmp_path / ".checkpoints").mkdir()
    (tmp_path / "ape").mkdir()
    save(tmp_path / "cat" / "a.png", RED)
    assert [label for _, label in items(open_dataset(f"folder:{tmp_path}"))] == [1]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name, color in {"2.png": GREEN, "10.png": RED, "3.png": BLUE}.items():
        save(tmp_path / name, color)
    (tmp_path / "list.txt").write_text("no image")
    dataset = open_dataset(f"folder:{tmp_path}")
    assert [corner(image) for image in items(dataset)] == [RED, GREEN, BLUE]


def test_transform_of_a_folder_receives_rgb_images(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 9, mode="L", size=(5, 4))
    dataset = open_dataset(f"folder:{tmp_path}", transform=pil_to_tensor)
    assert dataset.transform is pil_to_tensor
    assert torch.equal(dataset[0], torch.full((3, 4, 5), 9, dtype=torch.uint8))


def test_unreadable_images_in_a_folder_are_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", RED, size=(50, 50))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:70])
    (tmp_path / "c.jpg").write_bytes(b"not an image")
    save(tmp_path / "d.png", RED)
    dataset = open_dataset(f"folder:{tmp_path}")
    (tmp_path / "d.png").unlink()
    assert corner(dataset[0]) == RED
    for index, message in [
        (1, r"cannot read the image .*b\.png"),
        (2, r"cannot read .*c\.jpg"),
        (3, r"no image .*d\.png"),
    ]:
        with pytest.raises(BadInput, match=message):
            dataset[index]


def test_images_on_top_of_a_folder_with_subfolders(tmp_path: Path) -> None:
    """An empty subfolder makes no classes; images beside classes are left out with a warning that counts them."""
    for number in range(5):
        save(tmp_path / f"{number}.png", RED)
    (tmp_path / "notes").mkdir()
    (tmp_path / "x.jpg").mkdir()
    assert [corner(image) for image in items(open_dataset(f"folder:{tmp_path}"))] == [RED] * 5
    save(tmp_path / "x.jpg" / "thumb.png", BLUE)
    with pytest.warns(UserWarning, match=r"left out in folder:.*: images outside the class folders \(5\)"):
        dataset = open_dataset(f"folder:{tmp_path}")
    assert [(corner(image), label) for image, label in items(dataset)] == [(BLUE, 1)]


def test_hidden_files_pipes_and_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.jpg", RED)
    (tmp_path / "cat" / "._a.jpg").write_bytes(b"Mac OS X")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "b.jpg").write_bytes(b"Mac OS X")
    (tmp_path / "cat" / "notes.txt").touch()
    (tmp_path / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "cat" / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    with pytest.warns(UserWarning, match="left out") as told:
        dataset = open_dataset(f"folder:{tmp_path}")
    assert files(dataset) == [f"{tmp_path}/cat/a.jpg"]
    assert dataset[0][1] == 0
    (message,) = [str(each.message) for each in told]
    for counted in ("hidden files (1)", ".txt files (1)", "broken links, pipes, or devices (3)"):
        assert counted in message


def test_an_image_behind_a_loop_of_links_is_read_once(tmp_path: Path) -> None:
    for number in range(3):
        save(tmp_path / "set" / "cat" / f"{number}.png", RED)
    save(tmp_path / "elsewhere" / "more.png", BLUE)
    for name, target in {"latest": ".", "other": ".", "up": "..", "alinked": "../../elsewhere"}.items():
        (tmp_path / "set" / "cat" / name).symlink_to(target)
    with pytest.warns(UserWarning, match=r"links to folders that are read anyway \(3\)"):
        dataset = open_dataset(f"folder:{tmp_path}/set")
    assert [path.removeprefix(f"{tmp_path}/set/cat/") for path in files(dataset)] == [
        "0.png",
        "1.png",
        "2.png",
        "alinked/more.png",
    ]


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(EmptyInput, match=f"no images in {tmp_path}"):
        open_dataset(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(EmptyInput, match=f"no images in {tmp_path}"):
        open_dataset(f"folder:{tmp_path}")
    with pytest.raises(MissingData, match=f"there is no {tmp_path}/nowhere"):
        open_dataset(f"folder:{tmp_path}/nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="is not a folder"):
        open_dataset(f"folder:{tmp_path}/file")
    with pytest.raises(BadInput, match="write folder:PATH"):
        open_dataset("folder")
