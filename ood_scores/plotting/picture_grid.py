"""Grids of the pictures with the lowest or highest scores."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ood_scores.errors import BadInput
from ood_scores.evaluation.pictures import pictures_of
from ood_scores.evaluation.score_table import score_table
from ood_scores.features import FeatureSet
from ood_scores.plotting.style import LABEL, TICK, new_figure
from ood_scores.terminal import safe

CELL = 1.55
"""Width of a picture in inches."""
MOST_PIXELS = 256
"""Longest side of a picture in the grid."""
CHARACTERS = 23
"""The most characters of a name below a picture."""


def extreme_rows(scores: Tensor, count: int, most: str = "ood") -> NDArray[np.int64]:
    """Return the rows with the lowest scores (``most="ood"``) or the highest (``"id"``), the most extreme first.

    Raises:
        BadInput: if ``count`` is below 1, or ``most`` is something else.
    """
    if most not in ("ood", "id"):
        raise BadInput(f"most must be 'ood' or 'id', got {most!r}.")
    if count < 1:
        raise BadInput(f"count must be at least 1, got {count}.")
    values = np.asarray(scores.cpu())
    return np.argsort(values if most == "ood" else -values, kind="stable")[:count]


def picture_grid(
    feats: FeatureSet,
    scores: Tensor,
    data: Any = None,
    *,
    most: str = "ood",
    count: int = 24,
    columns: int = 6,
    title: str = "score",
) -> Figure:
    """Draw the pictures with the lowest or highest scores, each with its score, name, and predicted class.

    Args:
        feats: The feature set.
        scores: Scores ``[N]`` of its rows.
        data: Where the pictures are, see ``ood_scores.evaluation.pictures.pictures_of``; None for the dataset that the
            set records, if this process has opened it.
        most: ``"ood"`` for the lowest scores, or ``"id"`` for the highest.
        count: Number of pictures.
        columns: Number of pictures in a row.
        title: Name of the scores.

    Returns:
        A figure that belongs to no window; save it with ``figure.savefig("grid.png", dpi=150)``. Its axes are in the
        order of the pictures.

    Raises:
        BadInput: if an argument is not one of those above, or as for ``pictures_of``.
        MissingData: as for ``pictures_of``.
    """
    if columns < 1:
        raise BadInput(f"columns must be at least 1, got {columns}.")
    chosen = extreme_rows(scores, count, most)
    table = score_table(feats, scores)
    pictures = pictures_of(feats, data)
    rows, columns = ceil(len(chosen) / columns), min(columns, len(chosen))
    figure = new_figure(CELL * columns, (CELL + 0.5) * rows + 0.4)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, row in zip(panels, chosen.tolist(), strict=False):
        _draw(axes, pictures[row], _caption(table.iloc[row].to_dict()))
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    which = "lowest" if most == "ood" else "highest"
    of = f" of {safe(feats.provenance.dataset)}" if feats.provenance else ""
    text = f"The {len(chosen)} rows{of} with the {which} {title}, out of {len(feats):,}"
    figure.suptitle(text, fontsize=LABEL, x=0.01, ha="left", parse_math=False)
    return figure


def _draw(axes: Axes, picture: Any, caption: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_anchor("S")
    if picture is None:
        axes.set_facecolor("#eeeeee")
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=TICK, transform=axes.transAxes)
        axes.set_aspect("equal")
    else:
        picture.thumbnail((MOST_PIXELS, MOST_PIXELS))
        axes.imshow(picture)
    axes.set_xlabel(caption, fontsize=TICK, parse_math=False, linespacing=1.3)


def _caption(row: dict[str, Any]) -> str:
    name = safe(str(row.get("id") or f"row {row['row']}")).replace("\n", " ")
    lines = [f"{row['score']:.5g}", _shortened(name)]
    return "\n".join([*lines, *([f"predicted {row['prediction']}"] if "prediction" in row else [])])


def _shortened(name: str) -> str:
    """Return a name of at most ``CHARACTERS`` characters, without its first folders, or else without its middle."""
    tail = name
    while len(tail) > CHARACTERS and "/" in tail.removeprefix("…/"):
        tail = f"…/{tail.removeprefix('…/').partition('/')[2]}"
    kept = CHARACTERS - 1
    return tail if len(tail) <= CHARACTERS else f"{tail[: kept // 3]}…{tail[kept // 3 - kept :]}"
