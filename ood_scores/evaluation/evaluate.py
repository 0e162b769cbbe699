"""Evaluation of scorers: every scorer on every dataset, in one pass over each dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ood_scores.errors import BadInput, EmptyInput, ShapeMismatch
from ood_scores.evaluation.calibration_error import ClassifiedRows
from ood_scores.evaluation.metrics import asks_for_classifier, compare, table_metrics
from ood_scores.evaluation.score_table import score_columns
from ood_scores.features import Block, FeatureSet, Sets, as_feature_set
from ood_scores.features.accuracy import label_warnings
from ood_scores.features.statistics.row_hashes import overlaps
from ood_scores.progress import showing_work
from ood_scores.scorers.base import Scorer, as_scorer
from ood_scores.scorers.compatibility import (
    other_preprocessing,
    require_same_features,
    require_same_head,
    require_same_probes,
)
from ood_scores.scorers.decisions import decided, decisions
from ood_scores.scorers.one_pass import fit_all, score_all
from ood_scores.scorers.registry import create_scorer, list_scorers
from ood_scores.scorers.requirements import cannot_run
from ood_scores.scorers.scorer_runs import ScorerRun, check_runs, fit_runs, score_runs
from ood_scores.scorers.work import tell_costly
from ood_scores.user_warnings import warn_user

if TYPE_CHECKING:
    import pandas as pd

Scorers = Literal["all"] | Sequence["str | Scorer"] | Mapping[str, "str | Scorer"]
ALL = "all"


def evaluate(
    scorers: Scorers,
    *,
    id: Sets,
    ood: Mapping[str, Sets],
    fit: Sets | None = None,
    metrics: Sequence[str] = (),
    progress: bool = True,
) -> pd.DataFrame:
    """Measure how well each scorer separates an in-distribution (ID) set from each OoD set.

    Each set, including the fit set, is read once for all scorers together, and the logits of the ID set once more if
    metrics of the classifier are asked for.

    Args:
        scorers: Registered names or Scorer objects; or a mapping from display names to either, for a scorer with
            several settings. ``"all"`` is every registered scorer that can run on these sets.
        id: ID test set, or the path of its cache. A list of sets of the same data is an ensemble. Both also hold for
            ``ood`` and ``fit``.
        ood: OoD sets by name.
        fit: ID set that scorers are fitted on, usually the training set. If None, scorers must be fitted already or
            need no fit.
        metrics: Names of metrics on request, such as ``"oscr"``, ``"augrc_scod"``, or ``"ece"``; see
            ``ood_scores.metrics.METRICS``. Those that need to know which ID rows are classified correctly, or rate the
            probabilities of the classifier, are NaN if ``id`` has no labels or no logits. Those of the classifier are
            the same for all scorers and OoD sets.
        progress: Whether to show on a terminal which scorer is fitted or scored, and to print (on standard error)
            those that are expected to take more than a minute or to keep 1 GB, and those that took 10 seconds or raised
            the peak memory by 1 GB.

    Returns:
        A tidy data frame with one row for each scorer and OoD set. Columns: ``scorer``, ``ood``, every metric of
        ``ood_scores.metrics.METRICS`` that is not on request, or is in ``metrics`` (shares, not percentages), ``n_id``
        and ``n_ood``. ``.attrs["id_accuracy"]`` is
        the accuracy of the model on ``id``, or None without labels or logits; ``.attrs["id"]`` is the name of the ID
        dataset from its provenance, or None. ``.attrs["left_out"]`` has the reason for each scorer that ``"all"`` left
        out; ``.attrs["decided"]`` has the parameters that the sets decided, such as ``of='map'`` of
        ``activation_ratio``. ``.attrs["overlap"]`` lists the sets that share rows (``set``, ``other``, ``rows`` shared
        ``of`` the rows of ``other``), see ``ood_scores.features.statistics.row_hashes``; ``.attrs["warnings"]`` has the
        warnings about them, and about an accuracy near chance.

    Raises:
        UnknownName: if there is no such metric, or as for ``Scorer.score``.
        NotFitted, MissingInput, NotFinite: as for ``Scorer.score``.
        EmptyInput: if there is no scorer (or none that can run) or no OoD set, or as for ``Scorer.score``.
        ShapeMismatch: if the sets have different numbers of features or classes.
        OtherModel: if the sets were extracted with different weights or poolings, if their heads differ, or if the
            parameters of a probe that a scorer reads differ between the ID set and an OoD set.
        BadLabels: if labels of ``id`` are not class indices of the model.
    """
    return _evaluated(scorers, id, ood, fit, metrics, progress)[0]


def evaluate_details(
    scorers: Scorers,
    *,
    id: Sets,
    ood: Mapping[str, Sets],
    fit: Sets | None = None,
    metrics: Sequence[str] = (),
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of ``evaluate``, whose arguments these are, and the scores of every row.

    Returns:
        The table, and a data frame with one row for each row of each set. Its columns are ``set`` (``"id"``, or the
        name of the OoD set) and those of ``ood_scores.evaluation.score_table.score_table``, with a column for each
        scorer in place of ``score``.

    Raises:
        BadInput: if an OoD set is named ``"id"``, or as for ``evaluate``.
    """
    if "id" in ood:
        raise BadInput("an OoD set cannot be named 'id', as the rows of the ID set are: use another name.")
    table, sets, scores = _evaluated(scorers, id, ood, fit, metrics, progress)
    return table, score_columns(sets, scores)


