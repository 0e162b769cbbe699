"""One pass of a model over some of a loader's rows, to a cache or to memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ood_scores.errors import BadInput, RowsLeftOut, ShuffledLoader, StaleCache
from ood_scores.extraction.forward import Forward
from ood_scores.extraction.heads import FoundHead
from ood_scores.extraction.loaders import Batches, as_partial
from ood_scores.extraction.row_ids import NO_IDS, RowIds
from ood_scores.extraction.writers import BackgroundWriter, MemorySink
from ood_scores.features import FeatureSet, Provenance, load
from ood_scores.features.storage import cache as caches
from ood_scores.features.storage import gaps
from ood_scores.features.storage.texts import IDS
from ood_scores.models.class_names import require_as_many_classes
from ood_scores.progress import ProgressBar
from ood_scores.transfers import Arriving
from ood_scores.user_warnings import warn_user


@dataclass(frozen=True)
class Task:
    """What to run, over which batches."""

    forward: Forward
    batches: Batches
    progress: bool

    @property
    def skip(self) -> bool:
        """Whether rows that cannot be read are left out."""
        return self.forward.options.on_error == "skip"

    @cached_property
    def row_ids(self) -> RowIds:
        """The ids of the rows."""
        return RowIds.of(self.batches)


@dataclass(frozen=True)
class Target:
    """Where rows are written.

    Attributes:
        provenance: the provenance of the rows.
        path: the file; None for memory.
        rows: which rows of the loader to write; None for all, however many there are.
        state: the state of the file to continue; None for a new file.
        replace: whether a new file may replace another.
    """

    provenance: Provenance
    path: Path | None = None
    rows: range | None = None
    state: caches.CacheState | None = None
    replace: bool = False

    @property
    def promised(self) -> int | None:
        """The number of rows that there will be, if it is known."""
        return self.provenance.dataset_rows if self.rows is None else len(self.rows)


def run(task: Task, target: Target) -> FeatureSet:
    """Run the model over the rows that the target lacks, and open the target."""
    forward, first = task.forward, 0 if target.rows is None else target.rows.start
    done = target.state.rows if target.state else 0
    stop = None if target.rows is None else target.rows.stop
    if target.path and target.state and target.state.has_gaps:
        task.batches.unreadable |= dict.fromkeys((first + gap for gap in gaps.find(target.path)), "")
    remaining = task.batches.after(first + done, stop)  # before the cache is locked: forked workers share locks
    with forward.ready():
        first_start, example = task.batches.example
        first_rows = forward(example, first_start)
        if "logits" in first_rows.columns:
            require_as_many_classes(
                getattr(task.batches.loader, "dataset", None), first_rows.columns["logits"].shape[1]
            )
        no_rows = Arriving({name: values[:0] for name, values in first_rows.columns.items()})
        some_ids = task.row_ids.columns(first_start, as_partial(example))
        assert forward.found is not None
        with _open_sink(target, forward.found, first_rows.columns | some_ids) as sink:
            row_ids = replace(task.row_ids, exist=sink.has_ids)
            with (
                _progress_bar(target, sink.rows, task.progress) as bar,
                BackgroundWriter(sink, first, bar.update) as writer,
            ):
                for start, batch in remaining:
                    part = as_partial(batch)
                    _require_length(target.promised, start + part.rows - first, ended=False)
                    if part.batch is None:
                        rows = no_rows
                    else:
                        rows = first_rows if start == first_start else forward(part.batch, start)
                    ids = row_ids.columns(start, part)
                    writer.put(start, Arriving(rows.columns | ids, rows.arrived), part.reasons)
            _require_length(target.promised, sink.rows, ended=True)
            if not sink.has_gaps:
                sink.finish()
    if sink.has_gaps:
        _remove_gaps(sink, first, task.batches)
    return sink.feature_set() if isinstance(sink, MemorySink) else load(sink.path)


def _remove_gaps(sink: MemorySink | caches.CacheWriter, first: int, batches: Batches) -> None:
    """Remove the rows that cannot be read."""
    found = sink.gaps if isinstance(sink, MemorySink) else gaps.find(sink.path)
    skipped = list(batches.reasons([first + gap for gap in found]).items())
    if isinstance(sink, MemorySink):
        sink.remove_gaps(skipped)
    else:
        gaps.remove(sink.path, found, skipped)


def warn_of_rows_left_out(feats: FeatureSet) -> None:
    """Warn of rows of the dataset that the set lacks, if it does."""
    if feats.provenance and feats.provenance.skipped:
        warn_user(feats.provenance.left_out, RowsLeftOut)


def state_of(
    path: Path,
    provenance: Provenance,
    resume: bool,
    overwrite: bool,
    skip: bool,
    row_ids: RowIds = NO_IDS,
    first: int = 0,
) -> caches.CacheState | None:
    """Return the state of the cache to open or continue; None if a new file is to be written.

    Args:
        path: the file.
        provenance: the provenance of the rows.
        resume: whether to continue an unfinished file.
        overwrite: whether to replace the file.
        skip: whether rows that cannot be read may be missing.
        row_ids: the ids of the rows of the loader.
        first: the row of the loader that is the first of the file.

    Raises:
        StaleCache: if the cache has another provenance, or its rows have other ids than those of the dataset.
        BadInput: if the cache lacks rows that cannot be read, and ``skip`` is False.
    """
    if not path.exists():
        return None
    if overwrite:
        caches.check_replaceable(path)
        return None
    if provenance.shuffled:
        raise ShuffledLoader(
            f"{path} exists, but the order of the loader is random, so that its rows cannot be compared: use "
            "shuffle=False, or overwrite=True to extract again."
        )
    with caches.open_to_read(path) as h5:
        state = caches.state(h5)
        if state.provenance is None:
            raise StaleCache(f"{path} has no provenance, so it cannot be compared: open it with ood_scores.load.")
        state.provenance.require_same(provenance, str(path))
        row_ids.require_those_of(h5, path, first)
    if not skip and (state.has_gaps or state.provenance.skipped) and (state.finished or resume):
        raise BadInput(
            f"{path} lacks rows that could not be read: pass on_error='skip' to use it, or overwrite=True to extract "
            "again."
        )
    return state if state.finished or resume else None


def _require_length(promised: int | None, rows: int, ended: bool) -> None:
    if promised is not None and (rows > promised or (ended and rows < promised)):
        raise BadInput(
            f"the loader {'ended after' if ended else 'yielded at least'} {rows:,} rows, but its length is {promised:,}"
            ": correct the length of its sampler, or pass (batch for batch in loader), which has none."
        )


@contextmanager
def _open_sink(
    target: Target, found: FoundHead, columns: Mapping[str, Tensor]
) -> Iterator[MemorySink | caches.CacheWriter]:
    provenance = replace(target.provenance, head_modules=" + ".join(found.names))
    if target.path is None:
        yield MemorySink(target.promised, found.head, provenance, IDS in columns)
        return
    if provenance.shuffled:
        warn_user(
            f"the order of the loader is random, so that {target.path} can neither be resumed nor compared with "
            "another run: use shuffle=False.",
        )
    if target.state:
        writer = caches.CacheWriter.resume(target.path, target.state)
    else:
        shapes = {name: (values.shape[1:], values.numpy().dtype) for name, values in columns.items()}
        writer = caches.CacheWriter.create(target.path, shapes, target.promised, found.head, provenance, target.replace)
    with writer:
        yield writer


def _progress_bar(target: Target, done: int, visible: bool) -> ProgressBar:
    shard = f" ({target.provenance.shard})" if target.provenance.shard else ""
    resumed = f", resumed after {done:,} rows" if done else ""
    label = f"{target.provenance.dataset}{shard} → features{resumed}"
    return ProgressBar(label, target.promised, "rows", done=done, visible=visible, keep=True)
