"""``score``: a scorer applied to a feature set."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ood_scores.features import Sets, as_feature_set
from ood_scores.features.statistics.row_hashes import shared_rows, warn_of_overlaps
from ood_scores.scorers.base import Scorer, as_scorer
from ood_scores.scorers.compatibility import other_preprocessing
from ood_scores.scorers.one_pass import fit_all, score_all
from ood_scores.scorers.work import tell_costly
from ood_scores.user_warnings import warn_user


def score(
    scorer: str | Scorer,
    feats: Sets,
    fit: Sets | None = None,
    **params: Any,
) -> Tensor:
    """Score every row of a feature set; **higher = more in-distribution**.

    Args:
        scorer: a registered name (see ``list_scorers``) or a Scorer.
        feats: the set to score, or the path of its cache; a list of sets of the same data is an ensemble (see
            ``ood_scores.ensemble``).
        fit: the fit set, usually the training data, for scorers that need a fit; given like ``feats``.
        **params: parameters of the scorer, if it is given by name.

    Returns:
        The scores, float64 ``[N]`` on the CPU. If rows of ``feats`` are in ``fit``, a warning says how many.

    Raises:
        UnknownName, BadInput, NotFitted, MissingInput, NotFinite, EmptyInput: see ``Scorer``.
    """
    ready, feats = as_scorer(scorer, **params), as_feature_set(feats)
    fit_set = as_feature_set(fit) if fit is not None and ready.fit_needs else None
    tell_costly({ready.name: ready}, fit_set, [feats])
    if fit_set is not None:
        fit_all([ready], fit_set, hashed=True)
    ready = ready.decided_for([feats])
    ready.check_ready(feats)
    (scores,) = score_all([ready], feats, hashed=fit_set is not None)
    if fit_set is not None:
        warn_of_overlaps([shared_rows(fit_set, feats, "fit set", "set to score")])
        for text in other_preprocessing(feats.provenance, fit_set.provenance, "the set to score", "the fit set"):
            warn_user(text)
    return scores
