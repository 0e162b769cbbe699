from __future__ import annotations

import gzip
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.images import ImageArrays, ImageDataset
from ood_scores.data.kinds.digits import digits, digits_split, gaussian_noise, photo_patches, uniform_noise
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingData, ShapeMismatch, UnknownName

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, colour: Any, mode: str = "RGB", size: tuple[int, int] = (3, 2)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def items(dataset: ImageDataset) -> list[Any]:
    return [dataset[index] for index in range(len(dataset))]


def corner(image: Image.Image) -> Any:
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


# --- folder ---------------------------------------------------------------------------------------------------------


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
    for name, colour in {"2.png": GREEN, "10.png": RED, "3.png": BLUE}.items():
        save(tmp_path / name, colour)
    (tmp_path / "list.txt").write_text("no image")
    dataset = open_dataset(f"folder:{tmp_path}")
    assert [corner(image) for image in items(dataset)] == [RED, GREEN, BLUE]


def test_transform_gets_the_rgb_image(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 9, mode="L", size=(5, 4))
    dataset = open_dataset(f"folder:{tmp_path}", transform=pil_to_tensor)
    assert dataset.transform is pil_to_tensor
    assert torch.equal(dataset[0], torch.full((3, 4, 5), 9, dtype=torch.uint8))


def test_unreadable_images_are_named(tmp_path: Path) -> None:
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


# --- npz and arrays -------------------------------------------------------------------------------------------------


def test_npz_with_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "val.npz", images=images, labels=np.array([3, 0, -1, 2], dtype=np.int8))
    dataset = open_dataset(f"npz:{tmp_path}/val.npz")
    assert dataset.name == "val"
    assert [label for _, label in items(dataset)] == [3, 0, -1, 2]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image, _ in items(dataset)]), images)


def test_npz_of_grey_images_without_labels(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    np.savez(tmp_path / "ood.npz", images=images, other=np.zeros(1))
    dataset = open_dataset(f"npz:{tmp_path}/ood.npz", transform=pil_to_tensor)
    assert torch.equal(torch.stack(items(dataset)), torch.from_numpy(images)[:, None].expand(2, 3, 3, 4))


def test_npz_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(BadInput, match=f"there is no {path}"):
        open_dataset(f"npz:{path}")
    np.savez(path, x=np.zeros(1), y=np.zeros(1))
    with pytest.raises(BadInput, match="no array 'images'; it has: x, y"):
        open_dataset(f"npz:{path}")
    np.savez(path, images=np.array([{}], dtype=object))
    with pytest.raises(BadInput, match=r"cannot read the arrays of .*allow_pickle=False"):
        open_dataset(f"npz:{path}")
    np.save(tmp_path / "b.npy", np.zeros((2, 2, 2), dtype=np.uint8))
    with pytest.raises(BadInput, match="not a NumPy archive"):
        open_dataset(f"npz:{tmp_path}/b.npy")
    np.savez(path, images=np.zeros((100, 8, 8), dtype=np.uint8))
    damaged = bytearray(path.read_bytes())
    damaged[400] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BadInput, match=r"cannot read the arrays of .*Bad CRC"):
        open_dataset(f"npz:{path}")


def test_image_arrays_in_a_loader() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    dataset = ImageArrays(images, [4, 3, 2, 1, 0], transform=pil_to_tensor, name="mine")
    batches = list(DataLoader(dataset, batch_size=2))
    assert torch.equal(torch.cat([batch for batch, _ in batches])[:, 0], torch.from_numpy(images))
    assert torch.cat([labels for _, labels in batches]).tolist() == [4, 3, 2, 1, 0]
    assert dataset.name == "mine"
    assert pickle.loads(pickle.dumps(dataset))[4][1] == 0


def test_image_arrays_are_checked() -> None:
    images = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(BadInput, match="dtype float64; give uint8"):
        ImageArrays(images / 255)  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch, match=r"shape \[3, 3, 8, 8\]; give \[N,H,W,3\]"):
        ImageArrays(images.transpose(0, 3, 1, 2))
    with pytest.raises(ShapeMismatch, match=r"shape \[8, 8\]"):
        ImageArrays(images[0, :, :, 0])
    with pytest.raises(EmptyInput, match="arrays has no images"):
        ImageArrays(images[:0])
    with pytest.raises(ShapeMismatch, match=r"labels have shape \[2\] beside 3 images"):
        ImageArrays(images, [0, 1])
    with pytest.raises(ShapeMismatch, match=r"labels have shape \[3, 2\]"):
        ImageArrays(images, np.zeros((3, 2), dtype=int))
    with pytest.raises(BadLabels, match="labels have dtype float64; give integers"):
        ImageArrays(images, [0.0, 1.0, 2.0])


