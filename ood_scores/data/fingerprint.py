"""Checksums of datasets, which tell other images of the same name and number."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ood_scores.data.images import ImageDataset

SAMPLED = 64
"""Number of images that are read."""


def fingerprint(dataset: ImageDataset, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> str:
    """Return a SHA-256 of the labels of some rows of a dataset, and of up to ``SAMPLED`` of their images.

    The images are evenly spaced and are read at their own size, so that their place and dates do not matter. If a
    second reading differs, as that of a dataset that draws its images at random, only the labels count.

    Args:
        dataset: the dataset.
        rows: the numbers of the rows ``[N]``, at least one.
        labels: their labels ``[N]``.

    Raises:
        BadInput: if an image cannot be read.
    """
    count = min(len(rows), SAMPLED)
    sampled = rows[np.arange(count) * len(rows) // count]
    digest, again = (_of_images(dataset, sampled) for _ in range(2))
    content = np.asarray(labels, "<i8").tobytes() + (digest if digest == again else b"")
    return hashlib.sha256(content).hexdigest()


def _of_images(dataset: ImageDataset, rows: NDArray[np.int64]) -> bytes:
    checksum = hashlib.sha256()
    for row in rows.tolist():
        image, _ = dataset.load(row)
        checksum.update(f"{image.mode} {image.size}".encode() + image.tobytes())
    return checksum.digest()
