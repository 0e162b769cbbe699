"""
5. Training for detection: L2 norm and RNA on the digits
========================================================

Training can make features more telling. Two methods of the literature, on a network that trains in seconds:
L2-normalized features (Haas et al. 2024), and representation norm amplification with auxiliary images (RNA, Shin et
al. 2024).
"""

# %%
# Three recipes
# -------------
# A recipe is a TOML file or, here, a dictionary. All three train the same network on the digits 0 to 6. RNA also
# sees images that are out of distribution, here noise; it is tested on others.

from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from torch.utils.data import DataLoader

import ood_scores
import ood_scores.demo
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.digits import digits, digits_split, photo_patches, uniform_noise
from ood_scores.models.opening import load_model, preprocessing
from ood_scores.training import train
from ood_scores.training.recipe_file import recipe_from

folder = Path(mkdtemp())
split = digits_split(range(7))
np.savez(folder / "train.npz", images=split.train_images, labels=split.train_labels)
np.savez(folder / "noise.npz", images=uniform_noise(1000))

shared = {
    "epochs": 12,
    "batch_size": 64,
    "drop_last": True,
    "model": {"name": "digit_net"},
    "data": {"train": f"npz:{folder / 'train.npz'}"},
    "optimizer": {"lr": 0.05, "weight_decay": 5e-4},
    "schedule": {"name": "cosine"},
}
recipes = {
    "cross-entropy": {"objective": {"name": "cross_entropy"}},
    "L2 norm": {"objective": {"name": "l2_norm"}},
    "RNA": {"objective": {"name": "rna"}, "auxiliary": {"data": f"npz:{folder / 'noise.npz'}"}},
}
accuracies = {}
for name, own in recipes.items():
    trained = train(recipe_from({**shared, **own}), folder / name, progress=False)
    accuracies[name] = round(trained.accuracy["training"], 3)
accuracies

# %%
# What training did to the norm
# -----------------------------
# The length of the features becomes a score. In the networks that saw nothing but digits, photographs have features as
# long as theirs; after RNA, they are short.

from ood_scores.plotting.curves import Panel, score_histograms

sets = {
    "test": (split.test_images, split.test_labels),
    "unseen digits": (digits(range(7, 10))[0], None),
    "photographs": (photo_patches(300), None),
}
panels, rows = {}, []
for name in recipes:
    model = load_model("digit_net", folder / name / "last.safetensors")
    feats = {}
    for each, (images, labels) in sets.items():
        loader = DataLoader(ImageArrays(images, labels, preprocessing(model)), batch_size=256)
        feats[each] = ood_scores.extract(model, loader, progress=False)
    test = feats.pop("test")
    ood = {each: ood_scores.score("feature_norm", other) for each, other in feats.items()}
    panels[name] = Panel(ood_scores.score("feature_norm", test), ood)
    table = ood_scores.evaluate(["feature_norm", "msp", "energy"], id=test, ood=feats, progress=False)
    rows.append(table.assign(training=name))

figure = score_histograms(panels)

# %%

import pandas as pd

pd.concat(rows).pivot_table(index=["training", "scorer"], columns="ood", values="auroc").round(3)

# %%
# The digits are easy, and one seed is no evidence. The recipes of the papers, for GPUs, are in
# ``benchmarks/recipes``:
#
# .. code-block:: sh
#
#    ood-scores train benchmarks/recipes/haas_resnet18_60_l2.toml
#    ood-scores train benchmarks/recipes/rna_cifar10_lt.toml
#
# :doc:`/training` explains recipes, and :doc:`/reproduction` what was measured.
