"""Rows of a dataset that cannot be read: each is left out, and its reason is kept.

What the operating system reports, an ``OSError`` with an ``errno``, is never taken for a damaged row: a drive that
drops out for a minute must not make a dataset smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from ood_scores.errors import BadInput, FileSystemFault, MissingData, TooManyUnreadableRows, UnreadableRow

ROW_ERRORS = (BadInput, OSError)
"""Errors of a dataset that concern a single row."""

SHOWN = 3
"""Number of unreadable rows that an error lists."""


@dataclass(frozen=True)
class Unreadable:
    """An item that cannot be read."""

    reason: str


class Partial(NamedTuple):
    """A batch of which some rows may be unreadable.

    Attributes:
        batch: the batch of the readable rows; None if there is none.
        rows: the number of rows, readable or not.
        reasons: why rows are unreadable, by their position among all rows.
    """

    batch: Any
    rows: int
    reasons: Mapping[int, str]


class ReadableItems(Dataset[Any]):
    """A dataset whose unreadable items are objects of ``Unreadable``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except ROW_ERRORS as error:
            found = as_row_error(error, f"row {index}")
            if not isinstance(found, UnreadableRow):
                raise found from (error if found is not error else error.__cause__)
            return Unreadable(str(found))


@dataclass(frozen=True)
class CollateReadable:
    """A collate function that leaves out unreadable items."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, items: list[Any]) -> Any:
        reasons = {place: item.reason for place, item in enumerate(items) if isinstance(item, Unreadable)}
        if not reasons:
            return self.collate(items)
        readable = [item for item in items if not isinstance(item, Unreadable)]
        return Partial(self.collate(readable) if readable else None, len(items), reasons)


def as_row_error(error: Exception, row: str) -> BadInput:
    """Return an ``UnreadableRow`` in one line for an error of a damaged row; for a fault of the file system, its error.

    Args:
        error: a ``BadInput`` or ``OSError`` of a dataset, perhaps with the traceback of a worker process.
        row: what the message calls the row, if the error is not one of this package.
    """
    text = " ".join(str(error).split())
    if isinstance(error, (MissingData, FileSystemFault)):
        return error
    if isinstance(error, BadInput):
        return UnreadableRow(text)
    last = str(error).strip().rpartition("\n")[2].removeprefix(f"{type(error).__name__}: ")
    if getattr(error, "errno", None) is not None or "[Errno " in last:
        return FileSystemFault(f"{row} cannot be read ({last}): check the drive, then repeat the call.")
    return UnreadableRow(f"{row} cannot be read ({last}): replace or remove it.")


def require_few(reasons: Mapping[int, str], rows: int, dataset: str) -> None:
    """Check that the unreadable rows of a dataset are few enough to leave out: one, or at most a tenth.

    Raises:
        TooManyUnreadableRows: if there are more.
    """
    if len(reasons) > max(1, rows // 10):
        shown = [f"row {row}: {reasons[row].rstrip('.')}" for row in sorted(reasons) if reasons[row]][:SHOWN]
        raise TooManyUnreadableRows(
            f"at least {len(reasons):,} of the {rows:,} rows of {dataset} cannot be read ({'; '.join(shown)}), and no "
            "more than a tenth is left out: check the drive and the format of the files, remove from the dataset what "
            "cannot be repaired, and pass overwrite=True if a cache was begun."
        )


def copy_of(
    loader: DataLoader[Any], batch_sampler: Iterable[Any], dataset: Any = None, collate_fn: Any = None
) -> DataLoader[Any]:
    """Return the same loader with other batches, and with another dataset and collate function if there are any."""
    return DataLoader(
        dataset or loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=collate_fn or loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )


def leaving_out_unreadable(loader: DataLoader[Any], batch_sampler: Iterable[Any]) -> DataLoader[Any]:
    """Return the same loader with other batches, which are ``Partial`` where an item cannot be read."""
    return copy_of(loader, batch_sampler, ReadableItems(loader.dataset), CollateReadable(loader.collate_fn))
