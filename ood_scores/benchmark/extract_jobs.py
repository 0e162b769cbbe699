"""Run the pending extractions of a plan, several at a time on a CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.markup import escape
from torch.utils.data import DataLoader

from ood_scores.benchmark.planning import Failures, Job
from ood_scores.errors import (
    CacheError,
    DamagedCache,
    MissingData,
    NearChance,
    ProbeDoesNotApply,
    RowsLeftOut,
    StaleCache,
    UnreadableRow,
    WorkerDied,
)
from ood_scores.extraction import extract
from ood_scores.features import FeatureSet
from ood_scores.models.class_names import in_models_order
from ood_scores.transfers import pins_memory
from ood_scores.user_code import import_code, imported_code
from ood_scores.user_warnings import warn_user

MOST_JOBS = 4


@dataclass(frozen=True)
class Done:
    """The outcome of an extraction, and its warnings; ``reason`` and ``remedy`` are empty unless it failed."""

    rows: int = 0
    seconds: float = 0.0
    reason: str = ""
    remedy: str = ""
    warnings: tuple[str, ...] = ()


def extract_all(jobs: Sequence[Job], device: str, at_once: int | None, say: Callable[[str], None]) -> Failures:
    """Extract all features, and return the extractions that failed and why.

    Raises:
        CacheError: if another process writes a cache, or the disk refuses a write.
        WorkerDied: if a process was killed. Rows that it wrote are kept.
    """
    cores = _cores()
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    at_once = min(len(jobs), at_once or (1 if on_gpu else min(MOST_JOBS, cores)))
    failures: Failures = {}
    run = _one_by_one(jobs, device) if at_once <= 1 else _in_processes(jobs, device, at_once, max(1, cores // at_once))
    for number, (job, done) in enumerate(run, start=1):
        what = escape(f"{job.network.table.title} · {job.set}")
        for text in done.warnings:
            warn_user(text)
        if done.reason:
            failures[job.cache] = done.reason, done.remedy
            say(f"[yellow]not run[/] {what}: {escape(done.reason)}")
        else:
            say(f"[green]✓[/] {what}: {done.rows:,} rows in {done.seconds:.1f} s [dim]({number} of {len(jobs)})[/]")
    return failures


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_by_one(jobs: Sequence[Job], device: str) -> Iterator[tuple[Job, Done]]:
    for job in sorted(jobs, key=lambda job: job.network.key):  # each model is opened once
        yield job, run_job(job, device, job.loading.workers)
    _opened.clear()


def _in_processes(jobs: Sequence[Job], device: str, at_once: int, threads: int) -> Iterator[tuple[Job, Done]]:
    spawn = multiprocessing.get_context("spawn")
    with _ended_together():
        pool = ProcessPoolExecutor(
            at_once, mp_context=spawn, initializer=_start_worker, initargs=(threads, imported_code())
        )
        try:
            tasks = _submit(pool, jobs, device)
            for task in as_completed(tasks):
                yield tasks[task], task.result()
            pool.shutdown()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a process that ran a model was killed, perhaps because memory ran out, but the rows that it wrote are "
                "kept: run the same command again to continue, with --jobs 1 if memory is short."
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _submit(pool: ProcessPoolExecutor, jobs: Sequence[Job], device: str) -> dict[Future[Done], Job]:
    try:
        return {pool.submit(run_job, job, device, 0): job for job in jobs}
    except (OSError, ValueError) as error:  # a process that dies while the next one starts closes the pipes they share
        raise BrokenProcessPool(str(error)) from error


@contextmanager
def _ended_together() -> Iterator[None]:
    """Terminate processes that were started within the context when it ends; their caches survive."""
    before = {process.pid for process in multiprocessing.active_children()}
    try:
        yield
    finally:
        for process in multiprocessing.active_children():
            if process.pid not in before:
                process.terminate()


def _start_worker(threads: int, code: Sequence[str]) -> None:
    for name in code:
        import_code(name)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_job(job: Job, device: str, workers: int) -> Done:
    """Write the cache of a job; errors of the model or the data are returned, all others are raised."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            for category in (RowsLeftOut, NearChance):
                warnings.simplefilter("ignore", category)  # the results have it
            feats = _extract(job, device, workers)
    except (CacheError, OSError):
        raise
    except UnreadableRow as error:
        return Done(reason=str(error), remedy='leave out on_error = "raise" in [extraction]')
    except MissingData as error:
        return Done(reason=error.reason, remedy=error.remedy)
    except Exception as error:  # somebody's model: the others go on
        kind = "" if type(error).__module__.startswith("ood_scores") else f"{type(error).__name__}: "
        return Done(reason=f"{kind}{error}")
    texts = dict.fromkeys(str(each.message) for each in caught if issubclass(each.category, UserWarning))
    return Done(len(feats), time.perf_counter() - start, warnings=tuple(texts))


def _extract(job: Job, device: str, workers: int) -> FeatureSet:
    from ood_scores.data.sources import open_dataset

    model, transform = _open(job)
    options = {each.name: getattr(job.options, each.name) for each in fields(job.options)}
    arguments: dict[str, Any] = {"device": device, "progress": False, "name": job.set, **options}
    images = in_models_order(open_dataset(job.source, transform, root=job.data), model)
    loader = DataLoader(images, job.loading.batch_size, num_workers=workers, pin_memory=pins_memory(device))
    arguments["probes"] = [probe for probe in job.options.all_probes if probe.name != "layers"]
    while True:
        try:
            return extract(model, loader, job.cache, **arguments)
        except ProbeDoesNotApply as error:  # the other probes may
            arguments["probes"] = [probe for probe in arguments["probes"] if probe.name != error.probe]
        except (DamagedCache, StaleCache):  # not finished, and of no use
            if "overwrite" in arguments:
                raise
        arguments["overwrite"] = True


_opened: dict[tuple[str, str], tuple[Any, Any]] = {}
"""The last model that this process opened, and its transform."""


def _open(job: Job) -> tuple[Any, Any]:
    key = job.network.key, repr(job.preprocessing)
    if key not in _opened:
        _opened.clear()
        _opened[key] = job.network.open(job.preprocessing)
    return _opened[key]
