"""Evaluation of scorers: every scorer on every dataset, in one pass over each dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ood_scores.errors import BadInput, EmptyInput, ShapeMismatch
from ood_scores.evaluation import metrics
from ood_scores.features import Block, FeatureSet, as_feature_set
from ood_scores.scorers.base import Scorer, as_scorer, fit_all, require_same_weights, score_all

if TYPE_CHECKING:
    import pandas as pd

Sets = FeatureSet | Sequence[FeatureSet]
Scorers = Sequence["str | Scorer"] | Mapping[str, "str | Scorer"]


def evaluate(scorers: Scorers, *, id: Sets, ood: Mapping[str, Sets], fit: Sets | None = None) -> pd.DataFrame:
    """Measure how well each scorer separates an in-distribution (ID) set from each OoD set.

    Each set, including the fit set, is read once for all scorers together.

    Args:
        scorers: Registered names or Scorer objects; or a mapping from display names to either, for a scorer with
            several settings.
        id: ID test set. A list of feature sets of the same data is an ensemble; this also holds for ``ood`` and
            ``fit``.
        ood: OoD sets by name.
        fit: ID set that scorers are fitted on, usually the training set. If None, scorers must be fitted already or
            need no fit.

    Returns:
        A tidy data frame with one row for each scorer and OoD set. Columns: ``scorer``, ``ood``, every metric of
        ``ood_scores.metrics.METRICS`` (shares, not percentages), ``n_id`` and ``n_ood``. ``.attrs["id_accuracy"]`` is
        the accuracy of the model on ``id``, or None without labels or logits; ``.attrs["id"]`` is the name of the ID
        dataset from its provenance, or None.

    Raises:
        UnknownName, NotFitted, MissingInput, NotFinite: as for ``Scorer.score``.
        EmptyInput: if there is no scorer or no OoD set, or as for ``Scorer.score``.
        ShapeMismatch: if the sets have different numbers of features or classes.
        OtherModel: if the sets were extracted with different weights.
        BadLabels: if labels of ``id`` are not class indices of the model.
    """
    import pandas as pd

    chosen = _named(scorers)
    if not chosen:
        raise EmptyInput("there is no scorer to evaluate: pass scorers=['energy', ...].")
    if not isinstance(ood, Mapping):
        raise BadInput("ood must map names to feature sets: pass ood={'name': feats}.")
    if not ood:
        raise EmptyInput("there is no OoD set to evaluate on: pass ood={'name': feats}.")
    id = as_feature_set(id)
    others = {name: as_feature_set(feats) for name, feats in ood.items()}
    for name, feats in others.items():
        _check_same_model(id, feats, f"the OoD set {name!r}")
    if fit is not None:
        fit = as_feature_set(fit)
        _check_same_model(id, fit, "the fit set")
        fit_all(chosen.values(), fit)
    for feats in (id, *others.values()):
        for scorer in chosen.values():
            scorer.check_ready(feats)
    correct = [_Correct()] if _knows_accuracy(id) else []
    id_scores = score_all([*chosen.values(), *correct], id)
    ood_scores = {name: score_all(list(chosen.values()), feats) for name, feats in others.items()}
    rows = [
        {"scorer": label, "ood": name, **metrics.compare(id_scores[i], ood_scores[name][i])}
        for i, label in enumerate(chosen)
        for name in others
    ]
    table = pd.DataFrame(rows)
    table.attrs |= {
        "id_accuracy": float(id_scores[-1].mean()) if correct else None,
        "id": id.provenance.dataset if id.provenance else None,
    }
    return table


class _Correct(Scorer):
    """1 for rows that are classified correctly, else 0."""

    name = "accuracy"
    needs = ("logits", "labels")

    def score_block(self, block: Block) -> Tensor:
        return (block.prediction() == block.labels).double()


def _knows_accuracy(feats: FeatureSet) -> bool:
    if not (feats.has("labels") and feats.has("logits")):
        return False
    feats.class_labels()
    return True


def _check_same_model(id: FeatureSet, other: FeatureSet, name: str) -> None:
    for what in ("num_features", "num_classes"):
        here, there = getattr(id, what), getattr(other, what)
        if here != there and None not in (here, there):
            raise ShapeMismatch(
                f"{name} has {what} = {there}, the ID set has {here}: all sets must come from the same model."
            )
    require_same_weights(other.provenance, id.provenance, name, "the ID set")


def _named(scorers: Scorers) -> dict[str, Scorer]:
    if isinstance(scorers, (str, Scorer)):
        raise BadInput("scorers must be a list or a mapping of names or Scorer objects: pass scorers=['energy', ...].")
    if isinstance(scorers, Mapping):
        return {label: as_scorer(scorer) for label, scorer in scorers.items()}
    made = [as_scorer(scorer) for scorer in scorers]
    names = [scorer.name for scorer in made]
    labels = [name if names.count(name) == 1 else repr(scorer) for name, scorer in zip(names, made, strict=True)]
    if len(set(labels)) < len(labels):
        raise BadInput(f"a scorer is listed twice ({', '.join(labels)}): pass a mapping {{'first': ..., ...}}.")
    return dict(zip(labels, made, strict=True))
