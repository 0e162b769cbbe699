"""Paths that start with ``~`` are those of the user's folder, wherever files are read or written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ood_scores
from ood_scores.cli.parsing import write_table
from ood_scores.models.checkpoints import read_checkpoint

X = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def test_caches(home: Path, model: nn.Module) -> None:
    feats = ood_scores.extract(model, [X], cache="~/c.h5", progress=False)
    feats.save("~/again.h5")
    assert len(ood_scores.load("~/c.h5")) == len(ood_scores.load("~/again.h5")) == 40
    assert sorted(path.name for path in home.iterdir()) == ["again.h5", "c.h5"]
    assert not list(Path().iterdir())


def test_scorers_and_detectors(home: Path, model: nn.Module) -> None:
    detector = ood_scores.calibrate("energy", model, id=[X])
    detector.save("~/detector")
    detector.scorer.save("~/energy.safetensors")
    assert ood_scores.Detector.load("~/detector", model).weights == detector.weights
    assert type(detector.scorer).load("~/energy.safetensors").name == "energy"
    assert {path.name for path in home.iterdir()} == {"detector", "energy.safetensors"}
    assert not list(Path().iterdir())


def test_checkpoints_and_tables(home: Path, model: nn.Module) -> None:
    save_file(model.state_dict(), home / "w.safetensors")
    assert read_checkpoint("~/w.safetensors").keys() == model.state_dict().keys()
    write_table(pd.DataFrame({"a": [1]}), Path("~/t.csv"))
    assert (home / "t.csv").exists()
    assert not list(Path().iterdir())
