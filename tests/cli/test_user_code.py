"""Own scorers, probes, datasets, and models on the command line and in benchmark files, and code that must not run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ood_scores
from ood_scores import Detector, user_code
from ood_scores.benchmark import run
from ood_scores.cli import app
from ood_scores.data.kinds.base import DATASET_KINDS
from ood_scores.errors import BadInput, UnknownName
from ood_scores.extraction.probes import PROBES
from ood_scores.features import FeatureSet
from ood_scores.models.opening import load_model, preprocessing
from ood_scores.scorers.registry import SCORERS

CODE = '''
"""Own things: for a test."""
from dataclasses import dataclass
from os import system

import numpy as np
import torch
from ood_scores import Scorer, register_scorer
from ood_scores.data.images import ImageArrays
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.probes import Probe
from torchvision.transforms import Compose, Resize, ToTensor

open("ran", "a").write("x")


@register_scorer("logit_spread")
@dataclass
class LogitSpread(Scorer):
    needs = ("logits",)
    power: float = 1.0

    def score_block(self, block):
        return block.logits.std(dim=1, correction=0) ** self.power


@dataclass
class LargestLogit(Scorer):
    needs = ("logits",)

    def score_block(self, block):
        return block.logits.max(dim=1).values


@dataclass(frozen=True)
class Flipped(Probe):
    name: str = "flipped"
    scale: float = 1.0

    def columns(self, done, seen):
        return {self.name: self.scale * done.run(done.inputs.flip(-1))}


@dataclass
class FlipGap(Scorer):
    needs = ("logits", "flipped")

    def score_block(self, block):
        return -(block.logits - block.extras["flipped"]).abs().amax(dim=1)


class Array(Scorer):
    needs = ("logits",)

    def score_block(self, block):
        return block.logits.cpu().numpy().max(axis=1)


class Largest(Scorer):
    needs = ("logits",)

    def score_block(self, block):
        return block.logits.max(dim=1)


class Typing(Scorer):
    needs = ("logit",)

    def score_block(self, block):
        return block.logits[:, 0]


class Failing(Scorer):
    needs = ("logits",)

    def score_block(self, block):
        return block.logits @ torch.ones(7)  # the line to mend


def noisy(n="12", seed="0"):
    images = np.random.default_rng(int(seed)).integers(0, 256, (int(n), 8, 8, 3), dtype=np.uint8)
    return ImageArrays(images, np.arange(int(n)) % 3, name="noisy")


@register_dataset_kind("stripes")
def open_stripes(target, base, *, n: str = "12"):
    images = np.zeros((int(n), 8, 8), np.uint8)
    images[:, ::2] = 17 * np.arange(int(n))[:, None, None]
    return ImageArrays(images, name="stripes")


def small(width=4):
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 3))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    return model


def sized(num_classes=3):
    model = small()
    model[-1] = torch.nn.Linear(4, num_classes)
    return model


def undescribed():
    model = small()
    del model.pretrained_cfg
    return model


def half_described():
    model = small()
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    return model


def with_transform():
    model = small()
    del model.pretrained_cfg
    model.transform = Compose([Resize((8, 8)), ToTensor()])
    return model
'''

BENCHMARK = """
id = "id"
far = ["stripes"]
scorers = ["own.py:LogitSpread", "own:LargestLogit", "own:FlipGap", "energy"]
[sets]
id = "own.py:noisy?n=30"
stripes = "stripes?n=20"
[[model]]
name = "own.py:small"
width = 5
[extraction]
probes = ["own.py:Flipped"]
workers = 0
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with the file own.py; what it registers is forgotten afterwards."""
    before = [(registry, dict(registry)) for registry in (SCORERS, PROBES, DATASET_KINDS)]
    monkeypatch.setattr(user_code, "_imported", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(CODE)
    yield tmp_path
    forget()
    for registry, entries in before:
        registry.clear()
        registry.update(entries)  # type: ignore[arg-type]


def forget() -> None:
    """Leave no trace of own.py but on the disk, as in a new process."""
    sys.modules.pop("own", None)
    user_code._imported.clear()
    for registry in (SCORERS, PROBES, DATASET_KINDS):
        for name in [name for name, each in registry.items() if "own" in f"{name}{each}"]:
            if "ood_scores" not in str(registry[name]):
                del registry[name]
    DATASET_KINDS.pop("stripes", None)


def ok(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exit_code == 1, result.output
    assert result.output.startswith("error: ")
    return result.output


def extracted(cache: str, data: str = "own.py:noisy?n=30", *more: str) -> FeatureSet:
    ok("extract", "own.py:small", data, cache, "--workers", 0, "--probe", "own.py:Flipped:scale=1", *more)
    return ood_scores.load(cache)


def scores_in(table: str) -> np.ndarray:
    return pd.read_csv(table)["score"].to_numpy()


def test_own_things_on_the_command_line(folder: Path) -> None:
    feats = extracted("a.h5", "own.py:noisy?n=30", "--model-arg", "width=6")
    assert feats.num_features == 6
    assert feats.logits is not None
    assert feats.provenance is not None
    assert (feats.provenance.model, feats.provenance.arguments) == ("own.py:small", {"width": 6})
    spread = feats.logits.std(dim=1, correction=0).double() ** 2
    for name in ("own.py:LogitSpread", "own:LogitSpread", "logit_spread"):
        ok("score", name, "a.h5", "--param", "power=2", "--out", "s.csv", "--import", "own.py")
        np.testing.assert_allclose(scores_in("s.csv"), spread, rtol=1e-6)
    ok("score", "own.py:LargestLogit", "a.h5", "--out", "s.csv")
    np.testing.assert_allclose(scores_in("s.csv"), feats.logits.max(dim=1).values)
    gap = -(feats.logits - feats.extras["flipped"]).abs().amax(dim=1)
    ok("score", "own:FlipGap", "a.h5", "--out", "s.csv")
    np.testing.assert_allclose(scores_in("s.csv"), gap)
    extracted("b.h5", "stripes?n=20", "--model-arg", "width=6")
    ok(
        "evaluate",
        "--id",
        "a.h5",
        "--ood",
        "b.h5",
        "--scorer",
        "own.py:LargestLogit",
        "--scorer",
        "energy",
        "--out",
        "t.csv",
    )
    table = pd.read_csv("t.csv")
    assert list(table["scorer"]) == ["own.py:LargestLogit", "energy"]
    assert "logit_spread" in ok("list", "*spread*")


def test_detector_of_own_things_needs_their_code(folder: Path) -> None:
    words = ("--scorer", "own.py:FlipGap", "--probe", "own.py:Flipped", "--keep", 0.5, "--workers", 0)
    ok("calibrate", "own.py:small", "--id", "own.py:noisy?n=30", "--out", "detector", *words)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = Detector.load("detector").predict(images).score
    forget()
    with pytest.raises(BadInput, match=r"runs only if you ask for it: if you trust own\.py, add --import own\.py"):
        Detector.load("detector")
    (folder / "ran").unlink()
    message = refused("predict", "photo.png", "--detector", "detector")
    assert "add --import own.py" in message
    assert not (folder / "ran").exists()
    user_code.import_code("own.py")
    assert np.array_equal(Detector.load("detector").predict(images).score, expected)


def test_transform_of_an_own_model_is_that_of_its_detector(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    words = ("--id", "own.py:noisy?n=30", "--keep", 0.5, "--workers", 0)
    ok("calibrate", "own.py:with_transform", "--out", "detector", *words)
    assert not [each for each in recwarn if "not saved with the detector" in str(each.message)]
    images = np.random.default_rng(1).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
    model = user_code.referenced("own.py:with_transform")()
    inputs = torch.stack([model.transform(Image.fromarray(image)) for image in images])
    expected = torch.logsumexp(model.eval()(inputs).double(), dim=1).detach()
    np.testing.assert_allclose(Detector.load("detector").predict(images).score, expected, rtol=1e-6)


def test_saved_scorer_needs_its_code(folder: Path) -> None:
    cls = getattr(user_code.import_code("own.py"), "LargestLogit")  # noqa: B009
    ood_scores.create_scorer("own.py:LargestLogit").save("s.safetensors")
    feats = FeatureSet(torch.ones(2, 3), torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
    again = ood_scores.load_scorer("s.safetensors")
    assert isinstance(again, cls)
    assert ood_scores.score(again, feats).tolist() == [2.0, 4.0]
    forget()
    with pytest.raises(
        UnknownName, match=r"import the module that registers it first \(--import on the command line\)"
    ):
        ood_scores.load_scorer("s.safetensors")


def test_benchmark_of_own_things(folder: Path) -> None:
    (folder / "b.toml").write_text(BENCHMARK)
    message = refused("benchmark", "b.toml", "--out", "run")
    assert "add --import own.py" in message
    assert not (folder / "ran").exists()
    planned = ok("benchmark", "b.toml", "--out", "run", "--import", "own.py", "--dry-run")
    assert "costs are known after the extraction (own.py:small is code of your own, which runs only then)" in planned
    ok("benchmark", "b.toml", "--out", "run", "--jobs", 2, "--import", "own.py", "--quiet")
    table = pd.read_csv("run/results.csv")
    assert list(table["scorer"]) == ["own.py:LogitSpread", "own:LargestLogit", "own:FlipGap", "energy"]
    caches = sorted(Path("run").glob("caches/*/*.h5"))
    ood = ood_scores.load(next(cache for cache in caches if cache.name.startswith("stripes")))
    id = ood_scores.load(next(cache for cache in caches if cache.name.startswith("id")))
    assert (len(id), len(ood), id.num_features) == (30, 20, 5)
    expected = ood_scores.evaluate(["own:LargestLogit"], id=id, ood={"stripes": ood})["auroc"].item()
    assert table["auroc"][1] == pytest.approx(expected)


def test_all_code_that_a_benchmark_needs_is_named_at_once(folder: Path) -> None:
    text = BENCHMARK.replace("own:LargestLogit", "b.py:X").replace("own:FlipGap", "b.py:Y")
    (folder / "b.toml").write_text(text.replace("own.py:Flipped", "c.py:Z"))
    message = refused("benchmark", "b.toml", "--out", "run")
    assert "b.toml, line 9: 'own.py:small', 'b.py:X' and 'c.py:Z' name code, which runs only if you ask" in message
    assert "if you trust own.py, b.py and c.py, add --import own.py --import b.py --import c.py to the" in message
    assert not (folder / "ran").exists()


def test_all_code_that_a_detector_needs_is_named_at_once(folder: Path) -> None:
    (folder / "net.py").write_text("import own\n\ndef net():\n    return own.small()\n")
    words = ("--scorer", "own.py:FlipGap", "--probe", "own.py:Flipped", "--keep", 0.5, "--workers", 0)
    ok("calibrate", "net.py:net", "--id", "own.py:noisy?n=30", "--out", "detector", *words)
    forget()
    with pytest.raises(
        BadInput, match=r"add --import own\.py --import net\.py .* Import what defines its probe Flipped, too\."
    ):
        Detector.load("detector")


def test_kinds_come_before_code_of_the_same_name(folder: Path) -> None:
    (folder / "noise.py").write_text("")
    user_code.import_code("noise.py")
    user_code.import_code("own.py")
    (folder / "b.toml").write_text(BENCHMARK.replace('"stripes?n=20"', '"noise:uniform?n=20&size=8"'))
    assert list(run("b.toml", out="run", jobs=1, progress=False).table["n_ood"]) == [20] * 4


def test_a_plain_folder_is_not_a_module(folder: Path) -> None:
    Path("photos").mkdir()
    user_code.import_referenced("photos:Nothing")
    assert not user_code.imported_code()
    assert not user_code.is_reference("photos:Nothing")


def test_changed_code_is_run_again(folder: Path) -> None:
    (folder / "b.toml").write_text(BENCHMARK)
    user_code.import_code("own.py")
    first = run("b.toml", out="run", jobs=1, progress=False).table["auroc"]
    forget()
    changed = CODE.replace("block.logits.max(dim=1).values", "-block.logits.max(dim=1).values")
    (folder / "own.py").write_text(changed)
    user_code.import_code("own.py")
    again = run("b.toml", out="run", jobs=1, progress=False).table["auroc"]
    assert again[1] == pytest.approx(1 - first[1])
    assert again[3] == first[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("score", "own.py:FlipGab", "a.h5"),
            r"own has no 'FlipGab' \(did you mean 'FlipGap'\?\): choose from .*FlipGap",
        ),
        (("score", "own.py:Array", "a.h5"), "'own.py:Array' returned ndarray from score_block: return a tensor with"),
        (("score", "own.py:Largest", "a.h5"), "'own.py:Largest' returned max from score_block.* that is .values"),
        (("score", "own.py:Typing", "a.h5"), r"needs logit .* no registered probe computes it \(did you mean 'logits'"),
        (("score", "own.py:small", "a.h5"), "own.py:small is not a scorer"),
        (("score", "own.py:system", "a.h5"), "'system' is not defined in own"),
        (("score", "absent.py:X", "a.h5"), "there is no file .*absent.py"),
        (("score", "absent:X", "a.h5"), "there is no scorer 'absent:X'"),
        (("score", "msp", "a.h5", "--import", "absent"), "cannot import absent .*No module named"),
        (("score", "msp", "a.h5", "--import", "json.py"), "another module is named 'json'"),
        (("score", "msp", "a.h5", "--import", "a-b.py"), "cannot be imported under the name 'a-b'"),
        (("score", "msp", "a.h5", "--import", "broken.py"), r"cannot import broken \(ZeroDivisionError"),
        (("extract", "own.py:small", "own.py:noisy?m=3", "b.h5"), "has no option 'm'"),
        (("extract", "own.py:small", "own.py:noisy", "b.h5", "--probe", "own.py:small"), "own.py:small is not a probe"),
        (("extract", "own.py:noisy", "own.py:noisy", "b.h5"), "returned ImageArrays: it must return a torch.nn.Module"),
        (("extract", "own.py:small", "own.py:noisy", "b.h5", "--model-arg", "depth=3"), "cannot be called with"),
        (("extract", "own.py", "own.py:noisy", "b.h5"), "is a file without its function: write own.py:FUNCTION"),
        *(
            (
                ("extract", "own.py:small", "own.py:noisy", "b.h5", "--model-arg", f"{key}=3"),
                f"cannot set '{key}': {why}",
            )
            for key, why in {
                "name": "it is the name",
                "checkpoint": "pass --ch",
                "num_classes": "pass --num-cl",
            }.items()
        ),
    ],
)
def test_mistakes_in_names_of_code(folder: Path, words: tuple[str, ...], message: str) -> None:
    FeatureSet(torch.ones(3, 2), torch.eye(3)).save("a.h5")
    for name, code in {"json": "", "a-b": "", "broken": "1 / 0"}.items():
        (folder / f"{name}.py").write_text(code)
    assert re.search(message, refused(*words))


def test_number_of_classes_is_an_argument_of_an_own_function(folder: Path) -> None:
    ok("extract", "own.py:sized", "own.py:noisy", "c.h5", "--num-classes", "4")
    assert ood_scores.load("c.h5").num_classes == 4


def test_error_in_own_code_shows_its_lines_and_not_those_of_the_package(folder: Path) -> None:
    FeatureSet(torch.ones(3, 2), torch.eye(3)).save("a.h5")
    words = [sys.executable, "-m", "ood_scores", "score", "own.py:Failing", "a.h5"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "# the line to mend" in result.stderr
    assert "one_pass.py" not in result.stderr


def test_fitted_scorer_of_the_documentation_is_saved_and_loaded(folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own_code.md").read_text()
    code = page.split("```python\n")[2].partition("```")[0]
    (folder / "own.py").write_text(code)
    generator = torch.Generator().manual_seed(0)
    train, test = (FeatureSet(torch.randn(20, 4, generator=generator)) for _ in range(2))
    train.save("train.h5")
    test.save("test.h5")
    ok("score", "own.py:DistanceToMean", "test.h5", "--fit", "train.h5", "--out", "s.csv")
    expected = -(test.features - train.features.double().mean(dim=0)).norm(dim=1)
    np.testing.assert_allclose(scores_in("s.csv"), expected, rtol=1e-5)
    scorer = ood_scores.create_scorer("distance_to_mean").fit(train)
    scorer.save("fitted.safetensors")
    assert torch.equal(ood_scores.load_scorer("fitted.safetensors").score(test), scorer.score(test))


@pytest.mark.parametrize(
    ("name", "unknown"),
    [("undescribed", "input_size, interpolation, mean, std, crop_pct, crop_mode"), ("half_described", "mean, std")],
)
def test_an_unknown_preprocessing_is_demanded(folder: Path, name: str, unknown: str) -> None:
    user_code.import_code("own.py")
    model = load_model(f"own.py:{name}")
    with pytest.raises(BadInput, match=f"the {unknown} of the preprocessing of own.py:{name} are unknown: give the"):
        preprocessing(model)
    preprocessing(model, [0.5], [0.5], input_size=(3, 8, 8), crop_pct=1.0, crop_mode="center", interpolation="bilinear")
