"""The remedies of a benchmark, followed from nothing to the table."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app

SPEC = """
id = "test"
far = ["others"]
scorers = ["msp"]
[sets]
test = "digits?classes=0-6&rows=::20"
others = "digits?classes=7-9&rows=::20"
[[model]]
name = "tiny_net"
num_classes = 7
recipe = "tuned"
seeds = [3, 4]
"""


def test_following_the_remedies_fills_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of each seed is tuned from that of the same seed, which its training asks for."""
    monkeypatch.chdir(tmp_path)
    recipes = tmp_path / "benchmarks" / "recipes"
    recipes.mkdir(parents=True)
    data = {"train": "digits?classes=0-6&rows=::4"}
    tiny.write_toml(recipes / "plain.toml", tiny.tables(epochs=1, data=data))
    start = "{out}/../plain_seed{seed}/last.safetensors"
    tiny.write_toml(recipes / "tuned.toml", tiny.tables(epochs=1, data=data, model={"checkpoint": start}))
    (tmp_path / "spec.toml").write_text(SPEC)

    def run() -> ood_scores.benchmark.Results:
        return ood_scores.benchmark.run("spec.toml", data="data", jobs=1, device="cpu", progress=False)

    remedies = [each.remedy for each in run().not_run if each.remedy]
    assert len(remedies) == 2
    for seed, remedy in zip((3, 4), remedies, strict=True):
        command = shlex.split(remedy)[1:]
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code != 0
        told = re.search(r"by the recipe (\w+) with (.+)\.$", " ".join(refused.output.split()))
        assert told is not None
        assert told.groups() == ("plain", f"--set seed={seed} --out data/runs/plain_seed{seed}")
        for each in (["train", f"benchmarks/recipes/{told[1]}.toml", *shlex.split(told[2])], command):
            done = CliRunner().invoke(app, each)
            assert done.exit_code == 0, done.output
    results = run()
    assert not results.not_run
    assert results.table["checkpoint"].tolist() == [0, 1]
    assert results.table["auroc"].between(0, 1).all()
