"""Checksums of datasets: what changes them, and what does not."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ood_scores.data.fingerprint import SAMPLED, fingerprint
from ood_scores.data.images import ImageArrays
from ood_scores.data.sources import open_dataset

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (200, 4, 4, 3), dtype=np.uint8)
ROWS, LABELS = np.arange(200), np.arange(200) % 3


def test_checksum_of_few_images_by_hand() -> None:
    images = hashlib.sha256(b"".join(b"RGB (4, 4)" + PIXELS[row].tobytes() for row in (5, 2)))
    expected = hashlib.sha256(np.array([1, 0], "<i8").tobytes() + images.digest()).hexdigest()
    assert fingerprint(ImageArrays(PIXELS), np.array([5, 2]), np.array([1, 0])) == expected


def test_labels_rows_and_images_change_the_checksum() -> None:
    whole = fingerprint(ImageArrays(PIXELS), ROWS, LABELS)
    assert fingerprint(ImageArrays(PIXELS.copy()), ROWS, LABELS) == whole
    others = [
        fingerprint(ImageArrays(PIXELS), ROWS, np.roll(LABELS, 1)),
        fingerprint(ImageArrays(PIXELS), ROWS[::-1], LABELS),
        fingerprint(ImageArrays(PIXELS), ROWS[:199], LABELS[:199]),
        fingerprint(ImageArrays(255 - PIXELS), ROWS, LABELS),
        fingerprint(ImageArrays(PIXELS.reshape(200, 2, 8, 3)), ROWS, LABELS),
    ]
    assert len({whole, *others}) == 6


def test_evenly_spaced_images_are_read() -> None:
    read: list[int] = []

    class Watched(ImageArrays):
        def load(self, index: int) -> tuple[Image.Image, int | None]:
            read.append(index)
            return super().load(index)

    fingerprint(Watched(PIXELS), ROWS, LABELS)
    assert read[:SAMPLED] == read[SAMPLED:] == [row * 200 // SAMPLED for row in range(SAMPLED)]


def test_images_that_are_drawn_at_random_do_not_count() -> None:
    class Random(ImageArrays):
        def load(self, index: int) -> tuple[Image.Image, int | None]:
            return Image.fromarray(RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)), None

    first, again = (fingerprint(Random(PIXELS), ROWS, LABELS) for _ in range(2))
    assert first == again != fingerprint(Random(PIXELS), ROWS, np.roll(LABELS, 1))


def test_place_and_dates_of_files_do_not_count(tmp_path: Path) -> None:
    for number, pixels in enumerate(PIXELS[:6]):
        (tmp_path / "here" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "here" / str(number % 2) / f"{number}.png")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for path in (tmp_path / "there").rglob("*.png"):
        os.utime(path, (1, 1))
    here, there = (
        fingerprint(open_dataset(f"folder:{tmp_path / name}"), np.arange(6), LABELS[:6]) for name in ("here", "there")
    )
    assert here == there
