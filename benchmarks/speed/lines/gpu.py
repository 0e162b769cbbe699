"""The cost of extraction, scores, fits, detectors and training on a CUDA device; without one, there are no lines."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import ood_scores
from benchmarks.speed.lines.data import CLASSES, WIDTH, random_set
from benchmarks.speed.lines.training import ON_GPU, epochs
from benchmarks.speed.measure import Figure, Line, Product, paired, scaled, timed
from ood_scores.features import Block
from ood_scores.scorers.one_pass import fit_all

BATCH, BATCHES = 256, 100
BANK, QUERIES, K = 1_281_167, 10_000, 50
FIT_ROWS = 400_000
SIDE = 8192


def gpu(scale: float) -> Iterator[Line | Figure]:
    if torch.cuda.is_available():
        for section in SECTIONS.values():
            yield from section(scale)


def _resnet50() -> nn.Module:
    return timm.create_model("resnet50").eval().cuda().to(memory_format=torch.channels_last)


def _pixels(scale: float) -> int:
    return 224 if scale == 1 else 64


def extraction(scale: float) -> Iterator[Line]:
    """Measure ``extract`` to HDF5 on copies of one batch, so that loading images takes no time."""
    model = _resnet50()
    size, count, pixels = scaled(scale, BATCH), scaled(scale, BATCHES, least=2), _pixels(scale)
    pinned = torch.randn(size, 3, pixels, pixels).to(memory_format=torch.channels_last).pin_memory()
    there = pinned.cuda()

    def bare_loop() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            for _ in range(count):
                model(there)

    for batch, where, asked in ((there, "on the device", 0.95), (pinned, "streamed from pinned memory", 0.90)):
        with tempfile.TemporaryDirectory() as folder:
            yield paired(
                f"extract to HDF5 on a GPU, ResNet-50, {pixels} px, bf16, channels last, {count} x {size} {where}",
                partial(_extract, model, [batch] * count, Path(folder) / "cache.h5"),
                "bare forward loop of images on the device",
                bare_loop,
                better="higher",
                asked=asked,
                pairs=3,
            )


def _extract(model: nn.Module, batches: list[Tensor], path: Path) -> None:
    ood_scores.extract(
        model, batches, path, device="cuda", amp="bf16", channels_last=True, progress=False, overwrite=True
    )


def scoring(scale: float) -> Iterator[Line]:
    """Measure the scores of one block of features and logits against copying the bytes that they read."""
    rows = scaled(scale, 500_000)
    feats, _ = random_set(rows, "cuda")
    source = torch.empty(scaled(scale, 2**30), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for name in ("gradnorm", "energy", "feature_norm"):
        scorer = ood_scores.create_scorer(name)
        read = sum(width for column, width in (("features", WIDTH), ("logits", CLASSES)) if column in scorer.needs)

        def score(scorer: ood_scores.Scorer = scorer) -> Tensor:
            block = Block(feats.features, feats.logits)
            block.postponed = []  # as in a pass over a set, which waits once for each block
            return scorer.score_block(block)

        yield paired(
            f"{name}, {rows:,} x {WIDTH:,}, C={CLASSES:,}, from device memory",
            score,
            "what it reads, at the speed of a copy from device memory to device memory",
            partial(target.copy_, source),
            better="higher",
            asked=0.6,
            baseline_share=2 * len(source) / (4 * rows * read),
        )


def neighbors(scale: float) -> Iterator[Line]:
    """Measure exact neighbors in a bank of ImageNet's size against the operations of the products."""
    name, ours, _, _ = search(scale)
    bank, queries = scaled(scale, BANK, least=1000), scaled(scale, QUERIES, least=100)
    product = Product(scaled(scale, SIDE, least=512), torch.float32, "cuda")
    share = product.flops / (2 * bank * queries * WIDTH)
    at_the_speed = f"2 N M D operations at the speed of a {product}"
    yield paired(name, ours, at_the_speed, product.runner(), better="lower", pairs=3, baseline_share=share)


def faiss_neighbors(scale: float) -> Iterator[Line | Figure]:
    """Measure the same against faiss's GPU index in a process of its own, which a faiss for other GPUs ends."""
    command = [sys.executable, "-m", "benchmarks.speed.lines.faiss_gpu", str(scale)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True)
    yield from (Line(**json.loads(text)) for text in done.stdout.splitlines() if text.startswith("{"))
    if done.returncode:
        yield Figure("faiss's GpuIndexFlatL2 fails", "exit status of its process", done.returncode, "")


