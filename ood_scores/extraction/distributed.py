"""Extraction by several processes of `torchrun`: each writes its shard, and the first one joins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ood_scores.errors import BadInput
from ood_scores.extraction.one_pass import Target, Task, run, state_of
from ood_scores.extraction.ranks import meeting, shares
from ood_scores.features import Provenance
from ood_scores.features.storage import shards
from ood_scores.runtime import Ranks


def extract_shards(task: Task, path: Path, provenance: Provenance, ranks: Ranks, resume: bool, overwrite: bool) -> None:
    """Writes the cache at ``path``, which is not there or to be replaced, together with the other processes.

    Raises:
        BadInput, ShuffledLoader: the loader's rows cannot be shared, or another process would extract something else.
        StaleCache: the shards that are there were made by something else, or by another number of processes.
        WorkerDied: another process is gone.
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
        state = state_of(own, made_by[own], resume, overwrite) if resume else None
        if not (state and state.finished):
            run(task, Target(made_by[own], own, parts[own], state, replace=overwrite or not resume))
        others.wait()
        if ranks.first:
            shards.join(path, made_by)
        others.wait()


def _require_alike(provenances: Sequence[Provenance], ranks: Ranks) -> None:
    for rank, other in enumerate(provenances):
        what = [line.partition(":")[0] for line in provenances[ranks.rank].differences(other)]
        if what:
            raise BadInput(
                f"process {rank} would extract something else than process {ranks.rank}: {'; '.join(what)}. All "
                "processes must load the same checkpoint and the same data."
            )
