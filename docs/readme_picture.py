"""Draw the picture of the README from real images: run ``OOD_SCORES_DATA=FOLDER python docs/readme_picture.py``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

import ood_scores
from ood_scores.data.sources import open_dataset
from ood_scores.models.opening import load_model, preprocessing
from ood_scores.plotting.curves import Panel, score_histograms

DATA = Path(os.environ["OOD_SCORES_DATA"])
PICTURE = Path(__file__).parent / "images" / "scores.png"
SCORERS = ("msp", "energy", "gradnorm", "knn", "vim", "cadref")
OOD = {"CIFAR-100": "cifar100_test", "Textures": "textures", "scenes": "scenes", "MNIST": "mnist_test"}
CACHES = Path(mkdtemp()) if len(sys.argv) < 2 else Path(sys.argv[1])
COLORS = 96


def main() -> None:
    model = load_model("cifar_resnet20", checkpoint=DATA / "checkpoints" / "cifar10_resnet20.safetensors").eval()

    def feats(name: str) -> ood_scores.FeatureSet:
        dataset = open_dataset(f"sheets:{DATA}/images/{name}", preprocessing(model))
        return ood_scores.extract(
            model, DataLoader(dataset, batch_size=16), cache=CACHES / f"{name[:13]}.h5", channels_last=True
        )

    fit, test = feats("cifar10_train?take=25000"), feats("cifar10_test")
    others = {title: feats(name) for title, name in OOD.items()}
    panels = {}
    for name in SCORERS:
        scorer = ood_scores.create_scorer(name)
        if scorer.fit_needs:
            scorer.fit(fit)
        panels[name] = Panel(scorer.score(test), {title: scorer.score(other) for title, other in others.items()})
    figure = score_histograms(panels)
    figure.canvas.draw()
    pixels = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    PICTURE.parent.mkdir(exist_ok=True)
    pixels.quantize(COLORS).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
