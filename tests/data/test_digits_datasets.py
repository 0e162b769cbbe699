"""Handwritten digits and generated images, which need no download."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.digits import digits, digits_split, gaussian_noise, photo_patches, uniform_noise
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput


def test_digits_are_those_of_scikit_learn() -> None:
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
    with pytest.raises(BadInput, match="digits has no path"):
        open_dataset("digits:0-6")


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
def test_generated_images_depend_on_the_seed(make: Any) -> None:
    images = make(500)
    assert images.shape == (500, 8, 8)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, make(500, seed=0))
    assert not np.array_equal(images, make(500, seed=1))
    assert make(3, size=16).shape == (3, 16, 16)
    ImageArrays(images)


def test_noise_arrays_have_the_documented_distribution() -> None:
    uniform = uniform_noise(2000).ravel()
    assert (uniform.min(), uniform.max()) == (0, 255)
    assert abs(uniform.mean() - 127.5) < 1
    assert abs(uniform.std() - np.sqrt((256**2 - 1) / 12)) < 1
    normal = gaussian_noise(2000).ravel()
    assert abs(normal.mean() - 127.5) < 1
    assert abs(np.mean(np.abs(normal - 127.5) < 63.75) - 0.6827) < 0.01


def test_photo_patches_have_structure_that_noise_lacks() -> None:
    def neighbor_difference(images: np.ndarray) -> float:
        return float(np.abs(np.diff(images.astype(float), axis=2)).mean() / images.std())

    patches = photo_patches(1000)
    assert patches.std(axis=(1, 2)).mean() > 15
    assert neighbor_difference(patches) < 0.4 * neighbor_difference(uniform_noise(1000))
    with pytest.raises(BadInput, match="pass a size from 1 to 54"):
        photo_patches(1, size=55)
