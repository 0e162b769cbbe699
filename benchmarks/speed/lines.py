"""The lines of the speed table, each with its baseline."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import ood_scores
from benchmarks.speed.measure import Line, paired


def gradnorm() -> Iterator[Line]:
    """GradNorm at ImageNet's width: 50,000 rows of 2,048 features and 1,000 classes, from RAM."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(50_000, 2048, generator=generator)
    head = nn.Linear(2048, 1000)
    with torch.no_grad():
        feats = ood_scores.FeatureSet(features, head(features), head=ood_scores.Head(head.weight, head.bias))
    logits = feats.logits
    assert logits is not None

    def ours() -> object:
        return ood_scores.score("gradnorm", feats)

    def one_read() -> object:
        return features.sum() + logits.sum()

    few = 100

    def per_sample_autograd() -> None:
        for row in features[:few]:
            head.zero_grad()
            (-head(row).log_softmax(dim=0).mean()).backward()
            assert head.weight.grad is not None
            head.weight.grad.abs().sum()

    yield paired("GradNorm, 50,000 x 2,048, C=1,000", ours, "one read of features and logits", one_read, better="lower")
    yield paired(
        "GradNorm, 50,000 x 2,048, C=1,000",
        ours,
        f"per-sample autograd of the last layer ({few} rows, scaled)",
        per_sample_autograd,
        better="higher",
        pairs=3,
        baseline_share=few / len(features),
    )


def extraction() -> Iterator[Line]:
    """extract to HDF5 against the same model called in a plain loop, ResNet-50 at 224 px, batch 32."""
    model = timm.create_model("resnet50").eval()
    batches = [torch.randn(32, 3, 224, 224) for _ in range(4)]

    def bare_loop() -> None:
        with torch.inference_mode():
            for batch in batches:
                model(batch)

    with tempfile.TemporaryDirectory() as folder:

        def ours() -> object:
            return ood_scores.extract(model, batches, Path(folder) / "cache.h5", progress=False, overwrite=True)

        yield paired(
            "extract to HDF5, ResNet-50, 224 px, float32",
            ours,
            "bare forward loop",
            bare_loop,
            better="higher",
            pairs=5,
        )


def detector() -> Iterator[Line]:
    """Detector.predict against the same model called by itself, ResNet-18 at 224 px, batch 64."""
    model = timm.create_model("resnet18").eval()
    images = torch.randn(64, 3, 224, 224)
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
            f"Detector.predict with {scorer}, ResNet-18, 224 px, batch 64",
            lambda found=found: found.predict(images),  # type: ignore[misc]
            "bare model",
            bare,
            better="lower",
        )


LINES: dict[str, Callable[[], Iterator[Line]]] = {
    "gradnorm": gradnorm,
    "extraction": extraction,
    "detector": detector,
}
