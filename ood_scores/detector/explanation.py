"""Explanations of rejected images: similar training images, classes, p-values of several scorers, and maps."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ood_scores.detector.conformal import p_values
from ood_scores.detector.parts import require_weights
from ood_scores.detector.score_map import run_with_positions, score_map
from ood_scores.errors import BadInput, MissingData
from ood_scores.evaluation.pictures import pictures_of
from ood_scores.evaluation.similar_rows import class_name, likely_classes, similar_rows
from ood_scores.extraction.positions import Positions
from ood_scores.features import FeatureSet, OneSet, as_feature_set
from ood_scores.optional_packages import require
from ood_scores.scorers.base import Scorer, as_scorer
from ood_scores.scorers.fusion import Fusion
from ood_scores.scorers.one_pass import fit_all

if TYPE_CHECKING:
    from ood_scores.detector.detector import Detector
    from ood_scores.detector.prediction import Prediction


@dataclass(frozen=True)
class Neighbor:
    """A row of the fit set that is similar to an image.

    Attributes:
        row: its number in the fit set.
        id: its id, such as its file; None if it has none.
        label: the name, or the number, of its class; None if the set has no labels.
        distance: the Euclidean distance between the vectors that the scorer compares.
        picture: its picture; None if it is not available.
    """

    row: int
    id: str | None
    label: str | None
    distance: float
    picture: Image.Image | None = None


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why an image was rejected.

    Attributes:
        image: its number in the input.
        id: its file; None if images have no names.
        score: its score.
        p_values: the p-value of each scorer, by name; the first is that of the detector.
        classes: the names, or numbers, and probabilities of the most probable classes: what it nearly was.
        neighbors: the nearest rows of the fit set, the nearest first; empty without a fit set.
        score_map: the contribution of each position to the score, float64 ``[h, w]``, see ``detector.score_map``; None
            if there is no map.
        input: the input of the model, ``[C, H, W]``.
    """

    image: int
    id: str | None
    score: float
    p_values: Mapping[str, float]
    classes: tuple[tuple[str, float], ...]
    neighbors: tuple[Neighbor, ...]
    score_map: NDArray[np.float64] | None
    input: Tensor


@dataclass(frozen=True, eq=False)
class Explanations:
    """Explanations of the images of ``predict`` that were rejected, the lowest score first.

    Attributes:
        rows: the explanations.
        detector: the detector.
        images: the number of images that were read.
        rejected: the number of images that were rejected, of which those with the lowest scores are explained.
        no_map: why there are no maps, as a clause; None if there are.
        pooled: whether the features are pooled from a map, so that the mean of each map is the score.
    """

    rows: tuple[Explanation, ...]
    detector: Detector
    images: int
    rejected: int
    no_map: str | None
    pooled: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Explanation:
        return self.rows[row]

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.rows)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a page with all explanations, ``index.html``, to a folder, and return its path.

        The page contains its pictures and fetches nothing.

        Raises:
            CacheWriteFailed: if the page cannot be written.
        """
        require("the page of explanations needs", "report", "jinja2")
        from ood_scores.detector.explanation_page import write_page

        return write_page(self, folder)


@dataclass(frozen=True, eq=False)
class _Rejected:
    """A rejected image: its number among those that were read, and its row of each part."""

    number: int
    score: float
    p_value: float
    feats: FeatureSet
    positions: Positions | None
    input: Tensor


@dataclass(frozen=True)
class Calibrated:
    """Fitted scorers, and their scores of calibration rows."""

    scorers: Sequence[Scorer]
    scores: Sequence[NDArray[np.float64]]

    @classmethod
    def of(cls, scorers: Iterable[str | Scorer], fit: FeatureSet | None, id: FeatureSet | None) -> Calibrated:
        """Fit scorers that need it, and score the calibration rows.

        Raises:
            BadInput: if there are scorers, but no calibration rows, or no fit set for one that needs it.
        """
        ready = [as_scorer(each) for each in scorers]
        if ready and id is None:
            raise BadInput(
                "p-values of other scorers need calibration rows: pass id=, the feature set of held-out data."
            )
        unfitted = [each for each in ready if not each.is_fitted]
        if unfitted and fit is None:
            raise BadInput(f"{unfitted[0].name!r} needs to be fitted on ID data: pass fit=, a feature set.")
        if unfitted and fit is not None:
            fit_all(unfitted, fit)
        return cls(ready, [each.score(id).numpy() for each in ready] if id is not None else [])

    def p_values(self, feats: FeatureSet) -> dict[str, float]:
        """Return the p-value of each scorer for a set of one row."""
        return {
            scorer.name: float(p_values(known, scorer.score(feats).numpy())[0])
            for scorer, known in zip(self.scorers, self.scores, strict=True)
        }


def explain(
    detector: Detector,
    batches: Iterable[tuple[int, Any, Tensor]],
    names: NDArray[np.str_] | None,
    errors: Mapping[int, str],
    *,
    fit: OneSet | None,
    id: OneSet | None,
    scorers: Sequence[str | Scorer],
    neighbors: int,
    pictures: Any,
    most: int,
) -> Explanations:
    """Explain the rejected images of some batches; see ``Detector.explain``.

    Args:
        detector: the detector.
        batches: the number of the first row, the batch for the model, and the inputs in it.
        names: the files of all images, or None.
        errors: images that were left out, by their number; complete after the last batch.
        fit, id, scorers, neighbors, pictures, most: see ``Detector.explain``.
    """
    for name, value in (("neighbors", neighbors), ("most", most)):
        if value < 1:
            raise BadInput(f"{name} must be at least 1, got {value}.")
    fit, id = _of_model(detector, fit, "the fit set"), _of_model(detector, id, "the ID set")
    if fit is not None:
        detector.scorer.check_ready(fit)
    others = Calibrated.of(scorers, fit, id)
    kept: list[_Rejected] = []
    images = rejected = 0
    reason = None
    for start, batch, inputs in batches:
        found, here, reason = _rejected(detector, start, batch, inputs)
        images, rejected = images + len(found), rejected + len(here)
        kept = sorted([*kept, *here], key=lambda each: each.score)[:most]
    alike = _neighbors(detector.scorer, kept, fit, neighbors, pictures, detector.classes) if fit else [()] * len(kept)
    number_of = np.delete(np.arange(images + len(errors)), list(errors))
    rows = tuple(_explanation(detector, each, near, others) for each, near in zip(kept, alike, strict=True))
    rows = tuple(replace(row, image=int(number_of[row.image])) for row in rows)
    if names is not None:
        rows = tuple(replace(row, id=str(names[row.image])) for row in rows)
    pooled = all(each.positions is not None and each.positions.pooled for each in kept)
    return Explanations(rows, detector, images, rejected, reason if rows else None, pooled)


def _of_model(detector: Detector, given: OneSet | None, name: str) -> FeatureSet | None:
    """Return a set that must have been extracted with the detector's model."""
    if given is None:
        return None
    feats = as_feature_set(given)
    require_weights(detector.model, detector.weights, feats, name)
    return feats


