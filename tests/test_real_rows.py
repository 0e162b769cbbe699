"""Real pictures keep the names of their files from the folder to tables, grids, and the report."""

from __future__ import annotations

import json
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app

DATA = os.environ.get("OOD_SCORES_DATA")
pytestmark = pytest.mark.skipif(DATA is None, reason="OOD_SCORES_DATA does not name a folder of real images")

ROWS = 12
SETS = {
    "sample": f"folder:$OOD_SCORES_DATA/imagenet/sample?take={ROWS}",
    "flowers": "folder:$OOD_SCORES_DATA/imagenet/flowers?take=8",
}
CHECKPOINT = "checkpoints/imagenet_efficientnet_lite0.safetensors"

SPEC = f"""
id = "sample"
far = ["flowers"]
scorers = ["energy"]
[sets]
sample = "{SETS["sample"]}"
flowers = "{SETS["flowers"]}"
[[model]]
name = "tf_efficientnet_lite0"
checkpoint = "$OOD_SCORES_DATA/{CHECKPOINT}"
"""


def ok(*words: Any) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output + str(done.exception)
    return done.output


def files(name: str) -> list[str]:
    folder = Path(str(DATA)) / "imagenet" / name
    found = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.webp"))
    count = ROWS if name == "sample" else 8
    return found[:: len(found) // count][:count]


def test_names_survive_from_the_folder_to_the_report(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC)
    ok("benchmark", tmp_path / "spec.toml", "--out", tmp_path / "run", "--quiet", "--jobs", "1")
    results = ood_scores.benchmark.load_results(tmp_path / "run")
    scored = results.scored[0]
    assert scored.ids["id"].tolist() == files("sample")
    assert scored.ids["flowers"].tolist() == files("flowers")
    assert scored.to_pandas("flowers")["energy"].tolist() == scored.scores["energy"]["flowers"].tolist()
    page = unescape((tmp_path / "run" / "report.html").read_text())
    hardest = [files("sample")[row] for row in scored.scores["energy"]["id"].argsort()[:8].tolist()]
    shown = re.findall(r'<span class="file" title="([^"]*)"', page)
    assert sorted(shown) == sorted([*files("flowers"), *hardest])

    caches = {name: next(tmp_path.glob(f"run/**/*{name}*.h5")) for name in SETS}
    for suffix in ("csv", "parquet", "json"):
        ok("score", "energy", caches["sample"], "--out", tmp_path / f"s.{suffix}")
    tables = [pd.read_csv(tmp_path / "s.csv"), pd.read_parquet(tmp_path / "s.parquet")]
    tables.append(pd.DataFrame(json.loads((tmp_path / "s.json").read_text())["rows"]))
    for table in tables:
        assert table["id"].tolist() == files("sample")
        assert table["score"].tolist() == pytest.approx(scored.scores["energy"]["id"].tolist())
    words = ("evaluate", "--id", caches["sample"], "--ood", caches["flowers"], "--scorer", "energy")
    ok(*words, "--details", tmp_path / "d.csv")
    assert pd.read_csv(tmp_path / "d.csv")["id"].tolist() == files("sample") + files("flowers")
    ok("show", caches["flowers"], "--most-ood", "4", "--data", f"{DATA}/imagenet/flowers", "--out", tmp_path / "g.png")
    assert Image.open(tmp_path / "g.png").width > 600
