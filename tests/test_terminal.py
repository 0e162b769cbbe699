"""Texts that come from names of files and datasets, on a terminal and in tables."""

import io
import os
import subprocess
import sys
from pathlib import Path

import h5py
import pandas as pd
import pytest
import torch
from rich.table import Table

from ood_scores import FeatureSet, Head
from ood_scores.terminal import SafeConsole, csv_text, marked, safe

HOSTILE = "a\x1b]52;c;cm0=\x07b\x9b2J\u202e.png"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ✓ é\tand\nmore", "plain ✓ é\tand\nmore"),
        (HOSTILE, "a\\x1b]52;c;cm0=\\x07b\\x9b2J\\u202e.png"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        ("lone \ud800", "lone \\ud800"),
    ],
)
def test_control_characters_and_stray_bytes_are_escaped(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_the_console_shows_names_as_they_are_but_for_escapes() -> None:
    console = SafeConsole(file=io.StringIO(), force_terminal=True, width=200)
    table = Table("name")
    table.add_row(marked("scan [/b] :dog: [final].jpg"))
    console.print(table)
    console.print(f"[red]✗[/] {marked(HOSTILE)}")
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "scan [/b] :dog: [final].jpg" in text
    assert "\\x1b]52;c;cm0=\\x07b\\x9b2J\\u202e.png" in text
    assert "\x1b]52" not in text
    assert "\x1b[31m✗" in text


def test_csv_holds_no_formulas() -> None:
    images = ["=cmd|' /C calc'!A0.png", "@SUM(1).png", "-1", "a,b.png", "caf\udce9.png"]
    table = pd.DataFrame({"image": pd.Series(images, dtype=object), "score": [-1.5, 2, 3, 4, 5]})
    table["label"] = pd.array([1, None, 3, 4, 5], dtype="Int64")
    lines = csv_text(table).splitlines()
    assert lines == [
        "image,score,label",
        "'=cmd|' /C calc'!A0.png,-1.5,1",
        "'@SUM(1).png,2.0,",
        "'-1,3.0,3",
        '"a,b.png",4.0,4',
        "caf\\xe9.png,5.0,5",
    ]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    torch.manual_seed(0)
    for name in ("a", "b"):
        features = torch.randn(50, 4)
        FeatureSet(features, features[:, :3].clone(), head=Head(torch.eye(3, 4), torch.zeros(3))).save(
            folder / f"{name}.h5"
        )
    return folder


def ood_scores(folder: Path, *words: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-m", "ood_scores", *words], cwd=folder, env=environment, capture_output=True, check=False
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_is_not_utf8(encoding: str, caches: Path) -> None:
    out = caches / f"{encoding}.csv"
    run = ood_scores(
        caches, "evaluate", "--id", "a.h5", "--ood", "b.h5", "--scorer", "msp", "--out", out.name, encoding=encoding
    )
    assert run.returncode == 0, run.stderr
    assert b"? all metrics in" in run.stdout
    assert list(pd.read_csv(out)["scorer"]) == ["msp"]


def test_escapes_in_a_cache_do_not_reach_the_terminal(caches: Path) -> None:
    with h5py.File(caches / "a.h5", "r+") as h5:
        h5.attrs["dataset"] = "\x1b[2J\x1b]52;c;cm0gLXJmIH4=\x07"
    run = ood_scores(caches, "inspect", "a.h5")
    assert b"\x1b" not in run.stdout + run.stderr
