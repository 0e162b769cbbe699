"""Feature norms against accuracy and confidence, and changes of features during training by norm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, MissingInput, ShapeMismatch
from ood_scores.evaluation.neural_collapse import finite_blocks
from ood_scores.features import Block, FeatureSet, OneSet, Sets, as_feature_set
from ood_scores.runtime import default_torch_state

if TYPE_CHECKING:
    import pandas as pd

HAAS_EDGES = (10.0, 20.0, 30.0)
"""Edges of the norm groups of Haas et al. 2024 for models trained with L2; without L2 they use 5, 7 and 9."""


@default_torch_state()
def norm_groups(epochs: Sequence[OneSet], edges: Sequence[float] = HAAS_EDGES) -> pd.DataFrame:
    """Measure how much the features of each norm group change from one epoch to the next.

    Rows are grouped by the norm of their features in the last epoch. For group m with ``N_m`` rows, from epoch i-1 to
    epoch i::

        change_{m,i} = sum_n ||z_{n,i} - z_{n,i-1}||^2 / N_m,        total_{m,i} = sum_{j <= i} change_{m,j}

    Args:
        epochs: E feature sets of the same rows in the same order, one for each checkpoint. Only features are read, two
            blocks at a time, so sets on disk are not loaded as a whole.
        edges: Increasing edges; G-1 edges make G groups ``[0, e_1), [e_1, e_2), ..., [e_{G-1}, inf)``.

    Returns:
        A tidy data frame with one row for each epoch after the first and each group: ``epoch`` (1 to E-1), ``group``,
        ``low``, ``high``, ``rows``, ``change``, ``total``. ``change`` and ``total`` are NaN for a group without rows.

    Departures: the groups in the paper's text, [0,10), [10,20), [20,30) and [40,...), omit 30 to 40; here the last one
    begins where the previous one ends. The paper's square of a matrix is read as the mean over rows of the squared
    distance; a mean over coordinates as well would be D times smaller.

    Raises:
        BadInput: if there are fewer than two epochs, ``edges`` are not positive and increasing, or a set was extracted
            in random order.
        ShapeMismatch: if the sets have different numbers of rows or features.
        NotFinite: if features contain NaN or infinite values.

    Source: Haas, Yolland & Rabus 2024, Eq. 8, Fig. 3 (center) and Fig. 6.
    """
    import pandas as pd

    sets = [as_feature_set(epoch) for epoch in epochs]
    _check_epochs(sets)
    bounds = [0.0, *map(float, edges), float("inf")]
    if any(low >= high for low, high in pairwise(bounds)):
        raise BadInput(
            f"edges must be positive and increasing, got {list(edges)}: pass norms such as {list(HAAS_EDGES)}."
        )
    group = torch.bucketize(_norms(sets[-1]), torch.tensor(bounds[1:-1], dtype=torch.float64), right=True)
    rows = torch.bincount(group, minlength=len(bounds) - 1)
    sums = torch.stack([_moved(before, after, group, len(rows)) for before, after in pairwise(sets)])
    change = (sums / rows).numpy()
    steps, groups = change.shape
    return pd.DataFrame(
        {
            "epoch": np.repeat(np.arange(1, steps + 1), groups),
            "group": np.tile(np.arange(groups), steps),
            "low": np.tile(bounds[:-1], steps),
            "high": np.tile(bounds[1:], steps),
            "rows": np.tile(rows.numpy(), steps),
            "change": change.ravel(),
            "total": change.cumsum(axis=0).ravel(),
        }
    )


@default_torch_state()
def norm_bins(feats: Sets, bins: int = 125, *, scale: float = 1.0, labeled: bool = True) -> pd.DataFrame:
    """Compute the accuracy and the mean maximum softmax in bins of feature norms that hold equally many rows.

    Args:
        feats: Set with features, logits and, for the accuracy, labels.
        bins: Number of bins; Haas et al. use 125 bins of 80 test images. Rows with the same norm share a bin, so bins
            may be unequal and fewer if norms repeat.
        scale: Factor by which features are multiplied before the head, which changes the logits f to ``scale (f - b) +
            b``. Without it, the large norms of a model trained with L2 normalization saturate the softmax (Fig. 4,
            left). The paper's factor is tuned on test data and not published. The accuracy does not depend on it.
        labeled: Whether labels are classes of the model. If False, as for an OoD set, the accuracy is NaN.

    Returns:
        A tidy data frame with one row for each bin in order of the norm: ``low`` and ``high`` (smallest and largest
        norm), ``norm`` (mean), ``rows``, ``accuracy``, ``confidence``.

    Raises:
        BadInput: if ``bins`` is less than 1, or ``scale`` is not positive and finite.
        MissingInput: if there are no logits, or there is no head and ``scale`` is not 1.
        BadLabels: if there are no labels, or they are not class indices of the model.
        NotFinite: if features or logits contain NaN or infinite values.

    Source: Haas, Yolland & Rabus 2024, Fig. 4 (norm against softmax) and Fig. 7 (norm against accuracy).
    """
    import pandas as pd

    feats = as_feature_set(feats)
    _check_bins(feats, bins, scale)
    labels = feats.class_labels().cpu() if labeled else None
    rows = [_norm_and_confidence(block, scale) for block in finite_blocks(feats, "features", "logits")]
    norm, confidence, prediction = (torch.cat(parts).numpy() for parts in zip(*rows, strict=True))
    correct = np.full(len(norm), np.nan) if labels is None else (prediction == labels.numpy()).astype(np.float64)
    edges = np.sort(norm)[np.arange(1, bins) * len(norm) // bins]
    table = pd.DataFrame({"bin": np.searchsorted(edges, norm, side="right"), "norm": norm})
    table["accuracy"], table["confidence"] = correct, confidence
    grouped = table.groupby("bin", sort=True)
    found = grouped.agg(
        low=("norm", "min"),
        high=("norm", "max"),
        norm=("norm", "mean"),
        rows=("norm", "size"),
        accuracy=("accuracy", "mean"),
        confidence=("confidence", "mean"),
    )
    return found.reset_index(drop=True)


def _check_epochs(epochs: Sequence[FeatureSet]) -> None:
    if len(epochs) < 2:
        raise BadInput(f"at least two epochs are needed, got {len(epochs)}: pass one feature set per checkpoint.")
    shapes = {(len(feats), feats.num_features) for feats in epochs}
    if len(shapes) > 1:
        raise ShapeMismatch(f"the epochs have (rows, features) = {sorted(shapes)}: pass sets of the same rows.")
    if any(feats.provenance and feats.provenance.shuffled for feats in epochs):
        raise BadInput("an epoch was extracted in random order: extract all epochs without shuffling.")


def _norms(feats: FeatureSet) -> Tensor:
    blocks = finite_blocks(feats, "features")
    return torch.cat([torch.linalg.vector_norm(block.space("features"), dim=1) for block in blocks])


def _moved(before: FeatureSet, after: FeatureSet, group: Tensor, groups: int) -> Tensor:
    """Return the sum of squared distances from one epoch to the next in each group, float64 ``[G]``."""
    sums = torch.zeros(groups, dtype=torch.float64)
    pairs = zip(finite_blocks(before, "features"), finite_blocks(after, "features"), strict=True)
    for old, new in pairs:
        moved = (new.space("features") - old.space("features")).square().sum(dim=1)
        sums.index_add_(0, group[old.start : old.start + len(old)], moved)
    return sums


def _check_bins(feats: FeatureSet, bins: int, scale: float) -> None:
    if bins < 1:
        raise BadInput(f"bins must be at least 1, got {bins}.")
    if not 0 < scale < float("inf"):
        raise BadInput(f"scale must be positive and finite, got {scale}.")
    if not feats.has("logits"):
        raise MissingInput("accuracy and softmax need logits, and this feature set has none: extract them.")
    if scale != 1 and feats.head is None:
        raise MissingInput("logits of scaled features need a head, and this feature set has none: pass scale=1.")


def _norm_and_confidence(block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return feature norms, largest softmax probabilities and predictions, each ``[B]``."""
    bias = 0.0 if scale == 1 else block.head.bias.double()
    confidence = torch.softmax(scale * (block.logits64() - bias) + bias, dim=1).amax(dim=1)
    return torch.linalg.vector_norm(block.space("features"), dim=1), confidence, block.prediction()
