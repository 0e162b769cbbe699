"""Zero-shot classifiers on the command line and in benchmark files, from a folder that ``save_pretrained`` wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner
from vision_language import ADJECTIVES, CLASSES, NOUNS, clip, saved

import ood_scores
from ood_scores import NegativeWords
from ood_scores.benchmark.spec_file import load_spec
from ood_scores.cli import app
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput
from ood_scores.models.opening import load_model, preprocessing

TEXTS = ("a photo of a {}.", "the {}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, lists of words, and pictures in folders with the names of classes."""
    where = tmp_path_factory.mktemp("zero_shot")
    saved(where / "model", clip())
    for name, words in {"classes": CLASSES, "nouns": NOUNS, "adjectives": ADJECTIVES}.items():
        (where / f"{name}.txt").write_text("\n".join(words), encoding="utf-8")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (where / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(where / "photos" / name / f"{number}.png")
    return where


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    return done.exit_code, done.output


def extract(folder: Path, cache: Path, *options: object) -> tuple[int, str]:
    place = f"folder:{folder / 'photos'}"
    return call("extract", f"hf:{folder / 'model'}", place, cache, "--workers", 0, "--device", "cpu", *options)


def words(folder: Path) -> list[object]:
    texts = [word for text in TEXTS for word in ("--templates", text)]
    lists = ["--negatives", folder / "nouns.txt", "--adjectives", folder / "adjectives.txt"]
    return ["--classes", folder / "classes.txt", *texts, *lists]


def test_extract_and_score(folder: Path, tmp_path: Path) -> None:
    code, output = extract(folder, tmp_path / "c.h5", *words(folder), "--probe", "local_mcm")
    assert code == 0, output
    assert "12 rows of 12 features, 4 classes" in output
    found = ood_scores.load(tmp_path / "c.h5")
    model = load_model(
        f"hf:{folder / 'model'}", classes=CLASSES, templates=TEXTS, negatives=NegativeWords(NOUNS, ADJECTIVES)
    )
    images = open_dataset(f"folder:{folder / 'photos'}", preprocessing(model))
    assert images.class_names is not None
    numbers = [CLASSES.index(name) for name in images.class_names for _ in range(3)]
    assert found.labels is not None
    assert found.labels.tolist() == numbers
    with torch.no_grad():
        expected = model(torch.stack([images[row][0] for row in range(12)]))
    assert found.logits is not None
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    for scorer in ("mcm", "gl_mcm", "neglabel", "csp"):
        code, output = call("score", scorer, tmp_path / "c.h5")
        assert code == 0, output
    code, output = call("inspect", tmp_path / "c.h5")
    assert code == 0, output


def test_calibrate_and_predict(folder: Path, tmp_path: Path) -> None:
    code, output = call(
        *("calibrate", f"hf:{folder / 'model'}", "--id", f"folder:{folder / 'photos'}", "--out", tmp_path / "detector"),
        *("--scorer", "neglabel", "--keep", 0.8, "--workers", 0, "--device", "cpu", *words(folder)),
    )
    assert code == 0, output
    code, output = call(
        *("predict", folder / "photos", "--detector", tmp_path / "detector", "--workers", 0, "--device", "cpu"),
        *("--out", tmp_path / "table.csv"),
    )
    assert code == 0, output
    assert "fire truck" in (tmp_path / "table.csv").read_text() + output


def test_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "twice.txt").write_text("cat\ncat\n", encoding="utf-8")
    for options, message in (
        (["--classes", tmp_path / "twice.txt"], "classes have the same name ('cat')"),
        (["--templates", "the {}"], "templates belong to a zero-shot classifier"),
        (["--classes", folder / "classes.txt", "--templates", "a photo"], "cannot read the templates in 'a photo'"),
        (["--classes", folder / "classes.txt", "--adjectives", folder / "nouns.txt"], "pass --negatives, too"),
    ):
        code, output = extract(folder, tmp_path / "c.h5", *options)
        assert code == 1
        assert message in " ".join(output.split())


def test_benchmark(folder: Path, tmp_path: Path) -> None:
    (folder / "bench.toml").write_text(
        'id = "photos"\nfar = ["noise"]\nscorers = ["mcm", "gl_mcm", "neglabel", "csp"]\n'
        '[sets]\nphotos = "folder:photos"\nnoise = "noise:uniform?n=8&size=40"\n'
        f'[[model]]\nname = "hf:{folder / "model"}"\nclasses = "classes.txt"\ntemplates = ["the {{}}"]\n'
        'negatives = {nouns = "nouns.txt", adjectives = "adjectives.txt", share = 0.5}\n'
        '[extraction]\nworkers = 0\nprobes = ["local_mcm"]\n',
        encoding="utf-8",
    )
    spec = load_spec(folder / "bench.toml")
    assert spec.parts[0].models[0].arguments["classes"] == "classes.txt"
    run = ["benchmark", folder / "bench.toml", "--data", folder, "--out", tmp_path / "run", "--jobs", 1]
    code, output = call(*run)
    assert code == 0, output
    table = ood_scores.benchmark.load_results(tmp_path / "run").table
    assert set(table["scorer"]) == {"mcm", "gl_mcm", "neglabel", "csp"}
    caches = set(tmp_path.rglob("photos-*.h5"))
    assert len(caches) == 1
    (folder / "classes.txt").write_text("\n".join(CLASSES[::-1]), encoding="utf-8")
    code, output = call(*run)
    (folder / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    assert code == 0, output
    assert len(set(tmp_path.rglob("photos-*.h5"))) == 2, "the content of the file counts"


def test_a_list_of_some_of_the_classes_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """The others would have labels that are no classes, or those of other classes."""
    (tmp_path / "some.txt").write_text("\n".join(CLASSES[:3]), encoding="utf-8")
    message = "the model has 3 classes, the dataset 4, of which 1 are not among them (crane bird): add these"
    code, output = extract(folder, tmp_path / "c.h5", "--classes", tmp_path / "some.txt")
    assert code == 1
    assert message in " ".join(output.split())
    model = load_model(f"hf:{folder / 'model'}", classes=CLASSES[:3])
    images = open_dataset(f"folder:{folder / 'photos'}", preprocessing(model))
    with pytest.raises(BadInput, match="of which 1 are not among them"):
        ood_scores.extract(model, DataLoader(images, 4), progress=False)
    place = f"folder:{folder / 'photos'}?labels=none"
    words = ["--classes", tmp_path / "some.txt", "--workers", 0]
    code, output = call("extract", f"hf:{folder / 'model'}", place, tmp_path / "c.h5", *words)
    assert code == 0, output
    assert ood_scores.load(tmp_path / "c.h5").labels is None
    (folder / "some.toml").write_text(
        'id = "photos"\nfar = ["noise"]\nscorers = ["mcm"]\n'
        '[sets]\nphotos = "folder:photos"\nnoise = "noise:uniform?n=8&size=40"\n'
        f'[[model]]\nname = "hf:{folder / "model"}"\nclasses = {list(CLASSES[:3])}\n[extraction]\nworkers = 0\n',
        encoding="utf-8",
    )
    code, output = call("benchmark", folder / "some.toml", "--data", folder, "--out", tmp_path / "run", "--jobs", 1)
    assert "the model has 3 classes, the dataset 4" in " ".join(output.split())
