"""Rows know their name: ids of datasets and batches survive extraction, caches, kills, gaps, and shards."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import timm
import torch
from interrupted import exit_code_of_fork
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

import ood_scores
from ood_scores.data.row_ids import ids_of
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, DamagedCache, RowsLeftOut, StaleCache
from ood_scores.extraction.loaders import Batches
from ood_scores.extraction.row_ids import RowIds
from ood_scores.features import FeatureSet, Provenance
from ood_scores.features.storage import cache as caches
from ood_scores.features.storage import shards
from ood_scores.features.storage.texts import packed, text_type, unpacked

NAMES = [f"{'cat' if row < 5 else 'dog'}/{'x' * row}{row}.png" for row in range(40)]
FILES = NAMES[:10]
INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def network(inputs: int = 6) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def extract(batches: Any, cache: Path | None = None, inputs: int = 6, **options: Any) -> FeatureSet:
    return ood_scores.extract(network(inputs), batches, cache, device="cpu", progress=False, **options)


class Named(Dataset[Any]):
    """Rows with the attribute ``ids``."""

    def __init__(self, ids: Any = NAMES, dies_at: int | None = None) -> None:
        self.ids, self.dies_at = ids, dies_at

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, row: int) -> torch.Tensor:
        if row == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return INPUTS[row]


class Dicts(Dataset[Any]):
    """Rows that are dicts with an id."""

    def __init__(self, key: str = "id", ids: Any = NAMES, dies_at: int | None = None) -> None:
        self.key, self.names, self.dies_at = key, ids, dies_at

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, row: int) -> dict[str, Any]:
        if row == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": INPUTS[row], self.key: self.names[row]}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([Dicts()[row] for row in range(len(INPUTS))])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in folders of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for row, name in enumerate(FILES):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (20 * row, 0, 255 - 20 * row)).save(folder / name)
    (folder / "list.txt").write_text("".join(f"./{name} {row % 3}\n" for row, name in enumerate(FILES)))
    return folder


def ids(feats: FeatureSet) -> list[str] | None:
    return None if feats.ids is None else feats.ids.tolist()


class Sentences(Dataset[Any]):
    """Rows with the attribute ``samples``, which are texts and no files."""

    samples = [("a long review " * 400, 0)] * len(INPUTS)

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, row: int) -> torch.Tensor:
        return INPUTS[row]


def test_texts_that_are_no_files_are_no_ids() -> None:
    assert ids_of(Sentences()) is None
    assert extract(DataLoader(Sentences(), batch_size=8)).ids is None


# Texts


TEXTS = ["a/b.jpg", "ü.png", "", "x" * 300, b"\xff.jpg".decode("utf-8", "surrogateescape"), "=1+1\x1b[31m\n"]


def test_texts_are_packed_without_loss() -> None:
    column = packed(TEXTS)
    assert (column.shape, column.dtype) == ((6, 300), torch.uint8)
    assert unpacked(column).tolist() == TEXTS
    assert unpacked(packed([3, None, Path("a/b")])).tolist() == ["3", "", "a/b"]
    for text, reason in {"a\0": "null character", "x" * 4097: "4,096 bytes", "\ud800": "not valid text"}.items():
        with pytest.raises(BadInput, match=reason):
            packed([text])


@pytest.mark.parametrize("compress", [False, True])
def test_sets_keep_their_ids(compress: bool, tmp_path: Path) -> None:
    feats = FeatureSet(torch.randn(6, 3), torch.randn(6, 2), ids=TEXTS)
    feats.save(tmp_path / "c.h5", compress=compress)
    stored = ood_scores.load(tmp_path / "c.h5")
    for each in (feats, stored):
        assert each.has("ids")
        assert "ids" in repr(each)
        assert ids(each) == TEXTS
        assert ids(each[1:3]) == TEXTS[1:3]
        assert ids(each[1:5][[3, 0, 0]]) == [TEXTS[4], TEXTS[1], TEXTS[1]]
        assert ids(each[np.array([True, False] * 3)]) == TEXTS[::2]
        assert [block.ids.tolist() for block in each.blocks(4)] == [TEXTS[:4], TEXTS[4:]]
        assert [block.replaced(logits=block.logits).ids.tolist() for block in each.blocks(6)] == [TEXTS]
    assert ids(ood_scores.ensemble([feats, stored])) == TEXTS
    with h5py.File(tmp_path / "c.h5") as h5:
        assert h5["ids"].dtype == text_type(300)
        assert h5["ids"].asstr()[:4].tolist() == TEXTS[:4]
    with pytest.raises(BadInput, match="different ids"):
        ood_scores.ensemble([feats, FeatureSet(torch.randn(6, 3), torch.randn(6, 2), ids=list("abcdef"))])


def test_ids_of_a_set_are_one_for_each_row() -> None:
    with pytest.raises(ood_scores.errors.ShapeMismatch, match="6 rows, but ids has shape"):
        FeatureSet(torch.randn(6, 3), ids=TEXTS[1:])
    with pytest.raises(BadInput, match="ids must be a list of names"):
        FeatureSet(torch.randn(6, 3), ids="abcdef")
    assert FeatureSet(torch.randn(6, 3)).ids is None


# Where they come from


def test_datasets_know_their_ids(pictures: Path) -> None:
    assert open_dataset(f"folder:{pictures}").ids == FILES
    assert open_dataset(f"folder:{pictures}?rows=2:9&take=3&scramble=1").ids == FILES[2:7:2]
    assert open_dataset(f"imglist:{pictures}/list.txt").ids == FILES
    assert open_dataset("noise:uniform?n=3").ids is None
    assert ids_of(ImageFolder(str(pictures))) == FILES
    assert ids_of(Subset(ImageFolder(str(pictures)), [3, 1])) == [FILES[3], FILES[1]]
    assert ids_of(ConcatDataset([Named(), TensorDataset(INPUTS[:2])])) == [*NAMES, "", ""]
    assert ids_of(TensorDataset(INPUTS)) is None
    assert ids_of(Named(np.arange(40))) == list(range(40))
    with pytest.raises(BadInput, match="Named has 3 ids for 40 rows"):
        ids_of(Named([1, 2, 3]))


def test_datasets_of_timm_know_their_files(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictures.parent)
    data = timm.data.create_dataset("folder", pictures.name, transform=to_tensor)
    found = ids(extract(DataLoader(data, 4), inputs=48))
    assert found == [each.removeprefix(f"{pictures.name}/") for each in data.filenames(absolute=True)]
    assert set(found) == set(FILES)
    assert ids_of(ConcatDataset([Subset(data, [3, 1]), TensorDataset(INPUTS[:1])])) == [found[3], found[1], ""]


def test_archives_have_names(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, names=np.array(["a", "b", "ü"]))
    assert open_dataset(f"npz:{tmp_path}/a.npz").ids == ["a", "b", "ü"]
    np.savez(tmp_path / "b.npz", images=images, names=np.zeros((3, 2)))
    with pytest.raises(BadInput, match=r"the names in .* are not texts"):
        open_dataset(f"npz:{tmp_path}/b.npz")
    np.savez(tmp_path / "c.npz", images=images, names=np.array(["a"]))
    with pytest.raises(ood_scores.errors.ShapeMismatch, match="1 names for 3 images"):
        open_dataset(f"npz:{tmp_path}/c.npz")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_of_the_loader_decides(workers: int) -> None:
    assert ids(extract(DataLoader(Named(), 4, num_workers=workers))) == NAMES
    assert ids(extract(DataLoader(Named(), 16, drop_last=True, num_workers=workers))) == NAMES[:32]


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(Named(), 4, shuffle=True),
        lambda: DataLoader(Named(), 4, sampler=[3, 2, 1, 0]),
        lambda: DataLoader(Named(), batch_sampler=[[1, 0], [2]]),
        lambda: [INPUTS[:4], INPUTS[4:]],
        lambda: type("Own", (DataLoader,), {"__iter__": lambda self: iter([INPUTS.flip(0)])})(Named(), 40),
    ],
)
def test_no_ids_where_the_order_is_not_known(loader: Any) -> None:
    assert extract(loader()).ids is None


def test_ids_in_batches(tmp_path: Path) -> None:
    order = [3, 1, 2, 0]
    for key in ("id", "__key__", "file_name"):
        assert ids(extract(DataLoader(Dicts(key), 4, sampler=order))) == [NAMES[row] for row in order]
    assert ids(extract(DataLoader(Stream(), 4))) == NAMES
    assert ids(extract(DataLoader(Stream(), 3), tmp_path / "c.h5")) == NAMES  # the file grows, and its ids widen
    assert ids(ood_scores.load(tmp_path / "c.h5")[-3:]) == NAMES[-3:]
    assert ids(extract(DataLoader(Dicts(ids=range(40)), 4))) == [str(row) for row in range(40)]
    assert extract(DataLoader(Dicts("ids", torch.rand(40, 2)), 4)).ids is None  # the inputs of some model
    with pytest.raises(BadInput, match="'id' of a batch has 1 ids, but there are 4 inputs"):
        extract([{"x": INPUTS[:4], "id": ["a"]}])
    assert ids(extract([{"x": INPUTS[:4], "id": list("abcd")}, {"x": INPUTS[4:]}])) == [*"abcd", *[""] * 36]


def test_two_rows_of_a_dataset_with_one_id_are_refused(tmp_path: Path) -> None:
    repeated = [*NAMES[:36], "a", "b", "a", 7]
    with pytest.raises(BadInput, match="rows 36 and 38 of the dataset Named have the same id 'a': give each row"):
        extract(DataLoader(Named(repeated), 4), tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 2, 1, 3), np.uint8), names=["x", "y", "x"])
    with pytest.raises(BadInput, match="rows 0 and 2 of the dataset a have the same id 'x'"):
        extract(DataLoader(open_dataset(f"npz:{tmp_path}/a.npz", to_tensor), 2))


def test_repeated_ids_are_named() -> None:
    with pytest.warns(UserWarning, match=r"several rows have the same id: 'a' \(37 rows\)\. Their pictures"):
        extract(DataLoader(Dicts(ids=["a"] * 37 + ["b", "c", "d"]), 4))
    with pytest.warns(UserWarning, match=r"several rows have the same id: 'cat/0.png' \(2 rows\)"):
        extract(DataLoader(Subset(Named(), [0, 1, 0]), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(DataLoader(Named([""] * 39 + ["b"]), 4))


# Caches


def killed(data: Any, cache: Path) -> None:
    assert exit_code_of_fork(lambda: extract(DataLoader(data, 2), cache)) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("kind", [Named, Dicts])
def test_a_killed_extraction_continues_with_its_ids(kind: Any, tmp_path: Path) -> None:
    for row in (25, 33):
        killed(kind(dies_at=row), tmp_path / "c.h5")
    assert ids(extract(DataLoader(kind(), 2), tmp_path / "c.h5")) == NAMES
    extract(DataLoader(kind(), 2), tmp_path / "whole.h5")
    with h5py.File(tmp_path / "c.h5") as found, h5py.File(tmp_path / "whole.h5") as whole:
        for name in ("ids", "checksums/ids", "features", "checksums/features"):
            assert np.array_equal(found[name], whole[name])


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_cache_of_other_rows_is_stale(tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    killed(Named(dies_at=27), cache)
    other = [*NAMES[:3], "dog/other.png", *NAMES[4:]]
    message = r"c.h5 was created from other rows .*: row 3 was 'cat/xxx3.png' and is now 'dog/other.png'; 1 rows differ"
    for _ in range(2):  # unfinished, finished
        with pytest.raises(StaleCache, match=message):
            extract(DataLoader(Named(other), 2), cache)
        assert ids(extract(DataLoader(Named(), 2), cache)) == NAMES
    assert ids(extract(DataLoader(TensorDataset(INPUTS), 2), cache)) == NAMES
    assert ids(extract(DataLoader(Named(other), 2), cache, overwrite=True)) == other


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_cache_continues_without_ids(tmp_path: Path) -> None:
    killed(Named(dies_at=27), tmp_path / "with.h5")
    with caches.open_to_read(tmp_path / "with.h5") as h5:
        rows = caches.state(h5).rows  # 26, unless the last batch was still being written
    found = ids(extract(DataLoader(TensorDataset(INPUTS), 2), tmp_path / "with.h5"))
    assert found == [*NAMES[:rows], *[""] * (len(NAMES) - rows)]
    killed(Named(None, dies_at=27), tmp_path / "without.h5")  # as earlier versions wrote it
    assert extract(DataLoader(Named(), 2), tmp_path / "without.h5").ids is None


def test_a_changed_id_is_noticed(tmp_path: Path) -> None:
    extract(DataLoader(Named(), 4), tmp_path / "c.h5")
    with h5py.File(tmp_path / "c.h5") as h5:
        offset, size = h5["ids"].id.get_offset(), h5["ids"].nbytes
    content = bytearray((tmp_path / "c.h5").read_bytes())
    content[offset + size // 2] ^= 1
    (tmp_path / "c.h5").write_bytes(content)
    with pytest.raises(DamagedCache, match="its ids changed after they were written"):
        _ = ood_scores.load(tmp_path / "c.h5").ids
    with pytest.raises(DamagedCache, match="its ids changed after they were written"):
        extract(DataLoader(Named(), 4), tmp_path / "c.h5")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to_disk", [False, True])
def test_rows_left_out_take_their_ids_with_them(pictures: Path, workers: int, to_disk: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    (folder / FILES[4]).write_bytes(b"damaged")
    data = open_dataset(f"folder:{folder}", to_tensor)
    cache = tmp_path / "c.h5" if to_disk else None
    for _ in range(2):  # written, reused
        with pytest.warns(RowsLeftOut, match=f"row 4: .*{Path(FILES[4]).name}"):
            feats = extract(DataLoader(data, 3, num_workers=workers), cache, 48)
        assert ids(feats) == FILES[:4] + FILES[5:]
        for name, row in zip(FILES[:4] + FILES[5:], feats.features, strict=True):
            picture = to_tensor(Image.open(folder / name))[None]
            assert torch.allclose(network(48)[:3](picture)[0], row)


def test_shards_are_joined_with_their_ids(tmp_path: Path) -> None:
    """The ids of each shard are as wide as its longest, if they come from batches."""
    provenance = extract(DataLoader(Named(), 4)).provenance
    assert provenance is not None
    made_by: dict[Path, Provenance] = {}
    for rank, part in enumerate([slice(0, 14), slice(14, 40)]):
        feats = FeatureSet(INPUTS[part], INPUTS[part, :2], provenance=provenance, ids=NAMES[part])
        path = shards.shard_path(tmp_path / "c.h5", rank, 2)
        feats.save(path)
        made_by[path] = provenance
    shards.join(tmp_path / "c.h5", made_by)
    joined = ood_scores.load(tmp_path / "c.h5")
    assert ids(joined) == NAMES
    assert ids(joined[12:16]) == NAMES[12:16]
    assert ids(joined[[9, 0]]) == [NAMES[9], NAMES[0]]
    row_ids = RowIds.of(Batches.look_into(DataLoader(Named(list(reversed(NAMES))), 4)))
    with caches.open_to_read(tmp_path / "c.h5") as h5, pytest.raises(StaleCache, match="40 rows differ"):
        row_ids.require_those_of(h5, tmp_path / "c.h5")
    (tmp_path / "c.h5").unlink()
    last = list(made_by)[-1]
    FeatureSet(INPUTS[14:], INPUTS[14:, :2], provenance=provenance).save(last)  # as earlier versions wrote it
    shards.join(tmp_path / "c.h5", made_by)
    assert ood_scores.load(tmp_path / "c.h5").ids is None
    assert torch.equal(ood_scores.load(tmp_path / "c.h5").features, INPUTS)
