"""Extraction by several processes, as `torchrun` starts them: the same bits as by one, and every row once."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

import ood_scores
import ood_scores.models.networks  # makes its networks known to timm
from ood_scores.errors import BadInput, CacheError, DamagedCache, ShuffledLoader, StaleCache, UnfinishedCache
from ood_scores.extraction.distributed import shares
from ood_scores.features.statistics.base import Statistic
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import FeatureMean
from ood_scores.features.statistics.moments import ClassMoments, GlobalMoments
from ood_scores.features.statistics.row_samples import SampledRows
from ood_scores.features.storage.shards import shard_path
from ood_scores.runtime import Cost, Ranks

ROWS, BATCH = 333, 16
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(ROWS, 12, generator=GENERATOR)
LABELS = torch.randint(5, (ROWS,), generator=GENERATOR)

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["ood_scores.extraction.run", "rich.progress", "hypothesis", "timm"])


class Rows(Dataset):
    """Yield one batch at a time, with a pause before each."""

    def __init__(self, rows: int = ROWS, pause: float = 0.0, bad: tuple[int, ...] = ()) -> None:
        self.rows, self.pause, self.bad = rows, pause, bad

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        time.sleep(self.pause)
        return [self[row] for row in rows]

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        if row in self.bad:
            raise BadInput(f"row {row} is damaged.")
        return INPUTS[row], LABELS[row]


def extract(
    path: Path,
    *,
    rows: int = ROWS,
    batch: int = BATCH,
    pause: float = 0.0,
    seed: int = 1,
    bad: tuple[int, ...] = (),
    **options: Any,
) -> ood_scores.FeatureSet:
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    loader = DataLoader(Rows(rows, pause, bad), batch_size=batch)
    return ood_scores.extract(model, loader, path, name="data", layers=["0", "1"], progress=False, **options)


def work(path: Path, options: dict[str, Any], environment: dict[str, str], said: Any) -> None:
    os.environ.update(environment)
    seeds = options.pop("seeds", None)
    try:
        extract(path, **options, **({"seed": seeds[int(environment["RANK"])]} if seeds else {}))
    except Exception as error:
        said.put(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from error


class Launch:
    """The processes of one `torchrun`, without its monitoring."""

    def __init__(self, path: Path, count: int, **options: Any) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        self._said = children.SimpleQueue()
        self.processes = [children.Process(target=work, args=(path, options, rank, self._said)) for rank in ranks]
        for process in self.processes:
            process.start()

    def exits(self) -> list[int | None]:
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def errors(self) -> list[str]:
        """Return the error messages of the processes that failed."""
        return [self._said.get() for code in self.exits() if code == 1]


def launch(path: Path, count: int, **options: Any) -> None:
    assert Launch(path, count, **options).errors() == []


def contents(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return type, shape, and bytes of every HDF5 dataset, as any HDF5 reader sees them.

    The list of shards is left out, and so are the checksums, which a joined cache does not have itself.
    """
    found: dict[str, tuple[Any, ...]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith(("shards/", "checksums/")):
            found[name] = (item.dtype.str, item.shape, item[()].tobytes())

    with h5py.File(path, "r") as h5:
        h5.visititems(note)
    return found


def identity(path: Path) -> str:
    with h5py.File(path, "r") as h5:
        return str(h5.attrs["identity"])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "feats.h5"
    extract(path)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair") / "feats.h5"
    launch(path, 2)
    return path


@pytest.fixture
def copied(pair: Path, tmp_path: Path) -> Path:
    """The joined cache and its shards, moved to another folder."""
    shutil.copytree(pair.parent, tmp_path / "moved")
    return tmp_path / "moved" / pair.name


# --- the same as one process ------------------------------------------------------------------------------------------


def test_two_processes_have_the_result_of_one(single: Path, pair: Path) -> None:
    assert contents(pair) == contents(single)
    assert contents(pair).keys() > {"features", "logits", "labels", "extras/layers.0", "head/weight", "progress"}
    assert sorted(file.name for file in pair.parent.iterdir()) == [
        "feats.h5",
        "feats.h5.shard-0-of-2.h5",
        "feats.h5.shard-1-of-2.h5",
    ]
    feats, one = ood_scores.load(pair), ood_scores.load(single)
    assert (len(feats), feats.provenance and feats.provenance.dataset_rows) == (ROWS, ROWS)
    assert list(feats.extras) == list(one.extras)
    assert feats.provenance is not None
    assert one.provenance is not None
    assert feats.provenance.differences(one.provenance) == {}
    assert feats[150:190].features.equal(one.features[150:190])  # across the seam
    assert feats[[332, 0, 160, 159]].features.equal(one.features[[332, 0, 160, 159]])


def test_shards_contain_contiguous_rows_and_the_joined_file_none(single: Path, pair: Path) -> None:
    first, second = (ood_scores.load(shard_path(pair, rank, 2)) for rank in (0, 1))
    assert (len(first), len(second)) == (10 * BATCH, ROWS - 10 * BATCH)
    assert torch.cat([first.features, second.features]).equal(ood_scores.load(single).features)
    assert first.provenance is not None
    assert first.provenance.shard == "rows 0:160, shard 0 of 2"
    with h5py.File(pair) as h5:
        assert all(h5[name].is_virtual for name in ("features", "logits", "labels", "extras/layers.1"))


@pytest.mark.parametrize(("count", "rows"), [(3, ROWS), (3, 20)], ids=["three", "more processes than batches"])
def test_three_processes(count: int, rows: int, tmp_path: Path) -> None:
    launch(tmp_path / "joined 50%b.h5", count, rows=rows)  # HDF5 takes %b for a pattern
    extract(tmp_path / "single.h5", rows=rows)
    assert contents(tmp_path / "joined 50%b.h5") == contents(tmp_path / "single.h5")


def test_statistics_of_the_joined_file_equal_those_of_one_process(single: Path, copied: Path) -> None:
    wanted: list[Statistic] = [
        ClassMoments(),
        ClassMoments(per_class=True),
        GlobalMoments(),
        FeatureMean(),
        SampledRows(100),
    ]
    one, joined = (collect(ood_scores.load(path), wanted) for path in (single, copied))
    for statistic in wanted:
        assert _bits(joined[statistic]) == _bits(one[statistic])
    again = ood_scores.load(copied)
    spent: dict[Statistic, Cost] = {}
    collect(again, wanted[:1], spent)
    assert spent == {wanted[0]: Cost()}  # stored next to the cache
    assert _bits(again.statistics[wanted[0]]) == _bits(one[wanted[0]])


def _bits(result: Any) -> list[bytes]:
    parts = [result] if isinstance(result, torch.Tensor) else vars(result).values()
    return [part.numpy().tobytes() for part in parts if part is not None]


def test_scores_of_the_joined_file_equal_those_of_one_process(single: Path, pair: Path) -> None:
    one, joined = ood_scores.load(single), ood_scores.load(pair)
    assert np.array_equal(ood_scores.score("gradnorm", joined), ood_scores.score("gradnorm", one))


def test_a_finished_cache_is_opened_by_any_number_of_processes(
    copied: Path, monkeypatch: pytest.MonkeyPatch, single: Path
) -> None:
    assert extract(copied).features.equal(ood_scores.load(single).features)
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert len(extract(copied)) == ROWS
    with pytest.raises(StaleCache, match="weights: cache"):
        extract(copied, seed=2)


# --- interrupted ------------------------------------------------------------------------------------------------------


def test_killed_midway_and_run_again(single: Path, tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    killed = shard_path(path, 1, 2)
    started = Launch(path, 2, pause=0.05)
    deadline = time.monotonic() + 60
    while not killed.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.25)
    started.processes[1].kill()
    (message,) = started.errors()  # rank 0 does not wait for the dead
    assert started.exits() == [1, -signal.SIGKILL]
    assert message.startswith("WorkerDied: another process of torchrun has ended")
    assert not path.exists()
    with h5py.File(killed) as h5:
        assert 0 < h5["progress"][0] < ROWS - 160
    before = [identity(shard_path(path, rank, 2)) for rank in (0, 1)]
    with pytest.raises(StaleCache, match="by 2 processes has not finished: continue it with torchrun --nproc-per-node"):
        extract(path)
    for error in Launch(path, 3).errors():
        assert error.startswith(f"StaleCache: an extraction to {path} by 2 processes")
    launch(path, 2)
    assert contents(path) == contents(single)
    assert [identity(shard_path(path, rank, 2)) for rank in (0, 1)] == before  # continued, not begun again


def test_overwriting_with_another_number_of_processes(copied: Path, single: Path) -> None:
    launch(copied, 3, overwrite=True)
    assert contents(copied) == contents(single)
    assert len(list(copied.parent.glob("*.shard-*-of-3.h5"))) == 3
    assert not list(copied.parent.glob("*-of-2.h5"))
    extract(copied, overwrite=True)
    assert contents(copied) == contents(single)
    assert [file.name for file in copied.parent.iterdir()] == ["feats.h5"]


def test_an_extraction_by_one_process_is_not_continued_by_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "feats.h5"

    class Breaking(Rows):
        def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            if 64 in rows:
                raise KeyboardInterrupt
            return super().__getitems__(rows)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Rows", Breaking)
        with pytest.raises(KeyboardInterrupt):
            extract(path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UnfinishedCache, match="contains 64 rows of an extraction by one process: continue it without"):
        extract(path)


# --- shards that are not as they were ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("harm", ["missing", "truncated", "replaced", "emptied"])
def test_changed_shards_are_noticed(harm: str, rank: int, copied: Path) -> None:
    feats, shard = ood_scores.load(copied), shard_path(copied, rank, 2)
    if harm == "missing":
        shard.rename(shard.with_name("elsewhere.h5"))
    elif harm == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif harm == "replaced":
        ood_scores.FeatureSet(torch.zeros(160, 16), torch.zeros(160, 5)).save(shard)
    else:
        shard.write_bytes(b"")
    what = {"missing": "missing", "replaced": "not the one that was joined"}.get(harm, "truncated or damaged")
    message = rf"the shard {re.escape(str(shard))} is {what}\. .* reads its rows from 2 shards in its folder\. Put"
    for use in (lambda: ood_scores.load(copied), lambda: extract(copied), lambda: feats.features):
        with pytest.raises(DamagedCache, match=message):
            use()
    with pytest.raises(CacheError):
        ood_scores.score("energy", feats)


def test_the_advice_of_the_error_works(copied: Path, single: Path) -> None:
    shard_path(copied, 1, 2).unlink()
    copied.unlink()
    kept = identity(shard_path(copied, 0, 2))
    launch(copied, 2)
    assert contents(copied) == contents(single)
    assert identity(shard_path(copied, 0, 2)) == kept


# --- loaders that cannot be shared ------------------------------------------------------------------------------------


@given(rows=st.integers(1, 200), size=st.integers(1, 40), count=st.integers(1, 12), drop=st.booleans())
def test_shares_are_whole_batches_and_contain_every_row_once(rows: int, size: int, count: int, drop: bool) -> None:
    loader = DataLoader(TensorDataset(torch.zeros(rows, 1)), batch_size=size, drop_last=drop)
    found = shares(loader, count)
    assert [row for part in found for row in part] == list(range(rows // size * size if drop else rows))
    assert all(one.stop == other.start for one, other in itertools.pairwise(found))
    assert all(part.start % size == 0 or not part for part in found)
    batches = [-(-len(part) // size) for part in found]
    assert max(batches) - min(batches) <= 1


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(INPUTS, LABELS, strict=True)


DATA = TensorDataset(INPUTS, LABELS)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Stream(), batch_size=8), BadInput, "got DataLoader over Stream: use one process"),
        ([(INPUTS, LABELS)], BadInput, "of known length, got list over list"),
        (DataLoader(DATA, batch_sampler=[[0, 1]]), BadInput, "a DataLoader with a batch_size"),
        (DataLoader(DATA, batch_size=8, shuffle=True), ShuffledLoader, "differs between processes: use shuffle=False"),
        (
            DataLoader(DATA, batch_size=8, sampler=DistributedSampler(DATA, 2, 0, shuffle=False)),
            BadInput,
            "one process's share of the rows: remove the DistributedSampler",
        ),
    ],
    ids=["stream", "list", "batch sampler", "shuffled", "distributed sampler"],
)
def test_loaders_that_cannot_be_shared(
    loader: Any, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    model = nn.Linear(12, 5)
    with pytest.raises(error, match=message):
        ood_scores.extract(model, loader, tmp_path / "feats.h5", progress=False)
    assert list(tmp_path.iterdir()) == []
    assert len(ood_scores.extract(model, loader, progress=False)) > 0  # in memory each process is by itself


def test_a_custom_batch_sampler_cannot_be_shared() -> None:
    with pytest.raises(BadInput, match="a DataLoader with a batch_size"):
        shares(DataLoader(DATA, batch_sampler=type("Own", (BatchSampler,), {})(range(4), 2, False)), 2)


def test_processes_with_different_settings(tmp_path: Path) -> None:
    errors = Launch(tmp_path / "feats.h5", 2, seeds=[1, 2]).errors()
    assert sorted(error.partition(": load")[0] for error in errors) == [
        "BadInput: process 0 and process 1 have different settings (weights)",
        "BadInput: process 1 and process 0 have different settings (weights)",
    ]
    assert list(tmp_path.iterdir()) == []


def test_another_batch_size_does_not_continue_shards(tmp_path: Path) -> None:
    path = tmp_path / "feats.h5"
    launch(path, 2)
    path.unlink()
    errors = Launch(path, 2, batch=25).errors()
    assert all("rows of this shard: cache rows " in error for error in errors)
    assert len(errors) == 2


# --- the command line -------------------------------------------------------------------------------------------------


def test_torchrun(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("cifar_resnet20", num_classes=10).state_dict(), tmp_path / "weights.safetensors")
    words = ["cifar_resnet20", "digits?classes=0-1", "--checkpoint", str(tmp_path / "weights.safetensors")]
    words += ["--workers", "0", "--batch-size", "50"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "ood_scores", "extract", *words, str(tmp_path / "two.h5")],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("✓ 360 rows of 64 features, 10 classes") == 1
    subprocess.run(
        [sys.executable, "-m", "ood_scores", "extract", *words, str(tmp_path / "one.h5")],
        env=environment, capture_output=True, check=True, timeout=500,
    )  # fmt: skip
    assert contents(tmp_path / "two.h5") == contents(tmp_path / "one.h5")


def test_several_processes_without_a_master_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(BadInput, match="start the processes with torchrun, or unset WORLD_SIZE"):
        Ranks.here()


def test_rows_that_cannot_be_read_are_left_out_of_their_shards(tmp_path: Path) -> None:
    bad = (0, 5, 160, *range(320, ROWS))  # the last batch of the second shard, too
    options: dict[str, Any] = {"on_error": "skip", "bad": bad}
    launch(tmp_path / "shared.h5", 2, **options)
    with pytest.warns(ood_scores.errors.RowsLeftOut, match="16 of 333 rows of data"):
        alone = extract(tmp_path / "alone.h5", **options)
    shared = ood_scores.load(tmp_path / "shared.h5")
    assert shared.provenance is not None
    assert shared.provenance.skipped == tuple((row, f"row {row} is damaged.") for row in bad)
    assert alone.provenance is not None
    assert alone.provenance.skipped == shared.provenance.skipped
    assert shared.features.equal(alone.features)
    assert shared.labels is not None
    assert shared.labels.equal(LABELS[[row for row in range(ROWS) if row not in bad]])
