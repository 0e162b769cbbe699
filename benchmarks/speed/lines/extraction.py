"""The overhead of extraction and detectors over the model, on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

import ood_scores
from benchmarks.speed.measure import Figure, Line, paired, scaled
from ood_scores.detector.e_values import e_values


def extraction(scale: float) -> Iterator[Line | Figure]:
    """Measure ``extract`` to HDF5 against a plain loop over the same model, and what a call costs for a single row."""
    model = timm.create_model("resnet50").eval()
    size = scaled(scale, 32)
    batches = [torch.randn(size, 3, 224, 224) for _ in range(4)]

    def bare_loop() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    with tempfile.TemporaryDirectory() as folder:
        yield _constant(model, Path(folder) / "one.h5")
        yield paired(
            f"extract to HDF5, ResNet-50, 224 px, float32, batch {size}",
            partial(ood_scores.extract, model, batches, Path(folder) / "cache.h5", progress=False, overwrite=True),
            "bare forward loop",
            bare_loop,
            better="higher",
            asked=0.97,
            pairs=5,
        )


def _constant(model: torch.nn.Module, file: Path) -> Figure:
    """Measure what a call of ``extract`` costs beyond the model, with a single small image."""
    image = torch.randn(1, 3, 32, 32)
    ours = partial(ood_scores.extract, model, [image], file, progress=False, overwrite=True)
    line = paired("", ours, "", torch.inference_mode()(partial(model, image)), better="lower", pairs=11)
    how = "extract of one 32 px image to HDF5, less the model alone, medians of 11 runs"
    return Figure("constant cost of a call of extract, ResNet-50", how, line.ours_s - line.baseline_s, "s")


def detector(scale: float) -> Iterator[Line]:
    """Measure ``Detector.predict`` against the same model alone."""
    model = timm.create_model("resnet18").eval()
    size = scaled(scale, 64)
    images = torch.randn(size, 3, 224, 224)
    features = torch.rand(10_000, 512)
    classifier: Any = model.get_submodule("fc")
    head = ood_scores.Head(classifier.weight, classifier.bias)
    feats = ood_scores.FeatureSet(features, head(features), torch.arange(len(features)) % 1000, head)

    def bare() -> None:
        with torch.inference_mode():
            model(images)

    for scorer in ("energy", "gradnorm", "mahalanobis"):
        found = ood_scores.calibrate(scorer, model, fit=feats[:5000], id=feats[5000:])
        yield paired(
            f"Detector.predict with {scorer}, ResNet-18, 224 px, batch {size}",
            partial(found.predict, images),
            "bare model",
            bare,
            better="lower",
        )
    with_sets = ood_scores.calibrate("energy", model, id=feats[5000:], sets="aps")

    def everything() -> None:
        e_values(with_sets.calibration.scores, with_sets.predict(images).score)

    yield paired(
        f"Detector.predict with energy, label sets and e-values, ResNet-18, 224 px, batch {size}",
        everything,
        "bare model",
        bare,
        better="lower",
        asked=1.05,
    )
