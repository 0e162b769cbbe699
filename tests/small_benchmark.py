"""A benchmark that runs in two seconds: random images of 8 x 8 pixels and an untrained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file

import ood_scores.models.networks  # noqa: F401  registers the CIFAR networks
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Preprocessing, Spec

CLASSES = 4
ROWS = {"fits": 60, "test": 40, "cousins": 30, "dark": 25, "shifted": 20, "val_id": 24, "val_ood": 24}


def write_data(folder: Path, checkpoints: int = 1) -> None:
    """Write NPZ files of labeled images, and checkpoints 0.safetensors, 1.safetensors, …"""
    rng = np.random.default_rng(0)
    for number, (name, rows) in enumerate(ROWS.items()):
        labels = np.arange(rows) % CLASSES
        brightness = 30 * labels + (80 if "dark" in name or "ood" in name else 0)
        images = rng.integers(0, 80 + 5 * number, (rows, 8, 8, 3)) + brightness[:, None, None, None]
        if name == "cousins":
            labels = np.where(np.arange(rows) % 3 == 0, labels, -1)
        np.savez(folder / f"{name}.npz", images=images.clip(0, 255).astype(np.uint8), labels=labels)
    for seed in range(checkpoints):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = timm.create_model("cifar_resnet20", num_classes=CLASSES)
        save_file(network.state_dict(), folder / f"{seed}.safetensors")


def part(**changes: Any) -> Part:
    """Create a part with some fields changed; paths are relative to the folder of the data."""
    given: dict[str, Any] = {
        "title": "Small",
        "models": (ModelTable("cifar_resnet20", "Net", "0.safetensors"),),
        "sets": {name: f"npz:{name}.npz" for name in ROWS},
        "id": "test",
        "near": ("cousins",),
        "far": ("dark",),
        "fit": "fits",
        "preprocessing": Preprocessing(input_size=(8, 8)),
        "extraction": Extraction(batch_size=8, workers=0),
    }
    return Part(**given | changes)


def spec(*parts: Part) -> Spec:
    return Spec("small", "Small", parts or (part(),))
