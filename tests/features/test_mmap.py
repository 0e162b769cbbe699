"""Blocks of a file on disk are the mapped file if possible, and copies otherwise."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ood_scores import FeatureSet, load
from ood_scores.features.storage.mmap import MappedRows, mapped_rows

VALUES = np.arange(40_000 * 3, dtype=np.float32).reshape(40_000, 3)


def write(path: Path, **options: Any) -> h5py.Dataset:
    with h5py.File(path, "w") as h5:
        h5.create_dataset("first", data=np.zeros(7))
        h5.create_dataset("values", data=VALUES, **options)
    return h5py.File(path, "r")["values"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> h5py.Dataset:
    return write(tmp_path_factory.mktemp("mapped") / "values.h5")


@given(places=st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 5000)), max_size=8))
def test_rows_read_in_any_order_equal_those_of_the_file(dataset: h5py.Dataset, places: list[tuple[int, int]]) -> None:
    rows = mapped_rows(dataset)
    assert rows is not None
    for start, count in places:
        np.testing.assert_array_equal(rows.read(start, min(start + count, 40_000)), VALUES[start : start + count])


def test_earlier_rows_stay_valid_and_are_released(dataset: h5py.Dataset) -> None:
    class Pages(mmap.mmap):
        advised: list[tuple[int, int, int]]

        def madvise(self, *advice: int) -> None:
            self.advised.append(advice)  # type: ignore[arg-type]
            super().madvise(*advice)

    mapped = mapped_rows(dataset)
    assert mapped is not None
    pages = Pages(mapped.descriptor, len(mapped.pages), access=mmap.ACCESS_COPY)
    pages.advised = []
    rows = MappedRows(pages, mapped.descriptor, mapped.offset, mapped.dtype, mapped.width)
    early = rows.read(0, 20_000)
    rows.read(20_000, 40_000)
    assert (mmap.MADV_DONTNEED, 0, (mapped.offset + 20_000 * 12) // mmap.PAGESIZE * mmap.PAGESIZE) in pages.advised
    np.testing.assert_array_equal(early, VALUES[:20_000])


def test_changes_of_rows_do_not_reach_the_file(tmp_path: Path) -> None:
    FeatureSet(VALUES).save(tmp_path / "cache.h5")
    for block in load(tmp_path / "cache.h5").blocks(1000):
        block.features.zero_()
    assert torch.equal(load(tmp_path / "cache.h5").features, torch.from_numpy(VALUES))


@pytest.mark.parametrize("options", [{"chunks": (100, 3)}, {"compression": "gzip"}], ids=["chunks", "compressed"])
def test_rows_that_are_not_contiguous_are_not_mapped(tmp_path: Path, options: dict[str, Any]) -> None:
    assert mapped_rows(write(tmp_path / "values.h5", **options)) is None


def test_files_with_a_user_block_or_no_rows_are_not_mapped(tmp_path: Path) -> None:
    for name, rows, block in (("user.h5", 3, 512), ("none.h5", 0, 0)):
        with h5py.File(tmp_path / name, "w", userblock_size=block) as h5:
            h5.create_dataset("values", data=VALUES[:rows])
        assert mapped_rows(h5py.File(tmp_path / name, "r")["values"]) is None


def test_columns_read_as_a_whole_do_not_depend_on_the_file(tmp_path: Path) -> None:
    FeatureSet(VALUES).save(tmp_path / "cache.h5")
    features = load(tmp_path / "cache.h5").features
    with open(tmp_path / "cache.h5", "r+b") as file:
        file.truncate(0)
    assert torch.equal(features, torch.from_numpy(VALUES))
