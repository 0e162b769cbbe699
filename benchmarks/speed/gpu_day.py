"""Everything to measure while a GPU is there, in under nine minutes: ``python -m benchmarks.speed gpu --all``.

The tests that need a GPU, the lines of the group ``gpu``, and a profile. ``results.json``, ``README.md``, and
``log.txt`` are written after each line, so that what is done survives the loss of the rest. The lines that matter most
come first; when the time is up, the rest is left out, and the log says what.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.speed import table
from benchmarks.speed.lines.gpu import SECTIONS, profile
from benchmarks.speed.measure import Figure, Line
from benchmarks.time_limit import TimeIsUp, time_limit

ROOT = Path(__file__).parents[2]

SECONDS = 520
"""When to stop."""

TESTS_SECONDS = 120
"""The most time for the tests."""


@dataclass
class GpuDay:
    """What has been measured so far, and where it is written."""

    folder: Path
    measured_on: str
    started: float = field(default_factory=time.monotonic)
    found: list[Line | Figure] = field(default_factory=list)

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return SECONDS - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        """Print a text, and append it to the log, with the time."""
        line = f"[{time.monotonic() - self.started:5.0f} s] {text}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(line + "\n")

    def keep(self, each: Line | Figure) -> None:
        """Write a line with those before it."""
        self.found.append(each)
        records = table.update(self.folder, "gpu", self.found, self.measured_on, ["gpu"])
        self.say(table.in_words(records[-1]))

    def section(self, name: str, lines: Iterable[Line | Figure]) -> None:
        """Measure the lines of a section, unless the time is up; an error ends the section alone."""
        if self.left < 1:
            self.say(f"{name}: left out, the time is up")
            return
        self.say(f"{name} …")
        try:
            with time_limit(self.left):
                for each in lines:
                    self.keep(each)
        except TimeIsUp:
            self.say(f"{name}: not finished, the time is up")
        except Exception as error:
            self.say(f"{name}: {type(error).__name__}: {error}")
        torch.cuda.empty_cache()


def run(folder: Path, scale: float, measured_on: str) -> None:
    """Run the tests, measure all lines, and profile an extraction, as time allows."""
    day = GpuDay(folder, measured_on)
    day.say(f"on {measured_on}, {SECONDS} s, into {folder}")
    day.section("tests", _tests(day))
    for name, lines in SECTIONS.items():
        if name == "training":
            day.section("profile", _profile(day, scale))
        day.section(name, lines(scale))
    day.say(f"{len(day.found)} lines")


def gpu_tests() -> list[str]:
    """Return the command that runs the tests that need a GPU, for the root of the repository.

    Only their files are collected: others take time, and may need packages that a machine with a GPU lacks.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *options, *files]


def _tests(day: GpuDay) -> Iterator[Figure]:
    at_once = os.environ | {"PYTHONUNBUFFERED": "1"}  # tests that are done are shown if the time is up
    seconds = min(TESTS_SECONDS, day.left)
    try:
        done = subprocess.run(gpu_tests(), cwd=ROOT, env=at_once, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        day.say((output.decode() if isinstance(output, bytes) else output)[-2000:])
        day.say(f"tests: not finished after {error.timeout:.0f} s")
        return
    day.say(done.stdout[-4000:] + done.stderr[-1000:])
    failed = done.stdout.count("\nFAILED ") + done.stdout.count("\nERROR ") + (done.returncode not in (0, 1))
    passed = re.search(r"(\d+) passed", done.stdout)
    yield Figure("Tests that need a GPU and fail", "pytest -m gpu", failed, "", most=0)
    yield Figure("Tests that need a GPU and pass", "pytest -m gpu", int(passed[1]) if passed else 0, "", least=1)


def _profile(day: GpuDay, scale: float) -> Iterator[Figure]:
    day.say("\n" + profile(scale, day.folder))
    yield from ()
