"""
3. Choosing a score
===================

Scores that look different in a table may not be. This page compares all of them, draws their intervals, and tunes one
on validation data. :doc:`/choosing` has the same for real images.
"""

# %%
# Features of a network for the digits 0 to 6; see the tutorial before.

from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from torch.utils.data import DataLoader

import ood_scores
import ood_scores.demo
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.digits import digits, digits_split, photo_patches
from ood_scores.models.opening import load_model, preprocessing
from ood_scores.training import train
from ood_scores.training.recipe_file import recipe_from

folder = Path(mkdtemp())
split = digits_split(range(7))
np.savez(folder / "train.npz", images=split.train_images, labels=split.train_labels)
recipe = {
    "epochs": 8,
    "model": {"name": "digit_net"},
    "data": {"train": f"npz:{folder / 'train.npz'}"},
    "objective": {"name": "cross_entropy"},
    "optimizer": {"lr": 0.1},
}
train(recipe_from(recipe), folder / "run", progress=False)
model = load_model("digit_net", folder / "run" / "last.safetensors")


def features(images, labels=None):
    dataset = ImageArrays(images, labels, preprocessing(model))
    return ood_scores.extract(model, DataLoader(dataset, batch_size=256), progress=False)


fit = features(split.train_images, split.train_labels)
test = features(split.test_images, split.test_labels)
ood = {"unseen digits": features(digits(range(7, 10))[0]), "photographs": features(photo_patches(500))}

# %%
# All scores at once
# ------------------

table = ood_scores.evaluate("all", id=test, ood=ood, fit=fit, progress=False)
means = table.groupby("scorer")["auroc"].mean().sort_values(ascending=False)
print(f"{len(means)} scorers; {len(table.attrs['left_out'])} need probes, texts, or several models")
means.head(10).round(4)

# %%
# How sure is that?
# -----------------
# DeLong's intervals of the AUROC on the unseen digits, which are the harder set. Where they overlap widely, the
# order may be chance.

from matplotlib.figure import Figure

from ood_scores.evaluation.uncertainty import auroc_interval, compare_auroc

near = ood["unseen digits"]
best = means.index[:8]
scores = {name: (ood_scores.score(name, test, fit=fit), ood_scores.score(name, near, fit=fit)) for name in best}
intervals = {name: auroc_interval(*pair) for name, pair in scores.items()}

figure = Figure(figsize=(6, 3), layout="constrained")
axes = figure.subplots()
for place, each in enumerate(intervals.values()):
    axes.plot([each.low, each.high], [place, place], color="#0072b2")
    axes.plot(each.value, place, "o", color="#0072b2")
axes.set_yticks(range(len(best)), best)
axes.invert_yaxis()
axes.set_xlabel("AUROC on unseen digits, 95% interval")

# %%
# The scores of two scorers on the same rows are correlated; a paired test takes that into account:

compare_auroc(scores[best[0]], scores[best[-1]])

# %%
# Parameters
# ----------
# ``sweep`` evaluates a grid. Use validation data, never the sets you report: here the photographs choose, and the
# unseen digits are reported.

grid = ood_scores.sweep("knn", {"k": [1, 5, 20, 50]}, id=test[::2], ood={"photographs": ood["photographs"]}, fit=fit)
grid[["k", "auroc", "fpr95_id"]].round(4)
