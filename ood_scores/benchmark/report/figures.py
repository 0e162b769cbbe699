"""Figures of the HTML page: SVG paths, which the page scales and colors, and the hardest samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ood_scores.benchmark.hardest import Place, hardest_places
from ood_scores.benchmark.unit_files import Scored
from ood_scores.evaluation.metrics import auroc
from ood_scores.evaluation.pictures import data_uri
from ood_scores.evaluation.threshold_counts import roc_counts
from ood_scores.plotting.curves import BINS, bin_edges, heights
from ood_scores.plotting.style import OOD_COLORS
from ood_scores.terminal import safe

if TYPE_CHECKING:
    from torch import Tensor

    from ood_scores.data.images import ImageDataset

ROC_SIZE = 200
"""Grid steps and maximum number of points of a ROC curve."""
HISTOGRAM_SIZE = (BINS, 100)


@dataclass(frozen=True)
class SetFigure:
    """An OoD set against the ID set; ``color`` is a number in the palette, and ``auroc`` is in percent."""

    name: str
    color: int
    auroc: float
    ood_path: str
    roc_path: str


@dataclass(frozen=True)
class ScorerFigure:
    """Histograms and curves of a scorer; ``low`` and ``high`` are the ends of the histograms' axis."""

    scorer: str
    low: str
    high: str
    id_path: str
    sets: tuple[SetFigure, ...]


@dataclass(frozen=True)
class Similar:
    """A similar row of the fit set; ``name`` is its file or number, and ``image`` a data URI, empty if unavailable."""

    name: str
    label: str
    distance: str
    image: str


@dataclass(frozen=True)
class Sample:
    """A row with one of the worst scores.

    ``name`` is its file, or else its number; ``image`` is a data URI, empty if the image is unavailable. ``p_values``
    has the conformal p-value of each of several scorers: what each of them makes of the row. ``prediction`` and
    ``label`` are names if they are known, else numbers; ``label`` is empty for OoD rows and rows without one.
    ``classes`` are the most probable ones, ``similar`` the nearest rows of the fit set, and ``map`` is a data URI.
    """

    set: str
    row: int
    name: str
    score: str
    prediction: str
    label: str
    image: str
    p_values: tuple[tuple[str, float], ...] = ()
    classes: tuple[tuple[str, float], ...] = ()
    similar: tuple[Similar, ...] = ()
    map: str = ""


@dataclass(frozen=True)
class Hardest:
    """The OoD rows with the highest scores, and the ID rows with the lowest; ``no_map`` is why there are no maps."""

    scorer: str
    ood: tuple[Sample, ...]
    id: tuple[Sample, ...]
    no_map: str | None = None


def scorer_figure(unit: Scored, scorer: str, sets: Iterable[str]) -> ScorerFigure:
    """Return the figure of a scorer for the OoD sets that were scored."""
    scores = unit.scores[scorer]
    id_scores = np.asarray(scores["id"])
    ood_scores = {name: np.asarray(scores[name]) for name in sets if name in scores}
    edges = bin_edges(id_scores, list(ood_scores.values()))
    return ScorerFigure(
        scorer=scorer,
        low=f"{edges[0]:.3g}",
        high=f"{edges[-1]:.3g}",
        id_path=histogram_path(heights(id_scores, edges)),
        sets=tuple(
            SetFigure(
                name=name,
                color=i % len(OOD_COLORS),
                auroc=100 * auroc(id_scores, scores),
                ood_path=histogram_path(heights(scores, edges)),
                roc_path=roc_path(id_scores, scores),
            )
            for i, (name, scores) in enumerate(ood_scores.items())
        ),
    )


def histogram_path(bars: NDArray[np.float64]) -> str:
    """Return an SVG path of bars of width 1, the highest of height 100."""
    tops = np.rint(HISTOGRAM_SIZE[1] * (1 - bars)).astype(int)
    return f"M0 {HISTOGRAM_SIZE[1]}" + "".join(f"V{top}h1" for top in tops) + f"V{HISTOGRAM_SIZE[1]}z"


