"""The speed table: every line is there, and what is not measured again is kept."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.speed.__main__ import main
from benchmarks.speed.lines import GROUPS

SMALL = ["--scale", "0.01", "--threads", "1"]
LIGHT = {"gradnorm": 2, "mahalanobis": 1, "knn": 2, "metrics": 1}
"""Groups that take a second or two, and how many lines they have."""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("speed"), torch.get_num_threads()
    main([*LIGHT, *SMALL, "--out", str(folder)])
    yield folder
    torch.set_num_threads(threads)


def records(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_line_has_a_ratio_and_a_bound(table):
    found = records(table)
    assert [record["group"] for record in found] == [group for group in GROUPS for _ in range(LIGHT.get(group, 0))]
    assert all(0 < record["ratio"] < math.inf for record in found)
    assert all(record["met"] in (True, False) for record in found)
    readme = (table / "README.md").read_text()
    assert all(f"| {record['name']} | {record['baseline']} |" in readme for record in found)
    assert readme.count("at least") + readme.count("at most") == len(found)


def test_a_second_run_replaces_its_groups_and_keeps_the_others(table):
    before = records(table)
    main(["gradnorm", *SMALL, "--out", str(table)])
    after = records(table)
    assert [record["name"] for record in after] == [record["name"] for record in before]
    changed = {new["group"] for old, new in zip(before, after, strict=True) if old != new}
    assert changed == {"gradnorm"}


def test_a_group_that_finds_nothing_keeps_what_is_there(table, monkeypatch):
    before = records(table)
    monkeypatch.setitem(GROUPS, "gradnorm", lambda scale: [])
    main(["gradnorm", *SMALL, "--out", str(table)])
    assert records(table) == before


def test_an_unknown_group_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["exponents", "imports", "--out", str(tmp_path)])
    assert "there is no group 'imports'; there are: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
