"""What a row resembles: the most probable classes, and the most similar rows of a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ood_scores.features import FeatureSet
from ood_scores.scorers.base import Scorer

CLASSES = 3
"""Number of probable classes of a row."""


def similar_rows(scorer: Scorer, given: Sequence[FeatureSet], fit: FeatureSet, count: int) -> tuple[Tensor, Tensor]:
    """Find the rows of a fit set at the smallest Euclidean distances, in one pass over the set.

    Args:
        scorer: the scorer, fitted if it needs a fit; see ``Scorer.compared``.
        given: sets of the R rows to compare, at least one.
        fit: the fit set.
        count: the number of similar rows of each row.

    Returns:
        Their distances, float64 ``[R, count]``, ascending, and their numbers in the fit set, int64 ``[R, count]``;
        fewer if the fit set has fewer rows.
    """
    rows = torch.cat([vectors for feats in given for vectors in _compared(scorer, feats)])
    distances, numbers = rows.new_empty(len(rows), 0), rows.new_empty(len(rows), 0, dtype=torch.int64)
    start = 0
    for vectors in _compared(scorer, fit):
        found = torch.arange(start, start + len(vectors)).expand(len(rows), -1)
        start += len(vectors)
        distances = torch.cat([distances, torch.cdist(rows, vectors)], dim=1)
        distances, chosen = distances.topk(min(count, distances.shape[1]), dim=1, largest=False)
        numbers = torch.cat([numbers, found], dim=1).gather(1, chosen)
    return distances, numbers


def _compared(scorer: Scorer, feats: FeatureSet) -> Iterator[Tensor]:
    """Yield the vectors that a scorer compares, float64 ``[B, K]`` on the CPU, block by block."""
    for block in feats.blocks(device="cpu", only=("features", *scorer.needs)):
        yield scorer.compared(block).double()


def likely_classes(feats: FeatureSet, names: Sequence[str] | None) -> tuple[tuple[str, float], ...]:
    """Return the names of the most probable classes of the first row, or their numbers, and their probabilities."""
    if feats.logits is None:
        return ()
    probability, label = feats.logits[0].double().softmax(dim=0).sort(descending=True, stable=True)
    pairs = zip(label[:CLASSES].tolist(), probability[:CLASSES].tolist(), strict=True)
    return tuple((class_name(number, names), share) for number, share in pairs)


def class_name(label: int, names: Sequence[str] | None) -> str:
    """Return the name of a class, or its number if there is no name."""
    return names[label] if names and 0 <= label < len(names) else str(label)
