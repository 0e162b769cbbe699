"""NumPy archives of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_images import items
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput


def test_npz_with_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "val.npz", images=images, labels=np.array([3, 0, -1, 2], dtype=np.int8))
    dataset = open_dataset(f"npz:{tmp_path}/val.npz")
    assert dataset.name == "val"
    assert [label for _, label in items(dataset)] == [3, 0, -1, 2]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image, _ in items(dataset)]), images)


def test_npz_of_gray_images_without_labels(tmp_path: Path) -> None:
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