# --- imglist --------------------------------------------------------------------------------------------------------


def test_imglist(tmp_path: Path) -> None:
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


def test_imglist_errors(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(MissingData, match=f"there is no {path}"):
        open_dataset(f"imglist:{path}")
    path.write_text("\n \n")
    with pytest.raises(EmptyInput, match="lists no images"):
        open_dataset(f"imglist:{path}")
    path.write_text("a.png 0\n")
    with pytest.raises(
        MissingData, match=r"the first image of .* is not at .*/a\.png; name the images' folder with \?root=DIR"
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


# --- torchvision ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("split", "colour"), [("?split=train&", RED), ("?split=test&", BLUE), ("?", BLUE)])
def test_torchvision_dataset_with_a_split_argument(tmp_path: Path, split: str, colour: Any) -> None:
    save(tmp_path / "country211" / "train" / "AD" / "1.png", RED)
    save(tmp_path / "country211" / "test" / "AD" / "1.png", BLUE)
    image, label = open_dataset(f"torchvision:Country211{split}root={tmp_path}")[0]
    assert (corner(image), label) == (colour, 0)


def test_torchvision_dataset_without_splits(tmp_path: Path) -> None:
    save(tmp_path / "eurosat" / "2750" / "River" / "1.jpg", 100, mode="L")
    image, label = open_dataset(f"torchvision:EuroSAT?root={tmp_path}")[0]
    assert (corner(image), label) == ((100, 100, 100), 0)
    with pytest.raises(BadInput, match="EuroSAT is not split; leave split=test away"):
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
    assert f"open_dataset('torchvision:CIFAR10?root={tmp_path}&download=true')" in missing.value.remedy
    with pytest.raises(MissingData, match=r"cannot open ImageNet in .*To get it: register, .*image-net\.org"):
        open_dataset(f"torchvision:ImageNet?root={tmp_path}&split=val")
    with pytest.raises(BadInput, match="torchvision cannot download ImageNet"):
        open_dataset(f"torchvision:ImageNet?root={tmp_path}&download=true")
    with pytest.raises(BadInput, match="CIFAR10 has no split 'val'; there are: train, test"):
        open_dataset(f"torchvision:CIFAR10?root={tmp_path}&split=val")
    with pytest.raises(BadInput, match=r"cannot open SVHN .*Valid values are"):
        open_dataset(f"torchvision:SVHN?root={tmp_path}&split=val")
    with pytest.raises(BadInput, match="download=yes; write download=true or download=false"):
        open_dataset(f"torchvision:CIFAR10?root={tmp_path}&download=yes")
    for name in ["CIFAR11", "", "wrap_dataset_for_transforms_v2", "EMNIST"]:
        with pytest.raises(UnknownName, match=r"there are: .*CIFAR10, CIFAR100, .*SVHN"):
            open_dataset(f"torchvision:{name}")


def test_torchvision_dataset_that_does_not_classify(tmp_path: Path) -> None:
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 1, 64, 64), dtype=np.uint8))
    with pytest.raises(BadInput, match="name a classification dataset"):
        open_dataset(f"torchvision:MovingMNIST?root={tmp_path}")


# --- digits and the grammar of specs --------------------------------------------------------------------------------


def test_digits() -> None:
    dataset = open_dataset("digits")
    bunch = load_digits()
    assert len(dataset) == 1797
    assert dataset.name == "digits"
    for index in [0, 1, 900, 1796]:
        image, label = dataset[index]
        pixels = np.asarray(image)
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_array_equal(pixels[:, :, 1], np.rint(bunch.images[index] / 16 * 255))
        assert label == bunch.target[index]


@pytest.mark.parametrize(
    ("classes", "expected"), [("0-6", [0, 1, 2, 3, 4, 5, 6]), ("0,1,2", [0, 1, 2]), ("7", [7]), ("8-9,3", [8, 9, 3])]
)
def test_digits_of_some_classes(classes: str, expected: list[int]) -> None:
    dataset = open_dataset(f"digits?classes={classes}")
    assert dataset.name == f"digits[{classes}]"
    bunch = load_digits()
    rows = np.flatnonzero(np.isin(bunch.target, expected))
    assert len(dataset) == len(rows)
    for index in range(0, len(rows), 37):
        image, label = dataset[index]
        assert expected[label] == bunch.target[rows[index]]
        np.testing.assert_array_equal(np.asarray(image)[:, :, 0] > 0, bunch.images[rows[index]] > 0)