def _rejected(
    detector: Detector, start: int, batch: Any, inputs: Tensor
) -> tuple[Prediction, list[_Rejected], str | None]:
    """Return the prediction for a batch, its rejected rows, and why there are no maps."""
    feats, positions, reason = run_with_positions(detector.forward, detector.scorer, batch, inputs, start)
    found = detector.decide(feats)
    rows = [
        _Rejected(
            start + row,
            float(found.score[row]),
            float(found.p_value[row]),
            feats[row : row + 1],
            positions and positions.of_row(row),
            inputs[row],
        )
        for row in np.flatnonzero(found.is_ood).tolist()
    ]
    return found, rows, reason


def _explanation(
    detector: Detector, rejected: _Rejected, neighbors: Sequence[Neighbor], others: Calibrated
) -> Explanation:
    feats, scorer = rejected.feats, detector.scorer
    members = scorer.p_values_of_members(feats) if isinstance(scorer, Fusion) else {}
    own = {scorer.name: rejected.p_value} | {name: float(values[0]) for name, values in members.items()}
    return Explanation(
        image=rejected.number,
        id=None,
        score=rejected.score,
        p_values=own | others.p_values(feats),
        classes=likely_classes(feats, detector.classes),
        neighbors=tuple(neighbors),
        score_map=None if rejected.positions is None else score_map(scorer, rejected.positions, feats.head),
        input=rejected.input,
    )


def _neighbors(
    scorer: Scorer, rejected: Sequence[_Rejected], fit: FeatureSet, count: int, data: Any, names: Sequence[str] | None
) -> list[tuple[Neighbor, ...]]:
    """Return the nearest rows of the fit set for each rejected image, by the vectors that the scorer compares."""
    if not rejected:
        return []
    distances, numbers = similar_rows(scorer, [each.feats for each in rejected], fit, count)
    pictures = _pictures(fit, data)
    labels, ids = fit.labels, fit.ids
    return [
        tuple(
            Neighbor(
                row,
                str(ids[row]) or None if ids is not None else None,
                None if labels is None else class_name(int(labels[row]), names),
                distance,
                None if pictures is None else pictures[row],
            )
            for row, distance in zip(of_image.tolist(), far.tolist(), strict=True)
        )
        for of_image, far in zip(numbers, distances, strict=True)
    ]


def _pictures(fit: FeatureSet, data: Any) -> Any:
    try:
        return pictures_of(fit, data)
    except (MissingData, BadInput):
        if data is not None:
            raise
        return None
