"""Halves of a feature set: rows to fit on, and the reference rows whose scores the others are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from ood_scores.features.featureset import FeatureSet

SEED = 0


def halves(feats: FeatureSet) -> tuple[Tensor, Tensor]:
    """Draw half of the rows of each class, and return their numbers and those of the other rows, ascending.

    Both halves have rows of every class with at least two rows. All rows of a set without labels are one class. The
    draw depends on nothing but the labels and the number of rows.
    """
    order = torch.randperm(len(feats), generator=torch.Generator().manual_seed(SEED))
    if feats.labels is not None:
        order = order[feats.labels.cpu()[order].argsort(stable=True)]
    return order[::2].sort().values, order[1::2].sort().values
