"""Distances of ID and OoD images from the running means of the last BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ood_scores.errors import EmptyInput, MissingInput
from ood_scores.features import Sets, as_feature_set
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import Means
from ood_scores.scorers.requirements import Requirement

GAP = "batch_norm_gap"
"""The extra that is read, and the probe that computes it."""


def batch_norm_gap_ratio(id: Sets, ood: Sequence[Sets]) -> float:
    """Compute ``||mu_id - mu|| / ||mu_ood - mu||`` of the channels before the last BatchNorm.

    ``mu`` are the running means ``[C]`` of the BatchNorm, ``mu_id`` the means of the channels over the rows of ``id``,
    and ``mu_ood`` the means over the rows of each OoD set, averaged over the sets. A BatchNorm whose running means are
    those of n_id ID and n_ood OoD images has the ratio ``n_ood / n_id`` on the same images: with few OoD images, its
    running means are close to the ID images, fewer of whose channels are then active.

    Args:
        id: ID set with the extra ``batch_norm_gap``, which the probe of that name computes.
        ood: OoD sets with that extra.

    Departures: the text of the paper that we have lacks the symbols of the formula. The numerator follows from the
    sentence that the ratio falls as the running means approach those of the ID images; the Euclidean norm, and the test
    sets as the images, are assumptions.

    Raises:
        EmptyInput: if there is no OoD set, or a set has no rows.
        MissingInput: if a set lacks the extra.
        NotFinite: if the extra contains NaN or infinite values.

    Source: Shin et al. 2024, "Representation norm amplification", appendix E.5 and Table 13 (last column).
    """
    if not ood:
        raise EmptyInput("there is no OoD set: pass at least one.")
    outside = torch.stack([_mean_gap(feats) for feats in ood]).mean(dim=0)
    return float(torch.linalg.vector_norm(_mean_gap(id)) / torch.linalg.vector_norm(outside))


def _mean_gap(feats: Sets) -> Tensor:
    feats = as_feature_set(feats)
    if not feats.has(GAP):
        raise MissingInput(f"the ratio of gaps needs {GAP!r}: {Requirement(GAP).how_to_get('python')}.")
    if not len(feats):
        raise EmptyInput("this feature set has no rows.")
    wanted = Means(GAP)
    return collect(feats, [wanted])[wanted].means[0].cpu()
