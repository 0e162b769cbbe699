"""Images in arrays."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from ood_scores.data.images import ImageArrays
from ood_scores.errors import BadInput, BadLabels, EmptyInput, ShapeMismatch


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
    with pytest.raises(BadInput, match="dtype float64: pass uint8"):
        ImageArrays(images / 255)  # type: ignore[arg-type]
    with pytest.raises(ShapeMismatch, match=r"shape \[3, 3, 8, 8\]: pass \[N, H, W, 3\]"):
        ImageArrays(images.transpose(0, 3, 1, 2))
    with pytest.raises(ShapeMismatch, match=r"shape \[8, 8\]"):
        ImageArrays(images[0, :, :, 0])
    with pytest.raises(EmptyInput, match="arrays has no images"):
        ImageArrays(images[:0])
    with pytest.raises(ShapeMismatch, match=r"labels have shape \[2\] for 3 images"):
        ImageArrays(images, [0, 1])
    with pytest.raises(ShapeMismatch, match=r"labels have shape \[3, 2\]"):
        ImageArrays(images, np.zeros((3, 2), dtype=int))
    with pytest.raises(BadLabels, match="labels have dtype float64: pass integers"):
        ImageArrays(images, [0.0, 1.0, 2.0])
