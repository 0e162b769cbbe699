"""Loaders: their batches, number of rows, and order, and a checksum of the first rows."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ood_scores.errors import BadInput, BadLabels, EmptyInput, OodScoresError, UnreadableRow
from ood_scores.extraction.unreadable import (
    ROW_ERRORS,
    Partial,
    ReadableItems,
    Unreadable,
    as_row_error,
    copy_of,
    leaving_out_unreadable,
    require_few,
)
from ood_scores.runtime import from_workers

IMAGE_KEYS = ("pixel_values", "image", "images", "img", "inputs", "input", "x", "data")
INPUT_KEYS = (*IMAGE_KEYS, "input_ids", "input_values", "input_features")
LABEL_KEYS = ("labels", "label", "targets", "target", "y")
ID_KEYS = ("id", "ids", "__key__", "image_id", "file_name", "filename")
"""Keys of a dict batch under which the names of its rows are looked for, in this order."""
END = object()
CHECKSUM_ROWS = 16
"""Number of inputs and labels at the start that identify the data."""


class NamedInputs(dict[str, Any]):
    """A batch of a model with several inputs: by the names of the parameters of ``forward``, with or without labels.

    Attributes:
        first: the key of the first input.
        label: the key of the labels; None without labels.
    """

    def __init__(self, entries: Mapping[str, Any], first: str, label: str | None) -> None:
        super().__init__(entries)
        self.first, self.label = first, label


def unpack(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return inputs ``[B, ...]`` and labels ``[B]`` (or None) of a batch: ``x``, ``(x,)``, ``(x, y)``, or a dict."""
    if isinstance(batch, Mapping):
        inputs, labels = _from_mapping(batch)
    elif isinstance(batch, (tuple, list)):
        inputs, labels = (batch[0], batch[1] if len(batch) > 1 else None) if batch else (None, None)
    else:
        inputs, labels = batch, None
    if not isinstance(inputs, Tensor) or inputs.ndim < 2:
        got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise BadInput(
            f"a batch must contain a tensor of inputs [batch, ...], got {got}: pass a DataLoader(dataset, "
            "batch_size=...) whose batches are x, (x, y), or a dict."
        )
    if inputs.ndim == 3 and labels is not None and np.ndim(labels) == 0:
        raise BadInput(
            f"the loader yields single images {list(inputs.shape)}, not batches: pass DataLoader(dataset, "
            "batch_size=...)."
        )
    return inputs, None if labels is None else _as_labels(labels, len(inputs))


def _from_mapping(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    key = label_key(batch)
    return batch[input_key(batch)], None if key is None else batch[key]


def input_key(batch: Mapping[str, Any]) -> str:
    """Return the key of the inputs, which the model receives first.

    Raises:
        BadInput: if there is none of ``INPUT_KEYS``.
    """
    if isinstance(batch, NamedInputs):
        return batch.first
    for key in INPUT_KEYS:
        if key in batch:
            return key
    raise BadInput(
        f"no inputs in a batch with the keys {', '.join(map(str, batch))}: use one of {', '.join(INPUT_KEYS)}."
    )


def label_key(batch: Mapping[str, Any]) -> str | None:
    """Return the key of the labels; None if there are none."""
    if isinstance(batch, NamedInputs):
        return batch.label
    return next((key for key in LABEL_KEYS if key in batch), None)


def can_be_labels(values: Any, rows: int) -> bool:
    """Return whether values are integers, one for each input."""
    try:
        _as_labels(values, rows)
    except BadLabels:
        return False
    return True


def _as_labels(labels: Any, rows: int) -> Tensor:
    try:
        tensor = labels if isinstance(labels, Tensor) else torch.as_tensor(np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise BadLabels(f"labels must be integer class indices [{rows}], one per input: {error}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.shape != (rows,):
        raise BadLabels(
            f"labels must be integer class indices [{rows}], one per input, got {tensor.dtype} {tuple(tensor.shape)}."
        )
    return tensor.long()


def row_count(loader: Iterable[Any]) -> int | None:
    """Return the number of rows that the loader will yield, or None if it is not known in advance."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader.batch_sampler) is not BatchSampler:
        return None
    try:
        rows = len(loader.batch_sampler.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return rows - rows % loader.batch_sampler.batch_size if loader.batch_sampler.drop_last else rows


def is_shuffled(loader: Iterable[Any]) -> bool:
    """Return whether the loader is known to yield its rows in random order."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", None) or getattr(loader, "sampler", None)
    as_they_come = getattr(loader, "num_workers", 0) > 1 and not getattr(loader, "in_order", True)
    return as_they_come or isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))


