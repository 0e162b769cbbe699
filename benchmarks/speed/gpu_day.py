"""Everything to measure while a GPU is there, in under nine minutes: ``python -m benchmarks.speed gpu --all``.

The tests that need a GPU, the lines of the group ``gpu``, and a profile, those that matter most first. Each part is a
process of its own, which is killed when the shares of the time up to its own have passed; time that a part leaves is
that of the next ones. ``results.json``, ``README.md``, and ``log.txt`` are written after each line, so that what is
done survives the loss of the rest; ``NAME.txt`` is what a part printed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.speed import STARTED, table
from benchmarks.speed.measure import Figure, Line

ROOT = Path(__file__).parents[2]

MINUTES = 8.8
"""The time for everything, from the start of this process: nine minutes, less the end of the last part."""

TESTS = "tests"
SHARES = {
    TESTS: 0.22,
    "scoring": 0.07,
    "neighbors": 0.13,
    "fits": 0.14,
    "extraction": 0.15,
    "detector": 0.08,
    "profile": 0.05,
    "training": 0.10,
    "faiss": 0.06,
}
"""The parts in order, and their shares of the time."""

POLL_SECONDS = 0.1
AT_ONCE = os.environ | {"PYTHONUNBUFFERED": "1"}


@dataclass
class GpuDay:
    """What has been measured so far, where it is written, and when to stop."""

    folder: Path
    measured_on: str
    seconds: float
    started: float = field(default_factory=time.monotonic)
    found: list[Line | Figure] = field(default_factory=list)

    def run(self, commands: Mapping[str, list[str]]) -> None:
        """Run the command of each part, for its share of the time and what earlier parts have left."""
        self.say(f"on {self.measured_on}, {self.seconds:.0f} s")
        self._write()
        passed = 0.0
        for name, share in SHARES.items():
            passed += share
            self.part(name, commands[name], self.started + passed * self.seconds)
        self.say(f"{len(self.found)} lines")

    def part(self, name: str, command: list[str], end: float) -> None:
        """Keep the lines that a command prints as JSON, and kill it with its children at a time."""
        self.say(f"{name}, until {end - self.started:.0f} s …")
        output = self.folder / f"{name}.txt"
        with output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=AT_ONCE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            for text in _lines(output, process, end):
                if text.startswith('{"name"'):
                    self.keep(_line_or_figure(text))
        finally:
            status = process.poll()
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # a process that waits for the driver may outlive it
                    process.wait(timeout=2)
        if name == TESTS:
            self._keep_tests(output.read_text(errors="replace"), status)
        if status != 0:
            self.say(f"{name}: {'cut off' if status is None else f'exit status {status}'}, see {output.name}")

    def keep(self, each: Line | Figure) -> None:
        """Write a line with those before it."""
        self.found.append(each)
        self.say(table.in_words(self._write()[-1]))

    def say(self, text: str) -> None:
        """Print a text, and append it to the log, with the time."""
        line = f"[{time.monotonic() - self.started:5.0f} s] {text}"
        print(line, flush=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(line + "\n")

    def _write(self) -> list[table.Record]:
        return table.update(self.folder, "gpu", self.found, self.measured_on, ["gpu"])

    def _keep_tests(self, output: str, status: int | None) -> None:
        """Count the tests that have passed and failed so far."""
        outcomes = Counter(re.findall(r"^tests/\S+::.* (PASSED|FAILED|ERROR)\b", output, re.MULTILINE))
        how = "pytest -m gpu" if status is not None else "pytest -m gpu, cut off"
        failed = outcomes["FAILED"] + outcomes["ERROR"] + (status not in (0, 1, None))
        self.keep(Figure("Tests that need a GPU and fail", how, failed, "", most=0))
        self.keep(Figure("Tests that need a GPU and pass", how, outcomes["PASSED"], "", least=1))


def _lines(path: Path, process: subprocess.Popen[bytes], end: float) -> Iterator[str]:
    """Yield the lines of a file as a process writes them, until it has ended or the time has come."""
    rest = ""
    with path.open(errors="replace") as file:
        running = True
        while running:
            running = process.poll() is None and time.monotonic() < end
            *lines, rest = (rest + file.read()).split("\n")
            yield from lines
            time.sleep(POLL_SECONDS * running)


def _line_or_figure(text: str) -> Line | Figure:
    fields = json.loads(text)
    return Line(**fields) if "baseline" in fields else Figure(**fields)


def run(folder: Path, scale: float, measured_on: str, minutes: float) -> None:
    """Run the tests, measure all lines, and profile an extraction, as the time from the start of the process allows."""
    part = [sys.executable, "-m", "benchmarks.speed.gpu_part"]
    commands = {name: [*part, name, str(scale), str(folder.absolute())] for name in SHARES}
    GpuDay(folder, measured_on, 60 * minutes, STARTED).run(commands | {TESTS: gpu_tests()})


def gpu_tests() -> list[str]:
    """Return the command that runs the tests that need a GPU, for the root of the repository.

    Only their files are collected: others take time, and may need packages that a machine with a GPU lacks.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-v", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *options, *files]
