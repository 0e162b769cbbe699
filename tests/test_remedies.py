"""A walk through every remedy that is printed for a scorer that cannot run: each is followed until the scorer runs."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import ood_scores
from ood_scores import FeatureSet, create_scorer
from ood_scores.cli import app
from ood_scores.extraction.probes import PROBES
from ood_scores.scorers.requirements import HOW_TO_GET, unmet

SCORERS: list[tuple[str, dict[str, str]]] = [
    *((name, {}) for name in ood_scores.list_scorers()),
    ("gradnorm_params", {"group": "fc"}),
    ("block_norm", {"layer": "conv1"}),
    ("mc_dropout", {"output": "mutual_information"}),
]
ELSEWHERE = ("gl_mcm", "neglabel", "csp", "mahalanobis_odin", "mfs")
"""Scorers of another model than that of this walk, see ``tests/extraction/test_zero_shot_extraction.py``, of a cache,
see ``tests/scorers/test_mahalanobis_odin.py``, or of other images, see ``tests/extraction/test_mixup.py``."""

NOT_ON_THE_COMMAND_LINE = ("ensemble", "mc_dropout", *ELSEWHERE)  # the second: tiny_net has no dropout by default
ON_THE_COMMAND_LINE = [
    (name, parameters)
    for name, parameters in SCORERS
    if name in ("msp", "vim") or (create_scorer(name).tags.small_extras and name not in NOT_ON_THE_COMMAND_LINE)
]
"""The others print the same remedies."""

ROUNDS = 8
ROWS = {"fit": 200, "test": 16, "ood": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and labeled images of 4 classes."""
    where = tmp_path_factory.mktemp("remedies")
    rng = np.random.default_rng(0)
    for name, rows in ROWS.items():
        labels = np.arange(rows) % 4
        images = rng.integers(0, 90, (rows, 8, 8, 3)) + 40 * labels[:, None, None, None]
        np.savez(where / f"{name}.npz", images=images.astype(np.uint8), labels=labels)
    for seed in (0, 1):
        save_file(network(seed).state_dict(), where / f"{seed}.safetensors")
    return where


def network(seed: int) -> tiny.TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("tiny_net", num_classes=4, drop=0.1).eval()
    assert isinstance(model, tiny.TinyNet)
    return model


# ---- Python


PARTS = {
    HOW_TO_GET["logits"][0]: {"logits"},
    HOW_TO_GET["head"][0]: {"head"},
    "extract from a loader that yields (images, labels), or pass labels=... to FeatureSet": {"labels"},
    "pass a list of feature sets with logits, one of each model, on the same data": {"ensemble", "logits"},
    "pass fit=train_feats, or call .fit(train_feats) first": {"fit"},
}
"""What to give a feature set, by the remedy that is not a call."""


class PythonUser:
    """Someone who has feature sets with features alone, and does what errors say."""

    def __init__(self) -> None:
        self.options: dict[str, dict[str, Any]] = {"fit": {}, "test": {}}
        self.parts: set[str] = set()
        self.told: list[tuple[str, str]] = []

    def follow(self, remedy: str, which: str) -> None:
        self.told.append((remedy, which))
        call = re.fullmatch(r"extract it with (extract\(.*\))", remedy)
        if not call:
            self.parts |= PARTS[remedy]
            return
        known = {cls.__name__: cls for cls in PROBES.values()}
        options = eval(call[1], {"extract": lambda _, **options: options} | known)
        mine = self.options[which]
        more = [*mine.get("probes", []), *options.get("probes", [])]
        mine |= options | ({"probes": more} if more else {})

    def set(self, which: str, seed: int = 0) -> FeatureSet:
        rng = torch.Generator().manual_seed(ROWS[which])
        labels = torch.arange(ROWS[which]) % 4
        images = torch.rand(len(labels), 3, 8, 8, generator=rng) + labels[:, None, None, None] / 4
        full = ood_scores.extract(network(seed), [(images, labels)], progress=False, **self.options[which])
        kept: dict[str, Any] = {
            part: getattr(full, part) for part in ("logits", "labels", "head") if part in self.parts
        }
        return FeatureSet(full.features, extras=full.extras, **kept)

    def sets(self) -> tuple[FeatureSet | None, FeatureSet]:
        test = self.set("test")
        if "ensemble" in self.parts:
            test = ood_scores.ensemble([test, self.set("test", seed=1)])
        return (self.set("fit") if "fit" in self.parts else None), test


@pytest.mark.parametrize(("name", "parameters"), [each for each in SCORERS if each[0] not in ELSEWHERE])
def test_scorer_runs_once_the_remedies_in_python_are_followed(name: str, parameters: dict[str, str]) -> None:
    user, scorer = PythonUser(), create_scorer(name, **parameters)
    for _ in range(ROUNDS):
        fit, test = user.sets()
        missing = unmet(scorer, fit.has if fit else None, [test.has])
        if missing is None:
            break
        user.follow(missing.how_to_get("python"), "fit" if missing.fitting else "test")
    assert len(set(user.told)) == len(user.told)
    assert ood_scores.score(scorer, test, fit).isfinite().all()


# ---- the command line


