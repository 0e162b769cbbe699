"""Classification datasets of torchvision."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_images import BLUE, RED, corner, save
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.long_tail import labels_of
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, MissingData, UnknownName


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    for prefix, value in [("train", 10), ("t10k", 20)]:
        write_idx(raw / f"{prefix}-images-idx3-ubyte", np.full((3, 28, 28), value))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(3) + value % 7)
    return tmp_path


@pytest.mark.parametrize(
    ("split", "value", "first_label", "name"),
    [("?split=train&", 10, 3, "MNIST[train]"), ("?split=test&", 20, 6, "MNIST[test]"), ("?", 20, 6, "MNIST")],
)
def test_torchvision_dataset_with_a_train_argument(
    mnist: Path, split: str, value: int, first_label: int, name: str
) -> None:
    dataset = open_dataset(f"torchvision:MNIST{split}root={mnist}&download=false", transform=pil_to_tensor)
    image, label = dataset[0]
    assert torch.equal(image, torch.full((3, 28, 28), value, dtype=torch.uint8))
    assert label == first_label
    assert (len(dataset), dataset.name) == (3, name)


@pytest.mark.parametrize(("split", "color"), [("?split=train&", RED), ("?split=test&", BLUE), ("?", BLUE)])
def test_torchvision_dataset_with_a_split_argument(tmp_path: Path, split: str, color: Any) -> None:
    save(tmp_path / "country211" / "train" / "AD" / "1.png", RED)
    save(tmp_path / "country211" / "test" / "AD" / "1.png", BLUE)
    image, label = open_dataset(f"torchvision:Country211{split}root={tmp_path}")[0]
    assert (corner(image), label) == (color, 0)


def test_torchvision_dataset_without_splits(tmp_path: Path) -> None:
    save(tmp_path / "eurosat" / "2750" / "River" / "1.jpg", 100, mode="L")
    image, label = open_dataset(f"torchvision:EuroSAT?root={tmp_path}")[0]
    assert (corner(image), label) == ((100, 100, 100), 0)
    with pytest.raises(BadInput, match="EuroSAT has no splits: leave out split=test"):
        open_dataset(f"torchvision:EuroSAT?root={tmp_path}&split=test")


def test_torchvision_root_defaults_to_the_users_cache(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mnist / "cache" / "ood_scores").mkdir(parents=True)
    (mnist / "cache" / "ood_scores" / "data").symlink_to(mnist)
    monkeypatch.setenv("XDG_CACHE_HOME", str(mnist / "cache"))
    assert len(open_dataset("torchvision:MNIST")) == 3


def test_torchvision_download(mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import mnist as module

    def fake_download(url: str, download_root: str, filename: str, md5: str) -> None:
        raw = mnist / "MNIST" / "raw" / filename.removesuffix(".gz")
        Path(download_root, raw.name).write_bytes(gzip.decompress(gzip.compress(raw.read_bytes())))

    monkeypatch.setattr(module, "download_and_extract_archive", fake_download)
    assert len(open_dataset(f"torchvision:MNIST?root={tmp_path}/fresh&download=true")) == 3


def test_torchvision_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingData, match=f"cannot open CIFAR10 in {tmp_path}: Dataset not found") as missing:
        open_dataset(f"torchvision:CIFAR10?root={tmp_path}")
    assert missing.value.remedy.startswith("add download=true to the spec, or run: python -c ")
    assert f'open_dataset("torchvision:CIFAR10?root={tmp_path}&download=true")' in missing.value.remedy
    with pytest.raises(MissingData, match=r"cannot open ImageNet in .*To get it: register, .*image-net\.org"):
        open_dataset(f"torchvision:ImageNet?root={tmp_path}&split=val")
    with pytest.raises(BadInput, match="torchvision cannot download ImageNet"):
        open_dataset(f"torchvision:ImageNet?root={tmp_path}&download=true")
    with pytest.raises(BadInput, match="CIFAR10 has no split 'val'; there are: train, test"):
        open_dataset(f"torchvision:CIFAR10?root={tmp_path}&split=val")
    with pytest.raises(BadInput, match=r"cannot open SVHN .*Valid values are"):
        open_dataset(f"torchvision:SVHN?root={tmp_path}&split=val")
    with pytest.raises(BadInput, match="download=yes: write download=true or download=false"):
        open_dataset(f"torchvision:CIFAR10?root={tmp_path}&download=yes")
    for name in ["CIFAR11", "", "wrap_dataset_for_transforms_v2", "EMNIST"]:
        with pytest.raises(UnknownName, match=r"choose from .*CIFAR10, CIFAR100, .*SVHN"):
            open_dataset(f"torchvision:{name}")


def test_torchvision_dataset_that_does_not_classify(tmp_path: Path) -> None:
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 1, 64, 64), dtype=np.uint8))
    with pytest.raises(BadInput, match="name a classification dataset"):
        open_dataset(f"torchvision:MovingMNIST?root={tmp_path}")


def test_labels_of_torchvision_sets_that_keep_pairs(tmp_path: Path) -> None:
    for label in (0, 14):
        path = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}" / "1.ppm"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (3, 3)).save(path)
    dataset = open_dataset(f"torchvision:GTSRB?split=train&root={tmp_path}&rows=1:")
    assert labels_of(dataset).tolist() == [1] == [dataset[0][1]]  # torchvision numbers the folders
