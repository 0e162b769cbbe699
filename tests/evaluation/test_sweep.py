"""sweep: every combination of a grid, right in every cell, from one pass over each set."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from ood_scores import FeatureSet, Head, create_scorer, evaluate, metrics, sweep
from ood_scores.errors import BadInput, EmptyInput, MissingInput, NotFitted, UnknownName
from ood_scores.features import Block

HEAD = Head(torch.randn(4, 6, generator=torch.Generator().manual_seed(9)))
METRICS = [*(name for name, metric in metrics.METRICS.items() if not metric.on_request), "n_id", "n_ood"]


def feature_set(seed: int, rows: int = 60, scale: float = 1.0) -> FeatureSet:
    features = scale * torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed)).relu()
    return FeatureSet(features, HEAD(features), torch.arange(rows) % 4, HEAD)


FIT, ID = feature_set(0, rows=200), feature_set(1)
OOD = {"near": feature_set(2, rows=40, scale=0.7), "far": feature_set(3, rows=55, scale=0.2)}


def test_sweep_evaluates_every_combination() -> None:
    table = sweep("react", {"q": [0.5, 0.9], "base": ["energy", "gradnorm", "msp"]}, id=ID, ood=OOD, fit=FIT)
    assert table.columns.tolist() == ["scorer", "q", "base", "ood", *METRICS]
    assert len(table) == 2 * 3 * 2
    assert table["scorer"].unique().tolist() == ["react"]
    assert table["q"].tolist() == [0.5] * 6 + [0.9] * 6
    assert table["base"].tolist() == ["energy", "energy", "gradnorm", "gradnorm", "msp", "msp"] * 2
    assert table.attrs["id_accuracy"] is not None
    for (q, base), rows in table.groupby(["q", "base"], sort=False):
        expected = evaluate([create_scorer("react", q=q, base=base)], id=ID, ood=OOD, fit=FIT)
        pd.testing.assert_frame_equal(rows[["ood", *METRICS]].reset_index(drop=True), expected[["ood", *METRICS]])


def test_sweep_reads_each_set_once_for_all_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[FeatureSet] = []
    blocks, fit = FeatureSet.blocks, feature_set(0, rows=200)

    def counted(self: FeatureSet, *args: Any, **kwargs: Any) -> Iterator[Block]:
        passes.append(self)
        return blocks(self, *args, **kwargs)

    monkeypatch.setattr(FeatureSet, "blocks", counted)
    sweep("react", {"q": np.linspace(0.5, 1, 11).tolist(), "base": ["energy", "gradnorm"]}, id=ID, ood=OOD, fit=fit)
    assert [id(feats) for feats in passes] == [id(fit), id(ID), id(OOD["near"]), id(OOD["far"])]


def test_sweep_over_scorers_as_values() -> None:
    assert sweep("gradnorm", {"p": (1.0, 2.0)}, id=ID, ood=OOD)["p"].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert sweep("knn", {"k": [1, 5]}, id=ID, ood=OOD, fit=FIT)["k"].dtype == "int64"
    nested = sweep("react", {"base": [create_scorer("ash_s", percentile=0.5)]}, id=ID, ood=OOD, fit=FIT)
    assert nested["base"].unique().tolist() == ["ASHS(base='energy', percentile=0.5)"]
    twice = sweep("gradnorm", {"p": [1.0, 1.0]}, id=ID, ood=OOD)
    assert len(twice) == 4
    plain = sweep("energy", {}, id=ID, ood=OOD)
    pd.testing.assert_frame_equal(plain, evaluate(["energy"], id=ID, ood=OOD))


@pytest.mark.parametrize(
    ("name", "grid", "error", "message"),
    [
        ("raect", {}, UnknownName, "there is no scorer 'raect'"),
        ("react", {"quantile": [0.9]}, UnknownName, "scorer 'react' has no parameter 'quantile': choose from "),
        ("react", {"q": [0.9, 2.0]}, BadInput, "q must be in"),
        ("react", {"base": "energy"}, BadInput, "grid must map 'base' to a list of values, got 'energy'"),
        ("react", {"q": 0.9}, BadInput, "grid must map 'q' to a list of values, got 0.9"),
        ("react", {"q": []}, EmptyInput, "grid has no values for 'q'"),
        ("react", [0.9], BadInput, "grid must map parameters to the values to try"),
        ("react", {"q": [0.9]}, NotFitted, "'react' is fitted on in-distribution features"),
    ],
)
def test_sweep_errors(name: str, grid: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sweep(name, grid, id=ID, ood=OOD)


def test_sweep_of_a_scorer_whose_requirements_are_missing() -> None:
    with pytest.raises(MissingInput, match="'react' needs head"):
        sweep("react", {"q": [0.9]}, id=FeatureSet(ID.features), ood=OOD, fit=FIT)


def test_sweep_is_imported_lazily() -> None:
    code = (
        "import sys, ood_scores; assert 'torch' not in sys.modules; ood_scores.sweep; print('sweep' in dir(ood_scores))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True"
