"""A plain install: what needs no extra works without the packages of the extras, the rest says what to install."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_results import make_results

import ood_scores
from ood_scores import FeatureSet
from ood_scores.benchmark.report import write_report
from ood_scores.errors import MissingInput, MissingPackage
from ood_scores.optional_packages import installed, require

CONFIG = ConfigParser()
CONFIG.read(Path(__file__).parents[1] / "setup.cfg")
EXTRAS = CONFIG["options.extras_require"]
BLOCKED = (
    *("matplotlib", "jinja2", "markdown_it", "faiss", "tensorboard", "transformers", "datasets", "open_clip"),
    *("webdataset", "onnx", "onnxruntime", "onnxscript", "pyarrow", "lightning", "accelerate", "fastapi", "ray"),
    *("wandb", "mlflow", "pytorch_ood", "torchmetrics", "IPython", "sphinx"),
)
PLAIN = f"""
import json, sys
from importlib.machinery import PathFinder
class Plain(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED} else PathFinder.find_spec(name, path, target)
sys.meta_path = [Plain if finder is PathFinder else finder for finder in sys.meta_path]
import numpy as np, torch, ood_scores
from ood_scores.benchmark import run
from ood_scores.cli import app
from typer.testing import CliRunner
torch.manual_seed(0)
features = [torch.randn(rows, 8) for rows in (200, 60, 50)]
model = torch.nn.Linear(8, 4)
fit, val, ood = (ood_scores.extract(model, [rows], f"{{i}}.h5", progress=False) for i, rows in enumerate(features))
table = ood_scores.evaluate(["energy", "vim", "knn", "nnguide"], id=val, ood={{"o": ood}}, fit=fit, progress=False)
scores = {{name: ood_scores.score(name, val, fit=fit).tolist() for name in ("energy", "knn", "nnguide")}}
ood_scores.create_scorer("knn").fit(fit).save("knn.safetensors")
def message(call):
    try:
        call()
    except ood_scores.errors.MissingPackage as error:
        return str(error)
def figures():
    import ood_scores.plotting.curves
def papers():
    import ood_scores.benchmark.figures
def index():
    ood_scores.score("knn", val, fit=fit, index="IVF4,Flat")
def clip():
    from ood_scores.models.opening import load_model
    load_model("open_clip:ViT-B-32/openai")
def hub():
    from ood_scores.models.opening import load_model
    import pathlib
    pathlib.Path("vit").mkdir()
    description = dict(model_type="vit", architectures=["ViTForImageClassification"])
    pathlib.Path("vit/config.json").write_text(json.dumps(description))
    load_model("hf:vit")
def onnx():
    ood_scores.calibrate("energy", model, id=val).export_onnx("a.onnx", features[1])
doctor = CliRunner().invoke(app, ["doctor"])
shown = CliRunner().invoke(app, ["evaluate", "--id", "1.h5", "--ood", "2.h5", "--fit", "0.h5", "--scorer", "knn"])
print(json.dumps({{
    "auroc": dict(zip(table["scorer"], table["auroc"])), "scores": scores,
    "messages": {{f.__name__: message(f) for f in (figures, papers, index, clip, hub, onnx)}},
    "doctor": [doctor.exit_code, doctor.output], "evaluate": [shown.exit_code, shown.output],
}}))
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a process finds in which no package of an extra can be imported; its folder is ``folder``."""
    folder = tmp_path_factory.mktemp("plain")
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder}


def test_extract_score_and_evaluate_need_no_extra(plain: Any) -> None:
    fit, val, ood = (ood_scores.load(plain["folder"] / f"{i}.h5") for i in range(3))
    for name, scores in plain["scores"].items():
        assert ood_scores.score(name, val, fit=fit).tolist() == scores
    table = ood_scores.evaluate(list(plain["auroc"]), id=val, ood={"o": ood}, fit=fit, progress=False)
    assert dict(zip(table["scorer"], table["auroc"], strict=True)) == plain["auroc"]
    assert plain["evaluate"][0] == 0
    assert f"{100 * plain['auroc']['knn']:.1f}" in plain["evaluate"][1]


def test_neighbors_without_faiss_are_those_of_formulas(plain: Any) -> None:
    fit, val = (np.asarray(ood_scores.load(plain["folder"] / f"{i}.h5").features, float) for i in range(2))
    bank, rows = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (fit, val))
    distances = np.sort(np.linalg.norm(rows[:, None] - bank[None], axis=2), axis=1)[:, 49]
    np.testing.assert_allclose(plain["scores"]["knn"], -distances, rtol=1e-5)
    saved = ood_scores.load_scorer(plain["folder"] / "knn.safetensors")
    assert saved.score(ood_scores.load(plain["folder"] / "1.h5")).tolist() == plain["scores"]["knn"]


@pytest.mark.parametrize(
    ("use", "extra"),
    [
        ("figures", "report"),
        ("papers", "report"),
        ("index", "knn"),
        ("clip", "clip"),
        ("hub", "hub"),
        ("onnx", "export"),
    ],
)
def test_what_needs_an_extra_says_how_to_install_it(plain: Any, use: str, extra: str) -> None:
    assert plain["messages"][use].endswith(f'which is not installed: pip install "ood_scores[{extra}]".')
    assert extra in EXTRAS


def test_doctor_names_the_missing_extras(plain: Any) -> None:
    code, output = plain["doctor"]
    assert code == 0, output
    assert "✓ scores" in output


def test_all_has_every_extra_of_users() -> None:
    developers = {"all", "test", "docs", "knn-cpu"}
    (everything,) = EXTRAS["all"].split()
    assert set(re.findall(r"\w+", everything)) - {"ood_scores"} == EXTRAS.keys() - developers


def test_a_report_without_its_packages_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = make_results(tmp_path, n_id=40, n_ood=30)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r'report.html is not written: pip install "ood_scores\[report\]", then run'):
        paths = write_report(results)
    assert [path.name for path in paths] == ["report.md", "tables.tex"]
    assert not (results.folder / "report.html").exists()


def test_a_missing_package_is_an_import_error_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert not installed("json", "faiss")
    require("nothing needs", "none", "json")
    with pytest.raises(ImportError) as raised:
        require("indexes need", "knn", "json", "faiss")
    assert isinstance(raised.value, MissingPackage)
    assert isinstance(raised.value, MissingInput)
    assert str(raised.value) == 'indexes need faiss, which is not installed: pip install "ood_scores[knn]".'
    feats = FeatureSet(torch.randn(60, 4))
    with pytest.raises(MissingPackage):
        ood_scores.score("knn", feats, fit=feats, index="HNSW8")


def test_the_version_has_one_source() -> None:
    assert CONFIG["metadata"]["version"] == "attr: ood_scores.version.__version__"
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ood_scores.__version__}\n" in citation
    changes = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changes, flags=re.MULTILINE)[0] == ood_scores.__version__
