"""Rows of an HDF5 file without a copy: the file is mapped, and the kernel reads ahead while rows are processed."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import h5py


@dataclass
class MappedRows:
    """Rows of a contiguous HDF5 dataset as arrays on the mapped file.

    They are meant to be read in order: pages before the requested rows are released, so that a pass over a file needs
    no more memory than its blocks, and as many rows after them are read ahead from a slow disk. The mapping is private:
    changes of the arrays do not reach the file.
    """

    pages: mmap.mmap
    descriptor: int
    offset: int
    dtype: np.dtype
    width: tuple[int, ...]
    given_back: int = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        row = self.dtype.itemsize * int(np.prod(self.width))
        first, last = self.offset + start * row, self.offset + stop * row
        if hasattr(self.pages, "madvise"):
            self._give_back(first)
            self._fetch(last, min(2 * last - first, len(self.pages)))
        values = np.frombuffer(self.pages, self.dtype, (last - first) // self.dtype.itemsize, first)
        return values.reshape(stop - start, *self.width)

    def _give_back(self, until: int) -> None:
        stop = _page(until)
        if stop > self.given_back:
            self.pages.madvise(mmap.MADV_DONTNEED, self.given_back, stop - self.given_back)
        self.given_back = stop

    def _fetch(self, start: int, stop: int) -> None:
        if start < stop and not self._is_cached(stop - 1):  # the request alone costs as much as reading a cached page
            self.pages.madvise(mmap.MADV_WILLNEED, _page(start), stop - _page(start))

    def _is_cached(self, place: int) -> bool:
        try:
            return os.preadv(self.descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
        except (AttributeError, OSError):  # not Linux, or the read would block
            return False


def _page(place: int) -> int:
    return place // mmap.PAGESIZE * mmap.PAGESIZE


def mapped_rows(dataset: h5py.Dataset) -> MappedRows | None:
    """Map the rows of an open HDF5 dataset; None if they are not contiguous in the file or compressed."""
    h5 = dataset.file
    in_one_piece = dataset.chunks is None and not dataset.is_virtual and not dataset.external
    offset = dataset.id.get_offset() if in_one_piece and h5.driver == "sec2" and h5.userblock_size == 0 else None
    if not offset or offset % dataset.dtype.itemsize or dataset.nbytes == 0:
        return None
    descriptor = h5.id.get_vfd_handle()
    if (
        offset + dataset.nbytes > os.fstat(descriptor).st_size
    ):  # reading a mapping beyond the end of the file kills the process
        return None
    pages = mmap.mmap(descriptor, offset + dataset.nbytes, access=mmap.ACCESS_COPY)
    return MappedRows(pages, descriptor, offset, dataset.dtype, tuple(dataset.shape[1:]))
