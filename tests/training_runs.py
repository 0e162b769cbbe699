"""Small training runs, and their initial models and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import tiny
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ood_scores.data.sources import open_dataset
from ood_scores.models.opening import preprocessing
from ood_scores.training import Trained, state, train
from ood_scores.training.augment import seed_of
from ood_scores.training.recipe_file import recipe_from

ID = "digits?classes=0-6"
OOD: dict[str, Any] = {"data": "digits?classes=7-9"}


def run(out: Path, **changes: Any) -> Trained:
    return train(recipe_from(tiny.tables(**changes)), out, device="cpu", progress=False)


def weights(path: Path) -> dict[str, Tensor]:
    return state.read_tensors(path)


def digit_images(classes: str = "0-6") -> tuple[Tensor, Tensor]:
    """Return digits as model inputs, and their labels."""
    data = open_dataset(f"digits?classes={classes}", preprocessing(timm.create_model("tiny_net")))
    images, labels = next(iter(DataLoader(data, batch_size=len(data))))
    return images, labels


def fresh_model(seed: int) -> Any:
    """Return the initial network of a training run with this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "model"))
        return timm.create_model("tiny_net", num_classes=7)


def imbalanced(folder: Path, counts: list[int], first: int = 0) -> str:
    labels = np.repeat(np.arange(first, first + len(counts)), counts)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=labels)
    return f"npz:{folder}/data.npz"
