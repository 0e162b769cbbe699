"""Caches that must not be used, caches that must not be overwritten, and caches that are resumed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

import ood_scores
from ood_scores import FeatureSet
from ood_scores.errors import (
    BadInput,
    CacheBusy,
    DamagedCache,
    ForeignFile,
    NotFinite,
    ShapeMismatch,
    ShuffledLoader,
    StaleCache,
    UnfinishedCache,
)
from ood_scores.features import Provenance
from ood_scores.features.storage import cache as caches
from ood_scores.features.storage import layout
from ood_scores.features.storage.layout import VERSION, Shapes
from ood_scores.models.running import weights_sha256


class Classifier(nn.Sequential):
    """A model that counts its runs."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Renamed(Classifier):
    pass


class Data(Dataset):
    """A dataset that records which rows are read and interrupts the reading process at the row ``stop_at``."""

    name = "data"

    def __init__(self, rows: int = 40, seed: int = 0, shift: float = 0.0, labels: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(100, 6, generator=generator)[:rows] + shift
        self.labels = torch.arange(rows) % 3 if labels else None
        self.reads: list[int] = []
        self.stop_at: int | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> Any:
        if row == self.stop_at:
            raise KeyboardInterrupt
        self.reads.append(row)
        return self.inputs[row] if self.labels is None else (self.inputs[row], self.labels[row])


def extract(
    path: Path | None, model: nn.Module | None = None, data: Data | None = None, batch: int = 8, **options: Any
) -> FeatureSet:
    loading = {name: options.pop(name) for name in ("shuffle", "drop_last", "num_workers") if name in options}
    loader = DataLoader(data or Data(), batch_size=batch, **loading)
    return ood_scores.extract(model or Classifier(), loader, cache=path, **{"progress": False} | options)


def interrupted(path: Path, row: int = 24, **options: Any) -> None:
    """Write a cache whose extraction was interrupted when ``row`` was read."""
    data = options.pop("data", None) or Data()
    data.stop_at = row
    with pytest.raises(KeyboardInterrupt):
        extract(path, data=data, **options)


def assert_same(one: FeatureSet, other: FeatureSet, exactly: bool = True) -> None:
    tolerance = 0.0 if exactly else 1e-6
    for name in ("features", "logits", "labels"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=tolerance, atol=tolerance)
    assert (one.head is None) == (other.head is None)
    if one.head and other.head:
        assert one.head.weight.equal(other.head.weight)
        assert one.head.bias.equal(other.head.bias)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "feats.h5"


# --- the same again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"batch": 5}, {"num_workers": 2}, {"device": "cpu"}, {"resume": False}], ids=str
)
def test_valid_cache_is_opened_without_running_the_model(path: Path, options: dict[str, Any]) -> None:
    made = extract(path)
    before = path.read_bytes()
    model, data = Classifier(), Data()
    again = extract(path, model, data, **options)
    assert model.runs == 0
    assert max(data.reads, default=0) < 20
    assert path.read_bytes() == before
    assert_same(again, made)
    assert again.file == path


def test_extraction_to_a_cache_equals_extraction_to_memory(path: Path) -> None:
    on_disk, in_memory = extract(path), extract(None)
    assert_same(on_disk, in_memory)
    assert (on_disk.file, in_memory.file) == (path, None)


def test_cache_folder_is_created(tmp_path: Path) -> None:
    assert len(extract(tmp_path / "a" / "b" / "feats.h5")) == 40


def test_cache_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput, match="cannot be a folder, since a file is in its way"):
        extract(tmp_path / "file" / "feats.h5")


def test_provenance_of_the_file(path: Path) -> None:
    model = Classifier()
    extract(path, model, device="cpu")
    made_by = ood_scores.load(path).provenance
    assert made_by is not None
    assert made_by.architecture == "Classifier"
    assert made_by.weights_sha256 == weights_sha256(model)
    assert (made_by.head, made_by.requested_head, made_by.head_modules) == (None, "found", "2")
    assert (made_by.dataset, made_by.dataset_rows, made_by.labelled, made_by.shuffled) == ("data", 40, True, False)
    assert (made_by.batch_size, made_by.device) == (8, "cpu")
    assert made_by.precision == "model float32, autocast off, stored float32"
    assert (
        made_by.versions["torch"] == torch.__version__.split("+")[0] or made_by.versions["torch"] == torch.__version__
    )
    with h5py.File(path, "r") as h5:
        assert Provenance.from_attributes(h5.attrs) == made_by
        assert Provenance.from_attributes(made_by.to_attributes()) == made_by


