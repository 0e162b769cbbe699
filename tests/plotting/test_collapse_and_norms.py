"""Tests of the figures of neural collapse and feature norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from made_features import collapsed, random_set

from ood_scores import FeatureSet
from ood_scores.errors import EmptyInput
from ood_scores.evaluation.feature_norms import norm_bins, norm_groups
from ood_scores.evaluation.neural_collapse import Collapse, singular_values
from ood_scores.plotting.collapse import collapse_curves, singular_value_curves
from ood_scores.plotting.norms import norm_bin_curves, norm_group_curves


def lines(axes: Any) -> list[list[float]]:
    return [list(map(float, line.get_ydata())) for line in axes.get_lines()]


def test_collapse_curves_show_every_measure_of_every_run() -> None:
    first, second = Collapse(*np.arange(1.0, 8)), Collapse(*np.arange(8.0, 15))
    figure = collapse_curves({"L2": {20: second, 10: first}, "no L2": {10: second}})
    *panels, legend = figure.axes
    for i, axes in enumerate(panels):
        assert lines(axes) == [[i + 1, i + 8], [i + 8]]  # by epoch
        assert axes.get_ylim()[0] == 0
    assert [axes.get_title(loc="left")[:3] for axes in panels] == ["NC1", *["NC2"] * 4, "NC3", "NC4"]
    box = legend.get_legend()
    assert box is not None
    assert [text.get_text() for text in box.get_texts()] == ["L2", "no L2"]


def test_norm_bin_curves_have_a_column_for_each_model() -> None:
    feats = random_set(4, 6)
    known, unknown = norm_bins(feats, bins=5), norm_bins(feats, bins=5, labeled=False)
    figure = norm_bin_curves({"L2": {"id": known, "ood": unknown}, "no L2": {"id": known}})
    assert [len(axes.collections) for axes in figure.axes] == [2, 1, 2, 1]
    points = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_array_equal(points, known[["norm", "accuracy"]])
    points = figure.axes[2].collections[1].get_offsets()
    np.testing.assert_array_equal(points, unknown[["norm", "confidence"]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["id", "ood"]


def test_singular_value_curves_end_where_rounding_begins() -> None:
    table = singular_values(collapsed(5, 16), {"other": random_set(5, 16)})
    (axes,) = singular_value_curves(table).axes
    assert [len(line) for line in lines(axes)] == [5, 16]
    (axes,) = singular_value_curves(table, first=3).axes
    assert [len(line) for line in lines(axes)] == [3, 3]
    assert axes.get_yscale() == "log"


def test_norm_group_curves_leave_empty_groups_out() -> None:
    epochs = [FeatureSet(torch.full((3, 1), value) * torch.tensor([[1.0], [1], [9]])) for value in (1.0, 2, 4)]
    figure = norm_group_curves(norm_groups(epochs, edges=(5, 10)))
    assert [lines(axes) for axes in figure.axes] == [[[1, 4], [81, 324]], [[1, 5], [81, 405]]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["from 10 (1)", "0 to 5 (2)"]


def test_figures_of_empty_input_are_refused() -> None:
    with pytest.raises(EmptyInput, match="to draw: pass"):
        collapse_curves({"L2": {}})
    with pytest.raises(EmptyInput, match="to draw: pass"):
        norm_bin_curves({})
    with pytest.raises(EmptyInput, match="to draw: pass"):
        singular_value_curves(singular_values(FeatureSet(torch.ones(1, 1)))[:0])
    with pytest.raises(EmptyInput, match="to draw: pass"):
        norm_group_curves(norm_groups([FeatureSet(torch.ones(1, 1))] * 2)[:0])
