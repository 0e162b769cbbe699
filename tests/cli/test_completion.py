"""Tab completion of the arguments of commands."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ood_scores.cli import app
from ood_scores.data.sources import DATASET_KINDS
from ood_scores.extraction.probes import PROBES
from ood_scores.scorers import list_scorers


def completed(*words: str) -> list[str]:
    """Return what zsh, which passes words with colons whole, is told to complete the last word with."""
    line = " ".join(["ood-scores", *words])
    environment = {"_OOD_SCORES_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": line}
    shown = CliRunner().invoke(app, [], env=environment, prog_name="ood-scores").stdout
    lines = shown.removeprefix("_arguments '*: :((").removesuffix("))'\n").splitlines() if "((" in shown else []
    return [line.strip('"').replace("\\\\:", ":") for line in lines]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "photos/cat.jpg",
        "photos/dogs/a.jpg",
        "list.txt",
        "val.h5",
        ".hidden/x.txt",
        "benchmarks/papers/a.toml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_of_scorers() -> None:
    every = list_scorers()
    assert completed("score", "mah") == [name for name in every if name.startswith("mah")] != []
    for command in (["evaluate", "--scorer"], ["calibrate", "resnet50", "--scorer"], ["show", "--scorer"], ["list"]):
        assert completed(*command, "vi") == ["vim"]
    assert completed("score", "") == every


def test_names_of_probes() -> None:
    assert completed("extract", "--probe", "") == sorted(PROBES)
    assert completed("calibrate", "--probe", "od") == ["odin"]


def test_kinds_of_datasets_and_the_files_that_they_open(here: Path) -> None:
    assert completed("extract", "resnet50", "") == [f"{kind}:" for kind in sorted(DATASET_KINDS)]
    assert completed("extract", "resnet50", "torch") == ["torchvision:"]
    assert completed("extract", "resnet50", "torchvision:") == []
    assert completed("extract", "resnet50", "np") == ["npz:benchmarks/", "npz:photos/"]
    assert completed("extract", "resnet50", "fo") == ["folder:benchmarks/", "folder:photos/"]
    assert completed("extract", "resnet50", "folder:photos/") == ["folder:photos/dogs/"]
    assert completed("extract", "resnet50", "imglist:l") == ["imglist:list.txt"]
    assert completed("extract", "resnet50", "imglist:.hidden/") == ["imglist:.hidden/x.txt"]
    assert completed("extract", "resnet50", "npz:absent/") == []
    assert completed("extract", "resnet50", f"folder:{here}/ph") == [f"folder:{here}/photos/"]


def test_caches_or_datasets(here: Path) -> None:
    assert completed("calibrate", "resnet50", "--id", "v") == ["val.h5"]
    assert completed("calibrate", "resnet50", "--fit", "folder:p") == ["folder:photos/"]
    assert completed("calibrate", "resnet50", "--id", "n") == ["noise:", "npz:"]


def test_names_of_papers(here: Path) -> None:
    assert completed("paper", "") == ["a"]
