"""Benchmark results equal those of the single functions; a second run reuses them."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from small_benchmark import CLASSES, ROWS, part, spec
from torch.nn.functional import cross_entropy

import ood_scores
from ood_scores.benchmark import Results, load_results, run
from ood_scores.benchmark.results import table_columns
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Published, ScorerTable, Search
from ood_scores.evaluation import metrics
from ood_scores.evaluation.long_tail import sc_ood
from ood_scores.evaluation.neural_collapse import neural_collapse
from ood_scores.evaluation.uncertainty import auroc_interval, bootstrap
from ood_scores.models import opening

METRICS = ["auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood", "n_id", "n_ood"]
TIMES = ["fit_seconds", "score_microseconds"]


pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_report"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the network has not learned some classes
]


def results(data: Path, out: Path, *parts: Part) -> Results:
    return run(spec(*parts), out=out, data=data, jobs=1, progress=False)


def caches(out: Path) -> dict[str, ood_scores.FeatureSet]:
    """Return the caches by dataset, for a run with one cache per dataset."""
    return {path.name.rsplit("-", 1)[0]: ood_scores.load(path) for path in out.glob("caches/*/*.h5")}


def named(*names: str) -> tuple[ScorerTable, ...]:
    return tuple(ScorerTable(name, name) for name in names)


# ---- all scorers


@pytest.fixture(scope="module")
def everything(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("everything")
    published = (
        Published("Net", "msp", "mean", "auroc", 50.0, "Nobody"),
        Published("Net", None, None, "accuracy", 20.0, "Nobody"),
        Published("Net", None, None, "nc4", 0.5, "Nobody"),
        Published("Net", "odin", "far", "fpr95_id", 10.0, "Nobody"),
    )
    return results(data, out, part(measures=("neural_collapse", "long_tail"), published=published))


def test_benchmark_table_equals_evaluate_on_the_caches(everything: Results) -> None:
    feats = caches(everything.folder)
    assert {name: len(each) for name, each in feats.items()} == {
        n: ROWS[n] for n in ("fits", "test", "cousins", "dark")
    }
    scorers = list(dict.fromkeys(everything.table["scorer"]))
    assert {"msp", "gradnorm", "knn", "vim", "mahalanobis"} <= set(scorers)
    ood = {name: feats[name] for name in ("cousins", "dark")}
    again = ood_scores.evaluate(scorers, id=feats["test"], ood=ood, fit=feats["fits"])
    columns = ["scorer", "ood", *METRICS]
    pd.testing.assert_frame_equal(everything.table[columns], again[columns], check_dtype=False)
    assert list(everything.table.columns) == list(table_columns())
    assert (everything.table["id_accuracy"] == again.attrs["id_accuracy"]).all()
    assert dict(zip(everything.table["ood"], everything.table["group"], strict=True)) == {
        "cousins": "near",
        "dark": "far",
    }


def test_benchmark_intervals_and_scores(everything: Results) -> None:
    (scored,) = everything.scored
    feats = caches(everything.folder)
    assert_allclose(scored.scores["energy"]["id"], ood_scores.score("energy", feats["test"]), rtol=0)
    assert_allclose(scored.scores["knn"]["dark"], ood_scores.score("knn", feats["dark"], feats["fits"]), rtol=0)
    inside, outside = scored.scores["knn"]["id"], scored.scores["knn"]["cousins"]
    row: Any = everything.table.set_index(["scorer", "ood"]).loc[("knn", "cousins")]
    auroc, fpr = auroc_interval(inside, outside), bootstrap(inside, outside, "fpr95_ood")
    assert (row["auroc_low"], row["auroc_high"]) == (auroc.low, auroc.high)
    assert (row["fpr95_ood_low"], row["fpr95_ood_high"]) == (fpr.low, fpr.high)
    assert torch.equal(scored.labels["id"], torch.arange(40) % CLASSES)
    logits: Any = feats["cousins"].logits
    assert torch.equal(scored.predictions["cousins"], logits.argmax(dim=1))
    assert (list(scored.origins["dark"]), scored.rows["dark"].tolist()) == (["dark"] * 25, list(range(25)))


def test_benchmark_costs_parameters_and_provenance(everything: Results) -> None:
    table: Any = everything.table.set_index("scorer")
    assert (table["score_microseconds"] > 0).all()
    assert (table.loc["msp", "fit_seconds"] == 0).all()
    assert (table.loc["knn", "fit_seconds"] > 0).all()
    row = table.iloc[0]
    made_by: Any = caches(everything.folder)["test"].provenance
    assert (row["weights_sha256"], row["id_sha256"]) == (made_by.weights_sha256, made_by.data_sha256)
    assert json.loads(row["versions"])["torch"] == version("torch")
    assert json.loads(table.loc["knn", "parameters"].iloc[0])["k"] == 50


def test_benchmark_measures_and_published_numbers(everything: Results) -> None:
    feats = caches(everything.folder)
    measures = everything.measures.set_index("measure")["value"]
    assert measures["nc4"] == neural_collapse(feats["fits"]).nc4
    assert {"ece", "accuracy_many", "accuracy_few"} <= set(measures.index)
    table = everything.table.set_index(["scorer", "ood"])["auroc"]
    ours = [50 * (table["msp", "cousins"] + table["msp", "dark"]), 100 * measures["accuracy"], measures["nc4"], np.nan]
    assert_allclose(everything.comparison["ours"], ours, rtol=1e-12)
    assert_allclose(everything.comparison["difference"], np.array(ours) - [50, 20, 0.5, 10], rtol=1e-12)
    assert everything.comparison["n"].tolist() == [1, 1, 1, 0]
    assert everything.comparison["sd"].isna().all()


def test_scorers_that_cannot_run_are_listed_with_reasons(everything: Results) -> None:
    reasons = {entry.what: (entry.reason, entry.remedy) for entry in everything.not_run}
    assert set(reasons) | set(everything.table["scorer"]) == set(ood_scores.list_scorers())
    assert reasons["odin"] == ("scoring needs 'odin', which was not extracted", '[extraction] probes = ["odin"]')
    assert reasons["gram"][1] == '[extraction] fit_probes = ["gram"]'
    assert reasons["mahalanobis_layers"][0].startswith("fitting needs 'layers'")


def assert_same(one: Results, other: Results, *, times: bool = True) -> None:
    for name in ("table", "comparison", "measures", "searched"):
        frames = [getattr(each, name) for each in (one, other)]
        if name == "table" and not times:
            frames = [frame.drop(columns=TIMES) for frame in frames]
        pd.testing.assert_frame_equal(*frames)
    assert (one.not_run, one.spec, one.title) == (other.not_run, other.spec, other.title)
    for here, there in zip(one.scored, other.scored, strict=True):
        for label in here.scores:
            for name in here.labels:
                assert torch.equal(here.scores[label][name], there.scores[label][name])


def test_benchmark_results_load_from_the_folder_alone(everything: Results) -> None:
    assert_same(everything, load_results(everything.folder))
    written = pd.read_csv(everything.folder / "results.csv")
    pd.testing.assert_frame_equal(written, everything.table, check_dtype=False)


def test_second_benchmark_run_only_reads(everything: Results, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened, or images were")

    monkeypatch.setattr(opening, "load_model", opened)
    monkeypatch.setattr("ood_scores.data.sources.open_dataset", opened)
    monkeypatch.setattr("ood_scores.benchmark.unit.find", opened)
    (given,) = everything.spec["parts"]
    published = tuple(Published(**number) for number in given["published"])
    again = part(measures=("neural_collapse", "long_tail"), published=published)
    assert_same(everything, results(data, everything.folder, again))


# ---- several parts, checkpoints, networks


def test_benchmark_parts_share_caches_with_equal_options(data: Path, tmp_path: Path) -> None:
    probing = Extraction(batch_size=8, workers=0, rows=10, probes=("norms",), fit_probes=("gram",))
    found = results(
        data,
        tmp_path,
        part(scorers=named("msp")),
        part(title="Same", scorers=named("energy")),
        part(title="Probed", fit="test", far=(), scorers=named("block_norm", "gram"), extraction=probing),
    )
    names = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.glob("caches/*/*.h5"))
    assert names == ["cousins", "cousins", "dark", "fits", "test", "test", "test"]
    assert list(found.table.groupby("part", sort=False).size()) == [2, 2, 1]
    assert [entry.what for entry in found.not_run] == ["gram"]  # the test sets lack what it needs
    (row,) = found.table[found.table["part"] == "Probed"].to_dict("records")
    assert (row["n_id"], row["n_ood"]) == (10, 10)


def test_scorers_that_no_model_can_run_are_named_before_the_extraction(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = part(scorers=named("odin", "msp")), part(title="All that can run")
    run(spec(*parts), out=tmp_path, data=data, jobs=1, progress=True)
    said = " ".join(capfd.readouterr().err.split())
    line = "will not run Small · odin: scoring needs 'odin', which was not extracted: [extraction] probes = [\"odin\"]"
    assert line in said
    assert said.count("will not run") == 1
    assert said.index("will not run") < said.index("scores of")


def test_benchmark_with_several_checkpoints_and_an_ensemble(data: Path, tmp_path: Path) -> None:
    seeds = ModelTable("cifar_resnet20", "Net", tuple(f"{seed}.safetensors" for seed in range(3)))
    published = (
        Published("Net", "msp", "dark", "auroc", 50.0, "Nobody"),
        Published("All", "msp", "dark", "auroc", 1, "N"),
    )
    found = results(
        data, tmp_path, part(models=(seeds,), ensembles={"All": ("Net",)}, scorers=named("msp"), published=published)
    )
    far = found.table[found.table["ood"] == "dark"]
    assert (far["model"].tolist(), far["checkpoint"].tolist()) == (["Net"] * 3 + ["All"], [0, 1, 2, 0])
    seeds_alone = 100 * far["auroc"].to_numpy()[:3]
    assert len(set(seeds_alone)) == 3
    first = found.comparison.iloc[0]
    assert_allclose([first["ours"], first["sd"], first["n"]], [seeds_alone.mean(), seeds_alone.std(ddof=1), 3])
    members = [
        [ood_scores.load(path) for path in sorted(tmp_path.glob(f"caches/*/{name}-*.h5"))] for name in ("test", "dark")
    ]
    again = ood_scores.evaluate(["msp"], id=members[0], ood={"dark": members[1]})
    assert far["auroc"].iloc[3] == pytest.approx(again["auroc"].iloc[0], abs=1e-12)
    assert far["weights_sha256"].iloc[3].count("+") == 2


# ---- other protocols


def test_relabeled_rows_count_as_id_for_their_own_dataset(data: Path, tmp_path: Path) -> None:
    found = results(data, tmp_path, part(scorers=named("msp"), relabel=True, far=("val_ood",), metrics=("nll",)))
    feats = caches(tmp_path)
    inside, near = (ood_scores.score("msp", feats[name]) for name in ("test", "cousins"))
    labels: Any = feats["cousins"].labels
    expected = metrics.compare(*sc_ood(inside, near, labels))
    (row,) = found.table.to_dict("records")
    assert {key: row[key] for key in expected} == dict(expected)
    assert (row["n_id"], row["n_ood"]) == (50, 20)
    rows = feats["test"], feats["cousins"][::3]
    logits = torch.cat([torch.as_tensor(each.logits) for each in rows])
    classes = torch.cat([torch.as_tensor(each.labels) for each in rows])
    assert row["nll"] == pytest.approx(float(cross_entropy(logits.double(), classes)), abs=1e-12)
    assert [(entry.what, entry.reason) for entry in found.not_run] == [
        ("val_ood", "all of its rows are labeled as ID classes")
    ]
    (scored,) = found.scored
    assert scored.origins["id"] == ["test"] * 40 + ["cousins"] * 10 + ["val_ood"] * 24
    assert scored.rows["id"].tolist()[40:50] == list(range(0, 30, 3))


def test_covariate_shifted_datasets_count_as_id(data: Path, tmp_path: Path) -> None:
    found = results(data, tmp_path, part(scorers=named("energy"), covariate=("shifted",), near=()))
    feats = caches(tmp_path)
    inside = torch.cat([ood_scores.score("energy", feats[name]) for name in ("test", "shifted")])
    expected = metrics.compare(inside, ood_scores.score("energy", feats["dark"]))
    (row,) = found.table.to_dict("records")
    assert {key: row[key] for key in METRICS} == dict(expected)
    shifted = ood_scores.evaluate(["msp"], id=feats["shifted"], ood={"dark": feats["dark"]}).attrs["id_accuracy"]
    measures = found.measures.set_index("measure")["value"]
    assert measures["accuracy on shifted"] == shifted
    assert row["id_accuracy"] == measures["accuracy"]


@pytest.mark.parametrize("metric", ["auroc", "fpr95_id"])
def test_search_uses_validation_sets_only(data: Path, tmp_path: Path, metric: Any) -> None:
    search = Search("val_id", ("val_ood",), metric, {"knn": {"k": (1, 5, 20, 10_000)}})
    found = results(data, tmp_path, part(scorers=named("knn", "msp"), search=search))
    feats = caches(tmp_path)

    def tried(k: int, inside: str, outside: str) -> float:
        sets = {outside: feats[outside]}
        knn = {"knn": ood_scores.create_scorer("knn", k=k)}
        return ood_scores.evaluate(knn, id=feats[inside], ood=sets, fit=feats["fits"])[metric].iloc[0]

    values = {k: tried(k, "val_id", "val_ood") for k in (1, 5, 20)}
    best = (max if metric == "auroc" else min)(values, key=lambda k: values[k])
    assert found.searched["value"].tolist()[:3] == list(values.values())
    assert np.isnan(found.searched["value"].iloc[3])
    assert found.searched["chosen"].tolist() == [k == best for k in (1, 5, 20, 10_000)]
    row = found.table[(found.table["scorer"] == "knn") & (found.table["ood"] == "dark")].iloc[0]
    assert json.loads(row["parameters"])["k"] == best
    assert row[metric] == tried(best, "test", "dark")
    assert set(found.table["ood"]) == {"cousins", "dark"}


def test_failing_scorer_does_not_stop_the_others(data: Path, tmp_path: Path) -> None:
    scorers = (ScorerTable("too many", "knn", {"k": 10_000}), *named("knn", "msp"))
    found = results(data, tmp_path, part(scorers=scorers))
    assert list(dict.fromkeys(found.table["scorer"])) == ["knn", "msp"]
    ((entry),) = found.not_run
    assert entry.what == "too many"
    assert "10,000" in entry.reason or "10000" in entry.reason


# ---- the threshold of FPR95


def test_rule_of_a_part_selects_the_threshold_of_fpr95(data: Path, tmp_path: Path) -> None:
    """With 40 ID and 30 OoD rows, the nearest threshold may accept less than 95%, as in the code of several papers."""
    found = results(data, tmp_path, part(title="Nearest", rule="nearest", scorers=named("msp", "energy"), fit=None))
    scores = found.scored[0].scores
    for row in found.table.to_dict("records"):
        known, other = scores[row["scorer"]]["id"].numpy(), scores[row["scorer"]][row["ood"]].numpy()
        nearest = metrics.compare(known, other, rule="nearest")
        assert (row["fpr95_id"], row["fpr95_ood"]) == (nearest["fpr95_id"], nearest["fpr95_ood"])
    first = results(data, tmp_path, part(title="First", scorers=named("msp", "energy"), fit=None)).table
    assert not np.array_equal(first["fpr95_ood"], found.table["fpr95_ood"])