class CommandLineUser:
    """Someone who runs commands, and after each error what it says after ``here:``."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out
        self.told: list[tuple[str, str]] = []
        self.added: dict[str, list[str]] = {}

    def run(self, *words: object) -> str:
        """Return the error of a command, or an empty text if there is none."""
        result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})
        assert result.exit_code in (0, 1), result.output
        return result.stderr if result.exit_code else ""

    def extract(self, which: str, *options: str) -> Path:
        cache = self.out / f"{which}.h5"
        words = [f"npz:{self.folder / which}.npz", cache, "--checkpoint", self.folder / "0.safetensors", "--workers", 0]
        error = self.run("extract", "tiny_net", *words, *options)
        if error:
            assert "here: pass --overwrite, or another CACHE to keep both" in error
            assert not self.run("extract", "tiny_net", *words, *options, "--overwrite")
        return cache

    def follow(self, error: str) -> list[str]:
        """Do what an error says, and return what is added to the command."""
        found = re.search(r"^here: (.*)$", error, re.MULTILINE)
        assert found, error
        which = "fit" if "to be fitted on this" in error else "test"
        self.told.append((found[1], which))
        if "pass --fit CACHE" in found[1]:
            return ["--fit", str(self.extract("fit"))]
        words = re.fullmatch(r"extract it with (--.*)", found[1])
        assert words, error
        self.added.setdefault(which, []).extend(shlex.split(words[1]))
        self.extract(which, *self.added[which])
        return []


@pytest.mark.parametrize(("name", "parameters"), ON_THE_COMMAND_LINE)
def test_scorer_runs_once_the_remedies_on_the_command_line_are_followed(
    name: str, parameters: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    user = CommandLineUser(folder, tmp_path)
    words = ["score", name, str(user.extract("test"))]
    words += [word for key, value in parameters.items() for word in ("--param", f"{key}={value}")]
    for _ in range(ROUNDS):
        error = user.run(*words)
        if not error:
            break
        words += user.follow(error)
    assert not error
    assert len(set(user.told)) == len(user.told)


# ---- benchmark files


class BenchmarkUser:
    """Someone who writes a benchmark file, and adds to it what ``--dry-run`` says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fit = self.ensembles = ""
        self.scorers = 'scorers = "all"'
        self.extraction: dict[str, Any] = {"batch_size": 8, "workers": 0}

    def write(self) -> Path:
        models = "".join(
            f'[[model]]\nname = "tiny_net"\nlabel = "{n}"\ncheckpoint = "{n}.safetensors"\ndrop = 0.1\n' for n in (0, 1)
        )
        sets = "".join(f'{name} = "npz:{name}.npz"\n' for name in ROWS)
        lines = "".join(f"{key} = {value!r}\n" for key, value in self.extraction.items())
        text = f'id = "test"\nfar = ["ood"]\n{self.fit}\n{self.scorers}\n[sets]\n{sets}{models}{self.ensembles}'
        (self.folder / "mine.toml").write_text(f"{text}\n[extraction]\n{lines}")
        return self.folder / "mine.toml"

    def run(self, *options: str) -> str:
        words = ["benchmark", str(self.write()), "--data", str(self.folder), "--out", str(self.folder / "run")]
        result = CliRunner().invoke(app, [*words, *options], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.stdout

    def follow(self, remedy: str) -> None:
        if remedy == 'fit = "…", a name of [sets]':
            self.fit = 'fit = "fit"'
        elif remedy == 'list two [[model]] or more in [ensembles] "label" = ["model", "model"]':
            self.ensembles = '[ensembles]\n"both" = ["0", "1"]\n'
        else:
            table, _, line = remedy.partition(" ")
            assert table == "[extraction]", remedy
            key, _, text = line.partition(" = ")
            value = ast.literal_eval(text)
            self.extraction[key] = [*self.extraction.get(key, []), *value] if isinstance(value, list) else value


def test_all_scorers_run_once_the_remedies_of_a_benchmark_are_followed(folder: Path) -> None:
    user, told = BenchmarkUser(folder), []
    for _ in range(ROUNDS):
        without = re.findall(r"^ +without (.*) \((.*?): (.*)\)$", user.run("--dry-run"), re.MULTILINE)
        found = (
            remedy
            for _, _, remedy in without
            if remedy not in told and not re.search("classes = |train.h5|photos", remedy)
        )
        remedies = list(dict.fromkeys(found))
        if not remedies:
            break
        told += remedies
        for remedy in remedies:
            user.follow(remedy)
    assert {remedy.partition("]")[0] for remedy in told} >= {"[extraction"}
    output = user.run("--jobs", "1")
    results = ood_scores.benchmark.load_results(folder / "run")
    assert set(results.table["scorer"]) == set(ood_scores.list_scorers()) - {*ELSEWHERE}, output
    read = {need.partition(".")[0] for name, _ in SCORERS if name not in ELSEWHERE for need in _needs(name)} & set(
        PROBES
    )
    assert read <= set(re.findall(r"\w+", str(user.extraction)))


def _needs(name: str) -> list[str]:
    scorer = create_scorer(name)
    return [*scorer.fit_needs, *scorer.needs]


def test_probe_without_the_part_that_a_scorer_reads_has_a_remedy(folder: Path) -> None:
    user = BenchmarkUser(folder)
    user.scorers = '[scorers]\nmsp = {}\nfc = {name = "gradnorm_params", group = "fc"}'
    user.extraction["probes"] = ["gradnorm"]
    user.run("--jobs", "1")
    (reason,) = {(each.reason, each.remedy) for each in ood_scores.benchmark.load_results(folder / "run").not_run}
    assert reason[0] == "scoring needs 'gradnorm.fc', which was not extracted"
    user.extraction["probes"] = []
    user.follow(reason[1])
    user.run("--jobs", "1")
    assert not ood_scores.benchmark.load_results(folder / "run").not_run
