"""Relative paths in the probes of a benchmark start where those of its datasets and checkpoints do."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_benchmark import part, spec, write_data

from ood_scores.benchmark import plan
from ood_scores.benchmark.checks import check
from ood_scores.benchmark.digest import digest
from ood_scores.benchmark.planning import Unit
from ood_scores.benchmark.spec import Extraction
from ood_scores.extraction.probes.mixup import Mixup


def planned(data: Path, probe: str) -> Unit:
    chosen = spec(part(extraction=Extraction(batch_size=8, workers=0, fit_probes=(probe,))))
    check(chosen)
    (unit,) = plan(chosen, data / "out", data).units
    return unit


def test_paths_in_probes_start_in_the_folder_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    there = Mixup(proxy=f"npz:{tmp_path}/dark.npz").identity
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = planned(tmp_path, "mixup:proxy=npz:dark.npz").fit[0].options.all_probes
    assert [getattr(probe, "identity", "") for probe in found] == [there]
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/train.h5"):
        planned(tmp_path, "mahalanobis_odin:fit=train.h5")
    monkeypatch.chdir(tmp_path)
    here = Mixup(proxy="npz:dark.npz")
    assert here.identity == there
    assert digest(here) == digest(Mixup(proxy="npz:dark.npz", root=str(tmp_path)))
