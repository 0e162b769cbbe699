"""What the norm of the features says: of the rows that are right and sure, and of those that still move in training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ood_scores.errors import BadInput, MissingInput, ShapeMismatch
from ood_scores.evaluation.neural_collapse import finite_blocks
from ood_scores.features import Block, FeatureSet

if TYPE_CHECKING:
    import pandas as pd

HAAS_EDGES = (10.0, 20.0, 30.0)
"""Where Haas et al. 2024 divide the feature norms of their L2 models; of those without L2, at 5, 7 and 9."""


def norm_groups(epochs: Sequence[FeatureSet], edges: Sequence[float] = HAAS_EDGES) -> pd.DataFrame:
    """How much the features of each norm group change from one epoch to the next.

    Rows are grouped by the norm that their features have in the last epoch. Of group m, with ``N_m`` rows, from epoch
    i-1 to i::

        change_{m,i} = sum_n ||z_{n,i} - z_{n,i-1}||^2 / N_m,        total_{m,i} = sum_{j <= i} change_{m,j}

    Args:
        epochs: feature sets of the same rows in the same order, one for each checkpoint, E of them; only the features
            are read, two blocks at a time, so sets on disk stay there.
        edges: increasing; G-1 edges make G groups ``[0, e_1), [e_1, e_2), ..., [e_{G-1}, inf)``.

    Returns:
        A tidy frame, one row for each epoch but the first and each group: ``epoch`` (1 to E-1), ``group``, ``low``,
        ``high``, ``rows``, ``change``, ``total``; of a group without rows the last two are NaN.

    Departures: the groups in the paper's text, [0,10), [10,20), [20,30) and [40,...), leave 30 to 40 out; here the last
    begins where the one before ends. The mean over rows of the squared distance is meant by its square of a matrix; a
    mean over coordinates too would be D times smaller.

    Raises:
        BadInput: less than two epochs, edges that do not increase from above 0, or a set extracted in random order.
        ShapeMismatch: the sets have different numbers of rows or features.
        NotFinite: features hold NaN or infinite values.

    Source: Haas, Yolland & Rabus 2024, Eq. 8, Fig. 3 (centre) and Fig. 6.
    """
    import pandas as pd

    _check_epochs(epochs)
    bounds = [0.0, *map(float, edges), float("inf")]
    if any(low >= high for low, high in pairwise(bounds)):
        raise BadInput(f"edges are {list(edges)}; give norms above 0 in increasing order, such as {list(HAAS_EDGES)}.")
    group = torch.bucketize(_norms(epochs[-1]), torch.tensor(bounds[1:-1], dtype=torch.float64), right=True)
    rows = torch.bincount(group, minlength=len(bounds) - 1)
    sums = torch.stack([_moved(before, after, group, len(rows)) for before, after in pairwise(epochs)])
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


def norm_bins(feats: FeatureSet, bins: int = 125, *, scale: float = 1.0, labelled: bool = True) -> pd.DataFrame:
    """Accuracy and mean maximum softmax of the rows in each bin of feature norms; the bins hold equally many rows.

    Args:
        feats: features, logits and, for the accuracy, labels.
        bins: how many; Haas et al. take 125 of 80 test images each. Rows of the same norm share a bin, so that bins may
            be unequal, and fewer, where norms repeat.
        scale: the softmax is that of the logits that the head gives for ``scale`` times the features: ``scale (f - b) +
            b``. The large norms of a model trained with L2 normalisation saturate it otherwise (Fig. 4, left). The
            paper's factor is tuned on test data and not given. The accuracy is that of the model as it is.
        labelled: False for a set whose labels are not classes of the model, such as an OoD set: no accuracy (NaN).

    Returns:
        A tidy frame, one row for each bin, by increasing norm: ``low`` and ``high`` (the smallest and largest norm),
        ``norm`` (the mean), ``rows``, ``accuracy``, ``confidence``.

    Raises:
        BadInput: less than one bin, or a scale that is not above 0.
        MissingInput: there are no logits, or ``scale`` is not 1 and there is no head.
        BadLabels: there are no labels, or they are not class indices of the model.
        NotFinite: features or logits hold NaN or infinite values.

    Source: Haas, Yolland & Rabus 2024, Fig. 4 (norm against softmax) and Fig. 7 (norm against accuracy).
    """
    import pandas as pd

    _check_bins(feats, bins, scale)
    labels = feats.class_labels().cpu() if labelled else None
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
        raise BadInput(f"change needs two epochs at least, got {len(epochs)}: pass one feature set per checkpoint.")
    shapes = {(len(feats), feats.num_features) for feats in epochs}
    if len(shapes) > 1:
        raise ShapeMismatch(f"the epochs have (rows, features) = {sorted(shapes)}: pass sets of the same rows.")
    if any(feats.provenance and feats.provenance.shuffled for feats in epochs):
        raise BadInput("an epoch was extracted in random order, so that its rows are not those of the others.")


def _norms(feats: FeatureSet) -> Tensor:
    blocks = finite_blocks(feats, "features")
    return torch.cat([torch.linalg.vector_norm(block.space("features"), dim=1) for block in blocks])


def _moved(before: FeatureSet, after: FeatureSet, group: Tensor, groups: int) -> Tensor:
    """The sum of squared distances from one epoch to the next in each group, float64 ``[G]``."""
    sums = torch.zeros(groups, dtype=torch.float64)
    pairs = zip(finite_blocks(before, "features"), finite_blocks(after, "features"), strict=True)
    for old, new in pairs:
        moved = (new.space("features") - old.space("features")).square().sum(dim=1)
        sums.index_add_(0, group[old.start : old.start + len(old)], moved)
    return sums


def _check_bins(feats: FeatureSet, bins: int, scale: float) -> None:
    if bins < 1:
        raise BadInput(f"there is at least one bin, got bins={bins}.")
    if not 0 < scale < float("inf"):
        raise BadInput(f"features are scaled by a number above 0, got scale={scale}.")
    if not feats.has("logits"):
        raise MissingInput("accuracy and softmax need logits, and this feature set has none.")
    if scale != 1 and feats.head is None:
        raise MissingInput("logits of scaled features need the head, and this feature set has none: use scale=1.")


def _norm_and_confidence(block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Feature norms, largest softmax probabilities and predictions, each ``[B]``."""
    bias = 0.0 if scale == 1 else block.head.bias.double()
    confidence = torch.softmax(scale * (block.logits64() - bias) + bias, dim=1).amax(dim=1)
    return torch.linalg.vector_norm(block.space("features"), dim=1), confidence, block.prediction()
