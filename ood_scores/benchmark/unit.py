"""Evaluate a unit of a benchmark: all scorers of a part on one checkpoint."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.benchmark import unit_files
from ood_scores.benchmark.digest import digest
from ood_scores.benchmark.hardest import Given, OpenedModels, explained, hardest_places
from ood_scores.benchmark.measures import MeasuredSets, accuracies, measured
from ood_scores.benchmark.parameter_search import choose
from ood_scores.benchmark.planning import Job, Unit, runnable
from ood_scores.benchmark.results import interval_columns
from ood_scores.benchmark.spec import Part
from ood_scores.benchmark.unit_files import Found, SetScores
from ood_scores.errors import EmptyInput, OodScoresError
from ood_scores.evaluation import metrics
from ood_scores.evaluation.calibration_error import ClassifiedRows
from ood_scores.evaluation.uncertainty import interval
from ood_scores.features import Block, FeatureSet, Provenance, ensemble
from ood_scores.features.accuracy import label_warnings
from ood_scores.features.statistics.row_hashes import overlaps
from ood_scores.runtime import version_of
from ood_scores.scorers import Scorer
from ood_scores.scorers.decisions import decided
from ood_scores.scorers.registry import scorer_class
from ood_scores.scorers.requirements import Requirement
from ood_scores.scorers.scorer_runs import ScorerRun, fit_runs, score_runs
from ood_scores.scorers.work import tell_costly
from ood_scores.user_code import source_digests

ID = "id"


def evaluated(unit: Unit, out: Path, models: OpenedModels) -> tuple[Path, dict[str, Any]]:
    """Return the file of a unit and its facts; evaluate the unit if the file is missing, damaged or outdated.

    Of ``models``, that of the unit runs for the hardest rows only.
    """
    key = key_of(unit)
    path = out / unit_files.FOLDER / f"{key[:16]}.h5"
    facts = unit_files.read(path, key)
    return path, unit_files.write(path, key, find(unit, models)) if facts is None else facts


def find(unit: Unit, models: OpenedModels) -> Found:
    """Fit, score and compare. The failure of a scorer is recorded and does not affect the others."""
    found = Found(unit.part.title, unit.model, unit.checkpoint)
    try:
        _find(unit, found, models)
    except OodScoresError as error:
        found = Found(unit.part.title, unit.model, unit.checkpoint)
        found.not_run.append(_not_run(unit.title, str(error)))
    return found


def _find(unit: Unit, found: Found, models: OpenedModels) -> None:
    part = unit.part
    sets = {name: _features(jobs) for name, jobs in unit.sets.items()}
    fit = _features(unit.fit) if unit.fit else None
    runs = _fitted(unit, sets, fit, found)
    predicts = [_Prediction()] if sets[part.id].has("logits") else []
    reported = {name: feats for name, feats in sets.items() if name in (part.id, *part.covariate, *part.ood)}
    whole = {name: score_runs(runs, feats, predicts) for name, feats in reported.items()}
    _drop_failed(runs, found)
    found.scorers = list(runs)
    made_by = _provenances(unit, sets, fit)
    rated = metrics.asks_for_classifier(part.metrics)
    by_set = {
        name: _set_scores(whole[name], feats, name, found.scorers, made_by[name], rated)
        for name, feats in reported.items()
    }
    found.measures += _tidy(unit, accuracies(part, by_set, reported))
    found.sets = _id_and_ood(part, by_set, found)
    _warn(unit, found, sets, fit if any(run.scorer.fit_needs for run in runs.values()) else None)
    left_out = dict.fromkeys(each.left_out for of_set in made_by.values() for each in of_set)
    found.warnings += _tidy(unit, [{"warning": text} for text in left_out if text])
    found.table = _table(unit, found, runs, made_by)
    found.explained = _explained(unit, found, runs, sets, made_by, fit, models)
    outside = _outside(part, sets)
    inside = {ID: by_set[part.id], **{name: found.sets[name] for name in outside}}
    scores = {
        label: {name: of_set.scores[number] for name, of_set in inside.items()} for number, label in enumerate(runs)
    }
    auxiliary = sets.get(part.auxiliary) if part.auxiliary else None
    for name, figures, reason in measured(
        part, MeasuredSets(sets[part.id], fit, outside, auxiliary, scores, part.rule)
    ):
        found.measures += _tidy(unit, figures)
        found.not_run += [_not_run(f"{name} of {unit.title}", reason)] if reason else []


def _warn(unit: Unit, found: Found, sets: Mapping[str, FeatureSet], fit: FeatureSet | None) -> None:
    """Record the sets that share rows, and labels that do not seem to be the model's classes."""
    part, id = unit.part, sets[unit.part.id]
    searched = (part.search.id, *part.search.ood) if part.search else ()
    ood, covariate, search = (
        {name: sets[name] for name in names if name in sets} for names in (part.ood, part.covariate, searched)
    )
    shared = overlaps(fit, id, ood, covariate, search)
    accuracy = next((row["value"] for row in found.measures if row["measure"] == "accuracy"), None)
    found.overlap += _tidy(unit, [overlap.as_dict() for overlap in shared])
    texts = [*map(str, shared), *label_warnings(id, "ID set", accuracy)]
    found.warnings += _tidy(unit, [{"warning": text} for text in texts])


