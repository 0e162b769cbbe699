"""Run a benchmark: extract features, fit and score, and write tables and a report."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

from ood_scores.atomic import LockedFile, disk_errors, make_folder, user_path
from ood_scores.benchmark import checks, unit_files
from ood_scores.benchmark.extract_jobs import extract_all
from ood_scores.benchmark.hardest import OpenedModels
from ood_scores.benchmark.planning import (
    Plan,
    limited,
    numbers_by_network,
    plan,
    runnable_after_extraction,
    without,
)
from ood_scores.benchmark.progress import watching
from ood_scores.benchmark.published import compared
from ood_scores.benchmark.results import NotRun, Results, frame, plain, recorded_environment, save
from ood_scores.benchmark.spec import Spec
from ood_scores.benchmark.spec_file import load_spec
from ood_scores.benchmark.unit import evaluated
from ood_scores.data.images import ImageDataset
from ood_scores.errors import BadInput, CacheBusy, OodScoresError
from ood_scores.extraction.run import PACKAGES
from ood_scores.progress import showing_work, stderr_console
from ood_scores.runtime import versions_of
from ood_scores.scorers.requirements import Requirement
from ood_scores.user_warnings import warn_user

RUNS = "runs"
LOCK = ".lock"


def run(
    spec: str | os.PathLike[str] | Spec,
    *,
    out: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    overrides: Iterable[str] = (),
    device: str = "auto",
    jobs: int | None = None,
    progress: bool = True,
) -> Results:
    """Run a benchmark, or continue it, and write tables and a report.

    Each model processes each dataset once; the features are kept in ``<out>/caches``. All scorers of a part are then
    fitted and scored in one pass over each dataset; the scores are kept in ``<out>/scores``. The same call continues a
    run that was interrupted or killed at any moment, and reuses what exists. What needs missing data or weights does
    not run and is listed with the way to get it.

    Args:
        spec: a TOML file, or a ``Spec``.
        out: folder of the run; defaults to ``runs/`` and the name of the spec.
        data: folder where relative paths of datasets and checkpoints start; defaults to the current folder.
        overrides: ``key=value`` texts that override the file, see ``load_spec``.
        device: where models run; ``"auto"`` selects a GPU if there is one.
        jobs: number of extractions at the same time, each in its own process; defaults to one on a GPU, and to the
            number of cores, but at most four, on a CPU.
        progress: whether to print a line to standard error for each step.

    Raises:
        BadInput: if the spec is invalid, see ``load_spec``, or ``out`` is a file.
        UnknownName: if the spec names something that does not exist, see ``load_spec``.
        CacheBusy: if another run uses the folder.
        CacheWriteFailed: if the disk is full, or the folder may not be written.
        WorkerDied: if a process that ran a model was killed.
    """
    start = time.perf_counter()
    chosen = as_spec(spec, overrides)
    folder, base = places(chosen, out, data)
    say = _speaker(progress)
    with _alone_in(folder):
        planned = plan(chosen, folder, base)
        _say_plan(planned, say)
        with watching([job.cache for job in planned.pending], _rows_to_do(planned), progress):
            failures = extract_all(planned.pending, device, jobs, say)
        units, more = without(planned.units, failures)
        known = {path.name for path in (folder / unit_files.FOLDER).glob("*.h5")}
        models, by_number = OpenedModels(device), {}
        for number in numbers_by_network(units):
            unit, began = units[number], time.perf_counter()
            with showing_work(f"{unit.title} · {unit.part.title}", progress):
                by_number[number] = evaluated(unit, folder, models)
            seconds = time.perf_counter() - began
            say(f"[green]✓[/] scores of {escape(f'{unit.title} · {unit.part.title}')} in {seconds:.1f} s")
        found = [by_number[number] for number in range(len(units))]
        files = [path.name for path, _ in found]
        idle = not planned.pending and known.issuperset(files)
        environment = recorded_environment(folder, files) if idle else None
        environment = environment or _environment(device, time.perf_counter() - start)
        results = _results(chosen, folder, found, [*planned.not_run, *more], environment)
        save(results, files)
        _report(results, chosen, base, say)
    for part, text in results.warnings[["part", "warning"]].drop_duplicates().itertuples(index=False):
        warn_user(f"{part}: {text}")
    return results


def as_spec(spec: str | os.PathLike[str] | Spec, overrides: Iterable[str]) -> Spec:
    """Load and check a spec."""
    if not isinstance(spec, Spec):
        return load_spec(spec, overrides)
    if list(overrides):
        raise BadInput("overrides apply to a file only: change the Spec with dataclasses.replace(spec, ...).")
    checks.check(spec)
    return spec


def places(spec: Spec, out: str | os.PathLike[str] | None, data: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """Return the folder of a run, and the folder where relative paths start."""
    folder = Path(RUNS) / spec.name if out is None else user_path(out)
    return folder, Path() if data is None else user_path(data)


def _speaker(progress: bool) -> Callable[[str], None]:
    def say(text: str) -> None:
        if progress:
            stderr_console().print(text, soft_wrap=True)

    return say


def _say_plan(planned: Plan, say: Callable[[str], None]) -> None:
    todo = f"{len(planned.pending)} to do, {_rows_to_do(planned):,} rows" if planned.pending else "all done"
    say(f"extractions: {todo}")
    for text in _scorers_in_vain(planned):
        say(f"[yellow]will not run[/] {escape(text)}")


def _scorers_in_vain(planned: Plan) -> Iterator[str]:
    """Yield a line for each scorer that a part names and that none of its models will be able to run."""
    lacking: dict[str, list[dict[str, Requirement]]] = {}
    for unit in planned.units:
        if unit.part.scorers != "all":
            lacking.setdefault(unit.part.title, []).append(runnable_after_extraction(unit, planned.facts)[1])
    for part, of_units in lacking.items():
        of_all = set(of_units[0]).intersection(*of_units)
        for label, missing in of_units[0].items():
            if label in of_all:
                yield f"{part} · {label}: {missing.reason}: {missing.how_to_get('benchmark')}"


def _rows_to_do(planned: Plan) -> int:
    return sum(planned.facts[job.source].rows or 0 for job in planned.pending)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder of a run; raise CacheBusy if another run uses it."""
    make_folder(folder)
    try:
        with disk_errors(folder):
            lock = LockedFile(folder / LOCK, "a+")
    except CacheBusy as error:
        raise CacheBusy(f"another run uses {folder}: wait for it, or choose another --out.") from error
    with lock:
        yield