def search(scale: float) -> tuple[str, Callable[[], Tensor], Tensor, Tensor]:
    """Return the name of a search, the search, the bank on the CPU, and the normalized rows to search for."""
    bank, queries = scaled(scale, BANK, least=1000), scaled(scale, QUERIES, least=100)
    scorer = ood_scores.create_scorer("knn", k=K).fit(random_set(bank, "cuda")[0])
    feats, _ = random_set(queries, "cuda")
    name = f"Exact knn on a GPU, k={K}, {queries:,} rows against {bank:,} x {WIDTH:,}"
    return name, partial(scorer.score, feats), vars(scorer)["bank_"], torch.nn.functional.normalize(feats.features)


def fits(scale: float) -> Iterator[Line]:
    """Measure fits on a set in device memory against the operations of a product of the features with themselves."""
    rows = scaled(scale, FIT_ROWS, least=3 * WIDTH if scale == 1 else 500)
    width, classes = (WIDTH, CLASSES) if scale == 1 else (64, 10)
    product = Product(scaled(scale, SIDE, least=512), torch.float64, "cuda")
    run = product.runner()
    for names, columns in ((("mahalanobis", "vim"), width), (("gmm",), min(512, width))):
        features = torch.rand(rows, columns, device="cuda")
        head = ood_scores.Head(torch.randn(classes, columns, device="cuda"))
        labels = torch.arange(rows, device="cuda") % classes
        feats = ood_scores.FeatureSet(features, head(features), labels, head)

        def fit(feats: ood_scores.FeatureSet = feats, names: tuple[str, ...] = names) -> None:
            feats.statistics.clear()
            fit_all([ood_scores.create_scorer(name) for name in names], feats)

        yield paired(
            f"Fit of {' and '.join(names)} on a GPU, {rows:,} x {columns:,} float32, C={classes:,}",
            fit,
            f"2 N D^2 operations at the speed of a {product}",
            run,
            better="lower",
            pairs=3,
            baseline_share=product.flops / (2 * rows * columns**2),
        )


def detector(scale: float) -> Iterator[Line]:
    """Measure ``Detector.predict`` on images in device memory against the model alone."""
    model = _resnet50()
    size = scaled(scale, BATCH, least=2)
    pixels = _pixels(scale)
    images = torch.randn(size, 3, pixels, pixels, device="cuda")
    features = torch.rand(scaled(scale, 10_000, least=2000), WIDTH)
    classifier: Any = model.get_submodule("fc")
    head = ood_scores.Head(classifier.weight.detach().cpu(), classifier.bias.detach().cpu())
    feats = ood_scores.FeatureSet(features, head(features), torch.arange(len(features)) % CLASSES, head)

    def bare() -> None:
        with torch.inference_mode():
            model(images)

    for scorer in ("energy", "gradnorm", "knn"):
        found = ood_scores.calibrate(scorer, model, fit=feats[::2], id=feats[1::2], device="cuda")
        yield paired(
            f"Detector.predict with {scorer} on a GPU, ResNet-50, {pixels} px, batch {size}",
            partial(found.predict, images),
            "bare model",
            bare,
            better="lower",
            pairs=7,
        )


def training(scale: float) -> Iterator[Line | Figure]:
    """Measure epochs of recipes; at a smaller scale, of narrow networks in small batches."""
    narrow = [] if scale == 1 else ["model.width=4", "batch_size=128"]
    of = [replace(epoch, settings=[*epoch.settings, *narrow]) for epoch in ON_GPU]
    yield from epochs(of, torch.device("cuda", 0), scale)


SECTIONS: dict[str, Callable[[float], Iterable[Line | Figure]]] = {
    "scoring": scoring,
    "neighbors": neighbors,
    "fits": fits,
    "extraction": extraction,
    "detector": detector,
    "training": training,
    "faiss": faiss_neighbors,
}


def profile(scale: float, folder: Path) -> str:
    """Profile an extraction; write the trace into the folder, and return the table of the longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    model = _resnet50()
    pixels = _pixels(scale)
    batches = [torch.randn(scaled(scale, BATCH, least=2), 3, pixels, pixels).pin_memory()] * 5
    with tempfile.TemporaryDirectory() as caches:
        run = partial(_extract, model, batches, Path(caches) / "cache.h5")
        timed(run)
        with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            timed(run)
    found.export_chrome_trace(str(folder / "trace.json"))
    return found.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)
