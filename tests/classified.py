"""Features around class means with a linear head, some of them predicted incorrectly, for tests of scorers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from ood_scores import FeatureSet, Head, score

Array = NDArray[np.float64]
CLASSES, WIDTH = 5, 8


def rows(count: int, seed: int) -> tuple[Array, NDArray[np.int64]]:
    """Features around class means, some predicted incorrectly, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    return MEANS[labels] + rng.normal(size=(count, WIDTH)), labels


MEANS = 1.5 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
WEIGHT, BIAS = MEANS / 3, np.linspace(-0.2, 0.2, CLASSES)
FIT, labels_of_fit = rows(300, seed=0)
ROWS = np.concatenate([rows(40, seed=1)[0], 3 * np.random.default_rng(2).normal(size=(20, WIDTH))])
FIT_LOGITS, LOGITS = FIT @ WEIGHT.T + BIAS, ROWS @ WEIGHT.T + BIAS
PREDICTED, predicted_of_fit = LOGITS.argmax(axis=1), FIT_LOGITS.argmax(axis=1)
HEAD = Head(WEIGHT, BIAS)
TRAIN = FeatureSet(FIT, FIT_LOGITS, labels_of_fit, HEAD)
FEATS = FeatureSet(ROWS, LOGITS, head=HEAD)


def ours(name: str, feats: FeatureSet = FEATS, fit: FeatureSet = TRAIN, **params: Any) -> Array:
    return score(name, feats, fit=fit, **params).numpy()


def layer() -> nn.Linear:
    head = nn.Linear(WIDTH, CLASSES, dtype=torch.float64).requires_grad_(False)
    head.weight.copy_(torch.tensor(WEIGHT))
    head.bias.copy_(torch.tensor(BIAS))
    return head


def same(found: Array, theirs: Tensor, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(found, -theirs.detach().double().numpy(), rtol=rtol, atol=1e-12)
    assert spearmanr(found, -theirs.detach()).statistic > 1 - 1e-9


def float32(detector: Any) -> Any:
    """Fit and predict with a float32 head: fDBD and NCI of pytorch-ood cast features to float32."""
    detector.head.float()
    return detector.fit_features(torch.tensor(FIT)).predict_features(torch.tensor(ROWS))
