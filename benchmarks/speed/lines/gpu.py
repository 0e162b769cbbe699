"""The cost of extraction, scores and training on a CUDA device; without one, there are no lines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor

import ood_scores
from benchmarks.speed.lines.data import CLASSES, WIDTH, random_set
from benchmarks.speed.lines.training import ON_GPU, epochs
from benchmarks.speed.measure import Figure, Line, paired, scaled
from ood_scores.features import Block

BATCH, BATCHES = 256, 100


def gpu(scale: float) -> Iterator[Line | Figure]:
    if torch.cuda.is_available():
        yield from _extraction(scale)
        yield from _scoring(scale)
        yield from epochs(ON_GPU, torch.device("cuda", 0), scale)


def _extraction(scale: float) -> Iterator[Line]:
    """Measure ``extract`` to HDF5 on copies of one batch, so that loading images takes no time."""
    model = timm.create_model("resnet50").eval().cuda().to(memory_format=torch.channels_last)
    size, count = scaled(scale, BATCH), scaled(scale, BATCHES, least=2)
    pinned = torch.randn(size, 3, 224, 224).to(memory_format=torch.channels_last).pin_memory()
    there = pinned.cuda()

    def bare_loop() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            for _ in range(count):
                model(there)

    for batch, where, asked in ((there, "on the device", 0.95), (pinned, "streamed from pinned memory", 0.90)):
        with tempfile.TemporaryDirectory() as folder:
            yield paired(
                f"extract to HDF5 on a GPU, ResNet-50, 224 px, bf16, channels last, {count} x {size} images {where}",
                partial(_extract, model, [batch] * count, Path(folder) / "cache.h5"),
                "bare forward loop of images on the device",
                bare_loop,
                better="higher",
                asked=asked,
                pairs=5,
            )


def _extract(model: torch.nn.Module, batches: list[Tensor], path: Path) -> None:
    ood_scores.extract(
        model, batches, path, device="cuda", amp="bf16", channels_last=True, progress=False, overwrite=True
    )


def _scoring(scale: float) -> Iterator[Line]:
    """Measure the scores of one block of features and logits against copying the bytes that they read."""
    rows = scaled(scale, 500_000)
    feats, _ = random_set(rows, "cuda")
    source = torch.empty(scaled(scale, 2**30), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for name in ("gradnorm", "energy", "feature_norm"):
        scorer = ood_scores.create_scorer(name)
        read = sum(width for column, width in (("features", WIDTH), ("logits", CLASSES)) if column in scorer.needs)
        yield paired(
            f"{name}, {rows:,} x {WIDTH:,}, C={CLASSES:,}, from device memory",
            lambda scorer=scorer: scorer.score_block(Block(feats.features, feats.logits)),  # type: ignore[misc]
            "what it reads, at the speed of a copy from device memory to device memory",
            partial(target.copy_, source),
            better="higher",
            asked=0.6,
            baseline_share=2 * len(source) / (4 * rows * read),
        )