def test_provenance_without_known_length_survives() -> None:
    made_by = extract(None).provenance
    assert made_by is not None
    values = made_by.to_attributes()
    del values["dataset_rows"]
    restored = Provenance.from_attributes(values)
    assert restored is not None
    assert restored.dataset_rows is None
    assert restored.differences(made_by) == {"number of rows": (None, 40)}
    assert Provenance.from_attributes({}) is None


# --- stale ------------------------------------------------------------------------------------------------------------

STALE = {
    "weights": (lambda: {"model": Classifier(seed=1)}, "weights: cache [0-9a-f]{12}…, now [0-9a-f]{12}…"),
    "architecture": (lambda: {"model": Renamed()}, "architecture: cache Classifier, now Renamed"),
    "preprocessing": (lambda: {"data": Data(shift=0.1)}, r"data or preprocessing\): cache [0-9a-f]{12}…, now"),
    "other data": (lambda: {"data": Data(seed=1)}, r"first inputs and labels"),
    "rows": (lambda: {"data": Data(rows=41)}, "number of rows: cache 40, now 41"),
    "dropped rows": (lambda: {"batch": 16, "drop_last": True}, "number of rows: cache 40, now 32"),
    "labels gone": (lambda: {"data": Data(labels=False)}, "labels present: cache True, now False"),
    "amp": (lambda: {"amp": "bf16"}, "autocast off, stored float32, now model float32, autocast bf16, stored float32"),
    "storage": (lambda: {"dtype": "float16"}, "stored float32, now .* stored float16"),
    "named head": (lambda: {"head": "2"}, "requested head: cache found, now 2"),
    "no head": (lambda: {"head": False}, "requested head: cache found, now none"),
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize(("changes", "message"), STALE.values(), ids=STALE)
def test_stale_cache_is_refused_and_replaced_on_request(
    path: Path, changes: Callable[[], dict[str, Any]], message: str, finished: bool
) -> None:
    if finished:
        extract(path)
    else:
        interrupted(path)
    before = path.read_bytes()
    with pytest.raises(StaleCache, match=message) as refusal:
        extract(path, **changes())
    assert "pass overwrite=True to extract again, or another cache path to keep both" in str(refusal.value)
    assert path.read_bytes() == before
    assert_same(extract(path, **changes(), overwrite=True), extract(None, **changes()))


def test_stale_message_names_both_weights(path: Path) -> None:
    old, new = Classifier(), Classifier(seed=1)
    extract(path, old)
    with pytest.raises(StaleCache) as refusal:
        extract(path, new)
    assert f"cache {weights_sha256(old)[:12]}…, now {weights_sha256(new)[:12]}…" in str(refusal.value)
    assert str(refusal.value).count("\n") == 2  # one difference and what to do


def test_changed_labels_are_detected(path: Path) -> None:
    extract(path)
    data = Data()
    assert data.labels is not None
    data.labels[3] += 1
    with pytest.raises(StaleCache, match="first inputs and labels"):
        extract(path, data=data)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_cache_serves_the_same_data_under_another_name(path: Path, finished: bool) -> None:
    if finished:
        extract(path)
    else:
        interrupted(path)
    renamed = extract(path, name="other")
    assert renamed.provenance is not None
    assert renamed.provenance.dataset == "other"
    assert_same(renamed, extract(None))
    kept = extract(path).provenance
    assert kept is not None
    assert kept.dataset == "data"


def test_file_without_provenance_is_not_resumed(path: Path) -> None:
    FeatureSet(torch.ones(3, 2)).save(path)
    with pytest.raises(StaleCache, match=r"has no provenance.*ood_scores\.load"):
        extract(path)
    assert len(extract(path, overwrite=True)) == 40


# --- foreign and damaged ----------------------------------------------------------------------------------------------


def _text(path: Path) -> None:
    path.write_text("notes, not features")


def _another_hdf5_file(path: Path) -> None:
    with h5py.File(path, "w") as h5:
        h5["features"] = np.ones((3, 2))


def _truncated_another_hdf5_file(path: Path) -> None:
    _another_hdf5_file(path)
    os.truncate(path, path.stat().st_size - 1)


def _newer_format(path: Path) -> None:
    extract(path)
    with h5py.File(path, "r+") as h5:
        h5.attrs["version"] = VERSION + 1


FOREIGN = {
    "text": (_text, "is not an HDF5 file"),
    "zero bytes": (Path.touch, "is not an HDF5 file"),
    "directory": (Path.mkdir, r"is a folder: pass the file of a cache, such as .*val\.h5"),
    "another HDF5 file": (_another_hdf5_file, "but not a feature cache"),
    "newer format": (_newer_format, "has cache format 2, .* reads up to 1: update ood_scores"),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_file_is_refused_and_not_replaced(path: Path, make: Callable[[Path], None], message: str) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(ForeignFile, match=message):
        ood_scores.load(path)
    with pytest.raises(ForeignFile, match=message):
        extract(path)
    with pytest.raises(ForeignFile, match="not replaced: choose another path"):
        extract(path, overwrite=True)
    with pytest.raises(ForeignFile, match="not replaced: choose another path"):
        FeatureSet(torch.ones(3, 2)).save(path)
    assert path.is_dir() if before is None else path.read_bytes() == before


def test_damaged_foreign_file_is_not_replaced(path: Path) -> None:
    _truncated_another_hdf5_file(path)
    before = path.read_bytes()
    with pytest.raises(DamagedCache, match="truncated or damaged"):
        ood_scores.load(path)
    with pytest.raises(ForeignFile, match="not replaced"):
        extract(path, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0.5, 0.75, 0.95, 0.9999])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_truncated_cache_is_refused_and_replaced_on_request(path: Path, kept: float, finished: bool) -> None:
    whole = extract(None)
    if finished:
        extract(path)
    else:
        interrupted(path)
    os.truncate(path, int(kept * path.stat().st_size))
    for open_it in (ood_scores.load, extract):
        with pytest.raises(DamagedCache, match=r"truncated or damaged .* pass overwrite=True to extract again"):
            open_it(path)
    assert_same(extract(path, overwrite=True), whole)


@pytest.mark.parametrize("missing", ["progress", "features"])
def test_cache_with_missing_parts_is_damaged(path: Path, missing: str) -> None:
    extract(path)
    with h5py.File(path, "r+") as h5:
        del h5[missing]
    with pytest.raises(DamagedCache, match="lacks its features or their row count"):
        ood_scores.load(path)
    assert len(extract(path, overwrite=True)) == 40


def test_missing_file_raises_file_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ood_scores.load(path)


# --- unfinished -------------------------------------------------------------------------------------------------------


def test_unfinished_cache_is_refused_by_load_and_resumed_by_extract(path: Path) -> None:
    interrupted(path)
    with pytest.raises(UnfinishedCache, match=r"holds 24 rows .* run the same extract\(\.\.\.\) again"):
        ood_scores.load(path)
    assert_same(extract(path), extract(None))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_resuming_reads_only_the_missing_rows(path: Path) -> None:
    interrupted(path)
    model, data = Classifier(), Data()
    extract(path, model, data)
    assert data.reads == [*range(16), *range(24, 40)]  # the first rows for the checksum, then the rest
    assert model.runs == 3  # the first batch to find the head, then two


@pytest.mark.parametrize("batch", [1, 3, 7, 16, 24, 64])
def test_resuming_with_another_batch_size_writes_every_row_once(path: Path, batch: int) -> None:
    interrupted(path)
    continued = extract(path, batch=batch)
    assert_same(continued, extract(None), exactly=False)
    assert continued.features[:24].equal(extract(None).features[:24])


def test_resuming_with_workers(path: Path) -> None:
    interrupted(path)
    assert_same(extract(path, num_workers=2), extract(None))


def test_resuming_without_the_last_incomplete_batch(path: Path) -> None:
    whole = extract(None, data=Data(rows=43), drop_last=True)
    assert len(whole) == 40
    interrupted(path, data=Data(rows=43), drop_last=True)
    assert_same(extract(path, data=Data(rows=43), drop_last=True), whole)


def test_resuming_a_custom_loader_iterates_over_all_of_it(path: Path) -> None:
    class Doubling(DataLoader):
        def __iter__(self) -> Any:
            return ((2 * x, y) for x, y in super().__iter__())

    whole = ood_scores.extract(Classifier(), Doubling(Data(), batch_size=8), progress=False)
    data = Data()
    data.stop_at = 24
    with pytest.raises(KeyboardInterrupt):
        ood_scores.extract(Classifier(), Doubling(data, batch_size=8), cache=path, progress=False)
    data.stop_at = None
    assert_same(ood_scores.extract(Classifier(), Doubling(data, batch_size=8), cache=path, progress=False), whole)


def test_resuming_a_loader_of_unknown_length(path: Path) -> None:
    def batches(data: Data) -> Any:
        return (batch for batch in DataLoader(data, batch_size=8))

    data = Data()
    data.stop_at = 24
    with pytest.raises(KeyboardInterrupt):
        ood_scores.extract(Classifier(), batches(data), cache=path, progress=False)
    with pytest.raises(UnfinishedCache, match="holds 24 rows"):
        ood_scores.load(path)
    data.stop_at = None
    model = Classifier()
    assert_same(ood_scores.extract(model, batches(data), cache=path, progress=False), extract(None))
    assert model.runs == 3


def test_resume_false_starts_again(path: Path) -> None:
    interrupted(path)
    data = Data()
    extract(path, data=data, resume=False)
    assert data.reads == [*range(40)]
    assert_same(ood_scores.load(path), extract(None))


def test_nan_keeps_the_batches_before_it_and_names_the_row(path: Path) -> None:
    data = Data()
    data.inputs[27, 2] = torch.nan
    with pytest.raises(NotFinite, match="features hold NaN or infinite values, first in row 27"):
        extract(path, data=data)
    with pytest.raises(UnfinishedCache, match="holds 24 rows"):
        ood_scores.load(path)
    assert_same(extract(path), extract(None))


def test_nan_in_the_first_batch_leaves_no_file(path: Path) -> None:
    data = Data()
    data.inputs[3] = torch.inf
    with pytest.raises(NotFinite, match="hold NaN or infinite values, first in row 3"):
        extract(path, data=data)
    assert not path.exists()


class LyingSampler(SequentialSampler):
    def __init__(self, data: Data, length: int) -> None:
        super().__init__(data)
        self.length = length

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize(
    ("promised", "message"),
    [(48, "ended after 40 rows, but its length is 48"), (30, "yielded at least 32 rows, but its length is 30")],
)
def test_loader_whose_length_is_wrong(path: Path, promised: int, message: str, to_disk: bool) -> None:
    loader = DataLoader(Data(), batch_size=8, sampler=LyingSampler(Data(), promised))
    with pytest.raises(BadInput, match=f"{message}.*: correct the length of its sampler"):
        ood_scores.extract(Classifier(), loader, cache=path if to_disk else None, progress=False)
    if to_disk:
        with pytest.raises(UnfinishedCache, match=f"holds {min(promised // 8 * 8, 40)} rows"):
            ood_scores.load(path)


# --- random order -----------------------------------------------------------------------------------------------------


def test_shuffling_loader_warns_first_and_is_refused_later(path: Path) -> None:
    with pytest.warns(UserWarning, match=r"order of the loader is random, .* can neither be resumed nor compared"):
        made = extract(path, shuffle=True)
    assert len(made) == 40
    with pytest.raises(ShuffledLoader, match=r"use shuffle=False, or overwrite=True"):
        extract(path, shuffle=True)
    with pytest.raises(StaleCache, match="random order: cache True, now False"):
        extract(path)
    with pytest.warns(UserWarning, match="order of the loader is random"):
        extract(path, shuffle=True, overwrite=True)


def test_shuffling_loader_cannot_resume(path: Path) -> None:
    interrupted(path)
    with pytest.raises(ShuffledLoader, match="exists, but the order of the loader is random"):
        extract(path, shuffle=True)
    with pytest.raises(UnfinishedCache, match="holds 24 rows"):
        ood_scores.load(path)


@pytest.mark.filterwarnings("error")
def test_shuffling_in_memory_does_not_warn() -> None:
    assert extract(None, shuffle=True).features.shape == (40, 8)


# --- the writer -------------------------------------------------------------------------------------------------------

SHAPES: Shapes = {"features": ((2,), np.dtype("float32")), "labels": ((), np.dtype("int64"))}


def rows(*values: int) -> dict[str, Tensor]:
    return {"features": torch.tensor(values).float()[:, None].expand(-1, 2), "labels": torch.tensor(values)}


def test_writer_appends_and_grows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "UNKNOWN_LENGTH_ROWS", 2)
    with caches.CacheWriter.create(path, SHAPES, None, None, None) as writer:
        for run in itertools.pairwise(range(0, 30, 2)):
            writer.append(rows(*run))
        writer.finish()
    feats = ood_scores.load(path)
    expected = [row for run in itertools.pairwise(range(0, 30, 2)) for row in run]
    assert feats.labels is not None
    assert feats.labels.tolist() == expected
    assert feats.features.tolist() == [[row, row] for row in expected]


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"features": torch.ones(1, 3), "labels": torch.ones(1)}, ShapeMismatch),
        ({"features": torch.ones(2, 2), "labels": torch.ones(1)}, ShapeMismatch),
        ({"features": torch.ones(1, 2)}, BadInput),
        (rows(1, 2, 3, 4, 5), BadInput),
    ],
)
def test_writer_refuses_mismatched_rows(path: Path, bad: dict[str, Tensor], error: type[Exception]) -> None:
    with caches.CacheWriter.create(path, SHAPES, 4, None, None) as writer:
        writer.append(rows(7))
        with pytest.raises(error):
            writer.append(bad)
        with pytest.raises(BadInput, match="was created for 4 rows, got 1"):
            writer.finish()
        writer.append(rows(8, 9, 10))
        writer.finish()
    feats = ood_scores.load(path)
    assert feats.labels is not None
    assert feats.labels.tolist() == [7, 8, 9, 10]


