"""The hardest rows of a unit, and why: most probable classes, similar rows of the fit set, and maps of the score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ood_scores.benchmark.digest import digest
from ood_scores.benchmark.planning import Job, Unit
from ood_scores.data.images import ImageDataset
from ood_scores.data.sources import open_dataset
from ood_scores.detector.explanation_page import picture_of, with_map
from ood_scores.detector.score_map import run_with_positions, score_map, why_no_map
from ood_scores.evaluation.pictures import data_uri
from ood_scores.evaluation.similar_rows import class_name, likely_classes, similar_rows
from ood_scores.extraction.forward import Forward
from ood_scores.features import FeatureSet
from ood_scores.models.class_names import class_names, own_class_names
from ood_scores.models.running import choose_device
from ood_scores.scorers import Scorer

HARDEST = 8
"""Number of OoD rows, and of ID rows."""
SIMILAR = 4
"""Number of similar rows of each row."""
SIDE = 192
"""Longest side of a map in pixels."""

Place = tuple[str, int]
"""A dataset of a unit, ``"id"`` for the ID rows, and the number of a row among its rows."""


@dataclass(frozen=True)
class Given:
    """One of the hardest rows: its place, its dataset, its row in the dataset, and what the model said about it."""

    place: Place
    origin: str
    row: int
    feats: FeatureSet


@dataclass(frozen=True)
class Opened:
    """The model of a unit, as it was run for its features, and its datasets."""

    forward: Forward
    datasets: Mapping[str, ImageDataset]


class OpenedModels:
    """The models of the units of a run, opened one at a time: the last one stays open for the next unit.

    Args:
        device: where the models run.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._last: tuple[str, Forward, Callable[[Any], Any]] | None = None

    def of(self, job: Job) -> tuple[Forward, Callable[[Any], Any]]:
        """Return the model of a job, as it was run without probes, and the transform to its input."""
        options = replace(job.options, probes=(), layers=None, compile=False)
        key = digest(job.network, job.preprocessing, options)
        if self._last is None or self._last[0] != key:
            self._last = None
            model, transform = job.network.open(job.preprocessing)
            self._last = key, Forward(model, options, choose_device(model, self.device)), transform
        return self._last[1:]


def hardest_places(scores: Mapping[str, NDArray[np.float64]]) -> tuple[list[Place], list[Place]]:
    """Return the OoD rows with the highest scores, and the ID rows with the lowest, by the scores of each dataset."""
    outside = [name for name in scores if name != "id"]
    high = [(name, int(row)) for name in outside for row in np.argsort(-scores[name], kind="stable")[:HARDEST]]
    highest = sorted(high, key=lambda place: -scores[place[0]][place[1]])[:HARDEST]
    return highest, [("id", int(row)) for row in np.argsort(scores["id"], kind="stable")[:HARDEST]]


def explained(
    unit: Unit, label: str, scorer: Scorer, given: Sequence[Given], fit: FeatureSet | None, models: OpenedModels
) -> dict[str, Any]:
    """Explain the hardest rows for a scorer.

    The model runs on their images once more, for maps; an extraction keeps none.

    Args:
        unit: the unit.
        label: the label of the scorer.
        scorer: the scorer, fitted if it needs a fit.
        given: the rows, at least one.
        fit: the fit set, in which similar rows are found; None for none.
        models: opens the model.

    Returns:
        Plain data for JSON: ``scorer``, the label; ``fit``, the name of the fit set; ``no_map``, why there are no maps,
        as a clause, or None; ``rows``, one mapping each: its place as ``set`` and ``row``; ``classes``, names or
        numbers with their probabilities; ``label``, the name of the class of an ID row, or None; ``similar``, mappings
        with ``row``, ``id``, ``label``, and ``distance``; ``map``, a data URI, empty if there is none.
    """
    try:
        opened = _opened(unit, {each.origin for each in given}, models)
        names = _names(opened)
        maps, no_map = _maps(opened, scorer, given)
    except Exception as error:  # of somebody's model or data, which have changed since the extraction
        names, maps, no_map = None, [""] * len(given), f"the model could not be run again ({error})"
    similar = _similar(scorer, given, fit, names) if fit is not None else [[] for _ in given]
    rows = [
        {
            "set": each.place[0],
            "row": each.place[1],
            "classes": likely_classes(each.feats, names),
            "label": _label(each.feats, names) if each.place[0] == "id" else None,
            "similar": near,
            "map": drawn,
        }
        for each, near, drawn in zip(given, similar, maps, strict=True)
    ]
    return {"scorer": label, "fit": unit.part.fit, "no_map": no_map, "rows": rows}


def _opened(unit: Unit, origins: set[str], models: OpenedModels) -> Opened | None:
    """Open the model of a unit, and the datasets of these names; return None for an ensemble."""
    jobs = {name: unit.sets[name] for name in (unit.part.id, *sorted(origins))}
    if any(len(of_set) > 1 for of_set in jobs.values()):
        return None
    forward, transform = models.of(jobs[unit.part.id][0])
    datasets = {name: open_dataset(job.source, transform, root=job.data) for name, (job,) in jobs.items()}
    return Opened(forward, datasets)


def _names(opened: Opened | None) -> list[str] | None:
    """Return the names of the model's classes, or else those of its ID set."""
    if opened is None:
        return None
    model, of_id = opened.forward.model, next(iter(opened.datasets.values())).class_names
    return own_class_names(model) or (list(of_id) if of_id else None) or class_names(model)


def _maps(opened: Opened | None, scorer: Scorer, given: Sequence[Given]) -> tuple[list[str], str | None]:
    """Return drawings of the maps as data URIs, empty if there are none, and the reason, as a clause."""
    none = [""] * len(given)
    reason = "an ensemble has several maps" if opened is None else why_no_map(scorer, given[0].feats.head)
    if opened is None or reason:
        return none, reason
    items = [opened.datasets[each.origin][each.row] for each in given]
    inputs = torch.stack([item[0] if isinstance(item, tuple) else item for item in items])
    feats, positions, reason = run_with_positions(opened.forward, scorer, inputs, inputs)
    if positions is None:
        return none, reason
    found = []
    for row, image in enumerate(inputs):
        picture = picture_of(image, None)
        if picture is None:
            return none, "the inputs are no pictures"
        drawn = with_map(picture, score_map(scorer, positions.of_row(row), feats.head))
        found.append(data_uri(drawn, SIDE))
    return found, None


def _similar(
    scorer: Scorer, given: Sequence[Given], fit: FeatureSet, names: Sequence[str] | None
) -> list[list[dict[str, Any]]]:
    if not all(each.has(name) for each in (fit, given[0].feats) for name in ("features", *scorer.needs)):
        return [[] for _ in given]
    distances, numbers = similar_rows(scorer, [each.feats for each in given], fit, SIMILAR)
    labels, ids = fit.labels, fit.ids
    rows = fit.provenance.rows_in_dataset(len(fit)) if fit.provenance else np.arange(len(fit))
    return [
        [
            {
                "row": int(rows[number]),
                "id": "" if ids is None else str(ids[number]),
                "label": None if labels is None else class_name(int(labels[number]), names),
                "distance": distance,
            }
            for number, distance in zip(of_row, far, strict=True)
        ]
        for of_row, far in zip(numbers.tolist(), distances.tolist(), strict=True)
    ]


def _label(feats: FeatureSet, names: Sequence[str] | None) -> str | None:
    return None if feats.labels is None or feats.labels[0] < 0 else class_name(int(feats.labels[0]), names)
