"""Every command with every argument and option set to values that make no sense: one message, never a traceback."""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
import typer
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import ood_scores
import ood_scores.models.networks  # makes its networks known to timm
from ood_scores.cli import app
from ood_scores.features import FeatureSet

EVERYTHING = bool(os.environ.get("OOD_SCORES_ALL_ARGUMENTS"))
"""Whether to try all 2,900 combinations, which takes five minutes, instead of a sample."""
SAMPLED = 12
"""The number of combinations of each command in the sample."""

HUGE = "9" * 20
TEXTS = (
    *("", " ", "-1", "0", HUGE, f"1e{HUGE}", "nan", "-inf", "=", "a=b", "a=", "=a.h5", "==", ",", "[/b]", "\x1b[31m"),
    *("gone", "gone/", "~gone_user/x", "folder", "empty", "empty.h5", "bytes.bin", "caf\udce9", "x" * 300),
    *("bytes.h5", "bytes.toml", "bytes.safetensors", "bytes.json", "bytes.csv", "a.png", "a.h5", "fit", "pipe", "**"),
)
DATA = (
    *("digits?take=0", f"digits?take={HUGE}", "digits?rows=::0", f"digits?rows={HUGE}:", "digits?long_tail=nan"),
    *("digits?long_tail=0", f"digits?scramble={'9' * 5000}", "digits?classes=9-0", "digits?classes=a", "digits?a=b"),
    *(f"noise:gaussian?n={HUGE}", f"noise:uniform?size={HUGE}&n=1", "noise:", "noise:uniform?seed=-1", "?", ":", "a:b"),
    *("folder:", "folder:~gone_user/x", "folder:$GONE", "folder:$", "folder:a.png", "folder:folder", "folder:gone"),
    *("folder:caf\udce9", "folder:x\0y", "npz:", "npz:bytes.bin", "npz:empty", "npz:folder", "npz:a.h5"),
    *("imglist:bytes.bin", "imglist:empty", "imglist:minus.txt", "imglist:folder", "imglist:list.txt?root=gone"),
    *("imglist:numbers.txt", "sheets:", "sheets:gone", "sheets:folder", "sheets:bytes", "sheets:list"),
    *("torchvision:", "torchvision:A", "torchvision:CIFAR10?root=gone", "torchvision:CIFAR10?split=a&root=folder"),
)
"""Texts that name datasets."""
PARAMETERS = ("p=", "p=nan", "p=a", "=1", f"p={'9' * 400}", "p=-1", "q=1", "p", "p=1,2", "p=\0")
SETTINGS = (
    *("epochs=nan", "epochs=-1", f"epochs={HUGE}", "epochs=a", "epochs", "=1", "epochs=", "a.b.c=1", "model=1"),
    *(f"optimizer.lr={'1' * 400}", "optimizer.lr=nan", "optimizer.lr=-1", "optimizer.lr=1e400", "model.name=a"),
    *("model.in_chans=-1", "model.in_chans=0", f"model.in_chans={HUGE}", "model.num_classes=-1", "model.a=1"),
    *("batch_size=0", f"batch_size={HUGE}", "seed=-1", f"seed={HUGE}", "workers=-1", "data.train=gone", "data=1"),
    *("data.validation=2", "data.validation=nan", "data.augmentation=a", "schedule.name=a", "objective.name=a"),
    *('model.name="x\\u0000y"', 'data.train="folder:x\\u0000y"', "data.train='digits?take=1'", "amp=a", "epochs=[1]"),
)
SPEC_SETTINGS = (
    *("id=gone", "id=1", "near=[]", "near=['a']", 'sets.a="folder:x\\u0000y"', "sets=1", "fit=a", "scorers=1"),
    *("scorers=['a']", "scorers=[]", "extraction.rows=0", f"extraction.rows={HUGE}", "extraction.rows=nan", "model=1"),
    *("extraction.batch_size=0", "extraction.probes=['a']", "extraction.probes=[1]", "extraction.amp=a", "part=1"),
    *("model.1.name=a", "model.1.checkpoint=bytes.bin", "model.1.checkpoint=folder", "model.1.num_classes=-1", "a=1"),
    *('model.1.checkpoint="x\\u0000y"', f"model.1.num_classes={HUGE}", "preprocessing.input_size=[0]", "extends=gone"),
    *("preprocessing.mean=[nan]", "preprocessing.crop_pct=0", "preprocessing.crop_pct=nan", "preprocessing.std=[0]"),
    *("preprocessing.interpolation=a", "preprocessing.input_size=[99999999]", "search.id=a", "measures=['a']"),
)
BASE: dict[str, list[str]] = {
    "extract": ["tiny_net", "digits?take=4", "OUT.h5", "--checkpoint", "tiny.safetensors", "--workers", "0"],
    "score": ["gradnorm", "a.h5"],
    "evaluate": ["--id", "a.h5", "--ood", "b.h5", "--scorer", "msp"],
    "inspect": ["a.h5"],
    "list": ["msp"],
    "demo": ["--out", "OUT", "--seed", "a"],
    "train": ["recipe.toml", "--out", "OUT"],
    "benchmark": ["spec.toml", "--dry-run", "--out", "OUT"],
    "compare": ["gone", "gone"],
    "calibrate": [
        *("tiny_net", "--id", "digits?take=40", "--out", "OUT", "--checkpoint", "tiny.safetensors"),
        *("--workers", "0", "--mean", "0.5"),
    ],
    "predict": ["a.png", "--detector", "detector"],
}
SPECIAL = {
    "data": DATA,
    "id": DATA,
    "fit": DATA,
    "set": SETTINGS,
    "param": PARAMETERS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with valid and invalid files of all kinds, which is the current one."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("hostile")
    os.chdir(folder)
    Path("folder").mkdir()
    Path("fit").mkdir()
    for name in ("empty", "empty.h5"):
        Path(name).touch()
    for suffix in ("bin", "h5", "toml", "safetensors", "json", "csv"):
        Path(f"bytes.{suffix}").write_bytes(b"\xff\xfe\0\x80" * 50)
    os.mkfifo("pipe")
    Image.new("RGB", (8, 8)).save("a.png")
    Path("list.txt").write_text("a.png 1\n")
    Path("minus.txt").write_text("a.png {'label': " + "-" * 200_000 + "1}\n")
    Path("numbers.txt").write_text(f"a.png {'9' * 5000}\n")
    Path("list.json").write_text(
        json.dumps({"size": 10**9, "columns": 1, "per_file": 1, "count": 10**9, "labels": None})
    )
    Path("results").mkdir()
    Path("results/results.json").write_text("[1]")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        values = torch.randn(30, 4, generator=generator)
        FeatureSet(values, values).save(f"{name}.h5")
    torch.manual_seed(0)
    model = timm.create_model("tiny_net", num_classes=10).eval()
    save_file(model.state_dict(), "tiny.safetensors")
    ood_scores.calibrate("energy", model, id=[torch.rand(30, 3, 8, 8, generator=generator)], keep=0.9).save("detector")
    tiny.write_toml(Path("recipe.toml"), tiny.tables(epochs=1, data={"train": "digits?take=60"}))
    Path("spec.toml").write_text(
        'id = "a"\nnear = ["b"]\nscorers = ["msp"]\n[sets]\na = "digits?take=4"\nb = "noise:uniform?n=4&size=8"\n'
        '[[model]]\nname = "tiny_net"\ncheckpoint = "tiny.safetensors"\n'
    )
    yield folder
    os.chdir(before)


def arguments(command: str) -> Iterator[list[str]]:
    """Yield the valid arguments of a command with one of them changed, or with one option added."""
    group: Any = typer.main.get_command(app)
    base = BASE[command]
    places = [number for number, word in enumerate(base) if number == 0 or not word.startswith("--")]
    positional = [place for place in places if place == 0 or not base[place - 1].startswith("--")]
    names = iter(place for place in positional)
    for parameter in group.commands[command].params:
        if parameter.name == "seed":
            yield from ([*base[:-1], seed] for seed in ("-1", HUGE, "nan", "", "1.5"))  # others run the demo
            continue
        special = SPECIAL.get(parameter.name, ())
        if parameter.name == "set" and command == "benchmark":
            special = SPEC_SETTINGS
        if parameter.param_type_name == "argument":
            place = next(names, None)
            for value in (*TEXTS, *special):
                yield base if place is None else [*base[:place], value, *base[place + 1 :]]
        elif parameter.is_flag:
            if parameter.name != "compile":  # takes a minute
                yield [*base, parameter.opts[0]]
        elif parameter.opts[0] in base and parameter.name != "scorer":
            place = base.index(parameter.opts[0]) + 1
            for value in (*TEXTS, *special):
                yield [*base[:place], value, *base[place + 1 :]]
        else:
            for value in (*TEXTS, *special):
                yield [*base, parameter.opts[0], value]


def problem(command: str, words: list[str], number: int) -> str:
    """Return what is wrong with the outcome of a command, "" if nothing."""
    words = [word.replace("OUT", f"out{number}") if word.startswith("OUT") else word for word in words]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, [command, *words])
    if not isinstance(result.exception, SystemExit | None):
        error = result.exception
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
    if result.exit_code not in (0, 1, 2, 3, 4):
        return f"exit code {result.exit_code}"
    if result.exit_code and not result.output.strip():
        return "no message"
    return ""


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", BASE)
def test_senseless_arguments_end_in_a_message(command: str) -> None:
    found = {}
    cases = list(arguments(command))
    for number, words in enumerate(cases if EVERYTHING else random.Random(command).sample(cases, SAMPLED)):
        wrong = problem(command, words, number)
        if wrong:
            found[" ".join(word[:60] for word in words).encode("unicode_escape").decode()] = wrong
    assert found == {}


