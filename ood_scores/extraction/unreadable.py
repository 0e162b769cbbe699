"""Rows of a dataset that cannot be read: each is left out, and its reason is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from ood_scores.errors import BadInput

REASONS = (BadInput, OSError)
"""Errors of a dataset that concern a single row."""


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
        except REASONS as error:
            return Unreadable(" ".join(str(error).split()))


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


def leaving_out_unreadable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader whose batches are ``Partial`` where an item cannot be read."""
    sampler: Any = loader.batch_sampler
    return copy_of(loader, sampler, ReadableItems(loader.dataset), CollateReadable(loader.collate_fn))
