"""Tests of the commands against the functions that they call; errors are one line with exit code 1."""

import csv
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from networks import resnet
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner, Result

import ood_scores
from ood_scores.cli import app
from ood_scores.cli.parsing import named_caches, parameters
from ood_scores.data.catalog import CATALOG
from ood_scores.data.images import ImageDataset
from ood_scores.data.sources import open_dataset
from ood_scores.errors import OodScoresError
from ood_scores.evaluation.metrics import METRICS
from ood_scores.features import FeatureSet, Head
from ood_scores.scorers import create_scorer
from ood_scores.scorers.registry import scorer_class

COMMANDS = (
    *("extract", "score", "show", "evaluate", "inspect", "list", "demo"),
    *("train", "benchmark", "compare", "calibrate", "predict"),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def call(*words: object, columns: int = 100) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": str(columns)})


def ok(*words: object, columns: int = 100) -> str:
    result = call(*words, columns=columns)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    """Return the message of a command that fails with an error of the package."""
    result = call(*words)
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
    return result.output


def read_csv(path: Path) -> pd.DataFrame:
    """Read all cells as text."""
    with path.open(newline="") as file:
        return pd.DataFrame(list(csv.DictReader(file)))


def synthetic(rows: int, seed: int, shift: float = 0.0, labeled: bool = True) -> FeatureSet:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, rows)
    features = (rng.standard_normal((rows, 6)) + 2 * np.eye(4, 6)[labels] + shift).astype(np.float32)
    head = Head(np.eye(4, 6, dtype=np.float32))
    logits = head(torch.from_numpy(features))
    return FeatureSet(features, logits, labels if labeled else None, head)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    sets = {
        "train": synthetic(200, 0),
        "id": synthetic(90, 1),
        "near": synthetic(70, 2, -0.5, labeled=False),
        "far": synthetic(60, 3, 2.0, labeled=False),
    }
    for name, feats in sets.items():
        feats.save(folder / f"{name}.h5")
    return {name: folder / f"{name}.h5" for name in sets}


