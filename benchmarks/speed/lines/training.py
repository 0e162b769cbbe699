"""The overhead of the trainer over forward and backward passes: one epoch, with everything ``ood-scores train`` does.

On a CPU the networks are narrow, which makes the overhead relatively larger.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.speed.measure import Figure, Line, paired, scaled
from ood_scores.training.distributed import Processes
from ood_scores.training.recipe_file import load_recipe
from ood_scores.training.setup import prepare
from ood_scores.training.trainer import Run

RECIPES = Path(__file__).parents[2] / "recipes"


@dataclass(frozen=True)
class Epoch:
    """A recipe, the number of random training images, and other settings."""

    recipe: str
    images: int
    settings: Sequence[str] = ()
    auxiliary: bool = False


ON_CPU = (
    Epoch("haas_resnet18_60_l2", 1280, ["model.width=16", "batch_size=128", "data.validation=0"]),
    Epoch("rna_cifar10_lt", 640, ["model.width=16", "data.long_tail=1"], auxiliary=True),
)
ON_GPU = (
    Epoch("haas_resnet18_60_l2", 50_176, ["amp=bf16", "channels_last=true", "data.validation=0"]),
    Epoch("rna_cifar10_lt", 12_800, ["amp=bf16", "channels_last=true", "data.long_tail=1"], auxiliary=True),
)


def training(scale: float) -> Iterator[Line | Figure]:
    """Measure epochs on the CPU."""
    yield from epochs(ON_CPU, torch.device("cpu"), scale)


def epochs(of: Sequence[Epoch], device: torch.device, scale: float) -> Iterator[Line | Figure]:
    """Measure one epoch of each against forward and backward passes of the same batches, and its images per second."""
    for epoch in of:
        with tempfile.TemporaryDirectory() as folder:
            yield from _one(epoch, Path(folder), device, scaled(scale, epoch.images, least=256))


def _one(epoch: Epoch, folder: Path, device: torch.device, images: int) -> Iterator[Line | Figure]:
    data = _random_images(folder / "images.npz", images)
    settings = [f"data.train={data}", f"data.test={data}", "epochs=1", *epoch.settings]
    if epoch.auxiliary:
        settings.append(f"auxiliary.data={data}")
    recipe = load_recipe(RECIPES / f"{epoch.recipe}.toml", settings)
    who = Processes(device=device)
    prepared = prepare(recipe, who, folder)
    batch = recipe.stages[0].batch_size
    inputs = torch.randn(batch * (2 if epoch.auxiliary else 1), 3, 32, 32, device=device)
    inputs = inputs.contiguous(memory_format=torch.channels_last) if recipe.channels_last else inputs
    labels = torch.arange(len(inputs), device=device) % 10

    def bare() -> None:
        for _ in range(images // batch):
            prepared.model.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.amp == "bf16"):
                logits = prepared.model(inputs)
            cross_entropy(logits.float(), labels).backward()

    line = paired(
        f"train {epoch.recipe}, an epoch of {images:,} images ({', '.join(epoch.settings)})",
        lambda: Run(recipe, folder, who, prepared, None).train(show=False),
        f"forward and backward pass of the network, batches of {len(inputs)} that are there",
        bare,
        better="higher",
        pairs=3,
    )
    yield line
    yield Figure(f"Training speed of {epoch.recipe}", line.name, images // batch * batch / line.ours_s, "images/s")


def _random_images(path: Path, count: int) -> str:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 10)
    return f"npz:{path}"
