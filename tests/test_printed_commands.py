"""Every command and every call that help, messages, and remedies print is run on small data; new ones fail at first."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from printed import ROOT, messages, texts
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from typer.main import get_command
from typer.testing import CliRunner

from ood_scores.cli import COMMANDS, app
from ood_scores.cli import ood_scores as main
from ood_scores.data.catalog import CATALOG

IN_PROCESS = ["--jobs", "1"]
MORE_WORDS = {"extract": ["--workers", "0"], "benchmark": IN_PROCESS, "paper": IN_PROCESS, "calibrate": ["--overwrite"]}
"""Words to add to commands: processes take seconds to start, and several examples write the same detector."""


def failure_of(words: list[str]) -> str:
    """The output of a command that fails; "" for one that succeeds."""
    done = CliRunner().invoke(app, words, env={"COLUMNS": "100"})
    return "" if done.exit_code in (0, 3) else f"{words}: {done.output}"  # 3: predict --fail-on-ood


# ---- examples of the help


def examples() -> Iterator[str]:
    """The commands in the help of all commands, each on one line."""
    for function in (main, *COMMANDS.values()):
        text = (function.__doc__ or "").replace("\\\n", " ")
        yield from (
            " ".join(line.split()) for line in text.splitlines() if re.match(r" +(for .*)?(ood-scores|torchrun) ", line)
        )


STANDS_FOR = {
    "resnet50": "tiny_net --checkpoint net.safetensors",
    "cifar_resnet20": "tiny_net",
    "hf-hub:OWNER/NAME": "tiny_net --checkpoint net.safetensors",
    "hf-hub:OWNER/NAME@v1": "detector",
    "vit_small_patch14_dinov2": "nets.py:vit",
    "torchvision:CIFAR10?split=test": "folder:val",
    "benchmarks/suites/real.toml": "mine.toml",
    "benchmarks/recipes/digits.toml": "RECIPE.toml",
    "benchmarks/recipes/haas_resnet18_60_l2.toml": "RECIPE.toml",
    "benchmarks/recipes/rna_cifar10_lt.toml": "rna.toml",
    "probed/val.h5": "val.h5",
    "probed/textures.h5": "textures.h5",
    "/data": ".",
}
"""Small models, files, and folders, by those that examples name."""

ELSEWHERE = {
    "ood-scores demo": "tests/test_demo.py",
    "ood-scores demo --out elsewhere --seed 1": "tests/test_demo.py",
    "ood-scores paper haas2024 --data data": "tests/benchmark/test_paper_figures.py",
    "ood-scores linear-probe train.h5": "tests/cli/test_encoder_commands.py",
    "hf:openai/clip-vit-base-patch16": "tests/cli/test_zero_shot_commands.py",
}
"""Examples, or parts of them, that take long, and the tests that run such commands."""


def write_pictures(folder: Path, rows: int = 5) -> None:
    for label, name in enumerate("abcd"):
        (folder / name).mkdir(parents=True)
        for row in range(rows):
            pixels = np.random.default_rng([label, row, len(str(folder))]).integers(0, 60, (8, 8, 3)) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{row}.png")


NETS = """
import timm
import tiny


def small(width=16):
    return timm.create_model("tiny_net", num_classes=4).eval()


def vit():
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.models.VisionTransformer(**sizes)
    model.pretrained_cfg = small().pretrained_cfg
    return model
"""

SCORER = """
from ood_scores import Scorer, register_scorer


@register_scorer("printed_example")
class MyScorer(Scorer):
    needs = ("logits",)

    def score_block(self, block):
        return block.max_logit()
"""

SPEC = """
id = "val"
far = ["textures"]
scorers = ["msp"]
[sets]
val = "folder:val"
textures = "folder:textures"
[[model]]
name = "tiny_net"
checkpoint = "net.safetensors"
[extraction]
workers = 0
"""


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what examples read; benchmarks write no reports, which take seconds."""
    here = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ood_scores.benchmark.report.write_report", lambda results, images: [])
        patch.setattr("ood_scores.benchmark.unit.explained", lambda *_: None)
        patch.chdir(here)
        for name in ("train", "val", "textures", "photos", "inbox"):
            write_pictures(here / name)
        for name in ("train", "val"):
            shutil.copytree(name, f"imagenet/{name}")
        for name in ("cat.png", "new.png"):
            shutil.copy("photos/a/0.png", name)
        Image.open("cat.png").save("inbox/a/cat.jpg")
        Path("textures.txt").write_text("".join(f"textures/a/{row}.png 0\n" for row in range(5)))
        torch.manual_seed(0)
        net = tiny.tiny_net(num_classes=4)
        for name in ("net", "cifar10", "resnet20"):
            save_file(net.state_dict(), f"{name}.safetensors")
        Path("nets.py").write_text(NETS)
        Path("my_scorers.py").write_text(SCORER)
        Path("mine.toml").write_text(SPEC)
        recipe = tiny.tables(epochs=1, data={"train": "digits?classes=0-6&take=64"})
        tiny.write_toml(here / "RECIPE.toml", recipe)
        others = {"objective": {"name": "rna"}, "auxiliary": {"data": "digits?classes=7-9&take=64", "batch_size": 64}}
        tiny.write_toml(here / "rna.toml", recipe | others)
        np.savez("300k.npz", images=np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8))
        words = ["tiny_net", "--checkpoint", "net.safetensors"]
        for name in ("train", "val", "textures"):
            assert not failure_of(["extract", *words, f"folder:{name}", f"{name}.h5", "--workers", "0"])
        Path("cache").mkdir()
        for name in ("val", "textures", "sun"):
            shutil.copy(f"{name.replace('sun', 'textures')}.h5", f"cache/{name}.h5")
        assert not failure_of(["calibrate", *words, "--id", "val.h5", "--out", "detector"])
        assert not failure_of(["benchmark", "mine.toml", "--out", "runs/real", *IN_PROCESS])
        shutil.copytree("runs/real", "runs/real-new")
        yield here