def _results(
    spec: Spec,
    folder: Path,
    found: Sequence[tuple[Path, Mapping[str, Any]]],
    not_run: Sequence[NotRun],
    environment: Mapping[str, Any],
) -> Results:
    facts = [of_unit for _, of_unit in found]
    frames = {
        name: frame(name, [row for of_unit in facts for row in of_unit.get(name, [])])
        for name in ("table", "measures", "searched", "overlap", "warnings")
    }
    noted = [NotRun(of_unit["part"], **entry) for of_unit in facts for entry in of_unit["not_run"]]
    return Results(
        name=spec.name,
        title=spec.title,
        folder=folder,
        spec=plain(asdict(spec)),
        comparison=frame("comparison", compared(spec, frames["table"], frames["measures"])),
        not_run=tuple(dict.fromkeys([*not_run, *noted])),
        scored=tuple(unit_files.scored(path, of_unit) for path, of_unit in found if of_unit["sets"]),
        environment=environment,
        **frames,
    )


def _environment(device: str, seconds: float) -> dict[str, Any]:
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return {
        "versions": versions_of(PACKAGES),
        "device": torch.cuda.get_device_name() if on_gpu else device.replace("auto", "cpu"),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def _report(results: Results, spec: Spec, data: Path, say: Callable[[str], None]) -> None:
    from ood_scores.benchmark.report import write_report

    paths = write_report(results, images=images_of(spec, data))
    say(f"[green]✓[/] {escape(', '.join(str(path) for path in paths))}")


def images_of(spec: Spec, data: Path) -> Callable[[str, str], ImageDataset | None]:
    """Return a function that opens a dataset of a part with the scored rows, untransformed; None if it is missing."""
    from ood_scores.data.sources import open_dataset

    parts = {part.title: part for part in spec.parts}

    def images(part: str, name: str) -> ImageDataset | None:
        try:
            return open_dataset(limited(parts[part].sets[name], parts[part].extraction.rows), root=data)
        except OodScoresError:
            return None

    return images
