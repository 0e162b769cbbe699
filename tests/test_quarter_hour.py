"""The prepared run of five trainings on a GPU, rehearsed on a CPU at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import quarter_hour
from ood_scores.benchmark import Results

LABELED = {"cifar10_train": 160, "cifar10_test": 20}
UNLABELED = dict.fromkeys(("cifar100_test", "tinyimagenet_resize", "tinyimagenet_auxiliary", "textures", "scenes"), 16)
TOY = ("epochs=1", "model.width=2", "batch_size=32", "data.long_tail=4.0")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set OOD_SCORES_DATA to a folder with a sheet of noise for each dataset."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name, count in {**LABELED, **UNLABELED}.items():
        pixels = rng.integers(0, 256, (32 * -(-count // 4), 4 * 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.00.webp", lossless=True)
        labels = [row % 10 for row in range(count)] if name in LABELED else None
        index = {"size": 32, "columns": 4, "per_file": count, "count": count, "labels": labels}
        (tmp_path / "images" / f"{name}.json").write_text(json.dumps(index))
    monkeypatch.setenv("OOD_SCORES_DATA", str(tmp_path))


def rehearse(out: Path, minutes: float) -> Results | None:
    settings = [part for text in TOY for part in ("--set", text)]
    return quarter_hour.main(["--out", str(out), "--device", "cpu", "--minutes", str(minutes), *settings])


@pytest.mark.usefixtures("images")
@pytest.mark.filterwarnings("ignore")
def test_rehearsal_trains_and_compares_all_five_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ood_scores.benchmark.report.write_report", lambda results, images: [])
    monkeypatch.setattr("ood_scores.benchmark.unit.explained", lambda *_: None)
    out = tmp_path / "out"
    assert rehearse(out, minutes=0) is None  # no time: nothing is trained
    assert not out.exists()
    results = rehearse(out, minutes=60)
    assert results is not None
    assert {path.name for path in (out / "runs").iterdir()} == {f"{name}_seed0" for name in quarter_hour.RECIPES}
    assert set(results.comparison["model"]) == {"without L2", "with L2", "LA", "OE", "RNA"}
    assert results.comparison["ours"].notna().all()
    assert results.comparison["source"].str.contains("2024, Table").all()
