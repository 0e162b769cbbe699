"""What Jupyter shows of feature sets, scorers, detectors, predictions and results, with names of strangers escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import ood_scores
from ood_scores import FeatureSet, Head
from ood_scores.benchmark.results import Results, frame
from ood_scores.detector.prediction import Prediction
from ood_scores.notebook import facts_html


def test_names_are_escaped_and_missing_facts_left_out() -> None:
    html = facts_html("<script>", {"file": "a<b>&\x1b[31m.h5", "rows": 1234567, "model": None})
    assert "<script>" not in html
    assert "a&lt;b&gt;&amp;\\x1b[31m.h5" in html
    assert "1,234,567" in html
    assert "model" not in html


def test_feature_sets_and_scorers_show_their_facts() -> None:
    feats = FeatureSet(torch.randn(30, 5), torch.randn(30, 3), head=Head(torch.randn(3, 5), torch.zeros(3)))
    html = feats._repr_html_()
    assert "<strong>FeatureSet</strong>" in html
    assert "features, logits, head" in html
    knn = ood_scores.create_scorer("knn", k=3)
    before = knn._repr_html_()
    assert "Scorer knn" in before
    assert '>is fitted</th><td style="text-align:left">no<' in before
    assert ">yes<" in knn.fit(feats)._repr_html_()
    assert "is fitted" not in ood_scores.create_scorer("energy")._repr_html_()


def test_detectors_and_predictions_show_their_decisions() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    inputs = torch.randn(40, 4)
    detector = ood_scores.calibrate("energy", model, id=inputs.split(20), keep=0.9)
    html = detector._repr_html_()
    assert "at least 90.24% of ID rows are kept" in html
    assert f"{detector.calibration.thresholds[0].value:.6g}" in html
    found = detector.predict(inputs)
    shown = found._repr_html_()
    assert f'>OoD</th><td style="text-align:left">{found.is_ood.sum()}<' in shown
    assert "p_value" in shown
    assert isinstance(found, Prediction)


def test_results_show_auroc_by_dataset() -> None:
    row = {"part": "P", "model": "Net", "checkpoint": 0, "scorer": "msp", "n_id": 1, "n_ood": 1}
    rows = [row | {"ood": name, "auroc": value} for name, value in (("near", 0.75), ("<far>", 0.912))]
    nothing: Any = {name: frame(name, []) for name in ("comparison", "measures", "searched")}
    results = Results("r", "Title", Path("runs/r"), {}, frame("table", rows), not_run=(), scored=(), **nothing)
    html = results._repr_html_()
    assert "<td>75.0</td>" in html
    assert "<td>91.2</td>" in html
    assert "<far>" not in html
