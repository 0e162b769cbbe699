"""Folders of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dataset_images import BLUE, GREEN, RED, corner, items, save
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, EmptyInput, MissingData


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
