"""A run that is killed at any time, or stopped by a full disk, leaves a cache that is continued to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ood_scores
from ood_scores import atomic
from ood_scores.errors import CacheBusy, CacheWriteFailed, UnfinishedCache
from ood_scores.extraction.writers import AHEAD
from ood_scores.features.storage import cache as caches

ROWS, BATCH, PAUSE = 2560, 32, 0.003
KILLS = 20

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["ood_scores.extraction.run", "rich.progress"])


class SlowData(Dataset):
    """Yield random inputs and labels, slowly, one batch at a time."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(ROWS, 12, generator=generator)
        self.labels = torch.randint(5, (ROWS,), generator=generator)

    def __len__(self) -> int:
        return ROWS

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        time.sleep(PAUSE)
        return [(self.inputs[row], self.labels[row]) for row in rows]


class FillingDisk(SlowData):
    """Limit files to ``size`` bytes from row ``row`` on."""

    def __init__(self, row: int, size: int) -> None:
        super().__init__()
        self.row, self.size = row, size

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.row in rows:
            limit_file_size(self.size)
        return super().__getitems__(rows)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def known_length(data: Dataset | None = None) -> Iterable[Any]:
    return DataLoader(data or SlowData(), batch_size=BATCH)


def unknown_length(data: Dataset | None = None) -> Iterable[Any]:
    return (batch for batch in known_length(data))


LOADERS = {"known length": known_length, "unknown length": unknown_length}
kinds = pytest.mark.parametrize("kind", LOADERS)


def extract(path: Path, kind: str, data: Dataset | None = None) -> ood_scores.FeatureSet:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    return ood_scores.extract(model, LOADERS[kind](data), cache=path, name="data", progress=False)


def extract_once_told(path: Path, kind: str, began: Any) -> None:
    began.set()
    extract(path, kind)


def extract_or_say_busy(path: Path, kind: str) -> None:
    try:
        extract(path, kind)
    except CacheBusy:
        os._exit(3)


def start(target: Any, *arguments: Any) -> Any:
    process = children.Process(target=target, args=arguments)
    process.start()
    return process