def _explained(
    unit: Unit,
    found: Found,
    runs: Mapping[str, ScorerRun],
    sets: Mapping[str, FeatureSet],
    made_by: Mapping[str, list[Provenance]],
    fit: FeatureSet | None,
    models: OpenedModels,
) -> dict[str, Any] | None:
    """Explain the hardest rows of the scorer with the highest mean AUROC; return None without OoD rows."""
    aurocs = {label: [row["auroc"] for row in found.table if row["scorer"] == label] for label in runs}
    if not found.table:
        return None
    best = max(aurocs, key=lambda label: np.nan_to_num(np.mean(aurocs[label]), nan=-1))
    scores = {name: of_set.scores[found.scorers.index(best)].numpy() for name, of_set in found.sets.items()}
    given = []
    for name, number in itertools.chain(*hardest_places(scores)):
        of_set = found.sets[name]
        origin, row = of_set.names[int(of_set.origins[number])], int(of_set.rows[number])
        at = int(np.searchsorted(_dataset_rows(made_by[origin], len(sets[origin])), row))
        given.append(Given((name, number), origin, row, sets[origin][at : at + 1]))
    return explained(unit, best, runs[best].scorer, given, fit, models)


def _dataset_rows(made_by: Sequence[Provenance], count: int) -> NDArray[np.int64]:
    """Return the row in its dataset of each row of a set."""
    return made_by[0].rows_in_dataset(count) if made_by else np.arange(count)


def _outside(part: Part, sets: Mapping[str, FeatureSet]) -> dict[str, FeatureSet]:
    """Return the OoD sets of a part, without rows that show an ID class."""
    found: dict[str, FeatureSet] = {}
    for name in part.ood:
        feats = sets.get(name)
        labels = feats.labels if feats is not None and part.relabel else None
        outside = feats if feats is None or labels is None else feats[torch.nonzero(torch.as_tensor(labels) < 0)[:, 0]]
        found |= {name: outside} if outside is not None and len(outside) else {}
    return found


def _id_and_ood(part: Part, by_set: Mapping[str, SetScores], found: Found) -> dict[str, SetScores]:
    """Return the rows that count as ID, under ``"id"``, and the other rows of each OoD dataset."""
    inside = [by_set[name] for name in (part.id, *part.covariate) if name in by_set]
    outside = {}
    for name in part.ood:
        if name in by_set:
            shows_id = (by_set[name].labels >= 0) & part.relabel
            inside += [_rows(by_set[name], shows_id)] if shows_id.any() else []
            if shows_id.all():
                found.not_run.append(_not_run(name, "all of its rows are labeled as ID classes"))
            else:
                outside[name] = _rows(by_set[name], ~shows_id)
    return {ID: _joined(inside), **outside}


def _fitted(unit: Unit, sets: Mapping[str, FeatureSet], fit: FeatureSet | None, found: Found) -> dict[str, ScorerRun]:
    """Create the scorers that can run, with the parameters that the search selected, and fit them."""
    part = unit.part
    fit_has = fit.has if fit is not None else None
    tables, lacking = runnable(part, fit_has, [feats.has for feats in sets.values()])
    for label, missing in lacking.items():
        if _does_not_apply(missing, unit, sets):
            stem = missing.name.partition(".")[0]
            found.not_run.append(_not_run(label, f"the probe {stem!r} does not apply to the model"))
        else:
            found.not_run.append(_not_run(label, missing.reason, missing.how_to_get("benchmark")))
    chosen: dict[str, Mapping[str, Any]] = {}
    if part.search:
        chosen, tried = choose(part.search, tables, sets, fit)
        found.searched += _tidy(unit, tried)
    scorers = decided({label: table.create(chosen.get(label)) for label, table in tables.items()}, [*sets.values()])
    runs = {label: ScorerRun(scorer) for label, scorer in scorers.items()}
    tell_costly(scorers, fit, [*sets.values()])
    fit_runs(runs, fit)
    _drop_failed(runs, found)
    return runs


