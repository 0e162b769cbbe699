"""Explanations of the hardest rows of a benchmark: their places, similar rows by hand, maps, and reasons for none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_benchmark import part, spec

import ood_scores
from ood_scores.benchmark import run
from ood_scores.benchmark.hardest import hardest_places
from ood_scores.benchmark.networks import Network
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Preprocessing, ScorerTable
from ood_scores.benchmark.unit_files import Scored

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # the network has not learned some classes


def named(*names: str) -> tuple[ScorerTable, ...]:
    return tuple(ScorerTable(name, name) for name in names)


def scored(data: Path, out: Path, *parts: Part) -> list[Scored]:
    return list(run(spec(*parts), out=out, data=data, jobs=1, progress=False).scored)


def features(out: Path, name: str) -> ood_scores.FeatureSet:
    return ood_scores.load(next(out.glob(f"caches/*/{name}-*.h5")))


def test_the_hardest_rows_are_explained(data: Path, tmp_path: Path) -> None:
    units = scored(data, tmp_path, part(scorers=named("knn"), relabel=True, far=()))
    first = units[0].explained
    assert first is not None
    assert (first["scorer"], first["fit"], first["no_map"]) == ("knn", "fits", None)
    scores: dict[str, Any] = {name: values.numpy() for name, values in units[0].scores["knn"].items()}
    highest, lowest = hardest_places(scores)
    assert [(each["set"], each["row"]) for each in first["rows"]] == [*highest, *lowest]
    assert [scores[name][row] for name, row in highest] == sorted(scores["cousins"], reverse=True)[:8]
    assert lowest == [("id", row) for row in np.argsort(scores["id"], kind="stable")[:8]]
    fit = features(tmp_path, "fits")
    bank = torch.nn.functional.normalize(fit.features.double())
    for each in first["rows"]:
        place, row = each["set"], each["row"]
        origin, own_row = units[0].origins[place][row], int(units[0].rows[place][row])
        feats = features(tmp_path, origin)[own_row : own_row + 1]
        distances = (torch.nn.functional.normalize(feats.features.double()) - bank).norm(dim=1)
        nearest = distances.argsort()[:4]
        assert [near["distance"] for near in each["similar"]] == pytest.approx(distances[nearest].tolist(), abs=1e-6)
        assert [near["row"] for near in each["similar"]] == nearest.tolist()
        assert [near["label"] for near in each["similar"]] == [str(row % 4) for row in nearest.tolist()]
        assert each["map"].startswith("data:image/webp;base64,")
        logits: Any = feats.logits
        probability, label = logits.double().softmax(dim=1)[0].sort(descending=True)
        assert [name for name, _ in each["classes"]] == [str(number) for number in label[:3].tolist()]
        assert [share for _, share in each["classes"]] == pytest.approx(probability[:3].tolist())
        assert each["label"] == (str(int(feats.class_labels()[0])) if place == "id" else None)
    assert any(units[0].origins["id"][each["row"]] == "cousins" for each in first["rows"] if each["set"] == "id")
    page = (tmp_path / "report.html").read_text()
    assert page.count('<img class="map"') == page.count("nearest in the fit set</summary>") == 16


def test_probes_and_ensembles_have_no_maps(data: Path, tmp_path: Path) -> None:
    probes = Extraction(batch_size=8, workers=0, probes=("odin",))
    probed = part(title="Probed", scorers=named("odin"), extraction=probes)
    seeds = ModelTable("cifar_resnet20", "Net", ("0.safetensors", "1.safetensors"))
    several = part(title="All", models=(seeds,), ensembles={"All": ("Net",)}, scorers=named("energy"), fit=None)
    reasons = [unit.explained and unit.explained["no_map"] for unit in scored(data, tmp_path, probed, several)]
    assert reasons == ["'odin' reads odin, which have no positions", None, None, "an ensemble has several maps"]
    page = (tmp_path / "report.html").read_text()
    assert page.count('<img class="map"') == 16  # of the first checkpoint
    assert "There are no maps, because an ensemble has several maps." in page


def test_each_model_is_opened_once_for_all_parts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tuple(ModelTable("cifar_resnet20", label, f"{number}.safetensors") for number, label in enumerate("AB"))
    parts = [part(title=title, models=models, scorers=named("energy"), fit=None) for title in ("First", "Second")]
    first = scored(data, tmp_path, *parts)
    shutil.rmtree(tmp_path / "scores")
    opened: list[str] = []

    def counted(network: Network, preprocessing: Preprocessing) -> Any:
        opened.append(network.table.title)
        return open_network(network, preprocessing)

    open_network = Network.open
    monkeypatch.setattr(Network, "open", counted)
    again = scored(data, tmp_path, *parts)
    assert opened == ["A", "B"]
    assert [(unit.part, unit.model) for unit in again] == [
        (title, name) for title in ("First", "Second") for name in "AB"
    ]
    assert [unit.explained for unit in again] == [unit.explained for unit in first]
    assert all(unit.explained and unit.explained["no_map"] is None for unit in again)


def test_without_the_model_there_are_no_maps(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr("ood_scores.benchmark.hardest.open_dataset", fails)
    (unit,) = scored(data, tmp_path, part(scorers=named("energy"), fit=None))
    assert unit.explained is not None
    assert unit.explained["no_map"] == "the model could not be run again ('gone')"
    assert [each["similar"] for each in unit.explained["rows"]] == [[]] * 16
    assert "There are no maps, because the model could not be run again" in (tmp_path / "report.html").read_text()