def test_digits_errors() -> None:
    for classes in ["a", "0-", "-1", "0,,1", "0:3"]:
        with pytest.raises(BadInput, match=f"cannot read classes={classes}"):
            open_dataset(f"digits?classes={classes}")
    for classes in ["0-10", "3,3", "6-0"]:
        with pytest.raises(BadInput, match="one or more different digits from 0 to 9"):
            open_dataset(f"digits?classes={classes}")
    with pytest.raises(BadInput, match="digits takes no path"):
        open_dataset("digits:0-6")


def test_specs_that_cannot_be_read() -> None:
    with pytest.raises(UnknownName, match="'zip' in 'zip:a'; there are: folder, npz, imglist, sheets, torchvis"):
        open_dataset("zip:a")
    with pytest.raises(UnknownName, match="digits has no option 'class'; it has: classes"):
        open_dataset("digits?class=1")
    with pytest.raises(UnknownName, match="folder has no option 'split'; it has: scramble, rows, long_tail, take"):
        open_dataset("folder:x?split=test")
    with pytest.raises(UnknownName, match="'target'; it has: split, root, download"):
        open_dataset("torchvision:CIFAR10?target=1")
    for spec in ["digits?classes", "digits?classes=", "digits?=3", "digits?classes=1&"]:
        with pytest.raises(BadInput, match=r"write \?name=value&name=value"):
            open_dataset(spec)


def test_importing_the_package_loads_none_of_this() -> None:
    code = "import ood_scores, sys; assert not {'torchvision', 'sklearn', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- images that need no download -----------------------------------------------------------------------------------


def test_digits_split_is_stratified_complete_and_fixed_by_the_seed() -> None:
    split = digits_split([5, 2, 7], seed=3)
    images, labels = digits([5, 2, 7])
    assert split.train_images.dtype == split.test_images.dtype == np.uint8
    assert split.train_labels.dtype == split.test_labels.dtype == np.int64
    assert split.train_images.shape[1:] == split.test_images.shape[1:] == (8, 8)

    def rows(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
        return sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True))

    halves = rows(split.train_images, split.train_labels) + rows(split.test_images, split.test_labels)
    assert sorted(halves) == rows(images, labels)
    for label in range(3):
        n_test = np.count_nonzero(split.test_labels == label)
        assert abs(n_test - 0.3 * np.count_nonzero(labels == label)) < 1.5
    for one, same in zip(split, digits_split([5, 2, 7], seed=3), strict=True):
        np.testing.assert_array_equal(one, same)
    assert not np.array_equal(split.test_images, digits_split([5, 2, 7], seed=4).test_images)


@pytest.mark.parametrize("make", [photo_patches, uniform_noise, gaussian_noise])
def test_generated_images(make: Any) -> None:
    images = make(500)
    assert images.shape == (500, 8, 8)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, make(500, seed=0))
    assert not np.array_equal(images, make(500, seed=1))
    assert make(3, size=16).shape == (3, 16, 16)
    ImageArrays(images)


def test_noise_has_the_distribution_it_says() -> None:
    uniform = uniform_noise(2000).ravel()
    assert (uniform.min(), uniform.max()) == (0, 255)
    assert abs(uniform.mean() - 127.5) < 1
    assert abs(uniform.std() - np.sqrt((256**2 - 1) / 12)) < 1
    normal = gaussian_noise(2000).ravel()
    assert abs(normal.mean() - 127.5) < 1
    assert abs(np.mean(np.abs(normal - 127.5) < 63.75) - 0.6827) < 0.01


def test_photo_patches_have_structure_that_noise_lacks() -> None:
    def neighbour_difference(images: np.ndarray) -> float:
        return float(np.abs(np.diff(images.astype(float), axis=2)).mean() / images.std())

    patches = photo_patches(1000)
    assert patches.std(axis=(1, 2)).mean() > 15
    assert neighbour_difference(patches) < 0.4 * neighbour_difference(uniform_noise(1000))
    with pytest.raises(BadInput, match="give a size from 1 to 54"):
        photo_patches(1, size=55)
