"""Detectors on disk: the same predictions bit for bit, refused models, and damaged files."""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from detecting import PIXELS, Plain, Rows, extracted, network, same
from torch import nn

import ood_scores
from ood_scores import Detector, calibrate
from ood_scores.detector import Fusion
from ood_scores.detector.folder import sealed
from ood_scores.detector.hub import card
from ood_scores.errors import (
    BadInput,
    CacheWriteFailed,
    DamagedCache,
    ForeignFile,
    OodScoresError,
    OtherModel,
    UnknownName,
)
from ood_scores.features import FeatureSet
from ood_scores.models.running import on_cpu
from ood_scores.probes import ODIN
from ood_scores.scorers import Scorer, create_scorer

FILES = ["calibration.safetensors", "detector.json", "model.safetensors", "scorer.safetensors"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def sets(model: nn.Module) -> dict[str, FeatureSet]:
    probes = ["gram", "norms", ODIN(epsilon=0.1, std=(0.5, 0.4, 0.3))]
    return {name: extracted(model, 200, seed, probes=probes) for name, seed in (("fit", 1), ("id", 2))}


@pytest.fixture
def folder(tmp_path: Path, model: nn.Module, sets: dict[str, FeatureSet]) -> Path:
    """A saved detector."""
    calibrate("mahalanobis", model, fit=sets["fit"], id=sets["id"]).save(tmp_path / "detector")
    return tmp_path / "detector"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "energy": ("energy", {}),
    "delta": ("energy", {"keep": 0.9, "delta": 0.1}),
    "per class": ("gradnorm", {"keep": 0.7, "per_class": True}),
    "mahalanobis": ("mahalanobis", {"classes": ["ä", "b", "c", "d"]}),
    "vim": ("vim", {}),
    "knn": ("knn", {}),
    "react": ("react", {"preprocessing": {"mean": (0.2, 0.3, 0.4)}}),
    "gram": ("gram", {}),
    "block_norm": ("block_norm", {}),
    "odin": ("odin", {}),
    "fusion": (Fusion(["energy", "mahalanobis"], method="min"), {}),
    "nothing rejected": ("energy", {"keep": 0.999}),
}


@pytest.mark.filterwarnings("ignore:200 calibration rows are too few")
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_detector_has_the_same_predictions(
    case: str, tmp_path: Path, model: nn.Module, sets: dict[str, FeatureSet]
) -> None:
    scorer, options = CASES[case]
    detector = calibrate(scorer, model, fit=sets["fit"], id=sets["id"], **options)
    detector.save(tmp_path / "detector")
    assert names(tmp_path / "detector") == FILES
    alone, with_model = Detector.load(tmp_path / "detector"), Detector.load(tmp_path / "detector", model)
    assert with_model.model is model
    for images in (Rows(64, 5).inputs, PIXELS):
        expected = detector.predict(images)
        assert same(alone.predict(images), expected)
        assert same(with_model.predict(images), expected)
    assert repr(alone) == repr(detector)
    assert alone.calibration.thresholds == detector.calibration.thresholds
    assert (alone.classes, alone.forward.options.probes) == (detector.classes, detector.forward.options.probes)
    assert alone.data == detector.data
    alone.save(tmp_path / "again")
    assert same(Detector.load(tmp_path / "again").predict(PIXELS), detector.predict(PIXELS))


def test_the_description_is_plain_json(folder: Path, model: nn.Module) -> None:
    described = json.loads((folder / "detector.json").read_text(), parse_constant=pytest.fail)
    assert (described["format"], described["version"]) == ("ood_scores detector", 2)
    assert (described["scorer"], described["keep"], described["rows"]) == ("mahalanobis", 0.95, 200)
    assert float(described["threshold"]) == Detector.load(folder).calibration.thresholds[0].value
    assert described["model"]["architecture"] == "tiny_net"
    assert described["preprocessing"]["mean"] == [0.3, 0.3, 0.3]
    scores = safetensors.torch.load_file(folder / "calibration.safetensors")["scores"]
    assert torch.equal(scores, scores.sort().values)
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()