def images(count: int, size: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


# ---- extract


@pytest.mark.parametrize("file", ["weights.safetensors", "plain.pth"])
def test_extract_of_npz_equals_the_model(checkpoints: dict[str, Path], tmp_path: Path, file: str) -> None:
    pixels, labels = images(10), np.arange(10) % 7
    np.savez(tmp_path / "some.npz", images=pixels, labels=labels)
    spec = f"npz:{tmp_path / 'some.npz'}"
    output = ok(
        "extract", "cifar_resnet20", spec, tmp_path / "c.h5", "--checkpoint", checkpoints[file], "--batch-size", 4,
        "--workers", 0,
    )  # fmt: skip
    feats: Any = ood_scores.load(tmp_path / "c.h5")
    accuracy = float((feats.logits.argmax(1) == feats.labels).double().mean())
    assert f"10 rows of 64 features, 7 classes, accuracy {accuracy:.2%} in" in " ".join(output.split())
    inputs = torch.from_numpy((pixels / 255 - MEAN) / STD).float().permute(0, 3, 1, 2)
    model: Any = resnet(num_classes=7)
    torch.testing.assert_close(feats.logits, logits_of(model, inputs))
    with torch.no_grad():
        torch.testing.assert_close(feats.features, model.forward_head(model.forward_features(inputs), pre_logits=True))
    assert torch.equal(feats.labels, torch.from_numpy(labels))
    assert feats.provenance.dataset == "some"
    assert feats.provenance.architecture == "cifar_resnet20"


def test_extract_of_digits_with_all_options(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    words = ("extract", "cifar_resnet20", "digits?classes=8", tmp_path / "d.h5", "--workers", 0, "--device", "cpu")
    weights = ("--checkpoint", checkpoints["weights.safetensors"], "--num-classes", 7)
    ok(
        *words,
        *weights,
        "--dtype",
        "float64",
        "--head",
        "linear",
        "--name",
        "eights",
        "--mean",
        "0.5,0.25,0",
        "--std",
        2,
    )
    feats: Any = ood_scores.load(tmp_path / "d.h5")
    grey = torch.stack([_resized(open_dataset("digits?classes=8")[row][0]) for row in range(len(feats))])
    inputs = (grey - torch.tensor([0.5, 0.25, 0.0])[:, None, None]) / 2
    torch.testing.assert_close(feats.logits, logits_of(resnet(num_classes=7), inputs).double())
    assert feats.provenance.dataset == "eights"
    assert feats.provenance.head == "linear"
    assert feats.provenance.precision.endswith("stored float64")


def test_extract_refuses_a_cache_with_different_settings(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=images(4))
    words = ("extract", "cifar_resnet20", f"npz:{tmp_path / 'some.npz'}", tmp_path / "c.h5", "--workers", 0)
    weights = ("--checkpoint", checkpoints["plain.pth"])
    ok(*words, *weights)
    ok(*words, *weights)
    message = refused(*words, *weights, "--std", 1)
    assert "first inputs" in message
    assert "--overwrite" in message
    ok(*words, *weights, "--dtype", "float16", "--overwrite")
    assert ood_scores.load(tmp_path / "c.h5").features.dtype == torch.float16


def _resized(image: Any) -> Tensor:
    from torchvision.transforms import functional as F

    return F.to_tensor(F.resize(image, 32, F.InterpolationMode.BILINEAR, antialias=True))


def test_extract_records_mixed_precision(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    weights = checkpoints["plain.pth"]
    words = ("cifar_resnet20", "digits?classes=1", tmp_path / "c.h5", "--checkpoint", weights, "--workers", 0)
    ok("extract", *words, "--amp", "bf16", "--device", "cpu")
    feats: Any = ood_scores.load(tmp_path / "c.h5")
    assert "autocast bf16" in feats.provenance.precision


def test_extract_with_layers_and_probes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=images(6))
    words = ("extract", "cifar_resnet20", f"npz:{tmp_path / 'some.npz'}", tmp_path / "c.h5", "--workers", 0)
    weights = ("--checkpoint", checkpoints["plain.pth"])
    ok(
        *words,
        *weights,
        "--layers",
        "layer1, layer3",
        "--probe",
        "odin:epsilon=0,std=(1.0,2.0,1.0)",
        "--probe",
        "norms",
    )
    feats: Any = ood_scores.load(tmp_path / "c.h5")
    assert list(feats.extras)[:2] == ["layers.layer1", "layers.layer3"]
    assert torch.equal(feats.extras["odin"], feats.logits)
    assert "norms.layer2" in feats.extras
    assert "ODIN(name='odin', epsilon=0.0, temperature=1000.0, std=(1.0, 2.0, 1.0))" in feats.provenance.probe_texts
    assert "probes PooledLayers(name='layers'," in " ".join(ok("inspect", tmp_path / "c.h5").split())
    assert "layers and probes" in refused(*words, *weights, "--layers", "stages")
    assert "choose from activations, adascale, batch_norm_gap, extremes, fgsm" in refused(
        *words, *weights, "--probe", "colour"
    )
    assert "choose from name, epsilon" in refused(*words, *weights, "--probe", "odin:colour=red")
    assert "write odin:key=value" in refused(*words, *weights, "--probe", "odin:0.1")


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_extract_refuses_a_malicious_pickle_without_opening_it(tmp_path: Path, as_zip: bool) -> None:
    marker, file = tmp_path / "marker", tmp_path / "evil.pth"
    if as_zip:
        torch.save({"state_dict": Malicious(marker)}, file)
    else:
        file.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    message = refused("extract", "cifar_resnet20", "digits", tmp_path / "c.h5", "--checkpoint", file)
    assert "mkdir" in message
    assert not marker.exists()
    assert not (tmp_path / "c.h5").exists()


# ---- score


def test_score_writes_the_scores(caches: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.csv"
    output = ok("score", "gradnorm", caches["id"], "--param", "p=2", "--param", "bias=true", "--out", out)
    feats: Any = ood_scores.load(caches["id"])
    expected = ood_scores.score("gradnorm", feats, p=2.0, bias=True)
    table = read_csv(out)
    assert list(table.columns) == ["row", "score", "label", "prediction"]
    assert table["score"].astype(float).tolist() == expected.tolist()
    assert table["row"].astype(int).tolist() == list(range(90))
    assert table["label"].astype(int).tolist() == feats.labels.tolist()
    assert table["prediction"].astype(int).tolist() == feats.logits.argmax(1).tolist()
    for value in (expected.min(), expected.median(), expected.max()):
        assert f"{value:.3g}"[:3] in output
    lowest = re.findall(r"^│ +(\d+) │", output, re.MULTILINE)
    assert [int(row) for row in lowest] == expected.argsort()[:5].tolist()


@pytest.mark.parametrize("words", [("score", "energy", "id"), ("evaluate", "--id", "id", "--ood", "far")])
def test_tables_are_written_though_the_reader_of_the_output_leaves(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError

    given = [caches.get(word, word) for word in words]
    options = [*given, *(("--scorer", "msp", "--details", tmp_path / "rows.csv") if words[0] == "evaluate" else ())]
    ok(*options, "--out", tmp_path / "expected.csv")
    expected = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    (tmp_path / "rows.csv").unlink(missing_ok=True)
    monkeypatch.setattr(f"ood_scores.cli.{words[0]}.answer", closed)
    call(*options, "--out", tmp_path / "table.csv")
    written = {path.name: path.read_text() for path in tmp_path.glob("*.csv")}
    assert written == {**expected, "table.csv": expected["expected.csv"]}


def test_score_writes_json_with_a_fit_set_and_without_labels(caches: dict[str, Path], tmp_path: Path) -> None:
    words = ("score", "mahalanobis", caches["near"], "--fit", caches["train"], "--out", tmp_path / "s.json")
    ok(*words, "--param", "normalize=true")
    content = json.loads((tmp_path / "s.json").read_text())
    near, train = ood_scores.load(caches["near"]), ood_scores.load(caches["train"])
    expected = ood_scores.score("mahalanobis", near, train, normalize=True)
    assert content["scorer"] == "mahalanobis"
    assert content["parameters"] == {"normalize": True}
    assert [row["score"] for row in content["rows"]] == expected.tolist()
    assert set(content["rows"][0]) == {"row", "score", "prediction"}


@pytest.mark.parametrize(
    ("scorer", "text", "expected"),
    [
        ("gradnorm", "p=inf", float("inf")),
        ("gradnorm", "p=2", 2.0),
        ("gradnorm", "target=predicted", "predicted"),
        ("gradnorm", "bias=False", False),
        ("knn", "k=3", 3),
        ("knn", "index=IVF4,Flat", "IVF4,Flat"),
    ],
)
def test_scorer_parameters_have_the_type_of_their_default(scorer: str, text: str, expected: object) -> None:
    ((_, found),) = parameters(scorer, [text]).items()
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--param", "p"), "write --param key=value"),
        (("--param", "p=abc"), "p is a value such as 1.0, got 'abc'"),
        (("--param", "bias=maybe"), "bias is a value such as false"),
        (("--param", "q=1"), "has no parameter 'q': choose from p, temperature"),
        (("--param", "p=-1"), r"p must be in \(0, inf\]"),
        (("--out", "scores.xlsx"), "use a file name that ends in .csv, .parquet, or .json"),
    ],
)
def test_score_refuses_bad_options(caches: dict[str, Path], words: tuple[str, ...], message: str) -> None:
    assert re.search(message, refused("score", "gradnorm", caches["id"], *words))


def test_score_names_the_missing_fit_option(caches: dict[str, Path]) -> None:
    assert "--fit CACHE" in refused("score", "knn", caches["id"])


# ---- evaluate


def test_evaluate_command_writes_the_frame_of_evaluate(caches: dict[str, Path], tmp_path: Path) -> None:
    output = ok(
        "evaluate", "--id", caches["id"], "--ood", caches["near"], "--ood", f"there={caches['far']}",
        "--fit", caches["train"], "--scorer", "energy", "--scorer", "mahalanobis", "--out", tmp_path / "t.csv",
    )  # fmt: skip
    sets = {name: ood_scores.load(path) for name, path in caches.items()}
    ood = {"near": sets["near"], "there": sets["far"]}
    expected = ood_scores.evaluate(["energy", "mahalanobis"], id=sets["id"], ood=ood, fit=sets["train"])
    found = read_csv(tmp_path / "t.csv").astype(expected.dtypes.to_dict())
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert f"accuracy {expected.attrs['id_accuracy']:.2%}" in output
    mean = expected.groupby("scorer")[["auroc", "fpr95_id", "fpr95_ood"]].mean()
    for scorer, rows in expected.groupby("scorer"):
        shown = [rows.iloc[0], rows.iloc[1], mean.loc[scorer]]
        cells = [100 * row[metric] for row in shown for metric in ("auroc", "fpr95_id", "fpr95_ood")]
        (line,) = [line for line in output.splitlines() if line.strip().startswith(str(scorer))]
        assert [float(cell) for cell in line.split()[1:]] == pytest.approx(cells, abs=0.051)


def test_evaluate_command_shows_and_writes_the_metrics_asked_for(caches: dict[str, Path], tmp_path: Path) -> None:
    words = ["evaluate", "--id", caches["id"], "--ood", caches["near"], "--scorer", "energy"]
    output = ok(*words, "--metrics", "oscr, autc, nll", "--out", tmp_path / "t.csv")
    assert "labels of ID images, in nats, not in percent; lower is better" in " ".join(output.split())
    assert "OSCR: probability that an ID image is classified correctly" in " ".join(output.split())
    heads, arrows, row = (
        next(line for line in output.splitlines() if text in line) for text in ("OSCR", "↑", "energy ")
    )
    assert heads.rstrip().endswith("OSCR  AUTC   NLL")
    assert len(row.rstrip()) == len(heads.rstrip()) == len(arrows.rstrip())
    sets = {name: ood_scores.load(caches[name]) for name in ("id", "near")}
    asked = ["oscr", "autc", "nll"]
    expected = ood_scores.evaluate(["energy"], id=sets["id"], ood={"near": sets["near"]}, metrics=asked)
    written = pd.read_csv(tmp_path / "t.csv")
    assert written[asked].to_numpy() == pytest.approx(expected[asked].to_numpy())
    assert "there is no metric 'oscar' (did you mean 'oscr'?)" in " ".join(
        refused(*words, "--metrics", "oscar").split()
    )


def test_tables_of_many_metrics_fit_into_a_terminal(caches: dict[str, Path]) -> None:
    asked = [metric for metric in METRICS.values() if metric.on_request]
    words = ["--id", caches["id"], "--ood", caches["near"], "--scorer", "energy", "--metrics"]
    output = ok("evaluate", *words, ",".join(metric.name for metric in asked), columns=80)
    heads = [line for line in output.splitlines() if not line.endswith(".")]
    assert "…" not in output
    assert len([line for line in heads if line.strip().startswith("energy")]) > 1
    assert all(any(f" {metric.label} " in f"{line} " for line in heads) for metric in asked)


def test_evaluate_command_names_scorers_that_cannot_run(caches: dict[str, Path], tmp_path: Path) -> None:
    output = ok("evaluate", "--id", caches["id"], "--ood", caches["near"], "--out", tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    used = {row["scorer"] for row in content["rows"]}
    fitted = {name for name in ood_scores.list_scorers() if create_scorer(name).fit_needs}
    assert {"energy", "gradnorm", "msp"} <= used
    assert not used & fitted
    left_out = " ".join(output.split("left out", 1)[1].split())
    assert all(name in left_out for name in fitted)
    assert "pass --fit CACHE" in left_out
    assert "rankfeat scoring needs 'rankfeat', which was not extracted: extract it with --probe rankfeat" in left_out
    feats: Any = ood_scores.load(caches["id"])
    assert content["left_out"]["knn"] == "it needs a fit set: pass --fit CACHE"
    assert content["id_accuracy"] == float((feats.logits.argmax(1) == feats.labels).double().mean())

    ok(
        "evaluate",
        "--id",
        caches["id"],
        "--ood",
        caches["near"],
        "--fit",
        caches["train"],
        "--out",
        tmp_path / "f.json",
    )
    with_fit = {row["scorer"] for row in json.loads((tmp_path / "f.json").read_text())["rows"]}
    assert {"knn", "mahalanobis", *used} <= with_fit


def test_commands_name_rows_of_the_fit_set(caches: dict[str, Path], tmp_path: Path) -> None:
    rows = len(ood_scores.load(caches["id"]))
    shared = f"the fit set shares {rows} of {rows} rows with the"
    words = ("--id", caches["id"], "--ood", caches["near"], "--fit", caches["id"], "--scorer", "knn")
    output = ok("evaluate", *words, "--out", tmp_path / "t.json")
    assert f"warning: {shared} ID set (identical features)" in output
    assert json.loads((tmp_path / "t.json").read_text())["overlap"] == [
        {"set": "fit set", "other": "ID set", "rows": rows, "of": rows}
    ]
    assert f"warning: {shared} set to score" in ok("score", "knn", caches["id"], "--fit", caches["id"])


def test_evaluate_tables_fit_the_terminal(caches: dict[str, Path]) -> None:
    sets = [word for name in "abcdefg" for word in ("--ood", f"{name}={caches['far']}")]
    for columns in (60, 80, 120):
        output = ok("evaluate", "--id", caches["id"], *sets, "--scorer", "energy", columns=columns)
        lines = [line for line in output.splitlines() if not line.startswith("warning:")]  # the sets are the same
        assert max(map(len, lines)) <= columns
        rows = [line.split()[1:] for line in output.splitlines() if line.strip().startswith("energy")]
        assert sum(map(len, rows)) == 8 * 3
        assert "average" in output


def test_a_table_of_two_sets_fits_a_terminal_of_80_columns(caches: dict[str, Path]) -> None:
    words = [
        "evaluate",
        "--id",
        caches["id"],
        "--ood",
        caches["near"],
        "--ood",
        caches["far"],
        "--fit",
        caches["train"],
    ]
    output = ok(*words, "--scorer", "relative_mahalanobis", columns=80)
    (row,) = (line.split() for line in output.splitlines() if "relative_mahalanobis" in line)
    assert len([float(cell) for cell in row[1:]]) == 9


def test_scorers_separated_by_commas_are_told_apart(caches: dict[str, Path]) -> None:
    words = ["evaluate", "--id", caches["id"], "--ood", caches["near"], "--scorer", "energy, msp"]
    assert "repeat the option, as in --scorer energy --scorer msp." in refused(*words)


def test_a_cache_that_is_not_there_is_looked_for(caches: dict[str, Path]) -> None:
    other = caches["id"].with_name(f"{caches['id'].stem}s.h5")
    assert f"there is no file {other} (did you mean '{caches['id'].name}'?)." in refused("inspect", other)
    assert "is a folder: pass the file of a cache" in refused("inspect", caches["id"].parent)


def test_evaluate_takes_parameters_of_scorers(caches: dict[str, Path], tmp_path: Path) -> None:
    sets = ["--id", caches["id"], "--ood", caches["near"], "--fit", caches["train"], "--out", tmp_path / "t.csv"]
    ok("evaluate", *sets, "--scorer", "knn:k=3,normalize=false", "--scorer", "knn", "--scorer", "energy")
    table = pd.read_csv(tmp_path / "t.csv").set_index("scorer")
    assert list(table.index) == ["knn:k=3,normalize=false", "knn", "energy"]
    fit, inside, outside = (ood_scores.load(caches[name]) for name in ("train", "id", "near"))
    scorer = ood_scores.create_scorer("knn", k=3, normalize=False).fit(fit)
    assert table["auroc"].iloc[0] == pytest.approx(
        ood_scores.metrics.auroc(scorer.score(inside), scorer.score(outside))
    )
    assert "'knn' has no parameter 'kk' (did you mean 'k'?)" in refused("evaluate", *sets, "--scorer", "knn:kk=3")
    assert "--scorer energy is listed twice" in refused("evaluate", *sets, "--scorer", "energy", "--scorer", "energy")


def test_evaluate_tables_mark_experimental_scorers(caches: dict[str, Path]) -> None:
    words = ["evaluate", "--id", caches["id"], "--ood", caches["near"], "--fit", caches["train"]]
    output = ok(*words, "--scorer", "core", "--scorer", "energy", columns=120)
    assert [line.split()[0] for line in output.splitlines() if re.match(r" *(core|energy)", line)] in (
        ["core*", "energy"],
        ["energy", "core*"],
    )
    assert "*: experimental, may not be the score of the paper" in " ".join(output.split())
    assert "experimental" not in ok(*words, "--scorer", "energy", columns=120)


def test_evaluate_command_refuses_two_sets_with_one_name(caches: dict[str, Path]) -> None:
    words = ("--ood", caches["near"], "--ood", f"near={caches['far']}")
    assert "two OoD sets are named 'near'" in refused("evaluate", "--id", caches["id"], *words)


def test_equals_sign_in_the_path_of_a_cache_starts_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.h5").touch()
    texts = ["runs/lr=0.1/val.h5", "svhn=runs/lr=0.1/svhn.h5", "a=b.h5", "c=d.h5"]
    assert named_caches(texts) == {
        "val": Path("runs/lr=0.1/val.h5"),
        "svhn": Path("runs/lr=0.1/svhn.h5"),
        "a=b": Path("a=b.h5"),
        "c": Path("d.h5"),
    }


def test_cache_of_the_command_line_is_opened_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the README and the quick start, where both write cache/val.h5."""
    model = resnet(num_classes=2).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    for number, name in enumerate("ab"):
        (tmp_path / "val" / name).mkdir(parents=True)
        pixels = np.full((40, 40, 3), 100 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "val" / name / "0.png")
    cache = tmp_path / "val.h5"
    words = ("--checkpoint", tmp_path / "weights.pth", "--workers", 0)
    ok("extract", "cifar_resnet20", f"folder:{tmp_path / 'val'}", cache, *words)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    dataset = timm.data.create_dataset("folder", str(tmp_path / "val"), transform=transform)
    monkeypatch.setattr(type(model), "forward", pytest.fail)
    feats = ood_scores.extract(model, DataLoader(dataset, batch_size=64), cache)
    assert len(feats) == 2


# ---- inspect


class Interrupted(Dataset[Tensor]):
    name = "half"

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> Tensor:
        if row >= 24:
            raise KeyboardInterrupt
        return torch.full((3,), float(row))


def test_inspect_of_finished_caches(caches: dict[str, Path], tmp_path: Path) -> None:
    output = ok("inspect", caches["id"])
    assert "finished, 90 rows" in output
    for array in ("features", "logits", "labels", "head/weight", "head/bias"):
        assert array in output
    assert re.search(r"features +│ 90 × 6 +│ float32", output)
    assert "It has no provenance" in output

    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    rows = DataLoader(torch.utils.data.TensorDataset(torch.rand(20, 3)), 8)
    made: Any = ood_scores.extract(model, rows, tmp_path / "m.h5", name="noise", progress=False)
    output = ok("inspect", tmp_path / "m.h5")
    for text in ("Sequential", "noise", "8 images at a time", made.provenance.weights_sha256[:16]):
        assert text in output


def test_inspect_of_an_unfinished_cache(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        ood_scores.extract(nn.Linear(3, 2), DataLoader(Interrupted(), 8), tmp_path / "u.h5", progress=False)
    output = ok("inspect", tmp_path / "u.h5")
    assert "not finished, 24 of 40 rows (60%) so far" in output
    assert re.search(r"features +│ 24 × 3 +│ float32", output)
    assert "half" in output
    assert "run the same ood-scores extract" in refused("score", "energy", tmp_path / "u.h5")


def test_extract_says_what_it_keeps_continues_and_reuses(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c.h5"
    words = ["extract", "cifar_resnet20", "digits?classes=8&take=40", cache, "--workers", 0]
    words += ["--checkpoint", checkpoints["plain.pth"], "--batch-size", 8]
    honest = ImageDataset.__getitem__

    def interrupted(images: ImageDataset, row: int) -> Any:
        return honest(images, row) if row < 24 else Interrupted()[row]

    monkeypatch.setattr(ImageDataset, "__getitem__", interrupted)
    for options, again in (([], " again"), (["--overwrite"], ", without --overwrite or --no-resume,")):
        stopped = call(*words, *options, columns=200)
        assert stopped.exit_code == 130
        assert f"stopped: {cache} keeps 24 rows; run the same command{again} to continue" in stopped.stderr
    monkeypatch.setattr(ImageDataset, "__getitem__", honest)
    assert "features, resumed after 24 rows" in call(*words, columns=200).stderr
    assert call(*words).stderr == f"{cache} is complete: reused, the model was not run\n"


def test_other_commands_say_that_they_were_stopped(caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["ood_scores.evaluation.evaluate"], "score_runs", interrupted)
    stopped = call("evaluate", "--id", caches["id"], "--ood", caches["near"])
    assert (stopped.exit_code, stopped.stdout) == (130, "")
    assert stopped.stderr == "stopped: the caches are unchanged; run the same command again\n"
    monkeypatch.setattr("ood_scores.cli.inspect._progress", interrupted)
    stopped = call("inspect", caches["id"])
    assert (stopped.exit_code, stopped.stderr) == (130, "stopped: run the same command again\n")


def test_inspect_of_other_files(tmp_path: Path) -> None:
    import h5py

    (tmp_path / "notes.txt").write_text("not a cache")
    with h5py.File(tmp_path / "other.h5", "w") as h5:
        h5["x"] = 1
    assert "is not an HDF5 file" in refused("inspect", tmp_path / "notes.txt")
    assert "not a feature cache" in refused("inspect", tmp_path / "other.h5")
    assert "there is no file" in refused("inspect", tmp_path / "absent.h5")


# ---- list, help, errors


def test_list_shows_all_scorers_with_their_parameters() -> None:
    output = ok("list", "*", columns=120)
    for name in ood_scores.list_scorers():
        assert re.search(rf"^{name} +\S", output, flags=re.MULTILINE)
    for text in ("temperature=1.0", "k=50", "fit: features, labels", "Maximum softmax probability"):
        assert text in output
    matching = ok("list", "*norm*")
    assert "gradnorm" in matching
    assert "energy" not in matching
    assert "choose from activation_ratio" in refused("list", "nothing*")


def test_list_fits_in_a_screen_and_groups_all_scorers_by_what_they_need() -> None:
    output = ok("list", columns=80)
    assert len(output.splitlines()) <= 24
    groups = [set(re.findall(r"\w+", text)) for text in re.split(r"^(?:From|After) .*$", output, flags=re.MULTILINE)]
    for name in ood_scores.list_scorers():
        assert sum(name in group for group in groups[1:]) == 1, name
    starred = set(re.findall(r"(\w+)\*", output))
    assert starred == {name for name in ood_scores.list_scorers() if scorer_class(name).tags.experimental}
    logits, features, fitted, probed = groups[1:]
    assert {"msp", "energy"} <= logits
    assert {"gradnorm", "scale"} <= features
    assert {"knn", "vim", "prior_msp"} <= fitted
    assert {"odin", "gram", "ensemble", "mahalanobis_layers"} <= probed


@pytest.mark.parametrize("scorer", ["weiper", "knn"])
def test_list_cuts_no_parameter_in_a_terminal_of_80_columns(scorer: str) -> None:
    output = ok("list", scorer, columns=80)
    words = output.split()
    for name, known in inspect.signature(scorer_class(scorer)).parameters.items():
        assert f"{name}={known.default}" in words
    assert "…" not in output


def test_list_of_datasets() -> None:
    output = ok("list", "--datasets", columns=100)
    for known in CATALOG:
        assert re.search(rf"^{known.name} +{known.license.split()[0]}", output, flags=re.MULTILINE)
    lines = ok("list", "ninc?", "--datasets", columns=40).splitlines()
    assert "license: CC BY 4.0" in lines
    assert "md5: NINCO_all.tar.gz: b9ffae324363cd900a81ce3c367cd834" in lines
    assert any(line.startswith("get: git clone https://github.com/Jingkang50/OpenOOD && ") for line in lines)
    assert "opens with: imglist:benchmark_imglist/imagenet/test_ninco.txt?root=images_largescale" in lines
    (cifar,) = json.loads(ok("list", "cifar10", "--datasets", "--json"))["datasets"]
    assert (cifar["images"], cifar["get"]) == (60000, "opening it downloads it")
    assert "choose from cifar10" in refused("list", "nothing*", "--datasets")


def test_list_groups_scorers_by_family_and_cites_their_papers() -> None:
    assert "Gaussians\nmahalanobis " in ok("list", "mahalanobis", columns=120)
    experimental = " ".join(ok("list", "core", columns=400).split())
    assert "Experimental: written after the abstract and summaries of the paper" in experimental
    assert "Experimental" not in ok("list", "mahalanobis*", columns=120)
    papers = ok("list", "knn", "--papers", columns=200)
    assert "Yiyou Sun, Yifei Ming, Xiaojin Zhu, Yixuan Li. Out-of-Distribution Detection with Deep Nearest" in papers
    assert "https://github.com/deeplearning-wisc/knn-ood" in papers
    entries = ok("list", "ash_*", "--bibtex")
    assert entries.startswith("@inproceedings{djurisic2023extremely,\n  title = {{Extremely Simple Activation Shaping")
    assert entries.count("@") == 1


HELP = """
import sys
from typer.testing import CliRunner
from ood_scores.cli import app
for command in sys.argv[1:]:
    print(CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "80"}).output)
    print("=====")
print([name for name in ("torch", "timm", "pandas", "matplotlib") if name in sys.modules])
"""


def test_help_has_examples_and_imports_no_heavy_package() -> None:
    answer = subprocess.run([sys.executable, "-c", HELP, "", *COMMANDS], capture_output=True, text=True, check=True)
    *helps, imported = answer.stdout.split("=====\n")
    assert imported.strip() == "[]"
    assert all(command in helps[0] for command in COMMANDS)
    for command, text in zip(COMMANDS, helps[1:], strict=True):
        examples = [line for line in text.splitlines() if line.strip().startswith(f"ood-scores {command}")]
        assert "Examples" in text
        assert len(examples) >= 2 or command == "inspect"
        assert max(map(len, text.splitlines())) <= 80


def test_version_and_short_help() -> None:
    assert ok("--version") == f"ood-scores {ood_scores.__version__}\n"
    for words in ((), *((command,) for command in COMMANDS)):
        assert ok(*words, "-h") == ok(*words, "--help")


def test_help_breaks_no_line_within_a_sentence() -> None:
    assert "refused. Under torchrun, the processes share the rows." in ok("extract", "-h", columns=300)


def test_entry_points_of_the_command_line() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "ood_scores", "inspect", "absent.h5"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr == "error: there is no file absent.h5.\n"


@pytest.mark.parametrize(("typed", "completed"), [("ev", "evaluate"), ("evaluate --metr", "--metrics")])
def test_the_tab_key_completes(typed: str, completed: str) -> None:
    typed = f"ood-scores {typed}"
    state = {"_OOD_SCORES_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    assert CliRunner().invoke(app, [], prog_name="ood-scores", env=state).output.split() == [completed]


def test_output_has_no_colors_where_it_is_not_a_terminal() -> None:
    shown = CliRunner().invoke(app, ["list", "energy"], color=True, env={"FORCE_COLOR": None, "TERM": "xterm-256color"})
    assert "energy" in shown.output
    assert "\x1b" not in shown.output


def test_usage_errors_exit_with_code_2() -> None:
    assert call("score").exit_code == 2
    assert call("nonsense").exit_code == 2
    assert call("extract", "a", "b", "c", "--amp", "int8").exit_code == 2


def test_extract_reports_bad_data_before_creating_a_model(tmp_path: Path) -> None:
    message = refused("extract", "no_such_model", "npz:absent.npz", tmp_path / "c.h5")
    assert "there is no absent.npz" in message
    assert "no kind of dataset" in refused("extract", "cifar_resnet20", "nothing:x", tmp_path / "c.h5")
    assert "cannot read 'a,b'" in refused("extract", "x", "digits", tmp_path / "c.h5", "--mean", "a,b")


def test_warnings_of_commands_are_one_line(caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def score(*_: Any, **__: Any) -> Tensor:
        for _turn in range(6):
            warnings.warn("few rows", stacklevel=1)
            with warnings.catch_warnings():  # makes Python forget what it has shown
                pass
        raise OodScoresError("stopped")

    monkeypatch.setattr(ood_scores, "score", score, raising=False)
    assert call("score", "energy", caches["id"]).stderr == "warning: few rows\nerror: stopped\n"
