"""Every long work, killed at random moments: nothing that was done is lost, and the result has the same bits."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_benchmark
import tiny
import torch
from detecting import PIXELS, Rows, network
from interrupted import hide_gpus
from torch.utils.data import DataLoader

import ood_scores
from ood_scores.benchmark import load_results, runner
from ood_scores.detector import Detector
from ood_scores.errors import DamagedCache, ForeignFile
from ood_scores.features.storage import cache as caches
from ood_scores.scorers import Scorer
from ood_scores.training import state, train
from ood_scores.training.recipe_file import recipe_from

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes")

KILLS = int(os.environ.get("OOD_SCORES_KILLS", "2"))
"""Kills of each kind of work; 100 take some minutes."""
IN_A_ROW = 2
"""Kills of one run before it is left to end."""
SAVING = "saving"
"""The file that a work creates before it saves, which is short: half of the kills happen after this moment."""


class Slow(Rows):
    """Rows that take some time to load."""

    def __getitem__(self, row: int) -> Any:
        time.sleep(0.0005)
        return super().__getitem__(row)


def features(folder: Path, rows: int = 300, seed: int = 1) -> ood_scores.FeatureSet:
    return ood_scores.extract(network(), DataLoader(Rows(rows, seed), 32), folder / f"{seed}.h5", progress=False)


def extract(folder: Path) -> None:
    ood_scores.extract(network(), DataLoader(Slow(640, 0), 32), folder / "c.h5", progress=False)


def extracted_rows(folder: Path) -> int:
    if not (folder / "c.h5").exists():
        return 0
    with caches.open_to_read(folder / "c.h5") as h5:
        return caches.state(h5).rows


def columns(folder: Path) -> list[Any]:
    feats = ood_scores.load(folder / "c.h5")
    return [feats.features, feats.logits, feats.labels]


def fit_and_save(folder: Path) -> None:
    fit = features(folder)
    for name in ("mahalanobis", "vim", "knn"):
        scorer = ood_scores.create_scorer(name)
        scorer.fit(fit)
        scorer.save(folder / f"{name}.safetensors")


def saved_scorers(folder: Path) -> int:
    files = sorted(folder.glob("*.safetensors"))
    assert all(Scorer.load(file).is_fitted for file in files)
    return len(files)


def scores(folder: Path) -> list[Any]:
    feats = features(folder, 100, 2)
    return [Scorer.load(file).score(feats) for file in sorted(folder.glob("*.safetensors"))]


def calibrate(folder: Path) -> None:
    feats = ood_scores.extract(network(), DataLoader(Slow(200, 2), 32), progress=False)
    detector = ood_scores.calibrate("energy", network(), id=feats)
    (folder / SAVING).touch()
    detector.save(folder / "detector")


def saved_detectors(folder: Path) -> int:
    """Return 2 for a detector, and 1 for one whose first save is not complete, which is refused."""
    if not (folder / "detector").exists():
        return 0
    try:
        Detector.load(folder / "detector")
        return 2
    except (ForeignFile, DamagedCache) as error:
        if "is not a detector" in str(error) or "contains an unfinished detector: save the" in str(error):
            return 1
        raise


def decisions(folder: Path) -> list[Any]:
    detector = Detector.load(folder / "detector")
    return [*detector.predict(PIXELS).columns().values(), detector.calibration.scores]


def benchmark(folder: Path) -> None:
    if not (folder / "data").exists():
        (folder / "data.part").mkdir(exist_ok=True)
        small_benchmark.write_data(folder / "data.part")
        (folder / "data.part").rename(folder / "data")
    spec = small_benchmark.spec(small_benchmark.part(scorers=small_benchmark_scorers()))
    runner.run(spec, out=folder / "out", data=folder / "data", jobs=1, device="cpu", progress=False)


def small_benchmark_scorers() -> Any:
    from ood_scores.benchmark.spec import ScorerTable

    return tuple(ScorerTable(name, name) for name in ("msp", "mahalanobis", "knn"))


def finished_parts(folder: Path) -> int:
    found = 0
    for file in (folder / "out").glob("caches/*/*.h5"):
        with caches.open_to_read(file) as h5:
            found += caches.state(h5).rows
    return found + 1000 * len(list((folder / "out").glob("scores/*.h5")))


def results(folder: Path) -> list[Any]:
    found = load_results(folder / "out")
    timed = ("fit_seconds", "score_microseconds")
    (scored,) = found.scored
    values = [scored.scores[name][each] for name in ("msp", "mahalanobis", "knn") for each in ("id", "cousins", "dark")]
    return [found.table.drop(columns=list(timed)).to_json(), found.measures.to_json(), *values]


def training(folder: Path) -> None:
    tables = tiny.tables(epochs=3, batch_size=32, data={"train": "digits?take=200"}, state_every=2)
    train(recipe_from(tables), folder / "run", device="cpu", progress=False)


def trained_steps(folder: Path) -> int:
    file = folder / "run" / "log.csv"
    return len(file.read_text().split()) if file.exists() else 0


def weights(folder: Path) -> list[Any]:
    return list(state.read_tensors(folder / "run" / state.LAST).values())


@dataclass(frozen=True)
class Work:
    """A kind of work: what to do in a folder, how much of it is done, and the values that it ends with."""

    do: Callable[[Path], None]
    done: Callable[[Path], int]
    values: Callable[[Path], list[Any]]


WORKS = {
    "extract": Work(extract, extracted_rows, columns),
    "fit and save": Work(fit_and_save, saved_scorers, scores),
    "calibrate": Work(calibrate, saved_detectors, decisions),
    "benchmark": Work(benchmark, finished_parts, results),
    "train": Work(training, trained_steps, weights),
}


def started(kind: str, folder: Path) -> int:
    """Return the id of a process that does the work."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            hide_gpus()
            WORKS[kind].do(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait(folder: Path, moments: random.Random, seconds: float, saving: float) -> None:
    """Wait until a random moment of a work, or, in half of the cases, of the save at its end."""
    if not saving or moments.random() < 0.5:
        time.sleep(moments.uniform(0, seconds))
        return
    latest = time.perf_counter() + 20 * seconds
    while not (folder / SAVING).exists() and time.perf_counter() < latest:
        time.sleep(0.0005)
    time.sleep(moments.uniform(0, saving))


def same(one: Any, other: Any) -> bool:
    return one == other if isinstance(one, str) else np.array_equal(np.asarray(one), np.asarray(other))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", WORKS)
def test_killed_at_random_moments(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "train" and torch.cuda.is_available():
        pytest.skip("autograd cannot run in a fork of a process in which it has threads for a GPU")
    monkeypatch.setattr(runner, "_report", lambda *_: None)
    work, moments = WORKS[kind], random.Random(kind)
    (tmp_path / "here").mkdir()
    work.do(tmp_path / "here")  # imports what the forked processes need
    at = time.perf_counter()
    assert ended(started(kind, tmp_path / "expected")) == 0
    seconds = time.perf_counter() - at
    mark = tmp_path / "expected" / SAVING
    saving = time.time() - mark.stat().st_mtime if mark.exists() else 0
    expected, whole = work.values(tmp_path / "expected"), work.done(tmp_path / "expected")
    kills = number = midway = 0
    while kills < KILLS:
        number += 1
        folder, before = tmp_path / str(number), 0
        for _ in range(IN_A_ROW):
            (folder / SAVING).unlink(missing_ok=True)
            child = started(kind, folder)
            wait(folder, moments, seconds, saving)
            os.kill(child, signal.SIGKILL)
            code = ended(child)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            after = work.done(folder)
            assert after >= before
            midway += 0 < after < whole
            before = after
        assert ended(started(kind, folder)) == 0
        found = work.values(folder)
        assert len(found) == len(expected)
        assert all(map(same, found, expected))
        assert [file.name for file in folder.rglob("*.part*")] == []
    print(f"{kind}: {kills} kills of {number} runs of {seconds:.2f} s, {midway} of them midway")
