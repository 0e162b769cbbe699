"""Shards of webdataset: grouped as the library groups them, read in any order, with their keys as ids."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_tensor

import ood_scores
from ood_scores.data.long_tail import labels_of
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, EmptyInput, MissingData, RowsLeftOut

wds = pytest.importorskip("webdataset", reason="webdataset, part of the extra 'test', is not installed")


def picture(row: int, suffix: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (10 * row, 100, 200)).save(file, suffix)
    return file.getvalue()


def write(path: Path, files: dict[str, bytes], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 10 samples, written by the library."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(2):
        with wds.TarWriter(str(folder / f"val-{shard:03}.tar")) as writer:
            for row in range(10 * shard, 10 * shard + 10):
                writer.write({"__key__": f"n{row % 3}/img{row}", "png": picture(row), "cls": row % 3, "json": {}})
    return folder


def test_shards_are_read_like_by_the_library(shards: Path) -> None:
    dataset = open_dataset(f"wds:{shards}/val-{{000..001}}.tar")
    expected = list(wds.WebDataset(f"{shards}/val-{{000..001}}.tar", shardshuffle=False))
    assert dataset.ids == [sample["__key__"] for sample in expected] == [f"n{row % 3}/img{row}" for row in range(20)]
    assert labels_of(dataset).tolist() == [int(sample["cls"]) for sample in expected]
    assert (len(dataset), dataset.name) == (20, "val-{000..001}")
    for row in (17, 3, 12):  # in any order
        image, label = dataset[row]
        assert image.tobytes() == Image.open(io.BytesIO(expected[row]["png"])).tobytes()
        assert label == row % 3
    some = open_dataset(f"wds:{shards}/val-001.tar?rows=2:5")
    assert some.ids == [f"n{row % 3}/img{row}" for row in (12, 13, 14)]
    assert some.name == "val-001[rows=2:5]"


def test_shards_are_extracted_and_resumed_with_their_keys(shards: Path, tmp_path: Path) -> None:
    from extraction.test_row_ids import extract

    text = f"wds:{shards}/val-{{000..001}}.tar"
    loader = DataLoader(open_dataset(text, to_tensor), 4, num_workers=2)
    feats = extract(loader, tmp_path / "c.h5", 60)
    assert feats.ids is not None
    assert feats.ids.tolist() == [f"n{row % 3}/img{row}" for row in range(20)]
    assert feats.provenance is not None
    assert feats.provenance.data_text == text


def test_damaged_images_in_shards_are_left_out(tmp_path: Path) -> None:
    from extraction.test_row_ids import extract

    write(tmp_path / "a.tar", {"1.jpg": picture(1, "jpeg"), "2.jpg": picture(2, "jpeg")[:100], "3.jpeg": picture(3)})
    loader = DataLoader(open_dataset(f"wds:{tmp_path}/a.tar", to_tensor), 2)
    with pytest.raises(ood_scores.errors.UnreadableRow, match=r"cannot read the image 2 in .*a\.tar"):
        extract(loader, None, 60, on_error="raise")
    with pytest.warns(RowsLeftOut, match=r"row 1: .*a\.tar"):
        feats = extract(loader, None, 60, on_error="skip")
    assert feats.ids is not None
    assert feats.ids.tolist() == ["1", "3"]
    assert feats.labels is None


def test_names_in_shards(tmp_path: Path) -> None:
    files = {"__meta__/x.png": b"", "no_suffix": b"", "a.b.png": picture(1), "a.thumb.jpg": b"", "a.y": b" 7\n"}
    write(tmp_path / "a.tar", files)
    dataset = open_dataset(f"wds:{tmp_path}/a.tar?image=b.png&label=y")
    assert dataset.ids == ["a"]
    assert dataset[0][1] == 7
    write(tmp_path / "b.tar", {"a.png": picture(2)})
    assert open_dataset(f"wds:{tmp_path}/{{b,b}}.tar").ids == ["b.tar/a", "b.tar/a"]


@pytest.mark.parametrize(
    ("files", "text", "error", "message"),
    [
        ({"a.png": b""}, "wds:", BadInput, "wds needs a path"),
        ({"a.png": b""}, "wds:http://x/a.tar", BadInput, "wds reads local files"),
        ({"a.png": b""}, "wds:{path}/b.tar", MissingData, r"there is no shard .*b\.tar"),
        ({"a.png": b"", "a.png ": b""}, "wds:{path}/a.txt", MissingData, "there is no shard"),
        ({"a": b""}, "wds:{path}/a.tar", EmptyInput, "there are no samples"),
        ({"a.txt": b""}, "wds:{path}/a.tar", BadInput, r"'a' of .* must have one image, but has the files txt"),
        ({"a.png": b"", "a.jpg": b""}, "wds:{path}/a.tar", BadInput, "has the files png, jpg: write image=EXTENSION"),
        ({"a.png": b"", "a.cls": b"cat"}, "wds:{path}/a.tar", BadInput, r"label of the sample 'a' .* is b'cat'"),
        (
            {"a.png": b"", "a.cls": b"1", "b.png": b""},
            "wds:{path}/a.tar",
            BadInput,
            "label of the sample 'b' .* is b''",
        ),
        (
            {"a.png": b""},
            "wds:{path}/a.tar?label=y",
            BadInput,
            r"an integer in a file .* that ends in \.y",
        ),
        ({"a.png": b"", "a.cls": b"1" * 101}, "wds:{path}/a.tar", BadInput, r"is b'1{20}': it must be an integer"),
        ({"a.png": b""}, "{path}/a.tar", ood_scores.errors.UnknownName, "did you mean 'wds:"),
    ],
)
def test_bad_shards(files: dict[str, bytes], text: str, error: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.tar", files)
    with pytest.raises(error, match=message):
        open_dataset(text.format(path=tmp_path))


def test_damaged_and_compressed_shards(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"a.png": picture(1), "b.png": picture(2)}, "w:gz")
    with pytest.raises(BadInput, match=r"cannot read .*a\.tar as an uncompressed tar file"):
        open_dataset(f"wds:{tmp_path}/a.tar")
    write(tmp_path / "b.tar", {"a.png": picture(1) + bytes(3000)})
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:1500])
    with pytest.raises(BadInput, match=r"cannot read .*b\.tar as an uncompressed tar file"):
        open_dataset(f"wds:{tmp_path}/b.tar")


def test_a_missing_library_is_named(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("webdataset", "webdataset.shardlists"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingData, match=r"'webdataset', which is not installed\. .*: pip install webdataset"):
        open_dataset(f"wds:{shards}/val-000.tar")