def commands_in(line: str) -> Iterator[list[str]]:
    """The words after ``ood-scores`` of each command that a shell would run."""
    loop = re.fullmatch(r"for (\w+) in (\S+); do (.*); done", line)
    if loop:
        for path in sorted(Path().glob(loop[2])):
            yield from commands_in(loop[3].replace(f"${loop[1]}", str(path)))
        return
    command = re.split(r" (?:>|\|\|) ", line)[0]
    for text, small in STANDS_FOR.items():
        command = re.sub(rf"(?<![\w/:]){re.escape(text)}(?![\w@])", small, command.replace(f'"{text}"', text))
    program, *words = shlex.split(command)
    if program == "torchrun":
        given = get_args_parser().parse_args(words)
        assert (given.module, given.training_script) == (True, "ood_scores")
        words = given.training_script_args
    yield words


def test_examples_elsewhere_are_run_there() -> None:
    for text, where in ELSEWHERE.items():
        (line, *_) = [line for line in examples() if text in line]
        assert shlex.split(line)[1] in (ROOT / where).read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_examples_of_the_help_and_commands_in_messages_run(
    workbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in sorted({*examples(), *MENTIONED.values()}):
        if any(text in line for text in ELSEWHERE):
            continue
        monkeypatch.chdir(workbench)
        for words in commands_in(line):
            if words[0] == "extract":
                words = [re.sub(r".*\.h5$", str(tmp_path / "new.h5"), word) for word in [*words, "--overwrite"]]
            if words == ["paper"]:
                monkeypatch.chdir(ROOT)
            assert not failure_of([*words, *MORE_WORDS.get(words[0], [])])


# ---- commands in messages


MENTION = re.compile(r"ood-scores [a-z-]+(?: (?:NAME\b|'\*'|\.\.\. --[a-z-]+))?")
MENTIONED = {
    "ood-scores calibrate": "ood-scores calibrate resnet50 --id folder:imagenet/val --out detector",
    "ood-scores evaluate": "ood-scores evaluate --id cache/val.h5 --ood cache/textures.h5",
    "ood-scores extract": "ood-scores extract resnet50 folder:imagenet/val cache/val.h5",
    "ood-scores extract ... --overwrite": "ood-scores extract resnet50 folder:imagenet/val cache/val.h5 --overwrite",
    "ood-scores inspect": "ood-scores inspect val.h5",
    "ood-scores linear-probe": "ood-scores linear-probe train.h5 val.h5 textures.h5 --out probed",
    "ood-scores list": "ood-scores list",
    "ood-scores list '*'": "ood-scores list '*'",
    "ood-scores list NAME": "ood-scores list vim",
    "ood-scores score": "ood-scores score energy val.h5 --out scores.csv",
}
"""The commands in messages, and what is run for each."""

MADE_OF_WORDS = {
    "benchmark/networks.py": "tests/benchmark/test_missing_checkpoints.py",
    "cli/__init__.py": "tests/cli/test_commands.py",
}
"""Files that put commands together from words, and the tests that run these."""


def test_every_command_in_a_message_is_known() -> None:
    found = {mention for _, text in messages() for mention in MENTION.findall(text)} - {"ood-scores train"}
    assert found - set(MENTIONED) == set()
    assert {file for file, text in texts() if text == "ood-scores"} == set(MADE_OF_WORDS)


OTHER_PROGRAMS = {
    "options": {"--contents", "--data_root_path", "--dataset_mode", "--datasets", "--local-dir", "--save_dir"},
    "packages": {"gdown", "ood_scores", "pyarrow"},
}
"""Options of other programs than ours and torchrun, and packages that are in no extra, which messages name."""


def test_options_in_messages_are_options_of_a_command() -> None:
    commands = get_command(app).commands.values()  # type: ignore[attr-defined]
    options = [option for command in commands for option in command.params]
    known = {each for option in options for each in (*option.opts, *option.secondary_opts)}
    torchrun = {each for action in get_args_parser()._actions for each in action.option_strings}
    found = {option for _, text in messages() for option in re.findall(r"(?<!\S)--[a-z][a-z_-]*\b", text)}
    assert found - known - torchrun - OTHER_PROGRAMS["options"] == set()


def test_packages_to_install_are_those_of_the_extras() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    every = f"{setup['options']['install_requires']} {' '.join(extras.values())}"
    declared = {re.split(r"[<>=~\[;]", word)[0].lower().replace("-", "_") for word in every.split()}
    for file, text in texts():
        for name in re.findall(r'pip install "?([\w-]+)', text):
            assert name.replace("-", "_") in declared | OTHER_PROGRAMS["packages"], (file, text)
    for path in (ROOT / "ood_scores").rglob("*.py"):
        for extra in re.findall(r'\b(?:install\(|require\([^,()]+, )"([\w-]+)"', path.read_text(encoding="utf-8")):
            assert extra in extras, path


def test_commands_that_get_datasets_are_ones_of_the_shell() -> None:
    found = [re.search(r"\b(?:mkdir|wget|pip|git|cd) .*", known.get) for known in CATALOG]
    commands = [each[0] for each in found if each]
    assert len(commands) > 20
    checked = subprocess.run(["bash", "-n"], input="\n".join(commands), capture_output=True, text=True)
    assert checked.stderr == ""
