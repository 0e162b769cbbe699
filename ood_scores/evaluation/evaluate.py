"""evaluate: every scorer on every set, each set read once."""

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
    """How well each scorer separates one in-distribution set from each OoD set.

    Args:
        scorers: registered names or Scorer objects; or a mapping from the names to show to either, for the same scorer
            with several settings.
        id: the in-distribution test set. Here and below, a list of sets of the same data is an ensemble.
        ood: OoD sets by name.
        fit: in-distribution features (usually of the training set) for the scorers that are fitted. Scorers that are
            fitted already are left as they are if it is None.

    Returns:
        A tidy frame with one row for each scorer and OoD set. Columns: ``scorer``, ``ood``, every metric of
        ``ood_scores.metrics.METRICS`` (as shares, not percentages), ``n_id``, ``n_ood``.
        ``.attrs["id_accuracy"]`` is the model's accuracy on ``id``, None where it has no labels or logits;
        ``.attrs["id"]`` the name of the ID data where its provenance says it.

    Each set is read once for all scorers together; so is the fit set.

    Raises:
        UnknownName, NotFitted, MissingInput, NotFinite, EmptyInput: as ``Scorer.score``; EmptyInput also if there is
            no scorer or no OoD set.
        ShapeMismatch: the sets have different numbers of features or classes.
        OtherModel: sets that say which weights they come from, and they are not the same.
        BadLabels: labels of ``id`` that are not class indices of the model.
    """
    import pandas as pd

    chosen = _named(scorers)
    if not chosen:
        raise EmptyInput("no scorer to compare: pass scorers=['energy', ...].")
    if not isinstance(ood, Mapping):
        raise BadInput("ood maps names to feature sets: pass ood={'name': feats}.")
    if not ood:
        raise EmptyInput("no OoD set to compare with: pass ood={'name': feats}.")
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
    """1 where the largest logit is at the label, else 0: its mean is the accuracy."""

    name = "accuracy"
    needs = ("logits", "labels")

    def score_block(self, block: Block) -> Tensor:
        return (block.prediction() == block.labels).double()


def accuracy(feats: FeatureSet) -> float | None:
    """Share of rows whose largest logit is at their label; None without labels or logits."""
    if not _knows_accuracy(feats):
        return None
    return float(_Correct().score(feats).mean())


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
        raise BadInput("scorers is a list of names or Scorer objects, or a mapping from names to them.")
    if isinstance(scorers, Mapping):
        return {label: as_scorer(scorer) for label, scorer in scorers.items()}
    made = [as_scorer(scorer) for scorer in scorers]
    names = [scorer.name for scorer in made]
    labels = [name if names.count(name) == 1 else repr(scorer) for name, scorer in zip(names, made, strict=True)]
    if len(set(labels)) < len(labels):
        raise BadInput(f"a scorer is listed twice ({', '.join(labels)}): name them, {{'first': ..., 'second': ...}}.")
    return dict(zip(labels, made, strict=True))
