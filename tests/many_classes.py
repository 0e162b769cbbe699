"""Features around the means of 15 classes and their logits, for tests of scorers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ood_scores import FeatureSet

Array = NDArray[np.float64]
CLASSES, WIDTH = 15, 6
MEANS = 1.5 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))


def rows(count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return MEANS[np.arange(count) % CLASSES] + 0.5 * rng.normal(size=(count, WIDTH))


FIT, ROWS = rows(400, seed=0), np.concatenate([rows(40, seed=1), np.random.default_rng(2).normal(size=(20, WIDTH))])
FIT_LOGITS, LOGITS = FIT @ MEANS.T, ROWS @ MEANS.T
TRAIN, FEATS = FeatureSet(FIT, FIT_LOGITS), FeatureSet(ROWS, LOGITS)