def test_two_writers_in_one_process(path: Path) -> None:
    with caches.CacheWriter.create(path, SHAPES, 4, None, None) as writer:
        writer.append(rows(1))
        with pytest.raises(CacheBusy):
            caches.CacheWriter.resume(path, caches.CacheState(1, False, None))
        with pytest.raises(CacheBusy, match="not finished: wait"):
            ood_scores.load(path)
    with caches.CacheWriter.resume(path, caches.CacheState(1, False, None)) as writer:
        assert writer.rows == 1


def test_writer_does_not_resume_a_file_that_another_has_resumed(path: Path) -> None:
    with caches.CacheWriter.create(path, SHAPES, 4, None, None) as writer:
        writer.append(rows(1, 2))
    with pytest.raises(CacheBusy, match=r"another process has just written .* run the same call again"):
        caches.CacheWriter.resume(path, caches.CacheState(1, False, None))


def test_file_that_appears_during_the_first_batch_is_not_replaced(path: Path) -> None:
    class Slow(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            if not path.exists():
                FeatureSet(torch.ones(3, 2)).save(path)
            return super().forward(x)

    with pytest.raises(CacheBusy, match="another process has just started to write"):
        extract(path, Slow())
    assert ood_scores.load(path).features.equal(torch.ones(3, 2))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_hdf5_readers_can_read_the_file(path: Path) -> None:
    made = extract(path)
    with h5py.File(path, "r") as h5:
        assert h5["features"].dtype == np.float32
        assert h5["labels"].dtype == np.int64
        np.testing.assert_array_equal(h5["features"][()], made.features.numpy())
        np.testing.assert_array_equal(h5["progress"][()], [40, 1])
        assert h5.attrs["format"] == "ood_scores features"
        assert h5["features"].chunks is None
        assert h5["progress"].id.get_offset() % 8 == 0  # an aligned counter is never half written


def test_extras_keep_their_order(tmp_path: Path) -> None:
    extras = {name: torch.zeros(3, 1) for name in ("layers.blocks.9", "layers.blocks.11", "layers.blocks.2")}
    ood_scores.FeatureSet(torch.zeros(3, 2), extras=extras).save(tmp_path / "c.h5")
    assert list(ood_scores.load(tmp_path / "c.h5").extras) == list(extras)
