"""Parameters of scorers that depend on what the sets to score have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass

from ood_scores.features import FeatureSet
from ood_scores.scorers.base import Scorer


def decided(scorers: Mapping[str, Scorer], sets: Sequence[FeatureSet]) -> dict[str, Scorer]:
    """Return the scorers, by label, with these parameters decided for some sets."""
    return {label: scorer.decided_for(sets) for label, scorer in scorers.items()}


def decisions(before: Mapping[str, Scorer], after: Mapping[str, Scorer]) -> dict[str, str]:
    """Return the parameters that were decided, such as ``of='map'``, by the label of the scorer."""
    found = {label: _changes(scorer, after[label]) for label, scorer in before.items()}
    return {label: text for label, text in found.items() if text}


def _changes(before: Scorer, after: Scorer) -> str:
    names: list[str] = [each.name for each in fields(before) if each.init] if is_dataclass(before) else []
    pairs = {name: getattr(after, name) for name in names if getattr(before, name) is not getattr(after, name)}
    return ", ".join(f"{name}={value!r}" for name, value in pairs.items())
