"""``python -m benchmarks.speed``: measure every group of lines and write ``results.json`` and ``README.md``.

``python -m benchmarks.speed GROUP ...`` measures some groups and keeps the lines of the others.
``python -m benchmarks.speed gpu --all --out FOLDER`` measures all that needs a GPU in under nine minutes.
``python -m benchmarks.speed scorers [NAME ...]`` writes ``scorers.json`` and ``scorers.md`` instead.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.speed import gpu_day, scorers, table
from benchmarks.speed.lines import GROUPS

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    cpu = f"{platform.machine()} CPU, {options.threads} threads"
    devices = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    smaller = "" if options.scale == 1 else f", at {options.scale:g} of the sizes named"
    if options.all:
        if options.groups != ["gpu"] or not devices:
            parser.error("--all belongs to the group gpu, and needs a CUDA device")
        measured_on = f"{devices['gpu']}, torch {torch.__version__}{smaller}"
        gpu_day.run(options.out, options.scale, measured_on, options.minutes)
        return
    if options.groups[:1] == ["scorers"]:
        sizes = (options.fit_rows, options.rows, options.width, options.classes)
        scorers.run(options.out, f"{cpu}, torch {torch.__version__}", *sizes, names=options.groups[1:])
        return
    unknown = [group for group in options.groups if group not in GROUPS]
    if unknown:
        parser.error(f"there is no group {unknown[0]!r}; there are: {', '.join(GROUPS)}")
    for group in options.groups or GROUPS:
        measured_on = f"{devices.get(group, cpu)}, torch {torch.__version__}{smaller}"
        for record in table.update(options.out, group, GROUPS[group](options.scale), measured_on, list(GROUPS)):
            print(table.in_words(record), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument(
        "groups",
        nargs="*",
        metavar="GROUP",
        help=f"groups of lines: {', '.join(GROUPS)}; or: scorers [NAME ...]",
    )
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads (default 2)")
    parser.add_argument(
        "--all", action="store_true", help="with the group gpu: its tests and a profile too, in --minutes"
    )
    parser.add_argument(
        "--minutes", type=float, default=gpu_day.MINUTES, help=f"time for --all (default {gpu_day.MINUTES})"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="share of the rows to use (default 1)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the results")
    for name, size in (("fit-rows", 50_000), ("rows", 10_000), ("width", 512), ("classes", 100)):
        parser.add_argument(f"--{name}", type=int, default=size, help=f"size for the table of scorers (default {size})")
    return parser


if __name__ == "__main__":
    main()
