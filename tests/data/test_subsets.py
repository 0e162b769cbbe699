"""Options of every kind of dataset: subsets of rows, long tails, scrambled pixels."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_images import numbered, pixels, rows_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.digits import digits
from ood_scores.data.long_tail import labels_of, long_tail
from ood_scores.data.sources import open_dataset
from ood_scores.data.subsets import ChosenImages, ScrambledImages, seen_through, validation_split
from ood_scores.errors import BadInput, BadLabels, EmptyInput, UnknownName

# --- some rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["0:5", "5:", ":-3", "::4", "2:9:3", "-4:", "::-1", ":"])
def test_rows_option_is_a_slice(rows: str) -> None:
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


def test_long_tail_option() -> None:
    dataset = open_dataset("digits?long_tail=10&take=50")
    tail = long_tail(ImageArrays(*digits()), 10)
    assert dataset.name == "digits-LT[10][take=50]"
    step = len(tail) // 50
    assert labels_of(dataset).tolist() == tail.labels[::step][:50].tolist()
    assert [dataset[index][1] for index in range(50)] == labels_of(dataset).tolist()
    with pytest.raises(BadLabels, match="has no labels in"):
        open_dataset("noise:uniform?long_tail=10")


def test_only_some_classes_are_renumbered_in_the_order_of_the_text() -> None:
    images, labels = digits()
    dataset = open_dataset("digits?only=7,2-3")
    rows = np.flatnonzero(np.isin(labels, [7, 2, 3]))
    numbers = {7: 0, 2: 1, 3: 2}
    assert labels_of(dataset).tolist() == [numbers[label] for label in labels[rows].tolist()]
    assert [dataset[index][1] for index in range(5)] == labels_of(dataset)[:5].tolist()
    np.testing.assert_array_equal(pixels(dataset, 4)[:, :, 0], images[rows[4]])
    assert dataset.name == "digits[3 classes]"
    assert dataset.label_order != open_dataset("digits?only=2,3,7").label_order
    assert len(open_dataset("digits?rows=10:20&only=7,2-3")) == 10


def test_only_keeps_the_names_of_the_classes(tmp_path: Path) -> None:
    for name in ("ant", "bee", "cow"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / name / "a.png")
    dataset = open_dataset(f"folder:{tmp_path}?only=2,0")
    assert dataset.class_names == ("cow", "ant")
    assert labels_of(dataset).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("a", "write numbers"),
        ("1-", "write numbers"),
        ("1,1", "each once"),
        ("5-4", "at least one"),
    ],
)
def test_invalid_classes_are_refused(classes: str, message: str) -> None:
    with pytest.raises(BadInput, match=f"cannot read only={classes}: .*{message}"):
        open_dataset(f"digits?only={classes}")
    with pytest.raises(BadInput, match=r"cannot read only=3,12: digits has no image of class 12"):
        open_dataset("digits?only=3,12")


def test_invalid_subset_options_are_refused() -> None:
    for option in ["rows=5", "rows=a:b", "rows=1:2:3:4", "rows=::0", "take=0", "take=-1", "take=1.5", "scramble=x"]:
        with pytest.raises(BadInput, match=f"cannot read {option}: write"):
            open_dataset(f"digits?{option}")
    with pytest.raises(BadInput, match="cannot read long_tail=much: write how many times"):
        open_dataset("digits?long_tail=much")
    with pytest.raises(EmptyInput, match=r"digits\[rows=5:5\] has no images: digits has 1797"):
        open_dataset("digits?rows=5:5")
    with pytest.raises(UnknownName, match="noise has no option 'root': choose from n, size, seed, classes, scramble"):
        open_dataset("noise:uniform?root=x")


# --- items, labels and transforms of what is seen through options -----------------------------------------------------


class Unreadable(ImageArrays):
    def load(self, index: int) -> Any:
        raise AssertionError("no image is needed")


def test_subset_labels_are_known_without_reading_images() -> None:
    images, labels = digits()
    dataset = seen_through(Unreadable(images, labels), {"scramble": "0", "rows": "::-1", "long_tail": "2", "take": "7"})
    reverse = labels[::-1]
    kept = long_tail(ImageArrays(images[::-1], reverse), 2).indices
    assert labels_of(dataset).tolist() == reverse[kept][:: len(kept) // 7][:7].tolist()


def test_subset_transform_can_be_set_later() -> None:
    spec = "digits?scramble=1&rows=3:900&long_tail=3&take=4"
    dataset = open_dataset(spec)
    assert isinstance(dataset[0][0], Image.Image)
    dataset.transform = pil_to_tensor
    given_at_once = open_dataset(spec, pil_to_tensor)
    assert [image.sum() for image, _ in DataLoader(dataset, None)] == [given_at_once[i][0].sum() for i in range(4)]


def test_long_tail_sets_the_transform_of_its_dataset() -> None:
    tail = long_tail(long_tail(numbered(12, [0] * 8 + [1] * 4), 2), 2)
    tail.transform = np.asarray
    assert tail.transform is tail.dataset.dataset.transform is np.asarray  # type: ignore[attr-defined]
    assert isinstance(tail[0][0], np.ndarray)
    plain: Any = [0, 1]
    bare = long_tail(plain, 1, labels=[0, 0])
    assert bare.transform is None
    with pytest.raises(BadInput, match="list has no transform to set"):
        bare.transform = np.asarray


def test_subset_indices_may_be_negative() -> None:
    dataset = seen_through(numbered(10), {"scramble": "3", "rows": "4:8"})
    np.testing.assert_array_equal(pixels(dataset, -1), pixels(dataset, 3))
    assert isinstance(dataset, ChosenImages)
    for broken in (dataset, dataset.dataset):
        with pytest.raises(IndexError):
            broken.load(len(broken))


def test_random_images_are_the_same_in_spawned_workers() -> None:
    specs = ["digits?scramble=4&rows=0:90&take=4", "digits?long_tail=9&take=4"]
    dataset: Any = ConcatDataset([open_dataset(spec, pil_to_tensor) for spec in specs])
    noise = open_dataset("noise:gaussian?n=4&size=8", pil_to_tensor)
    for each in (dataset, noise):
        backwards = list(range(len(each)))[::-1]
        loader = DataLoader(each, None, sampler=backwards, num_workers=1, multiprocessing_context="spawn")
        for index, item in zip(backwards, loader, strict=True):
            assert all(np.array_equal(here, there) for here, there in zip(item, each[index], strict=True))


# --- scrambled images -------------------------------------------------------------------------------------------------


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


def test_scrambling_is_uniform() -> None:
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


# --- the validation split of training recipes ------------------------------------------------------------------------


def test_validation_options_split_a_dataset_as_a_recipe_does() -> None:
    """The sets are the images on which a recipe with the same share trains, and those that it holds out."""
    labels = labels_of(open_dataset("digits"))
    kept, aside = validation_split(labels, 0.1)
    trained, held_out = open_dataset("digits?without_validation=0.1"), open_dataset("digits?validation=0.1")
    assert isinstance(trained, ChosenImages)
    assert isinstance(held_out, ChosenImages)
    assert (list(trained.indices), list(held_out.indices)) == (kept.tolist(), aside.tolist())
    assert labels_of(held_out).tolist() == labels[aside].tolist()
    assert held_out.name.endswith("[validation=0.1]")
    tail = open_dataset("digits?long_tail=2&validation=0.1")
    assert len(tail) < len(held_out)


@pytest.mark.parametrize("share", ["0", "1", "1.5", "a", "nan"])
def test_validation_share_out_of_range_is_refused(share: str) -> None:
    with pytest.raises(BadInput, match=f"cannot read without_validation={share}: write the share"):
        open_dataset(f"digits?without_validation={share}")