def test_channels_last_weights_are_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20").to(memory_format=torch.channels_last)
    inputs = torch.randn(96, 3, 32, 32)
    detector = calibrate("energy", model, id=[inputs[:32]])
    detector.save(tmp_path / "detector")
    loaded = Detector.load(tmp_path / "detector")
    strides = [weight.stride() for weight in model.parameters()]
    assert [weight.stride() for weight in loaded.model.parameters()] == strides
    assert same(loaded.predict(inputs), detector.predict(inputs))


def test_another_process_has_the_same_predictions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet20")
    inputs = torch.randn(64, 3, 32, 32)
    detector = calibrate("gradnorm", model, id=[inputs])
    detector.save(tmp_path / "detector")
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    code = (
        "import sys, numpy, torch; torch.set_num_threads(int(sys.argv[2])); from ood_scores import Detector;"
        "found = Detector.load(sys.argv[1] + '/detector').predict(numpy.load(sys.argv[1] + '/inputs.npy'));"
        "numpy.savez(sys.argv[1] + '/found.npz', **found.columns())"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())], check=True)
    found = np.load(tmp_path / "found.npz")
    assert all(np.array_equal(found[name], values) for name, values in detector.predict(inputs).columns().items())


# ---- models


def test_refuses_a_model_with_other_weights(folder: Path, model: nn.Module) -> None:
    with pytest.raises(OtherModel, match=r"calibrated with tiny_net with weights .*the model passed is tiny_net"):
        Detector.load(folder, network(1))
    with pytest.raises(OtherModel, match="the model passed is Plain"):
        Detector.load(folder, Plain())
    assert Detector.load(folder, network(0)).weights == Detector.load(folder, model).weights


def test_a_model_that_is_not_from_timm_is_passed_to_load(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Plain()
    detector = calibrate("energy", plain, id=[Rows(64, 2).inputs])
    with pytest.warns(UserWarning, match="the Plain is not saved with the detector, because only models of timm and"):
        detector.save(tmp_path / "detector")
    assert names(tmp_path / "detector") == [name for name in FILES if name != "model.safetensors"]
    with pytest.raises(BadInput, match=r"contains no model: pass the Plain .*Detector.load\(path, model\)"):
        Detector.load(tmp_path / "detector")
    inputs = Rows(20, 3).inputs
    assert same(Detector.load(tmp_path / "detector", plain).predict(inputs), detector.predict(inputs))


def text_classifier(attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=20, num_labels=3, **sizes, attn_implementation=attention)
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def test_a_model_of_transformers_is_saved_with_the_detector(tmp_path: Path) -> None:
    batch = {"input_ids": torch.randint(20, (64, 5)), "attention_mask": torch.ones(64, 5, dtype=torch.long)}
    detector = calibrate("energy", text_classifier(), id=[batch])
    detector.save(tmp_path / "detector")
    assert same(Detector.load(tmp_path / "detector").predict(batch), detector.predict(batch))
    assert type(Detector.load(tmp_path / "detector").model) is type(detector.model)
    text = card(detector, {"scorer": "energy", "model": "Bert"}, "me/x", tmp_path / "detector")
    assert "pipeline_tag: text-classification" in text
    assert "whether a text is out of distribution" in text
    assert "found = detector.predict(batch)  # an input of the model\n" in text
    with pytest.warns(UserWarning, match="not saved .* because BertFor.* created with the attention sdpa, not eager"):
        calibrate("energy", text_classifier("eager"), id=[batch]).save(tmp_path / "eager")
    with pytest.raises(BadInput, match="a graph has one input, but the batch also has attention_mask: calibrate a"):
        detector.export(batch)
    with pytest.raises(BadInput, match="what a tokenizer of texts returns"):
        detector.predict(["a text"])


def test_the_model_can_be_left_out(folder: Path, model: nn.Module) -> None:
    Detector.load(folder).save(folder, with_model=False)
    assert "model.safetensors" not in names(folder)
    with pytest.raises(BadInput, match="contains no model"):
        Detector.load(folder)
    assert len(Detector.load(folder, model).predict(PIXELS)) == 5


def test_a_model_that_timm_creates_differently_is_left_out(tmp_path: Path) -> None:
    inputs = Rows(64, 2).inputs
    changed = network()
    changed.get_submodule("bn1").eps = 0.5  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"not saved with the detector, because .*other logits.*load\(path, model\)"):
        calibrate("energy", changed, id=[inputs]).save(tmp_path / "detector")
    assert "model.safetensors" not in names(tmp_path / "detector")
    with pytest.warns(UserWarning, match="other weights or buffers"):
        calibrate("energy", network().double(), id=[inputs.double()]).save(tmp_path / "detector")