def roc_path(id_scores: NDArray[np.float64], ood_scores: NDArray[np.float64]) -> str:
    """Return an SVG path of accepted ID against accepted OoD in a square of ``ROC_SIZE``, rounded to whole steps."""
    counts = roc_counts(id_scores, ood_scores)
    shares = np.stack([counts.negatives / counts.n_negative, counts.positives / counts.n_positive], axis=1)
    points = np.rint(ROC_SIZE * np.concatenate([np.zeros((1, 2)), shares])).astype(int)
    points = points[np.append(True, np.diff(points, axis=0).any(axis=1))]
    kept = points[np.unique(np.linspace(0, len(points) - 1, ROC_SIZE).round().astype(int))]
    return f"M0 {ROC_SIZE}l" + " ".join(f"{right} {-up}" for right, up in np.diff(kept, axis=0))


def hardest(
    unit: Scored, scorer: str, images: Callable[[str], ImageDataset | None], others: Sequence[str] = ()
) -> Hardest:
    """Return the hardest samples of a scorer, why they are hard if that is known, and what other scorers make of them.

    ``images`` returns the images of a dataset by its name.
    """
    scores = {name: np.asarray(values) for name, values in unit.scores[scorer].items()}
    known: Mapping[str, Any] = unit.explained or {}
    if known.get("scorer") != scorer:
        known = {}
    reasons = {(each["set"], each["row"]): each for each in known.get("rows", ())}
    ood, id = (
        _samples(unit, scorer, places, images, others, reasons, known.get("fit")) for places in hardest_places(scores)
    )
    return Hardest(scorer, ood, id, known.get("no_map"))


def _samples(
    unit: Scored,
    scorer: str,
    places: Sequence[Place],
    images: Callable[[str], ImageDataset | None],
    others: Sequence[str],
    reasons: Mapping[Place, Mapping[str, Any]],
    fit: str | None,
) -> tuple[Sample, ...]:
    columns = {name: _Columns(unit, scorer, name) for name, _ in places}
    p_values = {other: _p_values(unit.scores[other], places) for other in others}
    samples = []
    for number, (name, i) in enumerate(places):
        of, why = columns[name], reasons.get((name, i), {})
        origin, row, classes = of.origins[i], int(of.rows[i]), why.get("classes") or ()
        label = int(of.labels[i]) if name == "id" else -1
        samples.append(
            Sample(
                set=origin,
                row=row,
                name=_file(str(of.ids[i]), row),
                score=f"{of.scores[i]:.4g}",
                prediction=safe(classes[0][0]) if classes else str(int(of.predictions[i])),
                label=safe(why.get("label") or str(label)) if label >= 0 else "",
                image=_picture(images(origin), row),
                p_values=tuple((other, float(values[number])) for other, values in p_values.items()),
                classes=tuple((safe(text), float(share)) for text, share in classes),
                similar=tuple(_similar(near, images(fit) if fit else None) for near in why.get("similar", ())),
                map=why.get("map", ""),
            )
        )
    return tuple(samples)


def _similar(near: Mapping[str, Any], dataset: ImageDataset | None) -> Similar:
    row = int(near["row"])
    return Similar(_file(near["id"], row), safe(near["label"] or ""), f"{near['distance']:.3g}", _picture(dataset, row))


def _file(name: str, row: int) -> str:
    return safe(name) or f"row {row}"


def _picture(dataset: ImageDataset | None, row: int) -> str:
    return "" if dataset is None else data_uri(dataset.load(row)[0])


def _p_values(scores: Mapping[str, Tensor], places: Sequence[Place]) -> NDArray[np.float64]:
    """Return the conformal p-value of each row: of an ID row, among the ID rows with itself."""
    known = np.sort(np.asarray(scores["id"]))
    of_set = {name: np.asarray(scores[name]) for name, _ in places}
    at_most = np.searchsorted(known, [of_set[name][row] for name, row in places], side="right")
    itself = np.array([name != "id" for name, _ in places])
    return (at_most + itself) / (len(known) + itself)


class _Columns:
    """Columns of a set, read once."""

    def __init__(self, unit: Scored, scorer: str, name: str) -> None:
        self.scores, self.rows, self.origins = unit.scores[scorer][name], unit.rows[name], unit.origins[name]
        self.predictions, self.labels, self.ids = unit.predictions[name], unit.labels[name], unit.ids[name]
