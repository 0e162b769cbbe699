"""Scorers together: which can run, fitting and scoring all in one pass, and what each of them costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ood_scores.errors import OodScoresError
from ood_scores.features import FeatureSet
from ood_scores.scorers import Scorer
from ood_scores.scorers.base import fit_all, score_all

Has = Callable[[str], bool]


@dataclass
class Ready:
    """A scorer of a unit: what it has cost so far, over how many rows; ``failure`` says why it gave up."""

    scorer: Scorer
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    rows: int = 0
    failure: str = ""


def unmet(scorer: Scorer, fit: Has | None, sets: Sequence[Has]) -> tuple[str, str]:
    """Why a scorer cannot run and the remedy, both empty if it can.

    Args:
        scorer: not fitted.
        fit: what the fit set has; None where there is no fit set.
        sets: what each of the sets to be scored has.
    """
    if scorer.fit_needs and fit is None:
        return "it is fitted, and the part has no fit set", 'fit = "…", a name of [sets]'
    for name in scorer.fit_needs:
        if fit is not None and not fit(name):
            return f"to be fitted it reads {name}, which {_not_there(name)}", _remedy(name, "fit_probes")
    for name in scorer.needs:
        if not all(has(name) for has in sets):
            return f"it reads {name}, which {_not_there(name)}", _remedy(name, "probes")
    return "", ""


def _not_there(name: str) -> str:
    if name == "labels":
        return "the images do not have"
    return "the model does not give" if name in ("features", "logits", "head") else "is not extracted"


def _remedy(name: str, key: str) -> str:
    stem = name.partition(".")[0]
    if stem in ("features", "logits", "head", "labels"):
        return ""
    if stem == "ensemble":
        return '[ensembles] "label" = ["model", "model"]'
    return '[extraction] layers = "stages"' if stem == "layers" else f'[extraction] {key} = ["{stem}"]'


def fit_each(ready: Mapping[str, Ready], fit: FeatureSet | None) -> None:
    """Fits all in one pass; where that fails, each by itself."""
    fitted = [each for each in ready.values() if each.scorer.fit_needs]
    if fit is None or not fitted:
        return
    spent: list[float] = []
    try:
        fit_all([each.scorer for each in fitted], fit, spent=spent)
    except OodScoresError:
        spent = [_fit_alone(each, fit) for each in fitted]
    for each, seconds in zip(fitted, spent, strict=True):
        each.fit_seconds = seconds


def _fit_alone(each: Ready, fit: FeatureSet) -> float:
    spent: list[float] = []
    try:
        fit_all([each.scorer], fit, spent=spent)
    except OodScoresError as error:
        each.failure = str(error)
    return sum(spent)


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