def _does_not_apply(missing: Requirement, unit: Unit, sets: Mapping[str, FeatureSet]) -> bool:
    """Whether an extra is missing because its probe, which was requested, does not apply to the model."""
    stem = missing.name.partition(".")[0]
    requested = any(stem == probe.name for job in unit.jobs for probe in job.options.all_probes)
    return requested and not missing.fitting and not any(feats.has(stem) for feats in sets.values())


def _drop_failed(runs: dict[str, ScorerRun], found: Found) -> None:
    for label in [label for label, run in runs.items() if run.failure]:
        found.not_run.append(_not_run(label, runs.pop(label).failure))


class _Prediction(Scorer):
    """The class with the largest logit."""

    name = "prediction"
    needs = ("logits",)

    def score_block(self, block: Block) -> Tensor:
        return block.prediction().double()


def _features(jobs: Sequence[Job]) -> FeatureSet:
    found = [job.features() for job in jobs]
    there = [feats for feats in found if feats is not None]
    if len(there) < len(found):
        raise EmptyInput(f"the features of {jobs[0].set!r} were removed: run the same command again.")
    return there[0] if len(there) == 1 else ensemble(there)


def _set_scores(
    scores: Mapping[str, Tensor],
    feats: FeatureSet,
    name: str,
    scorers: Sequence[str],
    made_by: Sequence[Provenance],
    rated: bool,
) -> SetScores:
    unknown = torch.full((len(feats),), -1)
    labels = feats.labels
    predictions = scores.get(_Prediction.name)
    return SetScores(
        scores=torch.stack([scores[label] for label in scorers]) if scorers else torch.empty(0, len(feats)).double(),
        labels=unknown if labels is None else labels,
        predictions=unknown if predictions is None else predictions.long(),
        rows=torch.from_numpy(_dataset_rows(made_by, len(feats))),
        origins=torch.zeros(len(feats), dtype=torch.int64),
        names=[name],
        ids=np.full(len(feats), "") if feats.ids is None else feats.ids,
        classified=ClassifiedRows.of(feats, labels) if rated and labels is not None and feats.has("logits") else None,
    )


def _rows(whole: SetScores, mask: Tensor) -> SetScores:
    arrays = {name: getattr(whole, name)[..., mask] for name in unit_files.ARRAYS}
    classified = None if whole.classified is None else whole.classified[mask.numpy()]
    return SetScores(**arrays, names=whole.names, ids=whole.ids[mask.numpy()], classified=classified)


def _joined(parts: Sequence[SetScores]) -> SetScores:
    """Concatenate the rows of several datasets."""
    arrays = {name: torch.cat([getattr(each, name) for each in parts], dim=-1) for name in unit_files.ARRAYS}
    arrays["origins"] = torch.cat([torch.full_like(each.origins, number) for number, each in enumerate(parts)])
    ids = np.concatenate([each.ids for each in parts])
    known = [each.classified for each in parts if each.classified is not None]
    classified = ClassifiedRows.joined(known) if len(known) == len(parts) else None
    return SetScores(**arrays, names=[each.names[0] for each in parts], ids=ids, classified=classified)


def _table(
    unit: Unit, found: Found, runs: Mapping[str, ScorerRun], made_by: Mapping[str, list[Provenance]]
) -> list[dict[str, Any]]:
    part = unit.part
    accuracy = next((row["value"] for row in found.measures if row["measure"] == "accuracy"), None)
    sides = {name: _sides(part, found.sets, name) for name in found.sets if name != ID}
    of_classifier = _of_classifier(sides, part) if runs else {}
    rows = []
    for number, (label, each) in enumerate(runs.items()):
        for name, (known, other) in sides.items():
            rows.append(
                {
                    **_names(unit),
                    "scorer": label,
                    "ood": name,
                    "group": "near" if name in part.near else "far",
                    **_compared(known.scores[number], other.scores[number], _correct(known), part),
                    **of_classifier[name],
                    "id_accuracy": accuracy,
                    "fit_seconds": each.fit_seconds,
                    "score_microseconds": 1e6 * each.score_seconds / each.rows,
                    "parameters": json.dumps(described(each.scorer)),
                    "weights_sha256": _joint([each.weights_sha256 for each in made_by[ID]]),
                    "id_sha256": _joint([each.data_sha256 for each in made_by[ID]]),
                    "ood_sha256": _joint([each.data_sha256 for each in made_by[name]]),
                    "fit_sha256": _joint([each.data_sha256 for each in made_by.get("fit", [])]),
                    "versions": json.dumps(dict(made_by[ID][0].versions)),
                }
            )
    return rows