def is_in_order(loader: Iterable[Any]) -> bool:
    """Return whether the loader is known to yield the rows of its dataset in their order."""
    if not isinstance(loader, DataLoader) or type(loader.batch_sampler) is not BatchSampler:
        return False
    return isinstance(loader.sampler, SequentialSampler) and not is_shuffled(loader)


def data_text(loader: Iterable[Any]) -> tuple[str | None, str | None]:
    """Return the text that opens the loader's dataset, and the folder where its paths start; None if unknown."""
    dataset = getattr(loader, "dataset", None)
    text = getattr(dataset, "text", None) if is_in_order(loader) else None
    return (text, getattr(dataset, "root", None)) if isinstance(text, str) else (None, None)


def dataset_name(loader: Iterable[Any]) -> str:
    """Return the dataset's own ``name``, or the name of its class."""
    dataset = getattr(loader, "dataset", loader)
    return str(getattr(dataset, "name", None) or type(dataset).__name__)


def transform_of(loader: Iterable[Any]) -> Callable[[Any], Any] | None:
    """Return the attribute ``transform`` of the loader's dataset; None if there is none."""
    return getattr(getattr(loader, "dataset", None), "transform", None)


def preprocessing(loader: Iterable[Any]) -> str:
    """Return the transform of the loader's dataset in one line, or "" if it cannot be read."""
    transform = transform_of(loader)
    return " ".join(repr(transform).split()) if transform is not None else ""


def _unchanged(batch: Any) -> Any:
    return batch