def contents(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return type, shape, and bytes of every dataset in an HDF5 file."""
    found: dict[str, tuple[Any, ...]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = (item.dtype.str, item.shape, item[()].tobytes())

    with h5py.File(path, "r") as h5:
        h5.visititems(note)
    return found


def leftovers(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir() if file.suffix != ".h5"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """The finished file of an uninterrupted run, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    start(known_length).join()  # the first child waits for the imports
    runs = {}
    for number, kind in enumerate(LOADERS):
        path = folder / f"{number}.h5"
        began = children.Event()
        process = start(extract_once_told, path, kind, began)
        assert began.wait(60)
        at = time.perf_counter()
        process.join()
        assert process.exitcode == 0
        runs[kind] = path, time.perf_counter() - at
    return runs


def rows_after_kill(path: Path) -> int | None:
    """Return the number of rows of a killed run (None: no file yet), after checking that its file can be opened."""
    if not path.exists():
        return None
    with h5py.File(path, "r") as h5:
        state = caches.state(h5)
        assert len(h5["features"]) >= state.rows
    if state.finished:
        assert len(ood_scores.load(path)) == ROWS
    else:
        with pytest.raises(UnfinishedCache, match=f"holds {state.rows:,} rows .* run the same extract"):
            ood_scores.load(path)
    assert state.rows % BATCH == 0
    return state.rows


def test_an_uninterrupted_run_contains_the_outputs_of_the_model(uninterrupted: dict[str, tuple[Path, float]]) -> None:
    known, unknown = (contents(path) for path, _ in uninterrupted.values())
    assert known == unknown
    columns = {"features", "logits", "labels"}
    assert known.keys() == {
        *columns,
        *(f"checksums/{name}" for name in columns),
        "head/weight",
        "head/bias",
        "progress",
    }
    feats = ood_scores.load(uninterrupted["known length"][0])
    assert feats.labels is not None
    assert feats.labels.equal(SlowData().labels)
    assert feats.head is not None
    assert feats.logits is not None
    torch.testing.assert_close(feats.head(feats.features), feats.logits)


@kinds
def test_killed_at_random_instants(kind: str, tmp_path: Path, uninterrupted: dict[str, tuple[Path, float]]) -> None:
    whole, seconds = uninterrupted[kind]
    instants = random.Random(kind)
    left: list[int | None] = []
    while not in_many_places(left):
        assert len(left) < 5 * KILLS
        path = tmp_path / f"{len(left)}.h5"
        for _ in range(3):
            began = children.Event()
            process = start(extract_once_told, path, kind, began)
            assert began.wait(60)
            process.join(instants.uniform(0, 0.8 * seconds))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            if process.exitcode:
                left.append(rows_after_kill(path))
        extract(path, kind)
        assert contents(path) == contents(whole)
    assert leftovers(tmp_path) == []


def in_many_places(left: list[int | None]) -> bool:
    """Whether enough extractions were killed in the middle, which depends on what else the machine does."""
    in_the_middle = [rows for rows in left if rows and rows < ROWS]
    return len(left) >= KILLS and len(in_the_middle) >= KILLS // 3 and len(set(in_the_middle)) >= KILLS // 4


def extract_killed_in_write(path: Path, kind: str, number: int) -> None:
    """Extract, and die during the ``number``-th write, half of which reaches the file."""
    writes = 0
    whole = atomic.LockedFile.write

    def write(self: Any, data: Any) -> int:
        nonlocal writes
        writes += 1
        if writes == number:
            data = memoryview(data).cast("B")
            whole(self, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, data)

    atomic.LockedFile.write = write  # type: ignore[method-assign]
    extract(path, kind)


@kinds
@pytest.mark.parametrize("number", [1, 5, 12, 40, 170])
def test_killed_during_a_write(
    kind: str, number: int, tmp_path: Path, uninterrupted: dict[str, tuple[Path, float]]
) -> None:
    path = tmp_path / "killed.h5"
    process = start(extract_killed_in_write, path, kind, number)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (rows_after_kill(path) or 0) < ROWS
    extract(path, kind)
    assert contents(path) == contents(uninterrupted[kind][0])
    assert leftovers(tmp_path) == []


def extract_killed_before(path: Path, kind: str, step: str, number: int) -> None:
    """Extract, and die right before the ``number``-th ``os.link`` or ``os.replace``."""
    calls = 0
    original = getattr(os, step)

    def dying(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    setattr(os, step, dying)
    extract(path, kind)


@pytest.mark.parametrize(
    ("step", "number", "rows"),
    [("link", 1, None), ("unlink", 1, 0), ("replace", 1, 1024), ("replace", 2, 2048), ("replace", 3, ROWS)],
)
def test_killed_before_a_file_is_put_in_place(
    step: str, number: int, rows: int | None, tmp_path: Path, uninterrupted: dict[str, tuple[Path, float]]
) -> None:
    path = tmp_path / "killed.h5"
    process = start(extract_killed_before, path, "unknown length", step, number)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert rows_after_kill(path) == rows
    assert len(leftovers(tmp_path)) == 1
    extract(path, "unknown length")
    assert contents(path) == contents(uninterrupted["unknown length"][0])
    assert leftovers(tmp_path) == []


def extract_until_full_then_again(path: Path, kind: str, row: int, size: int, pipe: Connection) -> None:
    try:
        extract(path, kind, FillingDisk(row, size))
    except CacheWriteFailed as error:
        pipe.send(str(error))
    limit_file_size(resource.RLIM_INFINITY)
    pipe.send(rows_after_kill(path))
    extract(path, kind)


@kinds
@pytest.mark.parametrize(("row", "share"), [(0, 0.001), (0, 0.02), (0, 0.5), (640, 0.1), (640, 0.5), (640, 0.98)])
def test_full_disk(
    kind: str, row: int, share: float, tmp_path: Path, uninterrupted: dict[str, tuple[Path, float]]
) -> None:
    path = tmp_path / "full.h5"
    whole = uninterrupted[kind][0]
    mine, theirs = children.Pipe()
    process = start(extract_until_full_then_again, path, kind, row, int(share * whole.stat().st_size), theirs)
    theirs.close()
    message, rows = mine.recv(), mine.recv()
    process.join()
    assert process.exitcode == 0
    assert "File too large" in message
    assert f"{rows or 0:,} rows are safe: make room on the disk and run the same call again" in message
    assert row - (AHEAD + 1) * BATCH <= (rows or 0) < ROWS  # minus the batches that were waiting to be written
    assert contents(path) == contents(whole)
    assert leftovers(tmp_path) == []


def save_on_a_small_disk(path: Path, compress: bool, pipe: Connection) -> None:
    feats = ood_scores.FeatureSet(torch.randn(4000, 100, generator=torch.Generator().manual_seed(0)))
    limit_file_size(300_000)
    try:
        feats.save(path, compress=compress)
    except CacheWriteFailed as error:
        pipe.send(str(error))
    pipe.send([file.name for file in path.parent.iterdir()])


@pytest.mark.parametrize("compress", [False, True])
def test_full_disk_while_saving_leaves_the_old_file(compress: bool, tmp_path: Path) -> None:
    path = tmp_path / "saved.h5"
    ood_scores.FeatureSet(torch.ones(3, 2)).save(path)
    mine, theirs = children.Pipe()
    process = start(save_on_a_small_disk, path, compress, theirs)
    theirs.close()
    assert "could not write" in mine.recv()
    assert mine.recv() == ["saved.h5"]
    process.join()
    assert process.exitcode == 0
    assert ood_scores.load(path).features.equal(torch.ones(3, 2))


def test_a_second_writer_and_readers_get_an_error(tmp_path: Path, uninterrupted: dict[str, tuple[Path, float]]) -> None:
    path = tmp_path / "busy.h5"
    first = start(extract, path, "known length")
    while not path.exists() and first.is_alive():
        time.sleep(0.001)
    with pytest.raises(CacheBusy, match="being written by another process"):
        extract(path, "known length")
    with pytest.raises(CacheBusy, match="not finished: wait"):
        ood_scores.load(path)
    with pytest.raises(CacheBusy):
        ood_scores.extract(nn.Linear(12, 5), known_length(), cache=path, overwrite=True, progress=False)
    with pytest.raises(CacheBusy):
        ood_scores.FeatureSet(torch.ones(3, 2)).save(path)
    assert first.is_alive()
    first.join()
    assert first.exitcode == 0
    assert contents(path) == contents(uninterrupted["known length"][0])


def test_several_processes_started_at_once(tmp_path: Path, uninterrupted: dict[str, tuple[Path, float]]) -> None:
    path = tmp_path / "race.h5"
    processes = [start(extract_or_say_busy, path, "known length") for _ in range(4)]
    for process in processes:
        process.join()
    outcomes = {process.exitcode for process in processes}
    assert 0 in outcomes
    assert outcomes <= {0, 3}
    assert contents(path) == contents(uninterrupted["known length"][0])
    assert leftovers(tmp_path) == []


def test_temporary_files_of_killed_processes_only_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "feats[1].h5"
    dead, other = tmp_path / ".feats[1].h5.0123abcd.part", tmp_path / ".another.h5.0123abcd.part"
    dead.write_bytes(b"half a file")
    other.write_bytes(b"of another cache")
    with atomic.LockedFile(tmp_path / ".feats[1].h5.89abcdef.part", "x+"):
        ood_scores.FeatureSet(torch.ones(3, 2)).save(path)
        assert sorted(leftovers(tmp_path)) == [other.name, ".feats[1].h5.89abcdef.part"]
    ood_scores.FeatureSet(torch.ones(3, 2)).save(path)
    assert leftovers(tmp_path) == [other.name]
