"""Figures of the HTML page: SVG paths, which the page scales and colors, and the hardest samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

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
HARDEST = 8


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
class Sample:
    """A row with one of the worst scores.

    ``name`` is its file, or else its number; ``image`` is a data URI, empty if the image is unavailable. ``shares`` has
    for several scorers the share of ID rows with at most the same score: what each of them makes of the row.
    """

    set: str
    row: int
    name: str
    score: str
    prediction: int
    label: int
    image: str
    shares: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Hardest:
    """The OoD rows with the highest scores, and the ID rows with the lowest."""

    scorer: str
    ood: tuple[Sample, ...]
    id: tuple[Sample, ...]


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
    """Find the hardest samples of a scorer, and what other scorers make of them.

    ``images`` returns the images of a dataset by its name.
    """
    scores = {name: np.asarray(values) for name, values in unit.scores[scorer].items()}
    lowest = [("id", row) for row in np.argsort(scores.pop("id"), kind="stable")[:HARDEST]]
    high = [(name, row) for name in scores for row in np.argsort(-scores[name], kind="stable")[:HARDEST]]
    highest = sorted(high, key=lambda place: -scores[place[0]][place[1]])[:HARDEST]
    both = (_samples(unit, scorer, places, images, others) for places in (highest, lowest))
    return Hardest(scorer, *both)


def _samples(
    unit: Scored,
    scorer: str,
    places: Sequence[tuple[str, int]],
    images: Callable[[str], ImageDataset | None],
    others: Sequence[str],
) -> tuple[Sample, ...]:
    columns = {name: _Columns(unit, scorer, name) for name, _ in places}
    shares = {other: _shares(unit.scores[other], places) for other in others}
    samples = []
    for number, (name, i) in enumerate(places):
        of = columns[name]
        origin, row = of.origins[i], int(of.rows[i])
        dataset = images(origin)
        image = "" if dataset is None else data_uri(dataset.load(row)[0])
        name = safe(str(of.ids[i])) or f"row {row}"
        own = tuple((other, float(values[number])) for other, values in shares.items())
        samples.append(
            Sample(origin, row, name, f"{of.scores[i]:.4g}", int(of.predictions[i]), int(of.labels[i]), image, own)
        )
    return tuple(samples)


def _shares(scores: Mapping[str, Tensor], places: Sequence[tuple[str, int]]) -> NDArray[np.float64]:
    """Return the share of ID rows with at most the score of each row."""
    known = np.sort(np.asarray(scores["id"]))
    of_set = {name: np.asarray(scores[name]) for name, _ in places}
    return np.searchsorted(known, [of_set[name][row] for name, row in places], side="right") / len(known)


class _Columns:
    """Columns of a set, read once."""

    def __init__(self, unit: Scored, scorer: str, name: str) -> None:
        self.scores, self.rows, self.origins = unit.scores[scorer][name], unit.rows[name], unit.origins[name]
        self.predictions, self.labels, self.ids = unit.predictions[name], unit.labels[name], unit.ids[name]
