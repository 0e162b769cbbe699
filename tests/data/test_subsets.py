"""The options that every dataset takes, variables and relative paths in specs, noise."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.images import ImageArrays, ImageDataset
from ood_scores.data.kinds.digits import digits
from ood_scores.data.long_tail import labels_of, long_tail
from ood_scores.data.sources import open_dataset
from ood_scores.data.subsets import ChosenImages, ScrambledImages, seen_through
from ood_scores.errors import BadInput, BadLabels, EmptyInput, MissingData, UnknownName


def pixels(dataset: ImageDataset, index: int) -> np.ndarray:
    return np.asarray(dataset.load(index)[0])


def numbered(n: int, labels: Any = None) -> ImageArrays:
    """The pixels of an image say its row, up to 65,535."""
    rows = np.arange(n)
    images = np.stack([rows // 256, rows % 256, 0 * rows], axis=1).astype(np.uint8)[:, None, None]
    return ImageArrays(np.ascontiguousarray(np.broadcast_to(images, (n, 2, 2, 3))), labels, name="numbered")


def rows_of(dataset: ImageDataset) -> list[int]:
    corners = [pixels(dataset, index)[0, 0].astype(int) for index in range(len(dataset))]
    return [256 * high + low for high, low, _ in corners]


# --- some rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["0:5", "5:", ":-3", "::4", "2:9:3", "-4:", "::-1", ":"])
def test_rows_are_a_slice(rows: str) -> None:
    chosen = slice(*(int(bound) if bound else None for bound in rows.split(":")))
    dataset = seen_through(numbered(12), {"rows": rows})
    assert rows_of(dataset) == list(range(12))[chosen]
    assert dataset.name == f"numbered[rows={rows}]"


@given(st.integers(1, 300), st.integers(1, 320))
def test_take_chooses_evenly_spaced_rows(n: int, wanted: int) -> None:
    chosen = rows_of(seen_through(numbered(n), {"take": str(wanted)}))
    numbers = range(n)
    assert chosen == list(numbers[:: max(1, len(numbers) // wanted)][:wanted])
    assert len(chosen) == min(n, wanted)


def test_take_on_the_rows_that_a_slice_leaves() -> None:
    dataset = open_dataset("digits?take=5&rows=100:200")
    images, labels = digits()
    assert dataset.name == "digits[rows=100:200][take=5]"
    for index, row in enumerate(range(100, 200, 20)):
        np.testing.assert_array_equal(pixels(dataset, index)[:, :, 0], images[row])
    assert labels_of(dataset).tolist() == labels[100:200:20].tolist()


def test_long_tail() -> None:
    dataset = open_dataset("digits?long_tail=10&take=50")
    tail = long_tail(ImageArrays(*digits()), 10)
    assert dataset.name == "digits-LT[10][take=50]"
    step = len(tail) // 50
    assert labels_of(dataset).tolist() == tail.labels[::step][:50].tolist()
    assert [dataset[index][1] for index in range(50)] == labels_of(dataset).tolist()
    with pytest.raises(BadLabels, match="says no labels"):
        open_dataset("noise:uniform?long_tail=10")


def test_options_that_cannot_be_applied() -> None:
    for option in ["rows=5", "rows=a:b", "rows=1:2:3:4", "rows=::0", "take=0", "take=-1", "take=1.5", "scramble=x"]:
        with pytest.raises(BadInput, match=f"cannot read {option}; write"):
            open_dataset(f"digits?{option}")
    with pytest.raises(BadInput, match="cannot read long_tail=much; write how many times"):
        open_dataset("digits?long_tail=much")
    with pytest.raises(EmptyInput, match=r"digits\[rows=5:5\] has no images; digits has 1797"):
        open_dataset("digits?rows=5:5")
    with pytest.raises(UnknownName, match="noise has no option 'root'; it has: n, size, seed, scramble, rows"):
        open_dataset("noise:uniform?root=x")


# --- items, labels and transforms of what is seen through options ---------------------------------------------------


class Unreadable(ImageArrays):
    def load(self, index: int) -> Any:
        raise AssertionError("no image is needed")


def test_labels_are_known_without_an_image() -> None:
    images, labels = digits()
    dataset = seen_through(Unreadable(images, labels), {"scramble": "0", "rows": "::-1", "long_tail": "2", "take": "7"})
    reverse = labels[::-1]
    kept = long_tail(ImageArrays(images[::-1], reverse), 2).indices
    assert labels_of(dataset).tolist() == reverse[kept][:: len(kept) // 7][:7].tolist()


def test_the_transform_may_be_set_later() -> None:
    spec = "digits?scramble=1&rows=3:900&long_tail=3&take=4"
    dataset = open_dataset(spec)
    assert isinstance(dataset[0][0], Image.Image)
    dataset.transform = pil_to_tensor
    given_at_once = open_dataset(spec, pil_to_tensor)
    assert [image.sum() for image, _ in DataLoader(dataset, None)] == [given_at_once[i][0].sum() for i in range(4)]


def test_the_transform_of_a_long_tail_is_the_datasets() -> None:
    tail = long_tail(long_tail(numbered(12, [0] * 8 + [1] * 4), 2), 2)
    tail.transform = np.asarray
    assert tail.transform is tail.dataset.dataset.transform is np.asarray  # type: ignore[attr-defined]
    assert isinstance(tail[0][0], np.ndarray)
    plain: Any = [0, 1]
    bare = long_tail(plain, 1, labels=[0, 0])
    assert bare.transform is None
    with pytest.raises(BadInput, match="list has no transform to set"):
        bare.transform = np.asarray


def test_indices_as_a_sequence_has_them() -> None:
    dataset = seen_through(numbered(10), {"scramble": "3", "rows": "4:8"})
    np.testing.assert_array_equal(pixels(dataset, -1), pixels(dataset, 3))
    assert isinstance(dataset, ChosenImages)
    for broken in (dataset, dataset.dataset):
        with pytest.raises(IndexError):
            broken.load(len(broken))


def test_the_same_in_spawned_workers_in_any_order() -> None:
    specs = ["digits?scramble=4&rows=0:90&take=4", "digits?long_tail=9&take=4"]
    dataset: Any = ConcatDataset([open_dataset(spec, pil_to_tensor) for spec in specs])
    noise = open_dataset("noise:gaussian?n=4&size=8", pil_to_tensor)
    for each in (dataset, noise):
        backwards = list(range(len(each)))[::-1]
        loader = DataLoader(each, None, sampler=backwards, num_workers=1, multiprocessing_context="spawn")
        for index, item in zip(backwards, loader, strict=True):
            assert all(np.array_equal(here, there) for here, there in zip(item, each[index], strict=True))


# --- scrambled images -----------------------------------------------------------------------------------------------


def test_scrambled_images_keep_their_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
    images[5] = images[4]
    dataset = ScrambledImages(ImageArrays(images, range(6)), 0)
    for row in range(6):
        scrambled = pixels(dataset, row)
        assert scrambled.shape == (5, 7, 3)
        assert Counter(map(bytes, scrambled.reshape(-1, 3))) == Counter(map(bytes, images[row].reshape(-1, 3)))
        assert not np.array_equal(scrambled, images[row])
    assert not np.array_equal(pixels(dataset, 4), pixels(dataset, 5))  # each image has its own order
    assert dataset.load(2)[1] == 2


def test_every_place_is_as_likely() -> None:
    lit = np.zeros((4000, 2, 3, 3), dtype=np.uint8)
    lit[:, 0, 0] = 255
    dataset = ScrambledImages(ImageArrays(lit), 7)
    places = np.array([pixels(dataset, row)[:, :, 0].ravel().argmax() for row in range(4000)])
    assert np.abs(np.bincount(places, minlength=6) / 4000 - 1 / 6).max() < 0.03


def test_scrambling_depends_on_the_seed_and_the_row_in_the_whole_set() -> None:
    whole = open_dataset("digits?scramble=5")
    some = open_dataset("digits?rows=100:&scramble=5&take=3")
    assert (whole.name, some.name) == ("digits[scramble=5]", "digits[scramble=5][rows=100:][take=3]")
    step = (1797 - 100) // 3
    for index in range(3):
        np.testing.assert_array_equal(pixels(some, index), pixels(whole, 100 + index * step))
    assert not np.array_equal(pixels(open_dataset("digits?scramble=6"), 0), pixels(whole, 0))
    np.testing.assert_array_equal(pixels(pickle.loads(pickle.dumps(some)), 1), pixels(some, 1))


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise(kind: str) -> None:
    dataset = open_dataset(f"noise:{kind}?n=40&size=12&seed=3")
    assert (len(dataset), dataset.name) == (40, f"{kind}_noise")
    assert isinstance(dataset[0], Image.Image)  # no label
    np.testing.assert_array_equal(pixels(open_dataset(f"noise:{kind}?n=9&size=12&seed=3"), 8), pixels(dataset, 8))
    assert not np.array_equal(pixels(open_dataset(f"noise:{kind}?n=40&size=12&seed=4"), 8), pixels(dataset, 8))
    assert not np.array_equal(pixels(dataset, 7), pixels(dataset, 8))
    with pytest.raises(IndexError):
        dataset.load(40)
    assert pixels(open_dataset(f"noise:{kind}"), 9999).shape == (32, 32, 3)


def test_noise_has_the_distribution_it_says_in_every_channel() -> None:
    gaussian, uniform = (
        np.stack([pixels(open_dataset(f"noise:{kind}"), row) for row in range(60)]).reshape(-1, 3).astype(float)
        for kind in ("gaussian", "uniform")
    )
    assert np.abs(gaussian.mean(axis=0) - 127.5).max() < 1.5
    assert np.abs((np.abs(gaussian - 127.5) < 63.75).mean(axis=0) - 0.6827).max() < 0.01
    assert np.abs(uniform.mean(axis=0) - 127.5).max() < 1.5
    assert np.abs(uniform.std(axis=0) - np.sqrt((256**2 - 1) / 12)).max() < 1.5
    for sample in (gaussian, uniform):
        assert np.abs(np.corrcoef(sample.T) - np.eye(3)).max() < 0.02


def test_noise_errors() -> None:
    with pytest.raises(UnknownName, match="no noise 'pink'; there are: gaussian, uniform"):
        open_dataset("noise:pink")
    for option in ["n=0", "size=-1", "seed=a"]:
        with pytest.raises(BadInput, match=f"cannot read {option}; write a whole number from"):
            open_dataset(f"noise:uniform?{option}")


# --- variables and relative paths -----------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "list.txt").write_text("0.png 4\n2.png 5\n")
    return tmp_path


def test_variables_of_the_environment(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", str(three))
    monkeypatch.setenv("ROWS", "1:")
    for spec in ["folder:$MY_DATA/pictures?rows=$ROWS", "folder:${MY_DATA}/pictures?rows=${ROWS}"]:
        assert rows_of(open_dataset(spec)) == [256, 512]
    assert labels_of(open_dataset("imglist:$MY_DATA/list.txt?root=${MY_DATA}/pictures")).tolist() == [4, 5]


def test_a_dollar_sign_is_written_twice(three: Path) -> None:
    (three / "pictures").rename(three / "$x")
    assert len(open_dataset(f"folder:{three}/$$x")) == 3
    with pytest.raises(BadInput, match=r"write \$NAME or \$\{NAME\}, and \$\$ for a dollar sign"):
        open_dataset(f"folder:{three}/$")


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_labels_of_torchvision_sets_that_keep_pairs(tmp_path: Path) -> None:
    for label in (0, 14):
        path = tmp_path / "gtsrb" / "GTSRB" / "Training" / f"{label:05d}" / "1.ppm"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (3, 3)).save(path)
    dataset = open_dataset(f"torchvision:GTSRB?split=train&root={tmp_path}&rows=1:")
    assert labels_of(dataset).tolist() == [1] == [dataset[0][1]]  # torchvision numbers the folders
