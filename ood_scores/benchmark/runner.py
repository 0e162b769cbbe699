"""run: a spec in; caches, scores, tables and a report out."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape

from ood_scores.atomic import LockedFile, replacing
from ood_scores.benchmark import checks, unit_files
from ood_scores.benchmark.extract_jobs import extract_all
from ood_scores.benchmark.planning import Plan, limited, plan, without
from ood_scores.benchmark.progress import watching
from ood_scores.benchmark.published import compared
from ood_scores.benchmark.results import COLUMNS, NotRun, Results
from ood_scores.benchmark.spec import Spec
from ood_scores.benchmark.spec_file import load_spec
from ood_scores.benchmark.unit import SCORES, evaluated
from ood_scores.data.images import ImageDataset
from ood_scores.errors import BadInput, CacheBusy, OodScoresError
from ood_scores.extraction.extract import PACKAGES

RUNS = "runs"
JSON = "results.json"
CSV = "results.csv"
LOCK = ".lock"
FRAMES = {
    "table": COLUMNS,
    "comparison": (
        "part", "model", "scorer", "ood", "metric", "published", "ours", "difference", "sd", "n", "source",
    ),
    "measures": ("part", "model", "checkpoint", "measure", "value"),
    "searched": ("part", "model", "checkpoint", "scorer", "parameters", "metric", "value", "chosen"),
}  # fmt: skip
"""The frames of ``Results`` and their columns."""


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
    """Runs what a benchmark file says, or what is not yet done of it, and writes tables and a report.

    Every model sees every set once; its features are kept in ``<out>/caches``. All scorers of a part are then fitted
    and score from one pass over each set; the scores are kept in ``<out>/scores``. The same call continues a run that
    was stopped, or killed, at any moment, and reads again what is there. What the machine lacks, data or weights, is
    not run and listed with the way to get it; the rest goes on.

    Args:
        spec: a TOML file, or a ``Spec`` made in Python.
        out: folder of the run; by default ``runs/`` and the spec's name.
        data: where relative paths of sets and checkpoints start; by default the current folder.
        overrides: ``key=value`` texts that win over the file, as in ``load_spec``.
        device: where models run; ``"auto"`` takes a GPU if there is one.
        jobs: extractions at the same time, in processes of their own; by default one on a GPU, else as many as there
            are cores, at most four.
        progress: one line on standard error for each step.

    Raises:
        BadInput, UnknownName: the spec is wrong; see ``load_spec``.
        CacheBusy: another run is at work in the folder.
        CacheWriteFailed: the disk is full.
        WorkerDied: a process that ran a model was killed.
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
        files = []
        for unit in units:
            began = time.perf_counter()
            files.append(evaluated(unit, folder).name)
            seconds = time.perf_counter() - began
            say(f"[green]✓[/] scores of {escape(f'{unit.title} · {unit.part.title}')} in {seconds:.1f} s")
        not_run = [*planned.not_run, *more]
        results = _results(chosen, folder, files, not_run, _environment(device, time.perf_counter() - start))
        _write(results, files)
        _report(results, chosen, base, say)
    return results


def load_results(folder: str | os.PathLike[str]) -> Results:
    """What a finished run found, from its folder alone; scores are read when they are asked for.

    Raises:
        BadInput: there is no finished run in the folder, or a part of it was deleted.
    """
    folder = Path(folder)
    try:
        kept = json.loads((folder / JSON).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"there is no finished benchmark in {folder}: {JSON} is not there.") from error
    except ValueError as error:
        raise BadInput(
            f"{folder / JSON} is damaged ({error}): run the benchmark again, nothing is computed anew."
        ) from error
    scored = []
    for name in kept["scores"]:
        facts = unit_files.read(folder / SCORES / name)
        if facts is None:
            raise BadInput(f"{folder / SCORES / name} is missing or damaged: run the benchmark again.")
        if facts["sets"]:
            scored.append(unit_files.scored(folder / SCORES / name, facts))
    return Results(
        name=kept["name"],
        title=kept["title"],
        folder=folder,
        spec=kept["spec"],
        **{name: _frame(kept[name], columns) for name, columns in FRAMES.items()},
        not_run=tuple(NotRun(**entry) for entry in kept["not_run"]),
        scored=tuple(scored),
        environment=kept["environment"],
    )


def as_spec(spec: str | os.PathLike[str] | Spec, overrides: Iterable[str]) -> Spec:
    """A spec that is right."""
    if not isinstance(spec, Spec):
        return load_spec(spec, overrides)
    if list(overrides):
        raise BadInput("overrides go with a file: change the Spec itself, dataclasses.replace(spec, ...).")
    checks.check(spec)
    return spec