def _evaluated(
    scorers: Scorers,
    id: Sets,
    ood: Mapping[str, Sets],
    fit: Sets | None,
    metrics: Sequence[str],
    progress: bool,
) -> tuple[pd.DataFrame, dict[str, FeatureSet], dict[str, dict[str, Tensor]]]:
    """Return the table, the sets by name, and the scores of each set by the label of the scorer."""
    import pandas as pd

    table_metrics(metrics)  # raises UnknownName before the work
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
    given, chosen = chosen, decided(chosen, [id, *others.values()])
    read = {need for scorer in chosen.values() for need in scorer.needs}
    for name, feats in others.items():
        require_same_probes(feats.provenance, id.provenance, f"the OoD set {name!r}", "the ID set", read)
    correct = [_Correct()] if _knows_accuracy(id) else []
    score_sets = _score_what_can_run if scorers == ALL else _score_all
    with showing_work("evaluating", progress):
        found, left_out = score_sets(chosen, fit, [id, *others.values()], correct)
    id_scores, *ood_scores = found
    is_correct = id_scores[_Correct.name] if correct else None
    classified = ClassifiedRows.of(id, id.class_labels()) if correct and asks_for_classifier(metrics) else None
    compared = partial(compare, correct=is_correct, classified=classified, metrics=metrics)
    rows = [
        {"scorer": label, "ood": name, **compared(id_scores[label], scores[label])}
        for label in chosen
        if label not in left_out
        for name, scores in zip(others, ood_scores, strict=True)
    ]
    if not rows:
        raise EmptyInput(f"no scorer can run on these sets: {next(iter(left_out.values()))}")
    table = pd.DataFrame(rows)
    accuracy = None if is_correct is None else float(is_correct.mean())
    fitted = any(chosen[label].fit_needs for label in dict.fromkeys(table["scorer"]))
    shared = overlaps(fit if fitted else None, id, others)
    table.attrs |= {
        "id_accuracy": accuracy,
        "id": id.provenance.dataset if id.provenance else None,
        "left_out": left_out,
        "decided": {label: text for label, text in decisions(given, chosen).items() if label not in left_out},
        "overlap": [overlap.as_dict() for overlap in shared],
        "warnings": [
            *map(str, shared),
            *label_warnings(id, "ID set", accuracy),
            *_other_preprocessing(id, fit if fitted else None, others),
        ],
    }
    for text in table.attrs["warnings"]:
        warn_user(text)
    labels = list(dict.fromkeys(table["scorer"]))
    sets = {"id": id, **others}
    return table, sets, {name: {label: part[label] for label in labels} for name, part in zip(sets, found, strict=True)}


Scores = list[dict[str, Tensor]]


def _score_all(
    chosen: Mapping[str, Scorer], fit: FeatureSet | None, sets: Sequence[FeatureSet], correct: Sequence[Scorer]
) -> tuple[Scores, dict[str, str]]:
    """Fit and score all scorers, and raise the first error. ``correct`` is scored on the first set only."""
    tell_costly(chosen, fit, sets)
    if fit is not None:
        fit_all(chosen.values(), fit, hashed=True)
    for feats in sets:
        for scorer in chosen.values():
            scorer.check_ready(feats)
    found = []
    for number, feats in enumerate(sets):
        others = [] if number else correct
        scores = score_all([*chosen.values(), *others], feats, hashed=True)
        found.append(dict(zip([*chosen, *(each.name for each in others)], scores, strict=True)))
    return found, {}


def _score_what_can_run(
    chosen: Mapping[str, Scorer], fit: FeatureSet | None, sets: Sequence[FeatureSet], correct: Sequence[Scorer]
) -> tuple[Scores, dict[str, str]]:
    """Fit and score the scorers that can run, and return why each of the others cannot."""
    left_out = cannot_run(chosen, fit.has if fit else None, [feats.has for feats in sets], "python")
    runs = {label: ScorerRun(scorer) for label, scorer in chosen.items() if label not in left_out}
    tell_costly({label: run.scorer for label, run in runs.items()}, fit, sets)
    fit_runs(runs, fit)
    check_runs(runs, sets)
    found = [score_runs(runs, feats, [] if number else correct) for number, feats in enumerate(sets)]
    return found, left_out | {label: run.failure for label, run in runs.items() if run.failure}


class _Correct(Scorer):
    """1 for rows that are classified correctly, else 0."""

    name = "correctly classified"
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
    require_same_features(other.provenance, id.provenance, name, "the ID set")
    require_same_head(other, id, name, "the ID set")


def _other_preprocessing(id: FeatureSet, fit: FeatureSet | None, others: Mapping[str, FeatureSet]) -> list[str]:
    named = {f"the OoD set {name!r}": feats for name, feats in others.items()}
    named |= {} if fit is None else {"the fit set": fit}
    origin = id.provenance
    return [
        text
        for name, feats in named.items()
        for text in other_preprocessing(feats.provenance, origin, name, "the ID set")
    ]


def _named(scorers: Scorers) -> dict[str, Scorer]:
    if isinstance(scorers, str) and scorers == ALL:
        return {name: create_scorer(name) for name in list_scorers()}
    if not isinstance(scorers, Iterable) or isinstance(scorers, (str, Scorer)):
        raise BadInput(
            "scorers must be a list or a mapping of names or Scorer objects: pass scorers=['energy', ...] or 'all'."
        )
    if isinstance(scorers, Mapping):
        return {label: as_scorer(scorer) for label, scorer in scorers.items()}
    made = [as_scorer(scorer) for scorer in scorers]
    names = [scorer.name for scorer in made]
    labels = [name if names.count(name) == 1 else repr(scorer) for name, scorer in zip(names, made, strict=True)]
    if len(set(labels)) < len(labels):
        raise BadInput(f"a scorer is listed twice ({', '.join(labels)}): pass a mapping {{'first': ..., ...}}.")
    return dict(zip(labels, made, strict=True))
