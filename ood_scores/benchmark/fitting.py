"""Scorers together: which can run, fitting and scoring all in one pass, and what each of them costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ood_scores.errors import OodScoresError
from ood_scores.features import FeatureSet
from ood_scores.scorers import Scorer
from ood_scores.scorers.base import fit_each, score_all


@dataclass
class Ready:
    """A scorer of a unit: what it has cost so far, over how many rows; ``failure`` says why it gave up."""

    scorer: Scorer
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    rows: int = 0
    failure: str = ""


def fit_ready(ready: Mapping[str, Ready], fit: FeatureSet | None) -> None:
    """Fit all scorers, and note what each of them cost and why it failed."""
    if fit is None:
        return
    spent: list[float] = []
    errors = fit_each([each.scorer for each in ready.values()], fit, spent=spent)
    for each, seconds, error in zip(ready.values(), spent, errors, strict=True):
        each.fit_seconds, each.failure = seconds, str(error or "")


def score_each(ready: Mapping[str, Ready], feats: FeatureSet, others: Sequence[Scorer] = ()) -> dict[str, Tensor]:
    """The scores by label, and those of ``others`` by name, from one pass; where that fails, each by itself."""
    live = {label: each for label, each in ready.items() if not each.failure}
    spent: list[float] = []
    try:
        scores = score_all([*(each.scorer for each in live.values()), *others], feats, spent=spent)
    except OodScoresError:
        return _score_alone(live, feats) | {scorer.name: scorer.score(feats) for scorer in others}
    for each, seconds in zip(live.values(), spent, strict=False):
        each.score_seconds += seconds
        each.rows += len(feats)
    return dict(zip([*live, *(scorer.name for scorer in others)], scores, strict=True))


def _score_alone(live: Mapping[str, Ready], feats: FeatureSet) -> dict[str, Tensor]:
    found = {}
    for label, each in live.items():
        spent: list[float] = []
        try:
            (found[label],) = score_all([each.scorer], feats, spent=spent)
        except OodScoresError as error:
            each.failure = str(error)
            continue
        each.score_seconds += sum(spent)
        each.rows += len(feats)
    return found
