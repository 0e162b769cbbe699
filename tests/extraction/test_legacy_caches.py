"""Caches that an earlier version wrote: they open, are reused, are compared, and are continued."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import legacy_files as legacy
import numpy as np
import pytest
import torch

import ood_scores
from ood_scores import FeatureSet
from ood_scores.errors import StaleCache, UnfinishedCache
from ood_scores.features import Provenance
from ood_scores.features.migration import migrated
from ood_scores.features.storage import cache as caches

FACTS = legacy.FACTS["caches"]
FINISHED = [name for name in FACTS if name != "unfinished"]
REUSED = [name for name in FINISHED if name in legacy.EXTRACTIONS]

REWRITTEN = {
    "std=[0.5, 0.25, 1])": "std=(0.5, 0.25, 1))",
    "epsilon=np.float64(0.01), temperature=np.float32(10.5)": "epsilon=0.01, temperature=10.5",
    "orders=[1, 3])": "orders=(1, 3))",
    "orders=range(1, 3))": "orders=(1, 2))",
    "[inf, -0.5]": "(inf, -0.5)",
}
"""Values that are now recorded in another form, by their text."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the folder of caches."""
    return Path(shutil.copytree(legacy.FOLDER / "caches", tmp_path / "caches"))


def extract(name: str, folder: Path, model: torch.nn.Module | None = None) -> FeatureSet:
    entry = legacy.EXTRACTIONS[name]
    network = model or legacy.network(entry["network"])
    return ood_scores.extract(network, legacy.loader(**entry["loader"]), folder / f"{name}.h5", **legacy.options(name))


def columns_of(feats: FeatureSet) -> dict[str, torch.Tensor]:
    columns = {"features": feats.features, "logits": feats.logits, "labels": feats.labels}
    columns |= {f"extras/{name}": values for name, values in feats.extras.items()}
    return {name: values for name, values in columns.items() if values is not None}


@pytest.mark.parametrize("name", FINISHED)
def test_columns_are_read_bit_for_bit(name: str) -> None:
    feats = ood_scores.load(legacy.FOLDER / "caches" / f"{name}.h5")
    found = {
        column: {
            "shape": list(values.shape),
            "dtype": str(values.dtype).removeprefix("torch."),
            "sha256": sha256(np.ascontiguousarray(values.numpy()).data).hexdigest(),
        }
        for column, values in columns_of(feats).items()
    }
    assert found == FACTS[name]["columns"]


@pytest.mark.parametrize("name", FINISHED)
def test_provenance_is_what_it_was(name: str) -> None:
    found, expected = ood_scores.load(legacy.FOLDER / "caches" / f"{name}.h5").provenance, FACTS[name]["provenance"]
    if expected is None:
        assert found is None
        return
    assert found is not None
    expected = dict(expected)
    assert found.precision == expected.pop("precision")
    assert found.requested_head == expected.pop("head")
    probes = "\n".join(expected.pop("probes"))
    for old, new in REWRITTEN.items():
        probes = probes.replace(old, new)
    assert "\n".join(found.probe_texts) == probes
    assert {key: getattr(found, key) for key in expected} == expected
    assert Provenance.from_attributes(json.loads(json.dumps(found.to_attributes()))) == found


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("plain", ("float32", None, False, False, "float32", None)),
        ("float16_unlabelled", ("float32", None, False, False, "float16", None)),
        ("amp_bf16", ("float32", "bf16", False, False, "float32", None)),
        ("channels_last", ("float32", None, True, False, "float32", None)),
        ("compiled", ("float32", None, False, True, "float32", "fc")),
        ("headless", ("float32", None, False, False, "float64", False)),
    ],
)
def test_precision_and_head_become_fields(name: str, fields: tuple[Any, ...]) -> None:
    found = ood_scores.load(legacy.FOLDER / "caches" / f"{name}.h5").provenance
    assert found is not None
    assert (found.model_dtype, found.amp, found.channels_last, found.compiled, found.dtype, found.head) == fields


def test_probes_become_records() -> None:
    described = {
        "probes": json.dumps(["a.<locals>.B(x=-inf, y={'k': (1,)}, z=<function f>)", "B(x=f(1), y=-2, z=b'')"])
    }
    first, second = json.loads(migrated(described)["probes"])
    assert first == {"kind": "a.<locals>.B(x=-inf, y={'k': (1,)}, z=<function f>)", "parameters": {}}
    assert second == {"kind": "B", "parameters": {"x": {"repr": "f(1)"}, "y": -2, "z": {"repr": "b''"}}}
    (third,) = json.loads(migrated({"probes": "[\"a.<locals>.B(x=-inf, y={'k': (1,)})\"]"})["probes"])
    parameters = {"x": {"float": "-inf"}, "y": {"mapping": [["k", [1]]]}}
    assert third == {"kind": "a.<locals>.B", "parameters": parameters}
    assert migrated(migrated(described)) == migrated(described)


@pytest.mark.parametrize("name", REUSED)
def test_the_same_call_opens_the_cache_without_running_the_model(name: str, folder: Path) -> None:
    before = (folder / f"{name}.h5").read_bytes()
    assert len(extract(name, folder)) == FACTS[name]["rows"]
    assert (folder / f"{name}.h5").read_bytes() == before


@pytest.mark.parametrize("name", ["plain", "probes"])
def test_another_call_is_refused(name: str, folder: Path) -> None:
    model = legacy.network(legacy.EXTRACTIONS[name]["network"])
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(StaleCache, match="weights"):
        extract(name, folder, model)
    options = legacy.options(name) | {"dtype": "float16", "probes": ["odin"]}
    batches = legacy.loader(**legacy.EXTRACTIONS[name]["loader"])
    with pytest.raises(StaleCache) as caught:
        ood_scores.extract(legacy.network("plain"), batches, folder / f"{name}.h5", **options)
    _, *lines = str(caught.value).splitlines()
    assert [line.strip().partition(":")[0] for line in lines[:-1]] == ["precision", "layers and probes"]


def test_an_unfinished_cache_is_continued(folder: Path) -> None:
    expected, path = FACTS["unfinished"]["continued"], folder / "unfinished.h5"
    with pytest.raises(UnfinishedCache, match=f"holds {FACTS['unfinished']['rows']} rows"):
        ood_scores.load(path)
    with caches.open_to_read(path) as h5:
        first = h5["logits"][3]
    with h5py.File(path, "r+") as h5:  # rows that are there are not computed again
        h5["logits"][3] = 77.0
    assert (extract("unfinished", folder).logits[3] == 77).all()  # type: ignore[index]
    shutil.copy(legacy.FOLDER / "caches" / "unfinished.h5", path)
    feats = extract("unfinished", folder)
    assert feats.logits is not None
    assert np.array_equal(feats.logits[3].numpy(), first)
    assert {column: list(values.shape) for column, values in columns_of(feats).items()} == {
        column: facts["shape"] for column, facts in expected["columns"].items()
    }
    energy = ood_scores.score("energy", feats).numpy()
    assert np.allclose(energy, legacy.ARRAYS["caches/unfinished/continued/energy"], rtol=1e-5)
