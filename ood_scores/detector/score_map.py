"""Maps of a score: how much each position of an image's last feature map contributes to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.extraction.forward import Forward
from ood_scores.extraction.positions import Positions, recording_maps
from ood_scores.features import FeatureSet, Head
from ood_scores.scorers.base import Scorer

STEP = 1e-4
"""The step of the numerical derivative, as a share of the way from the mean to the vector of a position."""

READABLE = {"features", "logits", "head"}
"""What a scorer may read, so that its score can be computed for the vector of a position."""


def why_no_map(scorer: Scorer, head: Head | None) -> str | None:
    """Return the reason why a scorer has no maps, as a clause; None if it has."""
    others = [name for name in scorer.needs if name not in READABLE]
    if others:
        return f"{scorer.name!r} reads {', '.join(others)}, which have no positions"
    if head is None and set(scorer.needs) & {"logits", "head"}:
        return "the model has no affine head, so that positions have no logits"
    return None


def run_with_positions(
    forward: Forward, scorer: Scorer, batch: Any, inputs: Tensor, start: int = 0
) -> tuple[FeatureSet, Positions | None, str | None]:
    """Run a model on a batch, and find the positions of its last map in the same pass.

    Args:
        forward: the model. If it has not run yet, it runs once more, to find its head.
        scorer: the scorer whose maps are wanted.
        batch: the batch, the first row of which is row ``start``.
        inputs: the inputs in it.
        start: see ``batch``.

    Returns:
        The rows of the batch, the positions, and the reason why there are none, as a clause; else None.
    """
    if forward.found is None:
        forward.feature_set(batch, start)  # the passes in which the head is found are not recorded
    with recording_maps(forward.model) as seen:
        feats = forward.feature_set(batch, start)
    reason = why_no_map(scorer, feats.head)
    aspect = inputs.shape[-1] / inputs.shape[-2] if inputs.ndim == 4 else 1.0
    positions = None if reason else seen.find(feats.features, aspect)
    if positions is None and reason is None:
        reason = "the features of the model are not pooled from a map"
    return feats, positions, reason


def score_map(scorer: Scorer, positions: Positions, head: Head | None) -> NDArray[np.float64]:
    """Return the contributions to the score of one image, float64 ``[h, w]``.

    Let the features be pooled from the mean m of the vectors v_p at P positions. The map is the first-order expansion
    of the score s around m, ``s(m) + ds/dm . (v_p - m)``, so that its mean over the positions is the score. For energy,
    with global average pooling, it is ``sum_c softmax_c (W v_p + b)_c + H`` with the entropy H of the softmax: the mean
    over positions of the logits are the logits. For the norm of the features in GradNorm, ``sum_d sign(m_d) v_pd``,
    and for the Mahalanobis distance ``-(m - mu)^T Sigma^-1 (2 v_p - m - mu)`` with the nearest mean mu. The derivative
    is a central difference in float64, so that this holds for every scorer of features and logits, but for rounding and
    where the score has a kink.

    If the features are a token and not pooled, the map is the score that each other token would have in its place; its
    mean is not the score.

    Source: Zhou et al. 2016, Learning deep features for discriminative localization (class activation maps), which are
    this map for a logit; the expansion for other scores is our construction.

    Args:
        scorer: the scorer, for which ``why_no_map`` is None.
        positions: the positions of one image.
        head: the head of the model.
    """
    vectors = positions.vectors[0].double().cpu()
    if positions.pooled:
        mean = vectors.mean(dim=0, keepdim=True)
        moves = STEP * (vectors - mean)
        above, below = (_scores(scorer, positions.features(mean + sign * moves), head) for sign in (1, -1))
        values = _scores(scorer, positions.features(mean), head) + (above - below) / (2 * STEP)
    else:
        values = _scores(scorer, vectors, head)
    return values.reshape(positions.grid)


def _scores(scorer: Scorer, features: Tensor, head: Head | None) -> NDArray[np.float64]:
    on_cpu = head and head.to("cpu")
    return scorer.score(FeatureSet(features.clone(), on_cpu and on_cpu(features), head=on_cpu)).numpy()
