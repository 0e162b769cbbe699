"""
4. Your own scorer, probe, and dataset
======================================

Whatever you add is one class or one function, and works in every table, on the command line, and in files.
"""

# %%
# A scorer
# --------
# Its parameters are fields. ``score_block`` gets a block of rows; a fitted scorer names the statistics that it
# needs, which are collected in one pass for all scorers.

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import ood_scores
from ood_scores.features.statistics.means import FeatureMean
from ood_scores.scorers.base import fitted


@ood_scores.register_scorer("distance_to_mean")
@dataclass
class DistanceToMean(ood_scores.Scorer):
    """Minus the distance to the mean of the training features, to a power."""

    needs = fit_needs = ("features",)
    power: float = 1.0
    mean_: Any = fitted()

    def statistics(self):
        return (FeatureMean(),)

    def fit_statistics(self, found, feats):
        self.mean_ = found[FeatureMean()]

    def score_block(self, block):
        return -((block.features - self.mean_.to(block.features)).norm(dim=1) ** self.power)


# %%
# Check it as the package's own scorers are checked: the same scores in blocks of any size, from disk, in half
# precision, after saving and loading, and errors that say what to do.

from ood_scores.testing import check_probe, check_scorer

check_scorer(DistanceToMean)

# %%
# A probe
# -------
# It computes something more while the model runs, here the logits of the mirrored image.

from ood_scores.probes import Probe, register_probe


@register_probe
@dataclass(frozen=True)
class Mirrored(Probe):
    """Logits of the mirrored image."""

    name: str = "mirrored"

    def columns(self, done, seen):
        return {self.name: done.run(done.inputs.flip(-1))}


check_probe(Mirrored)


# %%
# A scorer that reads it: how much the prediction changes when the image is mirrored.


@ood_scores.register_scorer("mirror_agreement")
@dataclass
class MirrorAgreement(ood_scores.Scorer):
    """Minus the distance between the softmax of an image and that of its mirror image."""

    needs = ("logits", "mirrored")

    def score_block(self, block):
        return -(block.softmax() - block.extras["mirrored"].double().softmax(dim=1)).norm(dim=1)


# %%
# A dataset
# ---------
# Any dataset of PyTorch works with ``extract``. A function that is registered as a kind can be named in a file or a
# command.

from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.kinds.digits import digits_split, photo_patches


@register_dataset_kind("stripes")
def open_stripes(target, base, *, n="200"):
    """Open ``stripes?n=200``: striped images of 8 x 8 pixels."""
    images = np.zeros((int(n), 8, 8), np.uint8)
    images[:, ::2] = np.random.default_rng(0).integers(100, 256, (int(n), 1, 1), dtype=np.uint8)
    return ImageArrays(images, name="stripes")


from ood_scores.data.sources import open_dataset

stripes = open_dataset("stripes?n=100")

# %%
# All together
# ------------

split = digits_split()
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
inputs, labels = torch.from_numpy(split.train_images) / 255, torch.from_numpy(split.train_labels)
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(60):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def features(images, labels=None):
    batch = torch.from_numpy(np.stack(images)) / 255
    batches = [batch if labels is None else (batch, torch.from_numpy(labels))]
    return ood_scores.extract(model.eval(), batches, probes=["mirrored"], progress=False)


train = features(split.train_images, split.train_labels)
test = features(split.test_images, split.test_labels)
ood = {"stripes": features(stripes.images), "photographs": features(photo_patches(300))}
table = ood_scores.evaluate(["distance_to_mean", "mirror_agreement", "energy"], id=test, ood=ood, fit=train)
table[["scorer", "ood", "auroc", "fpr95_id"]].round(3)

# %%
from ood_scores.plotting.curves import Panel, score_histograms

panels = {}
for name in ["distance_to_mean", "mirror_agreement"]:
    id_scores = ood_scores.score(name, test, fit=train)
    panels[name] = Panel(id_scores, {each: ood_scores.score(name, feats, fit=train) for each, feats in ood.items()})
figure = score_histograms(panels)

# %%
# An idea is not yet a score: stripes are their own mirror image, and the second score takes them for the most typical
# digits. That is what tables are for.
#
# In a file ``mine.py``, the same classes work with ``--import mine.py`` on every command: see :doc:`/own_code`.
