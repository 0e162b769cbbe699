"""A benchmark that is interrupted at any moment continues to the same results."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import pandas as pd
import pytest
import torch
from small_benchmark import part, spec

from ood_scores.atomic import LockedFile
from ood_scores.benchmark import Results, load_results, run
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Preprocessing, ScorerTable
from ood_scores.errors import BadInput, CacheBusy, WorkerDied

pytestmark = pytest.mark.usefixtures("one_thread", "no_report")
TIMES = ["fit_seconds", "score_microseconds"]
SCORERS = tuple(ScorerTable(name, name) for name in ("msp", "gradnorm", "knn", "mahalanobis"))
PROBED = (ScorerTable("odin", "odin"),)
KILLS = 6

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["ood_scores.benchmark.runner", "ood_scores.models.opening"])


def two_parts() -> tuple[Part, Part]:
    probing = Extraction(batch_size=4, workers=0, probes=("odin",), rows=16)
    seeds = (ModelTable("cifar_resnet20", "Net", ("0.safetensors", "1.safetensors")),)
    return part(scorers=SCORERS, models=seeds), part(title="Probed", scorers=PROBED, extraction=probing)


def whole_run(data: Path, out: Path, jobs: int = 1) -> Results:
    torch.set_num_threads(1)
    return run(spec(*two_parts()), out=out, data=data, jobs=jobs, progress=False)


def table(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "results.csv").drop(columns=TIMES)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    whole_run(data, out)
    return out


def test_benchmark_killed_at_random_finds_the_same_results(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    started: list[int] = []
    for _ in range(KILLS):
        process: Any = children.Process(target=whole_run, args=(data, tmp_path))
        process.start()
        process.join(rng.uniform(0.3, 2.0))
        process.kill()
        process.join()
        started.append(len(list(tmp_path.glob("caches/*/*.h5"))))
    assert started == sorted(started)
    whole_run(data, tmp_path)
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed))
    assert not list(tmp_path.rglob(".*.part"))


@pytest.mark.parametrize("alive", [1, 2], ids=["while-the-next-starts", "at-work"])
def test_benchmark_reports_a_killed_process_and_continues(
    data: Path, undisturbed: Path, tmp_path: Path, alive: int
) -> None:
    def kill_the_first() -> None:
        while len(born := multiprocessing.active_children()) < alive:
            time.sleep(0.001)
        os.kill(born[0].pid or 0, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with pytest.raises(WorkerDied, match="run the same command again"):
        whole_run(data, tmp_path, jobs=2)
    killer.join()
    assert not (tmp_path / "results.csv").exists()
    whole_run(data, tmp_path, jobs=2)
    assert not multiprocessing.active_children()
    pd.testing.assert_frame_equal(table(tmp_path), table(undisturbed))


@pytest.mark.parametrize("harm", ["truncate", "flip", "other"])
def test_damaged_scores_are_computed_again(data: Path, undisturbed: Path, tmp_path: Path, harm: str) -> None:
    out = tmp_path / "copy"
    shutil.copytree(undisturbed, out)
    path = sorted(out.glob("scores/*.h5"))[0]
    if harm == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif harm == "flip":
        with h5py.File(path) as h5:
            offset = h5["sets/0/scores"].id.get_offset()
        with open(path, "r+b") as file:
            file.seek(offset + 3)
            file.write(b"\xaa\x55")
    else:
        path.write_text("not HDF5")
    with pytest.raises(BadInput, match="damaged: run the benchmark again"):
        load_results(out)
    whole_run(data, out)
    pd.testing.assert_frame_equal(table(out), table(undisturbed))
    load_results(out)


def test_runs_with_other_weights_or_preprocessing_do_not_share_files(data: Path, tmp_path: Path) -> None:
    def found(**changes: Any) -> pd.DataFrame:
        return run(spec(part(scorers=SCORERS, **changes)), out=tmp_path, data=data, jobs=1, progress=False).table

    first = found()
    other = found(models=(ModelTable("cifar_resnet20", "Net", "1.safetensors"),))
    squashed = found(preprocessing=Preprocessing(input_size=(8, 8), mean=(0.0, 0.0, 0.0)))
    assert first["auroc"].tolist() != other["auroc"].tolist() != squashed["auroc"].tolist() != first["auroc"].tolist()
    pd.testing.assert_frame_equal(found(), first)
    assert len(list(tmp_path.glob("scores/*.h5"))) == 3
    assert len(list(tmp_path.glob("caches/*/*.h5"))) == 12


def test_benchmark_folder_is_locked(data: Path, tmp_path: Path) -> None:
    with LockedFile(tmp_path / ".lock", "a+"), pytest.raises(CacheBusy, match="another run uses"):
        whole_run(data, tmp_path)
