"""The speed table: it has every line, and keeps lines that are not measured again."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from interrupted import exit_code_of_fork

from benchmarks.speed import gpu_day, scorers
from benchmarks.speed.__main__ import main
from benchmarks.speed.gpu_day import GpuDay
from benchmarks.speed.lines import GROUPS, gpu, training
from benchmarks.speed.measure import Figure, Line
from ood_scores import create_scorer, list_scorers

SMALL = ["--scale", "0.01", "--threads", "1"]
LIGHT = {"gradnorm": 2, "mahalanobis": 1, "knn": 2, "metrics": 1}
"""Groups that take a second or two, and their numbers of lines."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("speed"), torch.get_num_threads()
    main([*LIGHT, *SMALL, "--out", str(folder)])
    yield folder
    torch.set_num_threads(threads)


def records(folder):
    return json.loads((folder / "results.json").read_text())


def test_speed_lines_have_a_ratio_and_a_bound(table):
    found = records(table)
    assert [record["group"] for record in found] == [group for group in GROUPS for _ in range(LIGHT.get(group, 0))]
    assert all(0 < record["ratio"] < math.inf for record in found)
    assert all(record["met"] in (True, False) for record in found)
    readme = (table / "README.md").read_text()
    assert all(f"| {record['name']} | {record['baseline']} |" in readme for record in found)
    assert readme.count("at least") + readme.count("at most") == len(found)


def test_second_speed_run_replaces_its_groups_only(table):
    before = records(table)
    main(["gradnorm", *SMALL, "--out", str(table)])
    after = records(table)
    assert [record["name"] for record in after] == [record["name"] for record in before]
    changed = {new["group"] for old, new in zip(before, after, strict=True) if old != new}
    assert changed == {"gradnorm"}


def test_speed_group_without_lines_keeps_earlier_ones(table, monkeypatch):
    before = records(table)
    monkeypatch.setitem(GROUPS, "gradnorm", lambda scale: [])
    main(["gradnorm", *SMALL, "--out", str(table)])
    assert records(table) == before


def test_unknown_speed_group_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["exponents", "imports", "--out", str(tmp_path)])
    assert "there is no group 'imports'; there are: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_training_speed_is_measured_against_the_bare_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    small = ["model.width=4", "batch_size=128", "data.validation=0"]
    rna = training.Epoch("rna_cifar10_lt", 256, [*small, "data.long_tail=1"], auxiliary=True)
    monkeypatch.setattr(training, "ON_CPU", (training.Epoch("haas_resnet18_60", 256, small), rna))
    main(["training", "--threads", "1", "--out", str(tmp_path / "new")])
    torch.set_num_threads(threads)
    lines = records(tmp_path / "new")
    assert ["ratio" in line for line in lines] == [True, False, True, False]
    for line, speed in zip(lines[::2], lines[1::2], strict=True):
        assert line["ratio"] == pytest.approx(line["baseline_s"] / line["ours_s"])
        assert speed["value"] == pytest.approx(256 / line["ours_s"])


def test_the_table_of_scorers_states_the_waits_of_all() -> None:
    folder = Path(scorers.__file__).parent
    written = (folder / "scorers.md").read_text()
    assert written == scorers.markdown(json.loads((folder / "scorers.json").read_text()))
    for name in list_scorers():
        waits = create_scorer(name).tags.waits
        row = next((line for line in written.splitlines() if line.startswith(f"| `{name}` |")), None)
        assert row.endswith(f"| {waits} |") if row else waits == 1 or f"`{name}` ({waits})" in written


# --- the day a GPU is there -------------------------------------------------------------------------------------------


SLEEP = "import time; time.sleep(60)"


def printing(*names: str, then: str = "") -> list[str]:
    """A command that prints figures, as a part of the day does."""
    lines = [json.dumps(asdict(Figure(name, "counted", 1, ""))) for name in names]
    return [sys.executable, "-c", f"for line in {lines!r}: print(line)\n{then}"]


