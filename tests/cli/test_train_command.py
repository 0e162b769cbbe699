"""The command ``ood-scores train``."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner, Result

from ood_scores.cli import app
from ood_scores.training import load_recipe, trainer


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})


def ok(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tiny.write_toml(tmp_path / "small.toml", tiny.tables(data={"validation": 0.2}))


def test_train_command_produces_a_checkpoint_that_extract_opens(recipe: Path) -> None:
    output = ok("train", recipe, "--device", "cpu")
    assert re.search(r"epoch 1  loss \d\.\d+  accuracy \d+\.\d%  ‖z‖ \d\.\d+  lr 0\.05  validation \d+\.\d%\n", output)
    assert re.search(r"accuracy: training \d+\.\d\d%, validation \d+\.\d\d%\n", output)
    assert "✓ weights after 2 epochs in runs/small/last.safetensors" in output
    command = re.search(r"ood-scores (extract .*?)\n\n?$", output.replace("\\\n", " "), re.DOTALL)
    assert command
    features = ok(*shlex.split(command[1]), "--device", "cpu")
    assert re.search(r"1,264 rows of 16 features, 7 classes, accuracy \d+\.\d\d% in cache\.h5", features)


def test_train_options_set_out_and_quiet(recipe: Path) -> None:
    words = ["--set", "epochs=1", "--set", "optimizer.lr=0.01", "--out", "elsewhere", "--quiet", "--device", "cpu"]
    output = ok("train", recipe, *words)
    assert output.startswith("accuracy: training ")
    with open("elsewhere/log.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["lr"]) == 0.01


def test_train_command_refuses_wrong_recipes(recipe: Path) -> None:
    assert "--set: a recipe has no 'epoch' (did you mean 'epochs'?)" in refused("train", recipe, "--set", "epoch=3")
    recipe.write_text(recipe.read_text().replace("lr = ", "rate = "))
    message = refused("train", recipe)
    assert f"{recipe}, line 9: [optimizer] has no 'rate': choose from lr, name" in message
    assert "there is no recipe nothing.toml" in refused("train", "nothing.toml")


def test_train_command_refuses_missing_data_and_unsuitable_models(recipe: Path) -> None:
    assert "there is no nowhere.npz" in refused("train", recipe, "--set", "data.train=npz:nowhere.npz")
    rna = ["--set", "objective.name=rna", "--set", "auxiliary.data=digits?classes=7-9"]
    assert "add [auxiliary] with data = …" in refused("train", recipe, *rna[:2])
    assert "has none" in refused("train", recipe, *rna, "--set", "model.name=tiny_plain")
    assert "the device 'tpu' is not available" in refused("train", recipe, "--device", "tpu")


def test_train_command_resumes_an_interrupted_run(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = trainer.train_step, iter(range(1000))

    def interrupted(*arguments: Any) -> torch.Tensor:
        if next(calls) == 25:  # in the second epoch
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    result = call("train", recipe, "--device", "cpu")
    assert result.exit_code == 130
    assert "stopped: run the same command to resume from runs/small" in result.output
    monkeypatch.setattr(trainer, "train_step", honest)
    output = ok("train", recipe, "--device", "cpu")
    assert "resuming runs/small after epoch 1 of 2\n" in output
    assert "epoch 1  " not in output
    assert "epoch 2 " in output
    ok("train", recipe, "--device", "cpu", "--out", "peace", "--quiet")
    assert Path("runs/small/log.csv").read_text() == Path("peace/log.csv").read_text()


def test_train_command_refuses_a_folder_with_another_recipe(recipe: Path) -> None:
    short = ["--set", "epochs=1", "--device", "cpu", "--quiet"]
    ok("train", recipe, *short)
    message = refused("train", recipe, *short, "--set", "seed=1")
    assert "runs/small holds a run with another recipe (seed was 0, is 1)" in message
    ok("train", recipe, *short, "--set", "seed=1", "--overwrite")


def test_train_help_contains_working_examples() -> None:
    output = ok("train", "--help")
    assert "ood-scores train benchmarks/recipes/digits.toml" in output
    assert "torchrun --nproc-per-node 4 -m ood_scores train RECIPE.toml" in output
    folder = Path(__file__).parents[2]
    for name in re.findall(r"benchmarks/recipes/\w+\.toml", output):
        assert load_recipe(folder / name).epochs


def test_recipe_in_the_train_help_is_valid(tmp_path: Path) -> None:
    output = ok("train", "--help")
    text = output.partition("A recipe")[2].partition("╭")[0].replace("│", "")
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(line.strip() for line in text.splitlines()))
    recipe = load_recipe(path)
    assert (recipe.epochs, recipe.stages[0].schedule.milestones) == (60, (40, 50))