def _sides(part: Part, sets: Mapping[str, SetScores], ood: str) -> tuple[SetScores, SetScores]:
    """Return ID and OoD rows for one OoD dataset. Of relabeled ID rows, only those of this dataset are used."""
    inside = sets[ID]
    ours = {part.id, *part.covariate, ood}
    return _rows(inside, torch.tensor([name in ours for name in inside.names])[inside.origins]), sets[ood]


def _correct(known: SetScores) -> Tensor | None:
    """Return whether each ID row is classified correctly; None if a row has no label or no prediction."""
    is_known = (known.labels >= 0) & (known.predictions >= 0)
    return known.labels == known.predictions if is_known.all() else None


def _compared(inside: Tensor, outside: Tensor, correct: Tensor | None, part: Part) -> dict[str, Any]:
    figures = dict(metrics.compare(inside, outside, correct=correct, metrics=part.metrics, rule=part.rule))
    for metric in metrics.headline_metrics(part.metrics):
        if not metric.of_classifier:
            found = interval(metric.name, inside, outside, correct)
            figures |= zip(interval_columns(metric), (found.low, found.high), strict=True)
    return figures


def _of_classifier(sides: Mapping[str, tuple[SetScores, SetScores]], part: Part) -> dict[str, dict[str, float]]:
    """Return the metrics of the classifier that are asked for, and their intervals, by OoD set; all scorers share them.

    So do all OoD sets, unless some of their rows count as ID.
    """
    asked = [metric for metric in metrics.headline_metrics(part.metrics) if metric.of_classifier]
    found: dict[str, dict[str, float]] = {}
    for name, (known, other) in sides.items():
        if found and not part.relabel:
            found[name] = next(iter(found.values()))
            continue
        found[name] = {}
        for metric in asked:
            limits = interval(metric.name, known.scores[0], other.scores[0], classified=known.classified)
            names = metric.name, *interval_columns(metric)
            found[name] |= zip(names, (limits.value, limits.low, limits.high), strict=True)
    return found


def described(value: Any) -> Any:
    """Return the name and all parameters of a scorer as plain data for JSON."""
    if isinstance(value, Scorer):
        names: list[str] = [each.name for each in fields(value) if each.init] if is_dataclass(value) else []
        return {"name": value.name} | {name: described(getattr(value, name)) for name in names}
    if isinstance(value, (list, tuple)):
        return [described(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _provenances(unit: Unit, sets: Mapping[str, FeatureSet], fit: FeatureSet | None) -> dict[str, list[Provenance]]:
    by_set = {name: _made_by(unit.sets[name]) for name in sets} | {"fit": _made_by(unit.fit)}
    return by_set | {ID: by_set[unit.part.id]}


def _made_by(jobs: Sequence[Job]) -> list[Provenance]:
    found = [job.features() for job in jobs]
    return [feats.provenance for feats in found if feats is not None and feats.provenance is not None]


def _joint(hashes: Sequence[str]) -> str:
    return "+".join(dict.fromkeys(hashes))


def _names(unit: Unit) -> dict[str, Any]:
    return {"part": unit.part.title, "model": unit.model, "checkpoint": unit.checkpoint}


def _tidy(unit: Unit, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**_names(unit), **row} for row in rows]


def _not_run(what: str, reason: str, remedy: str = "") -> dict[str, str]:
    return {"what": what, "reason": reason, "remedy": remedy}


def key_of(unit: Unit) -> str:
    """Return a digest of everything that determines the results of a unit."""
    features = [_made_by([job]) for job in unit.jobs]
    code = source_digests(scorer_class(table.name) for table in unit.part.scorer_tables)
    facts = (
        unit,
        unit.part.scorer_tables,
        features,
        [metric.name for metric in metrics.table_metrics()],
        version_of("ood_scores"),
    )
    return digest(*facts, code) if code else digest(*facts)