def names(folder: Path) -> list[str]:
    found = [record["name"] for record in records(folder)]
    readme = (folder / "README.md").read_text()
    assert all(f"| {name} |" in readme for name in found)
    return found


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The commands of a day of four parts; each has a quarter of the time."""
    commands = {
        "slow": printing("short", then=f"print('half a li', end=''); {SLEEP}"),
        "broken": printing(
            "before", then="import sys; sys.stdout.buffer.write(b'\\xff\\n'); raise ValueError('no such kernel')"
        ),
        "quick": printing("first", "second"),
        "late": printing("last", then=f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"),
    }
    monkeypatch.setattr(gpu_day, "SHARES", dict.fromkeys(commands, 0.25))
    return commands


def test_parts_are_cut_off_when_their_time_is_up_and_what_they_printed_is_kept(
    parts: dict[str, list[str]], tmp_path: Path
) -> None:
    started = time.monotonic()
    GpuDay(tmp_path, "a GPU", seconds=4).run(parts)
    assert 4 <= time.monotonic() - started < 20  # the parts sleep for a minute
    assert names(tmp_path) == ["short", "before", "first", "second", "last"]
    log = (tmp_path / "log.txt").read_text()
    assert "slow: cut off, see slow.txt" in log
    assert "broken: exit status 1, see broken.txt" in log
    assert "ValueError: no such kernel" in (tmp_path / "broken.txt").read_text(errors="replace")
    assert "late: cut off" in log, "its share, and the time that was left"
    assert "quick: " not in log
    assert log.rstrip().endswith("5 lines")


def test_no_time_at_all_leaves_an_empty_table(
    parts: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu_day, "SHARES", {"scoring": 0.5, "fits": 0.5})
    main(["gpu", "--all", "--minutes", "0.001", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    assert records(tmp_path) == []
    assert (tmp_path / "log.txt").read_text().count("cut off") == 2


def test_the_shares_of_the_time_are_those_of_all_parts() -> None:
    assert gpu_day.SHARES.keys() == gpu.SECTIONS.keys() | {"tests", "profile"}
    assert sum(gpu_day.SHARES.values()) == pytest.approx(1)
    assert gpu_day.MINUTES < 9


@pytest.mark.skipif(sys.platform != "linux", reason="the age of a process is read from /proc")
def test_the_time_counts_from_the_start_of_the_process() -> None:
    code = "import time; time.sleep(0.5); from benchmarks.speed import STARTED; print(time.monotonic() - STARTED)"
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu_day.ROOT, capture_output=True, text=True, check=True)
    assert 0.5 <= float(done.stdout) <= time.monotonic() - before + 0.01  # a tick of the clock


@pytest.mark.parametrize("end", ["", SLEEP])
def test_tests_are_counted_though_they_are_cut_off(end: str, tmp_path: Path) -> None:
    words = ("test_a[x y] PASSED [ 10%]", "test_b FAILED [ 20%]", "test_c ERROR [ 30%]", "test_d SKIPPED [ 40%]")
    lines = [*(f"tests/test_it.py::{text}" for text in words), "FAILED tests/test_it.py::test_b"]
    command = [sys.executable, "-c", f"print({chr(10).join(lines)!r}); {end}"]
    GpuDay(tmp_path, "a GPU", seconds=2).part("tests", command, time.monotonic() + (2 if end else 60))
    failed, passed = records(tmp_path)
    assert (failed["value"], failed["met"], passed["value"]) == (2, False, 1)
    assert failed["how"] == ("pytest -m gpu, cut off" if end else "pytest -m gpu")


def test_a_kill_leaves_what_was_measured_before(tmp_path: Path) -> None:
    day = GpuDay(tmp_path, "a GPU", seconds=60)

    def killed() -> None:
        keep = day.keep
        day.keep = lambda each: (keep(each), os.kill(os.getpid(), signal.SIGKILL))  # type: ignore[method-assign,assignment,func-returns-value]
        day.part("killed", printing("first", "second"), time.monotonic() + 60)

    assert exit_code_of_fork(killed) == -signal.SIGKILL
    assert names(tmp_path) == ["first"]
    assert "first / counted / 1" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("status", [0, -signal.SIGSEGV])
def test_a_crash_of_faiss_takes_its_line_alone(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line("neighbors", "faiss", 1.0, 2.0, "lower", 1.1, 3)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{'kill -SEGV $$' if status else ''}\necho '{json.dumps(asdict(line))}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(python))
    failed = Figure("faiss's GpuIndexFlatL2 fails", "exit status of its process", status, "")
    assert list(gpu.faiss_neighbors(1.0)) == ([failed] if status else [line])