@dataclass
class Batches:
    """A loader whose first rows have been read, without losing them.

    Attributes:
        loader: the loader. From its first error on, a copy is read whose batches are ``Partial``.
        skip: whether to leave out rows that cannot be read.
        first: the first batches.
        rest: the iterator over the other batches.
        unreadable: why rows cannot be read, by their number; "" if that is not known.
        as_batch: a function that returns a batch in a form that ``unpack`` takes.
    """

    loader: Iterable[Any]
    skip: bool = False
    first: list[Any] = field(default_factory=list)
    rest: Iterator[Any] = field(default_factory=lambda: iter(()))
    unreadable: dict[int, str] = field(default_factory=dict)
    as_batch: Callable[[Any], Any] = _unchanged

    @classmethod
    def look_into(
        cls, loader: Iterable[Any], skip: bool = False, as_batch: Callable[[Any], Any] = _unchanged
    ) -> Batches:
        """Read batches until ``CHECKSUM_ROWS`` rows are known.

        Args:
            loader: the loader.
            skip: whether to leave out rows that cannot be read, if the loader allows it (see ``can_leave_out``).
            as_batch: a function that returns a batch in a form that ``unpack`` takes.

        Raises:
            EmptyInput: if there is no row, or none that can be read.
            UnreadableRow, TooManyUnreadableRows, FileSystemFault, MissingData: if rows cannot be read, nor left out.
        """
        if isinstance(loader, Dataset):
            raise BadInput("extract needs batches, got a dataset: pass DataLoader(dataset, batch_size=...).")
        if not isinstance(loader, Iterable) or isinstance(loader, (str, PathLike)):
            raise BadInput(
                f"extract needs batches, got {type(loader).__name__}: pass DataLoader(dataset, batch_size=...); "
                "ood_scores.data.sources.open_dataset opens a dataset such as 'folder:PATH'."
            )
        batches = cls(loader, skip and can_leave_out(loader), as_batch=as_batch)
        batches.rest = batches._counted(loader, 0)
        rows = 0
        while rows < CHECKSUM_ROWS and (batch := next(batches.rest, END)) is not END:
            part = as_partial(batch)
            if part.batch is not None:
                part = part._replace(batch=_cloned(part.batch))  # loaders may reuse memory
            if part.rows:
                batches.first.append(part if part.reasons else part.batch)
                rows += part.rows - len(part.reasons)
        if not rows:
            raise EmptyInput(
                f"no row of {dataset_name(loader)} can be read: {next(iter(batches.unreadable.values()))}"
                if batches.unreadable
                else "the loader yields no batch: check whether the dataset is empty, or smaller than a batch with "
                "drop_last=True."
            )
        return batches

    @property
    def example(self) -> tuple[int, Any]:
        """The first row's number and the readable rows of the first batch that has any."""
        parts = ((start, as_partial(batch)) for start, batch in _numbered(self.first, 0))
        return next((start, part.batch) for start, part in parts if part.batch is not None)

    def checksum(self, further_inputs: Callable[[Any], Mapping[str, Tensor]] = lambda batch: {}) -> str:
        """Return the SHA-256 of the first ``CHECKSUM_ROWS`` inputs, as the model sees them, and of their labels.

        Args:
            further_inputs: returns what the model receives of a batch besides the inputs, by name; by default nothing.
        """
        digest = hashlib.sha256()
        parts = [as_partial(batch).batch for batch in self.first]
        pairs = [unpack(batch) for batch in parts if batch is not None]
        for x in itertools.islice(itertools.chain.from_iterable(x for x, _ in pairs), CHECKSUM_ROWS):
            digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
            digest.update(x.cpu().contiguous().view(torch.uint8).numpy())
        labels = [y for _, y in pairs if y is not None]
        if labels:
            digest.update(torch.cat(labels)[:CHECKSUM_ROWS].cpu().numpy().tobytes())
        further = [further_inputs(batch) for batch in parts if batch is not None]
        for name in sorted(further[0]):
            rows = itertools.chain.from_iterable(values[name] for values in further)
            for row in itertools.islice(rows, CHECKSUM_ROWS):
                digest.update(f"{name} {row.dtype} {tuple(row.shape)}".encode())
                digest.update(row.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def rows_of_list(self) -> range | None:
        """Return the rows of a list of batches; None for another loader, or if a batch cannot be used."""
        if not isinstance(self.loader, (list, tuple)):
            return None
        try:
            return range(sum(as_partial(self.as_batch(batch)).rows for batch in self.loader))
        except OodScoresError:  # which is raised once earlier batches are written
            return None

    def after(self, rows: int, stop: int | None = None) -> Iterator[tuple[int, Any]]:
        """Yield the first row's number and the batch, for every batch with rows after ``rows``, up to row ``stop``.

        A plain DataLoader skips earlier batches without loading them; other loaders are iterated over. ``stop``
        requires a loader that can skip. A batch with unreadable rows is a ``Partial``.
        """
        loader = self.loader
        if (rows or stop is not None) and isinstance(loader, DataLoader) and can_jump(loader):
            self.rest = iter(())  # stops the workers of the first iterator
            size = loader.batch_sampler.batch_size  # type: ignore[union-attr]
            first, last = rows // size, None if stop is None else -(-stop // size)
            chosen = list(itertools.islice(loader.batch_sampler, first, last))  # type: ignore[arg-type]
            return _numbered(self._counted(copy_of(loader, chosen), first * size), first * size)
        numbered = _numbered(itertools.chain(self.first, self.rest), 0)
        return ((start, batch) for start, batch in numbered if start + as_partial(batch).rows > rows)

    def _counted(self, loader: Iterable[Any], row: int) -> Iterator[Any]:
        """Yield the batches of a loader, the first of which begins with row ``row``, and count what is unreadable."""
        for batch in self._read(loader):
            is_partial = isinstance(batch, Partial)
            batch = batch._replace(batch=self.as_batch(batch.batch)) if is_partial else self.as_batch(batch)
            part = as_partial(batch)
            if part.reasons:
                self.unreadable |= {row + place: reason for place, reason in part.reasons.items()}
                require_few(self.unreadable, row_count(self.loader) or 0, dataset_name(self.loader))
            row += part.rows
            yield batch

    def _read(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches; an error of the dataset says how to go on, unless rows are left out from there on."""
        done = 0
        try:
            for batch in from_workers(loader):
                yield batch
                done += 1
        except ROW_ERRORS as error:
            if not (self.skip and isinstance(loader, DataLoader)):
                found = self._in_words(error)
                raise found from (error if found is not error else error.__cause__)
            remaining = list(itertools.islice(loader.batch_sampler, done, None))  # type: ignore[arg-type]
            yield from from_workers(leaving_out_unreadable(loader, remaining))

    def _in_words(self, error: Exception) -> BadInput:
        found = as_row_error(error, f"a row of {dataset_name(self.loader)}")
        if not isinstance(found, UnreadableRow):
            return found
        return UnreadableRow(
            f"{found} To leave out such rows and continue, pass on_error='skip'."
            if can_leave_out(self.loader)
            else f"{found} Rows of this loader cannot be left out: leave them out in the loader itself, or pass a "
            "DataLoader with a batch_size and shuffle=False over a dataset of known length."
        )

    def reasons(self, rows: Collection[int]) -> dict[int, str]:
        """Return why rows cannot be read; those whose reason is not known are read again."""
        unknown = {row for row in rows if not self.unreadable.get(row)}
        if unknown:
            loader: Any = self.loader
            indices = itertools.chain.from_iterable(loader.batch_sampler)
            readable = ReadableItems(loader.dataset)
            items = {row: readable[index] for row, index in enumerate(indices) if row in unknown}
            self.unreadable |= {
                row: item.reason if isinstance(item, Unreadable) else "it could not be read at first"
                for row, item in items.items()
            }
        return {row: self.unreadable[row] for row in rows}


def as_partial(batch: Any) -> Partial:
    """Return a batch with the number of its rows; 0 for None, which a collate function returns that drops all rows."""
    if isinstance(batch, Partial):
        return batch
    return Partial(batch, 0 if batch is None else len(unpack(batch)[0]), {})


def _cloned(batch: Any) -> Any:
    inputs, labels = unpack(batch)
    copies = inputs.clone(), None if labels is None else labels.clone()
    if not isinstance(batch, Mapping):
        return copies
    further = {key: _own_copy(values) for key, values in batch.items()}
    found: dict[Any, Any] = further | dict(zip((input_key(batch), label_key(batch)), copies, strict=True))
    return NamedInputs(found, batch.first, batch.label) if isinstance(batch, NamedInputs) else found


def _own_copy(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        return values.copy()
    return values.clone() if isinstance(values, Tensor) else values


def _numbered(batches: Iterable[Any], start: int) -> Iterator[tuple[int, Any]]:
    for batch in batches:
        rows = as_partial(batch).rows
        if rows:
            yield start, batch
        start += rows


def can_leave_out(loader: Iterable[Any]) -> bool:
    """Return whether unreadable rows can be left out: the same batches can be read again, in the same order."""
    if not isinstance(loader, DataLoader) or not can_jump(loader) or is_shuffled(loader):
        return False
    return isinstance(loader.batch_sampler.sampler, (SequentialSampler, Sequence))  # type: ignore[union-attr]


def can_jump(loader: DataLoader[Any]) -> bool:
    """Return whether batches can be skipped without loading them."""
    return row_count(loader) is not None and type(loader).__iter__ is DataLoader.__iter__
