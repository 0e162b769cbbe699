"""With ``--json``, every command prints one JSON object on standard output, and everything else on standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from detecting import extracted, network
from made_results import make_results
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import ood_scores
from ood_scores import demo
from ood_scores.cli import COMMANDS, app
from ood_scores.cli.printing import json_text

SPEC = """
title = "Digits"
id = "seen"
far = ["nines"]
scorers = ["energy"]
[sets]
seen = "digits?classes=0-3&take=60"
nines = "digits?classes=9&take=40"
[extraction]
workers = 0
[[model]]
label = "Net"
name = "tiny_net"
checkpoint = "weights.safetensors"
num_classes = 4
"""
WEIGHTS = ("--checkpoint", "weights.safetensors")
WORDS: dict[str, tuple[str, ...]] = {
    "train": ("recipe.toml", "--out", "trained", "--device", "cpu"),
    "extract": ("tiny_net", "digits?classes=0-3&take=30", "digits.h5", *WEIGHTS, "--workers", "0"),
    "linear-probe": ("id.h5", "--out", "probed"),
    "score": ("energy", "id.h5"),
    "show": ("digits.h5", "--data", "digits?classes=0-3&take=30", "--out", "grid.png"),
    "evaluate": ("--id", "id.h5", "--ood", "far.h5", "--scorer", "energy"),
    "benchmark": ("spec.toml", "--out", "run", "--jobs", "1"),
    "paper": ("spec.toml", "--out", "run"),
    "compare": ("run", "run"),
    "calibrate": ("tiny_net", *WEIGHTS, "--id", "id.h5", "--out", "detector"),
    "predict": ("photo.png", "--detector", "detector"),
    "inspect": ("id.h5", "--verify"),
    "list": ("energy",),
    "demo": ("--out", "made"),
    "doctor": (),
}
"""Arguments of each command; some read what those above them write."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The documents that all commands print, by command."""
    folder = tmp_path_factory.mktemp("json")
    model = network()
    save_file(model.state_dict(), folder / "weights.safetensors")
    for name, seed in (("id", 1), ("far", 2)):
        extracted(model, 200, seed).save(folder / f"{name}.h5")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "photo.png")
    (folder / "spec.toml").write_text(SPEC)
    tiny.write_toml(folder / "recipe.toml", tiny.tables(epochs=1))
    made = demo.Demo(make_results(folder), {"l2_norm": dict.fromkeys(("test", "train", "unseen", "noise"), Path())})
    documents: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "run", lambda out, seed: made)
        for command, words in WORDS.items():
            result = CliRunner().invoke(app, [command, *words, "--json"])
            assert result.exit_code == 0, f"{command}: {result.output}"
            documents[command] = json.loads(result.stdout)
            assert result.stdout == json.dumps(documents[command], indent=2) + "\n", command
        documents["energies"] = ood_scores.score("energy", "id.h5").tolist()
        documents["plan"] = json.loads(
            CliRunner().invoke(app, ["benchmark", "spec.toml", "--dry-run", "--json"]).stdout
        )
    return documents


def test_every_command_is_walked(found: dict[str, Any]) -> None:
    assert WORDS.keys() == COMMANDS.keys()
    assert all(isinstance(found[command], dict) and found[command] for command in COMMANDS)


def test_documents_contain_what_the_tables_show(found: dict[str, Any]) -> None:
    assert [row["score"] for row in found["score"]["rows"]] == found["energies"]
    assert found["score"]["scorer"] == "energy"
    (row,) = found["evaluate"]["rows"]
    assert (row["scorer"], row["ood"], found["evaluate"]["left_out"]) == ("energy", "far", {})
    (row,) = found["benchmark"]["rows"]
    assert found["paper"]["rows"] == [row]
    assert found["paper"]["tables"] == []
    (compared,) = found["compare"]["rows"]
    assert compared["auroc_a"] == compared["auroc_b"] == row["auroc"]
    (image,) = found["predict"]["rows"]
    assert image["image"] == "photo.png"
    assert image["is_ood"] == (image["score"] < found["calibrate"]["thresholds"][0])
    assert image["error"] is None
    arrays = {each["array"]: each["shape"] for each in found["inspect"]["arrays"]}
    assert arrays["features"] == [200, 16]
    assert found["inspect"]["verified"] is True
    assert found["inspect"]["provenance"]["dataset_rows"] == 200
    (energy,) = found["list"]["scorers"]
    assert (energy["name"], energy["needs"], energy["paper"]["year"]) == ("energy", ["logits"], 2020)
    assert (found["extract"]["rows"], found["extract"]["classes"]) == (30, 4)
    assert found["linear-probe"]["caches"][0]["rows"] == 200
    assert found["train"]["epochs"] == 1
    assert found["show"]["picture"] == "grid.png"
    assert set(found["demo"]["accuracy"]) == {row["model"] for row in found["demo"]["rows"]}
    assert found["doctor"]["tests"] == dict.fromkeys(("extraction", "scores", "cache"), "")


def test_a_plan_says_what_would_run(found: dict[str, Any]) -> None:
    plan = found["plan"]
    assert [(cache["set"], cache["exists"], cache["rows"]) for cache in plan["caches"]] == [
        ("seen", False, 60),
        ("nines", False, 40),
    ]
    assert [(unit["model"], unit["scorers"]) for unit in plan["units"]] == [("Net", ["energy"])]


NAMES = pd.Series(["a\x1b\udcff", "é"], dtype=object)


def test_documents_are_strict_json() -> None:
    table = pd.DataFrame({"n": pd.array([1, None], "Int64"), "x": [np.nan, np.inf], "name": NAMES})
    text = json_text({"rows": table, "accuracy": float("nan"), "sets": ("a", "b")})
    assert text.isascii()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "rows": [{"n": 1, "x": None, "name": "a\x1b\udcff"}, {"n": None, "x": "inf", "name": "é"}],
        "accuracy": None,
        "sets": ["a", "b"],
    }


def test_an_error_leaves_standard_output_empty() -> None:
    result = CliRunner().invoke(app, ["score", "energy", "absent.h5", "--json"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: there is no file absent.h5.\n"