def test_arguments_of_the_timm_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = calibrate("energy", timm.create_model("tiny_net", norm=False, in_chans=1), id=[torch.rand(64, 1, 8, 8)])
    with pytest.warns(UserWarning, match=r"not saved with the detector, because .* is missing.*arguments=\{"):
        detector.save(tmp_path / "detector")
    with pytest.raises(BadInput, match="arguments cannot be stored as JSON"):
        detector.save(tmp_path / "detector", arguments={"norm": nn.Identity})
    detector.save(tmp_path / "detector", arguments={"norm": False})
    loaded = Detector.load(tmp_path / "detector")
    loaded.save(tmp_path / "again")
    assert same(Detector.load(tmp_path / "again").predict(PIXELS), detector.predict(PIXELS))
    assert same(Detector.load(tmp_path / "detector").predict(PIXELS), detector.predict(PIXELS))


def test_a_model_that_has_changed_is_not_saved(tmp_path: Path) -> None:
    model = network()
    detector = calibrate("energy", model, id=[Rows(64, 2).inputs])
    with torch.no_grad():
        model.get_submodule("fc").bias.add_(1)  # type: ignore[operator]
    with pytest.raises(OtherModel, match="have changed since the calibration"):
        detector.save(tmp_path / "detector")


def test_a_scorer_that_is_not_registered_is_not_saved(tmp_path: Path, model: nn.Module) -> None:
    class Mine(Scorer):
        needs = ("logits",)

        def score_block(self, block: Any) -> torch.Tensor:
            return block.max_logit()

    detector = calibrate(Mine(), model, id=[Rows(64, 2).inputs])
    with pytest.raises(BadInput, match="not registered"):
        detector.save(tmp_path / "detector")
    assert not list(tmp_path.iterdir())


# ---- folders


def test_replaces_a_detector_and_nothing_else(folder: Path, tmp_path: Path, model: nn.Module) -> None:
    detector = calibrate("energy", model, id=[Rows(64, 2).inputs])
    (folder / "notes.txt").write_text("mine")
    detector.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert Detector.load(folder).scorer == create_scorer("energy")
    (tmp_path / "empty").mkdir()
    detector.save(tmp_path / "empty")
    detector.save(tmp_path / "a" / "b" / "c")
    assert names(tmp_path / "empty") == names(tmp_path / "a" / "b" / "c") == FILES
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(ForeignFile, match="contains other files than a detector"):
        detector.save(tmp_path / "photos")
    assert names(tmp_path / "photos") == ["cat.png"]
    with pytest.raises(ForeignFile, match="is a file"):
        detector.save(tmp_path / "photos" / "cat.png")


@pytest.mark.parametrize("nth", range(4))
@pytest.mark.parametrize("place", ["detector", "new"])
def test_a_full_disk_leaves_the_old_detector(
    nth: int, place: str, folder: Path, tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync = itertools.count(), os.fsync

    def refuse_nth(file: int) -> None:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    expected = Detector.load(folder).predict(PIXELS)
    detector = calibrate("energy", model, id=[Rows(64, 2).inputs])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse_nth)
        with pytest.raises(CacheWriteFailed, match="No space left on device"):
            detector.save(tmp_path / place)
    assert same(Detector.load(folder).predict(PIXELS), expected)
    assert names(folder) == FILES
    assert names(tmp_path) == ["detector"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path, model: nn.Module) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CacheWriteFailed, match="could not write"):
        calibrate("energy", model, id=[Rows(64, 2).inputs]).save(tmp_path / "detector")


def shorten(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-30])


def description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "detector.json").read_text())