def places(spec: Spec, out: str | os.PathLike[str] | None, data: str | os.PathLike[str] | None) -> tuple[Path, Path]:
    """The folder of a run, and where relative paths start."""
    return Path(out) if out is not None else Path(RUNS) / spec.name, Path(data) if data is not None else Path()


def _speaker(progress: bool) -> Callable[[str], None]:
    screen = Console(stderr=True, highlight=False, quiet=not progress)
    return lambda text: screen.print(text, soft_wrap=True)


def _say_plan(planned: Plan, say: Callable[[str], None]) -> None:
    todo = f"{len(planned.pending)} to do, {_rows_to_do(planned):,} rows" if planned.pending else "all are there"
    say(f"extractions: {todo}")


def _rows_to_do(planned: Plan) -> int:
    return sum(planned.facts[job.source].rows or 0 for job in planned.pending)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Raises CacheBusy if another run is at work in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = LockedFile(folder / LOCK, "a+")
    except CacheBusy as error:
        raise CacheBusy(f"another run is at work in {folder}: wait for it, or choose another --out.") from error
    with lock:
        yield


def _results(
    spec: Spec, folder: Path, files: Sequence[str], not_run: Sequence[NotRun], environment: Mapping[str, Any]
) -> Results:
    rows: dict[str, list[Any]] = {name: [] for name in FRAMES}
    scored, noted = [], list(not_run)
    for name in files:
        path = folder / SCORES / name
        facts = unit_files.read(path)
        if facts is None:
            raise BadInput(f"{path} was removed while the benchmark ran: run it again.")
        if facts["sets"]:
            scored.append(unit_files.scored(path, facts))
        noted += [NotRun(facts["part"], **entry) for entry in facts["not_run"]]
        for frame in ("table", "measures", "searched"):
            rows[frame] += facts[frame]
    frames = {name: _frame(rows[name], columns) for name, columns in FRAMES.items()}
    frames["comparison"] = _frame(compared(spec, frames["table"], frames["measures"]), FRAMES["comparison"])
    return Results(
        name=spec.name,
        title=spec.title,
        folder=folder,
        spec=_plain(asdict(spec)),
        not_run=tuple(dict.fromkeys(noted)),
        scored=tuple(scored),
        environment=environment,
        **frames,
    )


TEXTS = (
    "part", "model", "scorer", "ood", "group", "parameters", "weights_sha256", "id_sha256", "ood_sha256",
    "fit_sha256", "versions", "metric", "source", "measure",
)  # fmt: skip
WHOLE = ("checkpoint", "n_id", "n_ood", "n")


def _frame(rows: Any, columns: Sequence[str]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(columns))
    kinds = {name: "int64" if name in WHOLE else "float64" for name in columns if name not in (*TEXTS, "chosen")}
    return frame.astype(kinds | ({"chosen": bool} if "chosen" in columns else {}))


def _write(results: Results, files: Sequence[str]) -> None:
    kept = {
        "name": results.name,
        "title": results.title,
        "spec": results.spec,
        **{name: getattr(results, name).to_dict("records") for name in FRAMES},
        "not_run": [asdict(entry) for entry in results.not_run],
        "scores": list(files),
        "environment": results.environment,
    }
    _replace(results.folder / CSV, results.table.to_csv(index=False))
    _replace(results.folder / JSON, json.dumps(_plain(kept), indent=1, allow_nan=False) + "\n")


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _plain(value: Any) -> Any:
    """As JSON has it, NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and value != value else value


def _environment(device: str, seconds: float) -> dict[str, Any]:
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if on_gpu else device.replace("auto", "cpu"),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def _report(results: Results, spec: Spec, data: Path, say: Callable[[str], None]) -> None:
    from ood_scores.benchmark.report import write_report

    paths = write_report(results, images=images_of(spec, data))
    say(f"[green]✓[/] {escape(', '.join(str(path) for path in paths))}")


def images_of(spec: Spec, data: Path) -> Callable[[str, str], ImageDataset | None]:
    """Opens the images that a part calls by a name, untransformed, the rows as they were scored; None if not there."""
    from ood_scores.data.sources import open_dataset

    parts = {part.title: part for part in spec.parts}

    def images(part: str, name: str) -> ImageDataset | None:
        try:
            return open_dataset(limited(parts[part].sets[name], parts[part].extraction.rows), root=data)
        except OodScoresError:
            return None

    return images
