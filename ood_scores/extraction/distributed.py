"""Extraction by several processes of ``torchrun``: each writes its shard, and the first one joins the shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ood_scores.errors import BadInput, ShuffledLoader, WorkerDied
from ood_scores.extraction import loaders
from ood_scores.extraction.one_pass import Target, Task, run, state_of
from ood_scores.extraction.unreadable import require_few
from ood_scores.features import Provenance
from ood_scores.features.storage import shards
from ood_scores.runtime import Ranks

Value = TypeVar("Value")

LONGEST_WAIT = timedelta(days=1)
"""Time to wait for the slowest process once this one has written its rows."""


def extract_shards(task: Task, path: Path, provenance: Provenance, ranks: Ranks, resume: bool, overwrite: bool) -> None:
    """Write the cache at ``path``, which does not exist or is to be replaced, together with the other processes.

    Raises:
        BadInput, ShuffledLoader: if the loader's rows cannot be shared, or another process has different settings.
        StaleCache: if existing shards were created with different settings, or by another number of processes.
        TooManyUnreadableRows: if more rows cannot be read than may be left out.
        WorkerDied: if another process has ended.
    """
    rows = shares(task.batches.loader, ranks.count)
    parts = {shards.shard_path(path, rank, ranks.count): part for rank, part in enumerate(rows)}
    made_by = {
        shard: replace(provenance, shard=f"rows {part.start}:{part.stop}, shard {rank} of {ranks.count}")
        for rank, (shard, part) in enumerate(parts.items())
    }
    own = list(parts)[ranks.rank]
    if not overwrite:
        shards.require_no_others(path, ranks.count)
    with meeting() as others:
        _require_alike(others.gather(provenance), ranks)
        if overwrite and ranks.first:
            path.unlink(missing_ok=True)
            shards.remove(path, keep=ranks.count)
        first = parts[own].start
        state = state_of(own, made_by[own], resume, overwrite, task.skip, task.row_ids, first) if resume else None
        if state and state.finished:
            found = state.provenance
        else:
            target = Target(made_by[own], own, parts[own], state, replace=overwrite or not resume)
            found = run(task, target).provenance
        others.wait()
        left_out = others.gather(found.skipped if found else ())
        require_few(dict(itertools.chain(*left_out)), provenance.dataset_rows or 0, provenance.dataset)
        if ranks.first:
            shards.join(path, made_by)
        others.wait()


def _require_alike(provenances: Sequence[Provenance], ranks: Ranks) -> None:
    for rank, other in enumerate(provenances):
        differing = provenances[ranks.rank].differences(other)
        if differing:
            raise BadInput(
                f"process {rank} and process {ranks.rank} have different settings ({'; '.join(differing)}): load the "
                "same checkpoint and the same data in all processes."
            )


@dataclass(frozen=True)
class Meeting:
    """Communication between the processes.

    Its methods raise WorkerDied if a process has ended.
    """

    group: Any

    def gather(self, value: Value) -> list[Value]:
        """Return the value of every process, by rank."""
        values: list[Any] = [None] * dist.get_world_size(self.group)
        _unless_one_died(lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def wait(self) -> None:
        """Wait until all processes have reached this call."""
        _unless_one_died(lambda: dist.monitored_barrier(self.group, LONGEST_WAIT))


@contextmanager
def meeting() -> Iterator[Meeting]:
    """Connect the processes of ``torchrun`` by gloo, whatever device they compute on."""
    started_here = not dist.is_initialized()
    if started_here:
        _unless_one_died(lambda: dist.init_process_group("gloo"))
    group = dist.group.WORLD if started_here else dist.new_group(backend="gloo")
    try:
        yield Meeting(group)
    finally:
        dist.destroy_process_group(group)


def _unless_one_died(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:
        raise WorkerDied(
            f"another process of torchrun has ended, or did not start ({str(error).splitlines()[0]}): check its error, "
            "then run the same command again to continue."
        ) from error


def shares(loader: Any, count: int) -> list[range]:
    """Return the rows of each of ``count`` processes: contiguous whole batches, equally many where possible.

    Raises:
        ShuffledLoader: if the order is random, so that each process would have its own.
        BadInput: if the loader's rows cannot be counted and skipped, or are one process's share already.
    """
    if loaders.is_shuffled(loader):
        raise ShuffledLoader("the order of the loader is random and differs between processes: use shuffle=False.")
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise BadInput("the loader already yields one process's share of the rows: remove the DistributedSampler.")
    if not isinstance(loader, DataLoader) or not loaders.can_jump(loader):
        raise BadInput(
            f"several processes can only share a DataLoader with a batch_size over a dataset of known length, got "
            f"{type(loader).__name__} over {type(getattr(loader, 'dataset', loader)).__name__}: use one process."
        )
    rows, size = loaders.row_count(loader) or 0, loader.batch_sampler.batch_size  # type: ignore[union-attr]
    batches = -(-rows // size)
    bounds = [min(batches * rank // count * size, rows) for rank in range(count + 1)]
    return [range(*pair) for pair in itertools.pairwise(bounds)]