def change(folder: Path, **entries: Any) -> None:
    """Change entries of the description and renew its checksum."""
    (folder / "detector.json").write_text(json.dumps(sealed(description(folder) | entries)))


def drop(folder: Path, entry: str) -> None:
    described = description(folder)
    del described[entry]
    (folder / "detector.json").write_text(json.dumps(sealed(described)))


def alter(folder: Path, old: str, new: str) -> None:
    """Change the text of the description and leave its checksum."""
    text = (folder / "detector.json").read_text()
    assert old in text
    (folder / "detector.json").write_text(text.replace(old, new, 1))


def change_thresholds(folder: Path) -> None:
    """Make the thresholds NaN and renew all checksums."""
    tensors = safetensors.torch.load_file(folder / "calibration.safetensors")
    content = safetensors.torch.save(tensors | {"thresholds": torch.full_like(tensors["thresholds"], torch.nan)})
    (folder / "calibration.safetensors").write_bytes(content)
    digest = {"calibration.safetensors": hashlib.sha256(content).hexdigest()}
    change(folder, files=description(folder)["files"] | digest)


def name_a_file(folder: Path, name: str) -> None:
    change(folder, files=description(folder)["files"] | {name: "0" * 64})


DAMAGES: dict[str, tuple[Any, type[OodScoresError], str]] = {
    "a shorter scorer": (lambda f: shorten(f, "scorer.safetensors"), DamagedCache, "scorer.safetensors is missing, tr"),
    "shorter scores": (lambda f: shorten(f, "calibration.safetensors"), DamagedCache, "calibration.safetensors is mis"),
    "a shorter model": (lambda f: shorten(f, "model.safetensors"), DamagedCache, "model.safetensors is missing, trunc"),
    "a shorter description": (lambda f: shorten(f, "detector.json"), DamagedCache, "detector.json is truncated"),
    "no scorer": (lambda f: (f / "scorer.safetensors").unlink(), DamagedCache, "scorer.safetensors is missing"),
    "no description": (
        lambda f: (f / "detector.json").unlink(),
        ForeignFile,
        "is not a detector that ood_scores saved",
    ),
    "another program's": (lambda f: change(f, format="other"), ForeignFile, "is not a detector"),
    "a newer version": (lambda f: change(f, version=3), ForeignFile, "detector format 3; .* reads up to 2: update"),
    "no version": (lambda f: drop(f, "version"), DamagedCache, r"damaged \(KeyError\('version'\)\)"),
    "another mean": (lambda f: alter(f, "0.3", "0.8"), DamagedCache, "detector.json was altered"),
    "another threshold": (lambda f: alter(f, '"threshold": "', '"threshold": "1'), DamagedCache, "json was altered"),
    "an older version": (lambda f: alter(f, '"version": 2', '"version": 1'), DamagedCache, "json was altered"),
    "no checksum": (lambda f: alter(f, '"sha256"', '"sha257"'), DamagedCache, "json was altered"),
    "NaN thresholds": (change_thresholds, DamagedCache, "calibration.safetensors contains NaN"),
    "a file elsewhere": (lambda f: name_a_file(f, "../model.safetensors"), DamagedCache, "names a file '../model"),
    "a file of any name": (lambda f: name_a_file(f, "x.safetensors"), DamagedCache, "names a file 'x.safetensors'"),
    "no run": (lambda f: drop(f, "run"), DamagedCache, r"damaged \(KeyError\('run'\)\)"),
    "a timm model unknown here": (
        lambda f: change(f, model={"architecture": "no_net", "weights_sha256": "", "channels_last": False}),
        UnknownName,
        "timm has no model 'no_net'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_detector(damage: str, folder: Path) -> None:
    break_it, error, message = DAMAGES[damage]
    break_it(folder)
    with pytest.raises(error, match=message):
        Detector.load(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Detector.load(tmp_path / "detector")


def test_a_saved_model_is_a_checkpoint(folder: Path, model: nn.Module) -> None:
    again = ood_scores.models.opening.load_model("tiny_net", folder / "model.safetensors")
    inputs = Rows(8, 3).inputs
    with torch.no_grad():
        assert torch.equal(again(inputs), on_cpu(model)(inputs))
