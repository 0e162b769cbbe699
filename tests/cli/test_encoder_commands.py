"""Encoders by the name of their folder: on the command line and in benchmark files, from extraction to a detector."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, MissingInput
from ood_scores.models.opening import load_model, preprocessing

WIDTH = 24


def write_pictures(top: Path, classes: dict[str, int], rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for name, brightness in classes.items():
        (top / name).mkdir(parents=True)
        for row in range(rows):
            pixels = np.clip(rng.normal(brightness, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(top / name / f"{row}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder like DINOv2 and its image processor, and pictures of two classes and of others."""
    where = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.Dinov2Model(config).save_pretrained(where / "dino")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(where / "dino")
    write_pictures(where / "train", {"day": 180, "night": 70}, 20, 0)
    write_pictures(where / "val", {"day": 180, "night": 70}, 12, 1)
    write_pictures(where / "dark", {"none": 0}, 12, 2)
    return where


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "250"})
    return done.exit_code, " ".join(done.output.split())


def extract(folder: Path, data: str, cache: Path, *options: object, model: str = "dino") -> tuple[int, str]:
    words = ("--workers", 0, "--device", "cpu", *options)
    return call("extract", f"hf:{folder / model}", f"folder:{folder / data}", cache, *words)


def benchmark(folder: Path, out: Path, pool: str = "cls+mean", model: str = "hf:dino") -> tuple[int, str]:
    (folder / "bench.toml").write_text(
        'id = "val"\nfar = ["dark"]\nfit = "train"\nscorers = ["mahalanobis", "mahalanobis_pp", "energy"]\n'
        '[sets]\nval = "folder:val"\ndark = "folder:dark"\ntrain = "folder:train"\n'
        f'[[model]]\nname = "{model}"\n[extraction]\nworkers = 0\npool = "{pool}"\n',
        encoding="utf-8",
    )
    return call("benchmark", folder / "bench.toml", "--data", folder, "--out", out, "--jobs", 1)


def test_extract_score_evaluate_show_and_calibrate(folder: Path, tmp_path: Path) -> None:
    for name in ("train", "val", "dark"):
        code, output = extract(folder, name, tmp_path / f"{name}.h5", "--pool", "cls+mean")
        assert code == 0, output
    val = ood_scores.load(tmp_path / "val.h5")
    model = load_model(f"hf:{folder / 'dino'}")
    images = open_dataset(f"folder:{folder / 'val'}", preprocessing(model))
    with torch.inference_mode():
        tokens = model(torch.stack([images[row][0] for row in range(24)])).last_hidden_state
    expected = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
    torch.testing.assert_close(val.features, expected, rtol=1e-5, atol=1e-5)
    assert val.ids is not None
    assert val.ids[0] == "day/0.png"
    code, output = call("score", "knn", tmp_path / "dark.h5", "--fit", tmp_path / "train.h5", "--param", "k=5")
    assert code == 0, output
    code, output = call("score", "energy", tmp_path / "dark.h5")
    assert code == 1
    assert "ood-scores linear-probe" in output
    probed = tmp_path / "probed"
    code, output = call(
        "linear-probe", *(tmp_path / f"{name}.h5" for name in ("train", "val", "dark")), "--out", probed
    )
    assert code == 0, output
    code, output = call(
        *("evaluate", "--id", probed / "val.h5", "--ood", probed / "dark.h5", "--fit", probed / "train.h5"),
        *("--scorer", "mahalanobis", "--scorer", "energy", "--out", tmp_path / "table.csv"),
    )
    assert code == 0, output
    assert set(pd.read_csv(tmp_path / "table.csv")["scorer"]) == {"mahalanobis", "energy"}
    code, output = call("show", probed / "val.h5", "--data", folder / "val", "--out", tmp_path / "grid.png")
    assert code == 0, output
    assert Image.open(tmp_path / "grid.png").size[0] > 300
    code, output = call(
        *("calibrate", f"hf:{folder / 'dino'}", "--scorer", "energy", "--id", probed / "val.h5"),
        *("--images", f"folder:{folder / 'val'}", "--keep", 0.9, "--out", tmp_path / "detector", "--device", "cpu"),
    )
    assert code == 0, output
    code, output = call(
        *("predict", folder / "dark", "--detector", tmp_path / "detector", "--workers", 0, "--device", "cpu"),
        *("--out", tmp_path / "predictions.csv"),
    )
    assert code == 0, output
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 12


def test_a_benchmark_of_an_encoder(folder: Path, tmp_path: Path) -> None:
    name = f"hf:{folder / 'dino'}"
    code, output = benchmark(folder, tmp_path, model=name)
    assert code == 0, output
    results = ood_scores.benchmark.load_results(tmp_path)
    assert set(results.table["scorer"]) == {"mahalanobis", "mahalanobis_pp"}
    (not_run,) = results.not_run
    assert (not_run.what, not_run.remedy) == ("energy", "use a model with a classifier, or ood-scores linear-probe")
    (cache,) = tmp_path.rglob("val-*.h5")
    assert ood_scores.load(cache).num_features == 2 * WIDTH
    code, output = benchmark(folder, tmp_path, "mean", model=name)
    assert code == 0, output
    assert sorted(ood_scores.load(each).num_features for each in tmp_path.rglob("val-*.h5")) == [WIDTH, 2 * WIDTH]
    code, output = benchmark(folder, tmp_path, "max", model=name)
    assert code == 1
    assert "pool must be 'mean', 'cls', 'cls+mean', a function, or FILE.py:FUNCTION, got 'max'" in output


def test_an_image_processor_of_another_model(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    message = (
        "the model cannot take a batch of shape [24, 3, 16, 16] (first row 0): Input image size (16*16) doesn't match"
    )
    remedy = "Check that the preprocessing is that of this model"
    model = load_model(f"hf:{folder / 'vit'}")
    images = open_dataset(f"folder:{folder / 'val'}", preprocessing(model))
    with pytest.raises(BadInput) as raised:
        ood_scores.extract(model, DataLoader(images, 24), progress=False)
    code, output = extract(folder, "val", tmp_path / "c.h5", model="vit")
    assert code == 1
    bench = benchmark(folder, tmp_path / "run", model=f"hf:{folder / 'vit'}")[1]
    for text in (str(raised.value), output, bench):
        assert message in text
        assert remedy in text
    (folder / "vit" / "preprocessor_config.json").write_text('{"image_processor_type": "Nothing"}')
    code, output = extract(folder, "val", tmp_path / "c.h5", model="vit")
    assert code == 1
    assert "transformers cannot open the image processor of" in output
    shutil.rmtree(folder / "vit")


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        (
            "transformers",
            "hf:dino",
            'models of Hugging Face need transformers, which is not installed: pip install "ood_scores[hub]"',
        ),
        ("open_clip", "open_clip:ViT-B-32/openai", "pip install"),
    ],
)
def test_a_missing_package(
    package: str, name: str, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = name.replace("dino", str(folder / "dino"))
    with pytest.raises(MissingInput, match=re.escape(message)):
        load_model(name)
    code, output = call("extract", name, f"folder:{folder / 'val'}", tmp_path / "c.h5", "--workers", 0)
    assert code == 1
    assert message in output
    assert message in benchmark(folder, tmp_path / "run", model=name)[1]
