"""Fit and score many scorers in one pass each, and keep what every one of them cost and why it failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ood_scores.errors import OodScoresError
from ood_scores.features import FeatureSet
from ood_scores.runtime import Cost
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.one_pass import fit_all, score_all


@dataclass
class ScorerRun:
    """A scorer, its costs so far, the number of scored rows, and the reason of its failure, if it failed."""

    scorer: Scorer
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    rows: int = 0
    failure: str = ""


def fit_each(
    scorers: Sequence[Scorer], feats: FeatureSet, *, spent: list[Cost] | None = None
) -> list[OodScoresError | None]:
    """Fit all scorers in one pass, or one at a time if the set is wrong for some; return the error of each, or None.

    ``RowHashes`` of the set are computed in the same pass.
    """
    errors: list[OodScoresError | None] = []
    try:
        fit_all(scorers, feats, spent=spent, hashed=True, errors=errors)
        return errors
    except OodScoresError:
        return [_fit_error(scorer, feats, spent) for scorer in scorers]


def _fit_error(scorer: Scorer, feats: FeatureSet, spent: list[Cost] | None) -> OodScoresError | None:
    try:
        fit_all([scorer], feats, spent=spent)
    except OodScoresError as error:
        if spent is not None:
            spent.append(Cost())
        return error
    return None


def fit_runs(runs: Mapping[str, ScorerRun], fit: FeatureSet | None) -> None:
    """Fit all scorers."""
    if fit is None:
        return
    spent: list[Cost] = []
    errors = fit_each([run.scorer for run in runs.values()], fit, spent=spent)
    for run, cost, error in zip(runs.values(), spent, errors, strict=True):
        run.fit_seconds, run.failure = cost.seconds, str(error or "")


def check_runs(runs: Mapping[str, ScorerRun], sets: Sequence[FeatureSet]) -> None:
    """Check, before a row is read, that all scorers that have not failed can score some sets."""
    for run in runs.values():
        try:
            for feats in [] if run.failure else sets:
                run.scorer.check_ready(feats)
        except OodScoresError as error:
            run.failure = str(error)


def score_runs(runs: Mapping[str, ScorerRun], feats: FeatureSet, others: Sequence[Scorer] = ()) -> dict[str, Tensor]:
    """Score a set with all scorers that have not failed, in one pass; if that fails, with one scorer at a time.

    Returns:
        The scores by label, and those of ``others`` by the name of the scorer.
    """
    live = {label: run for label, run in runs.items() if not run.failure}
    try:
        return _scores(live, feats, others)
    except OodScoresError:
        found = _scores({}, feats, others)
    for label, run in live.items():
        try:
            found |= _scores({label: run}, feats)
        except OodScoresError as error:
            run.failure = str(error)
    return found


def _scores(runs: Mapping[str, ScorerRun], feats: FeatureSet, others: Sequence[Scorer] = ()) -> dict[str, Tensor]:
    spent: list[Cost] = []
    scores = score_all([*(run.scorer for run in runs.values()), *others], feats, spent=spent, hashed=True)
    for run, cost in zip(runs.values(), spent, strict=False):
        run.score_seconds += cost.seconds
        run.rows += len(feats)
    return dict(zip([*runs, *(scorer.name for scorer in others)], scores, strict=True))