def extracting(data: str, *more: str) -> list[str]:
    return ["extract", "tiny_net", data, "mistakes.h5", "--checkpoint", "tiny.safetensors", "--workers", "0", *more]


MISTAKES: list[tuple[list[str], str, int]] = [
    (extracting("folder:~gone_user/x"), "there is no ~gone_user/x", 1),
    (extracting("imglist:minus.txt"), "line 1 of minus.txt is .*: write one image per line, such as 'cats/1.jpg 3'", 1),
    (extracting("imglist:pipe"), "cannot read pipe as a text file, since it is not a regular file", 1),
    (extracting("sheets:list"), "there is no image list.*webp", 1),
    (extracting(f"noise:uniform?n={HUGE}"), "write a whole number from 1 to 2147483647", 1),
    (extracting(f"noise:uniform?n=1&size={HUGE}"), "write a whole number from 1 to 10000", 1),
    (extracting(f"digits?scramble={'9' * 5000}"), "write a whole number from 0 to 2147483647", 1),
    (extracting("digits?take=4", "--batch-size", HUGE), "Invalid value for '--batch-size'", 2),
    (extracting("digits?take=4", "--workers", "5000"), "Invalid value for '--workers'", 2),
    (["predict", "a.png", "--detector", "detector", "--workers", "5000"], "Invalid value for '--workers'", 2),
    (
        ["evaluate", "--id", "a.h5", "--ood", "=b.h5", "--scorer", "msp"],
        "cannot read --ood =b.h5: write --ood NAME=",
        1,
    ),
    (["demo", "--out", "d", "--seed", HUGE], "Invalid value for '--seed'", 2),
    (["train", "pipe"], "cannot read pipe as a text file", 1),
    (["train", "recipe.toml", "--set", f"optimizer.lr={'1' * 400}"], "lr contains a whole number of more than 64", 1),
    (["train", "recipe.toml", "--set", "model.in_chans=0"], "in_chans of the network 'tiny_net' is 0: give", 1),
    (["train", "recipe.toml", "--set", "workers=5000"], "workers = 5000 is out of range: it must be at most 1024", 1),
    (
        ["benchmark", "spec.toml", "--set", "extraction.workers=5000"],
        "workers = 5000 is out of range: give at most 1024",
        1,
    ),
    (["benchmark", "spec.toml", "--set", 'sets.a="folder:x\\u0000y"'], "or a null character", 1),
    (["compare", "results", "results"], "results.json is damaged", 1),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("words", "message", "code"), MISTAKES)
def test_mistakes_are_named(words: list[str], message: str, code: int) -> None:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert re.search(message, " ".join(result.output.replace("│", "").split()))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("variable", "value"), [("WORLD_SIZE", "x"), ("RANK", "-1"), ("LOCAL_RANK", "9" * 20)])
def test_environment_that_torchrun_has_not_set(variable: str, value: str) -> None:
    result = CliRunner().invoke(app, extracting("digits?take=4"), env={variable: value})
    assert result.exit_code == 1
    assert f"the environment variable {variable} is '{value}', not a whole number" in " ".join(result.output.split())
    done = CliRunner().invoke(app, extracting("digits?take=4"), env={variable: ""})
    assert done.exit_code == 0


@pytest.mark.usefixtures("folder")
def test_names_that_are_not_utf8_are_stored() -> None:
    result = CliRunner().invoke(app, extracting("digits?take=5", "--name", "caf\udce9", "--overwrite"))
    assert result.exit_code == 0
    provenance = ood_scores.load("mistakes.h5").provenance
    assert provenance is not None
    assert provenance.dataset == "caf\\udce9"
