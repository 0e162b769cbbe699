"""The demo: handwritten digits, a small network trained in two ways, and every scorer; offline, in half a minute."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from ood_scores.atomic import make_folder, replacing
from ood_scores.benchmark import Results, plan
from ood_scores.benchmark import run as run_benchmark
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Spec
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.digits import digits, digits_split, photo_patches, uniform_noise
from ood_scores.models.networks.classifier import PooledClassifier, cifar_cfg, init_he
from ood_scores.optional_packages import installed
from ood_scores.progress import stderr_console
from ood_scores.training import Recipe, train
from ood_scores.training.recipe_file import recipe_from
from ood_scores.training.state import LAST

__all__ = ["DigitNet"]

ID_CLASSES = range(7)
UNSEEN_CLASSES = range(7, 10)
FAR_IMAGES = 500
NEAR, FAR = ("unseen",), ("photo", "noise")
OOD = (*NEAR, *FAR)
DRAWN = ("msp", "energy", "gradnorm", "feature_norm", "mahalanobis", "knn")
"""Scorers in the figure, one of each family."""

TRAININGS = ("cross_entropy", "l2_norm")
"""Training objectives. Both minimize the cross-entropy; in the second, the classifier sees only the direction of the
features."""

_HALF = (0.5, 0.5, 0.5)
default_cfgs = generate_default_cfgs({"digit_net": cifar_cfg(mean=_HALF, std=_HALF) | {"input_size": (3, 8, 8)}})


class DigitNet(PooledClassifier):
    """Three convolutions, global average pooling, and a linear classifier: ``[N, 1, 8, 8]`` to ``[N, 7]``."""

    def __init__(self, num_classes: int = len(ID_CLASSES), in_chans: int = 1) -> None:
        super().__init__(in_chans, num_features=64)
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.reset_classifier(num_classes)
        init_he(self)

    def forward_features(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)))


@register_model
def digit_net(pretrained: bool = False, **kwargs: Any) -> DigitNet:
    return build_model_with_cfg(DigitNet, "digit_net", pretrained, **kwargs)


@dataclass(frozen=True)
class Demo:
    """The results of the demo.

    Attributes:
        results: Results of the benchmark; the column ``model`` names the training.
        caches: Path of the feature cache by training and dataset.
    """

    results: Results
    caches: Mapping[str, Mapping[str, Path]]


def run(out: Path, seed: int = 0, epochs: int = 30, progress: bool = True) -> Demo:
    """Train two networks, compare all scorers on them, and write caches, tables, a report, and a figure to a folder.

    Without the packages of the extra ``report``, there is neither report nor figure.
    """
    data = image_sets(seed)
    inputs = out / "inputs" / f"seed{seed}"
    make_folder(inputs)
    for name, images in data.items():
        labelled: dict[str, Any] = {} if images.labels is None else {"labels": images.labels}
        np.savez(inputs / f"{name}.npz", images=images.images, **labelled)
    with one_thread():
        for training in TRAININGS:
            if progress:
                stderr_console().print(f"training a network: {training}")
            how = recipe(training, inputs / "train.npz", seed, epochs)
            train(how, inputs / training, device="cpu", progress=progress)
    spec = benchmark()
    results = run_benchmark(spec, out=out, data=inputs, jobs=1, progress=False)
    if installed("matplotlib"):
        _draw(results, out / "scores.png")
    units = plan(spec, out, inputs).units
    caches = {unit.model: {job.set: job.cache for job in unit.jobs} for unit in units}
    return Demo(results, caches)


def _draw(results: Results, path: Path) -> None:
    """Draw the scores of ``DRAWN`` on the test set and each OoD dataset, by scorer and training."""
    from ood_scores.plotting.curves import Panel, score_histograms

    panels = {
        f"{name}, {scored.model}": Panel(scored.scores[name]["id"], {ood: scored.scores[name][ood] for ood in OOD})
        for scored in results.scored
        for name in DRAWN
    }
    figure = io.BytesIO()
    score_histograms({title: panels[title] for title in sorted(panels)}, columns=4).savefig(figure, dpi=150)
    with replacing(path) as file:
        file.write(figure.getvalue())


def benchmark() -> Spec:
    """Return the comparison as a benchmark specification."""
    part = Part(
        title="Handwritten digits",
        models=tuple(ModelTable("digit_net", training, f"{training}/{LAST}") for training in TRAININGS),
        sets={name: f"npz:{name}.npz" for name in ("train", "test", *OOD)},
        fit="train",
        id="test",
        near=NEAR,
        far=FAR,
        extraction=Extraction(channels_last=True, batch_size=256, workers=0),
    )
    return Spec("demo", part.title, (part,))


def image_sets(seed: int) -> dict[str, ImageArrays]:
    """Return digits 0 to 6 for training and test; digits 7 to 9, photograph patches, and noise, without labels."""
    split = digits_split(ID_CLASSES, seed)
    unlabelled = {
        "unseen": digits(UNSEEN_CLASSES)[0],
        "photo": photo_patches(FAR_IMAGES, seed=seed),
        "noise": uniform_noise(FAR_IMAGES, seed=seed),
    }
    return {
        "train": ImageArrays(split.train_images, split.train_labels, name="digits 0 to 6, training"),
        "test": ImageArrays(split.test_images, split.test_labels, name="digits 0 to 6, test"),
        **{name: ImageArrays(images, name=name) for name, images in unlabelled.items()},
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, because the networks are too small to gain from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def recipe(training: str, images: Path, seed: int, epochs: int) -> Recipe:
    """Return the recipe of one of ``TRAININGS`` on a file of images."""
    return recipe_from(
        {
            "epochs": epochs,
            "seed": seed,
            "model": {"name": "digit_net"},
            "data": {"train": f"npz:{images}"},
            "objective": {"name": training},
            "optimizer": {"lr": 0.1, "weight_decay": 5e-4},
            "schedule": {"name": "steps", "milestones": [max(1, epochs // 2), max(1, 3 * epochs // 4)]},
        }
    )
