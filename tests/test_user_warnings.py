"""Warnings point at the line of the user's code that called the package."""

from __future__ import annotations

import ast
import linecache
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ood_scores
from ood_scores import FeatureSet, calibrate, create_scorer, evaluate, extract, score
from ood_scores.errors import NearChance
from ood_scores.features import Head
from ood_scores.scorers import registry

PACKAGE = Path(ood_scores.__file__).parent


def feats(rows: int = 60, predicted: int = 3) -> FeatureSet:
    """A set of which only the first classes are predicted."""
    with torch.random.fork_rng():
        torch.manual_seed(rows)
        head = Head(torch.randn(3, 8), torch.tensor([0.0, 0.0, 0.0 if predicted == 3 else -100.0]))
        features = torch.randn(rows, 8)
        logits = head(features)
    return FeatureSet(features, logits, logits.argmax(1), head)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def loader(shuffle: bool = False) -> DataLoader[Any]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x = torch.randn(60, 8)
    return DataLoader(TensorDataset(x, (network()(x).argmax(1) + 1) % 3), 16, shuffle=shuffle)


FEATS, LACKING = feats(), feats(80, predicted=2)
OTHER = FeatureSet(feats(70).features, feats(70).logits)


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("near chance", lambda path: extract(network(), loader(), progress=False)),
        ("is random", lambda path: extract(network(), loader(shuffle=True), path / "c.h5", progress=False)),
        ("near chance", lambda path: calibrate("energy", network(), id=loader())),
        ("fitted on", lambda path: calibrate("knn", network(), fit=FEATS, id=FEATS)),
        ("shares 60 of 60 rows", lambda path: score("knn", FEATS, fit=FEATS)),
        ("OoD set 'b'", lambda path: evaluate(["energy"], id=OTHER, ood={"a": FEATS, "b": FEATS})),
        ("no correctly predicted row", lambda path: create_scorer("she").fit(LACKING)),
        ("no correctly predicted row", lambda path: score("she", FEATS, fit=LACKING)),
        ("ebo is energy here", lambda path: create_scorer("ebo")),
    ],
)
def test_warnings_point_at_the_callers_line(text: str, call: Callable[[Path], Any], tmp_path: Path) -> None:
    registry.tell_alias.cache_clear()
    with pytest.warns(UserWarning, match=text) as found:
        call(tmp_path)
    for warning in found:
        assert warning.filename == __file__, warning
        assert "lambda path" in linecache.getline(__file__, warning.lineno), warning


def test_one_warning_of_accuracy_near_chance(tmp_path: Path) -> None:
    with pytest.warns(NearChance, match=r"the dataset 'TensorDataset' is 0\.00%, near chance for 3 .*OoD set means"):
        extract(network(), loader(), tmp_path / "c.h5", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(network(), loader(), tmp_path / "c.h5", progress=False)  # was warned of when it was created
    with pytest.warns(UserWarning, match="near chance") as found:
        calibrate("energy", network(), id=loader())
    assert [str(each.message)[:31] for each in found] == ["the accuracy on the ID set is 0"]


def test_every_warning_of_the_package_does_so() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "warn" and isinstance(node.value, ast.Name):
                assert node.value.id != "warnings" or path.name == "user_warnings.py", path
