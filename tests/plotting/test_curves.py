"""Tests of the figures of score distributions."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import StepPatch

from ood_scores.evaluation.metrics import auroc
from ood_scores.plotting.curves import BINS, Panel, bin_edges, score_histograms


def panel(shift: float = -2.0, sets: int = 2) -> Panel:
    rng = np.random.default_rng(0)
    return Panel(rng.normal(0, 1, 300), {f"set {i}": rng.normal(shift, 1 + i, 200) for i in range(sets)})


def test_score_histograms_have_a_row_for_each_set() -> None:
    panels = {"energy": panel(), "msp": panel(-1.0)}
    figure = score_histograms(panels, columns=2)
    assert isinstance(figure, Figure)
    assert len(figure.axes) == 4
    texts = [axes.texts[0].get_text() for axes in figure.axes]
    expected = [
        f"{name}\n{100 * auroc(each.id_scores, scores):.1f}"
        for each in panels.values()
        for name, scores in each.ood_scores.items()
    ]
    assert texts == expected
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["energy", "", "msp", ""]
    assert figure.get_supxlabel().startswith("score (higher = more in-distribution")
    assert figure.get_supylabel() == "density, relative to its peak"


def test_heights_are_the_histogram_relative_to_its_peak() -> None:
    one = panel(sets=1)
    (axes,) = score_histograms({"energy": one}).axes
    in_distribution, *out_of_distribution = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    for scores, patches in ((one.id_scores, [in_distribution]), (one.ood_scores["set 0"], out_of_distribution)):
        for patch in patches:
            heights, edges, _ = patch.get_data()
            counts, _ = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)
            assert counts.sum() == len(np.asarray(scores))
            np.testing.assert_allclose(heights, counts / counts.max())


def test_score_histograms_of_tensors_and_arrays_are_equal(tmp_path: Path) -> None:
    arrays = panel()
    tensors = Panel(torch.tensor(arrays.id_scores), {k: torch.tensor(v) for k, v in arrays.ood_scores.items()})
    for name, each in (("arrays", arrays), ("tensors", tensors)):
        score_histograms({"energy": each}).savefig(tmp_path / f"{name}.png")
    first, second = (imread(tmp_path / f"{name}.png") for name in ("arrays", "tensors"))
    assert np.array_equal(first, second)
    assert first.std() > 0.05


@pytest.mark.parametrize(
    ("id_scores", "ood_scores", "low", "high"),
    [
        ([0.0, 1.0], [0.5], 0.0, 1.0),
        ([0.0, 1.0], [-100.0], -2.965, 1.0),
        ([0.0, 1.0], [float("-inf")], -2.965, 1.0),
        ([0.0, 1.0, float("inf")], [0.5], 0.0, 3.965),
        ([2.0, 2.0], [2.0], 2.0, 3.0),
    ],
)
def test_bin_edges_extend_to_the_limit_only(
    id_scores: list[float], ood_scores: list[float], low: float, high: float
) -> None:
    edges = bin_edges(np.array(id_scores), [np.array(ood_scores)])
    assert len(edges) == BINS + 1
    assert (edges[0], edges[-1]) == pytest.approx((low, high))
    assert (np.diff(edges) > 0).all()


def test_score_histograms_do_not_import_pyplot() -> None:
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot.get_fignums() if pyplot else None
    score_histograms({"energy": panel()})
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert (pyplot.get_fignums() if pyplot else None) == before
