"""Missing inputs of a benchmark are listed with the way to get them, in the results and on the command line."""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import Any

import pytest
from small_benchmark import part, spec
from typer.testing import CliRunner

from ood_scores.benchmark import load_results, plan, run
from ood_scores.benchmark.costs import Estimates
from ood_scores.benchmark.networks import find
from ood_scores.benchmark.planning import SetFacts
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, ScorerTable, Search
from ood_scores.cli import app
from ood_scores.errors import BadInput, MissingData
from ood_scores.scorers import work

pytestmark = pytest.mark.usefixtures("one_thread")
SCORERS = (ScorerTable("msp", "msp"), ScorerTable("knn", "knn"))


def missing() -> Part:
    models = (
        ModelTable("cifar_resnet20", "Net", ("0.safetensors", "9.safetensors")),
        ModelTable("cifar_resnet20", "Trained", recipe="mine", seeds=(0, 4)),
    )
    sets = {**part().sets, "gone": "npz:gone.npz", "elsewhere": "npz:$NOT_SET_HERE/a.npz"}
    return part(models=models, sets=sets, far=("dark", "gone", "elsewhere"), scorers=SCORERS)


def test_missing_inputs_are_listed_and_the_rest_runs(data: Path, tmp_path: Path) -> None:
    found = run(spec(missing()), out=tmp_path, data=data, jobs=1, progress=False)
    assert set(found.table["ood"]) == {"cousins", "dark"}
    assert set(found.table["model"]) == {"Net"}
    listed = {entry.what: (entry.reason, entry.remedy) for entry in found.not_run}
    assert listed["Net (1)"] == (f"there is no checkpoint {data}/9.safetensors", "")
    train = f"ood-scores train benchmarks/recipes/mine.toml --set seed=4 --out {data}/runs/mine_seed4"
    assert listed["Trained (1)"] == (f"there is no checkpoint {data}/runs/mine_seed4/last.safetensors", train)
    assert listed["gone"][0] == f"there is no {data}/gone.npz"
    assert "NOT_SET_HERE" in listed["elsewhere"][0]


@pytest.mark.parametrize("role", ["id", "fit"])
def test_model_without_its_id_or_fit_set_does_not_run(data: Path, tmp_path: Path, role: str) -> None:
    sets = {**part().sets, "gone": "npz:gone.npz"}
    gone = part(title="Gone", sets=sets, scorers=SCORERS, **{role: "gone"})
    found = run(spec(part(scorers=SCORERS), gone), out=tmp_path, data=data, jobs=1, progress=False)
    assert set(found.table["part"]) == {"Small"}
    assert [(entry.part, entry.what) for entry in found.not_run] == [("Gone", "gone"), ("Gone", "Net")]
    assert found.not_run[1].reason == "required dataset 'gone' is unavailable"


def test_model_without_an_ood_set_does_not_run(data: Path, tmp_path: Path) -> None:
    text = FILE.replace('"cousins"]', "]").replace('"dark", "gone"]', '"gone"]').replace("&download=true", "")
    planned = command(data, tmp_path / "out", "--dry-run", text=text)
    assert "not run Net (none of its OoD datasets is available)" in planned.output
    result = command(data, tmp_path / "out", text=text)
    assert result.exit_code == 1
    assert "not run Net (none of its OoD datasets is available)" in result.output
    assert not (tmp_path / "out" / "caches").exists()


def test_probes_that_do_not_apply_leave_out_their_scorers_only(data: Path, tmp_path: Path) -> None:
    chosen = part(
        scorers=(
            *SCORERS[:1],
            ScorerTable("dropout", "mc_dropout"),
            ScorerTable("local", "gl_mcm"),
            ScorerTable("norms", "odin"),
        ),
        extraction=Extraction(batch_size=8, workers=0, probes=("mc_dropout", "local_mcm", "odin")),
    )
    found = run(spec(chosen), out=tmp_path, data=data, jobs=1, progress=False)
    assert set(found.table["scorer"]) == {"msp", "norms"}
    assert [(each.what, each.reason) for each in found.not_run] == [
        ("dropout", "the probe 'mc_dropout' does not apply to the model"),
        ("local", "the probe 'local_mcm' does not apply to the model"),
    ]


def test_second_run_keeps_the_recorded_time(data: Path, tmp_path: Path) -> None:
    first = run(spec(part(scorers=SCORERS)), out=tmp_path, data=data, jobs=1, progress=False)
    again = run(spec(part(scorers=SCORERS)), out=tmp_path, data=data, jobs=1, progress=False)
    assert again.environment == first.environment == load_results(tmp_path).environment
    more = run(spec(part(scorers=SCORERS[:1])), out=tmp_path, data=data, jobs=1, progress=False)
    assert more.environment["seconds"] != first.environment["seconds"]


def test_shared_rows_are_named_in_results_and_reports(data: Path, tmp_path: Path) -> None:
    text = "the fit set shares 40 of 40 rows with the ID set (identical features)"
    with pytest.warns(UserWarning, match=r"Small: the fit set shares 40 of 40 rows with the ID set"):
        found = run(
            spec(part(scorers=(ScorerTable("maha", "mahalanobis"),), fit="test")),
            out=tmp_path,
            data=data,
            jobs=1,
            progress=False,
        )
    expected = {"part": "Small", "model": "Net", "checkpoint": 0, "set": "fit set", "other": "ID set", "rows": 40}
    assert expected | {"of": 40} in found.overlap.to_dict("records")
    assert found.warnings["warning"].str.startswith(text).any()
    again = load_results(tmp_path)
    assert again.overlap.equals(found.overlap)
    assert again.warnings.equals(found.warnings)
    assert text in (tmp_path / "report.md").read_text()
    assert text in (tmp_path / "report.html").read_text()


def test_rows_of_search_and_covariate_sets_under_other_names_are_named(data: Path, tmp_path: Path) -> None:
    again = {"far again": "npz:./dark.npz", "test again": "npz:./test.npz", "shifted again": "npz:./shifted.npz"}
    changed = part(
        scorers=SCORERS,
        sets={**part().sets, **again},
        covariate=("test again", "shifted"),
        search=Search("shifted again", ("far again", "val_ood"), grid={"knn": {"k": (1, 5)}}),
    )
    with pytest.warns(UserWarning, match="the search set 'far again' shares 25 of 25 rows with the OoD set 'dark'"):
        found = run(spec(changed), out=tmp_path, data=data, jobs=1, progress=False)
    names = found.overlap[["set", "other", "rows", "of"]].to_numpy().tolist()
    assert names == [
        ["search set 'shifted again'", "covariate-shifted set 'shifted'", 20, 20],
        ["search set 'far again'", "OoD set 'dark'", 25, 25],
        ["ID set", "covariate-shifted set 'test again'", 40, 40],
    ]
    for written in ("report.md", "report.html"):
        text = html.unescape((tmp_path / written).read_text())
        assert "the ID set shares 40 of 40 rows with the covariate-shifted set 'test again'" in text


def test_file_in_the_place_of_the_folder_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"something else")
    with pytest.raises(BadInput, match="out cannot be a folder, since a file is in its way"):
        run(spec(part(scorers=SCORERS)), out=tmp_path / "out", data=data, jobs=1, progress=False)
    assert (tmp_path / "out").read_bytes() == b"something else"


def test_model_with_a_wrong_checkpoint_does_not_run(data: Path, tmp_path: Path) -> None:
    wrong = ModelTable("cifar_resnet56", "Wrong", "0.safetensors")
    found = run(
        spec(part(models=(*part().models, wrong), scorers=SCORERS)), out=tmp_path, data=data, jobs=1, progress=False
    )
    assert set(found.table["model"]) == {"Net"}
    assert any("does not fit 'cifar_resnet56'" in entry.reason for entry in found.not_run)


FILE = """
title = "On the command line"
id = "test"
near = ["cousins"]
far = ["dark", "gone"]
fit = "fits"
scorers = ["msp", "knn", "odin"]
[sets]
fits = "npz:fits.npz"
test = "npz:test.npz"
cousins = "npz:cousins.npz"
dark = "npz:dark.npz"
gone = "torchvision:SVHN?split=test&root=nowhere&download=true"
[[model]]
label = "Net"
name = "cifar_resnet20"
checkpoint = "0.safetensors"
[preprocessing]
input_size = [8, 8]
[extraction]
workers = 0
"""


def command(data: Path, out: Path, *words: str, text: str = FILE) -> Any:
    path = out.parent / "spec.toml"
    path.write_text(text)
    places = ["--out", str(out), "--data", str(data), "--jobs", "1"]
    return CliRunner().invoke(app, ["benchmark", str(path), *places, *words], env={"COLUMNS": "120"})


def test_dry_run_prints_the_plan_and_does_nothing(data: Path, tmp_path: Path) -> None:
    before = sorted(data.rglob("*"))
    result = command(data, tmp_path / "out", "--dry-run", "--set", "extraction.rows=20")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    assert sorted(data.rglob("*")) == before
    assert "extract  Net · test: 20 rows caches/Net-" in result.output
    assert "On the command line · Net: 2 scorers\n         msp, knn" in result.output
    assert (
        "without odin (scoring needs 'odin', which was not extracted: [extraction] probes = [\"odin\"])"
        in result.output
    )
    assert "not run gone (" in result.output


def test_dry_run_names_what_is_costly(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the extraction, the widths are those of the network; after it, those of the caches."""
    monkeypatch.setattr(work, "FASTEST", 0.0)
    monkeypatch.setattr(work, "_speed", lambda device: 100.0)
    text = FILE.replace("&download=true", "").replace("odin", "mahalanobis")
    knn, covariance = 2 * 60 * 95 * 64 / 3600, 4 * 60 * 64**2 / 3600
    line = (
        f"expected to be costly the covariance of features for mahalanobis (about {covariance / 100:.0f} h), knn "
        f"(about {knn / 100:.0f} h)"
    )
    assert line in command(data, tmp_path / "out", "--dry-run", text=text).output
    assert command(data, tmp_path / "out", text=text).exit_code == 0
    assert line in command(data, tmp_path / "out", "--dry-run", text=text).output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("cifar_resnet20", "hf-hub:o/n"), "the files that describe hf-hub:o/n are read only then"),
        (('name = "cifar_resnet20"', 'name = "open_clip:RN50"\nclasses = ["a", "b"]'), "the texts of a zero-shot cl"),
    ],
)
def test_dry_run_says_why_costs_are_unknown(
    data: Path, tmp_path: Path, change: tuple[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_speed", lambda device: 100.0)
    text = FILE.replace('checkpoint = "0.safetensors"', "").replace(', "gone"', "").replace(*change)
    output = command(data, tmp_path / "out", "--dry-run", text=text).output
    assert f"costs are known after the extraction ({reason}" in output
    assert "expected to be costly" not in output


def test_costs_are_unknown_while_a_number_of_rows_is(data: Path, tmp_path: Path) -> None:
    planned = plan(spec(part()), tmp_path, data)
    assert Estimates(planned.facts).unknown(planned.units[0]) is None
    estimates = Estimates({**planned.facts, "npz:dark.npz": SetFacts(None, labeled=False)})
    assert estimates.unknown(planned.units[0]) == "the number of rows of 'dark' is known only then"
    assert estimates.costly(planned.units[0], {}) == []


def test_benchmark_command_prints_percent_and_what_did_not_run(data: Path, tmp_path: Path) -> None:
    text = FILE.replace("&download=true", "")
    result = command(data, tmp_path / "out", text=text)
    assert result.exit_code == 0, result.output
    found: Any = load_results(tmp_path / "out").table.set_index(["scorer", "ood"])
    (line,) = [line for line in result.output.splitlines() if line.split()[:1] == ["knn"]]
    rows = [found.loc[("knn", "cousins")], found.loc[("knn", "dark")]]
    cells = [100 * row[metric] for row in rows for metric in ("auroc", "fpr95_id")]
    means = [(cells[0] + cells[2]) / 2, (cells[1] + cells[3]) / 2]
    assert [float(cell) for cell in line.split()[1:]] == pytest.approx(means + cells, abs=0.051)
    assert "not run gone (" in result.output
    assert "→ " in result.output
    again = command(data, tmp_path / "out", "--dry-run", text=text)
    assert "exists   Net · test caches/Net-" in again.output


def test_benchmark_command_exits_with_1_if_nothing_runs(data: Path, tmp_path: Path) -> None:
    assert command(data, tmp_path / "out", text=FILE.replace("0.safetensors", "7.safetensors")).exit_code == 1
    result = command(data, tmp_path / "out", "--set", "near=cosins")
    assert result.exit_code == 1
    assert "near is 'cosins': give a list" in result.output


def test_benchmark_command_exits_with_1_if_no_scorer_runs(data: Path, tmp_path: Path) -> None:
    text = FILE.replace("&download=true", "")
    result = command(data, tmp_path / "out", "--set", "scorers=['odin']", text=text)
    assert result.exit_code == 1
    assert "not run odin (" in result.output
    assert "all metrics" not in result.output
    assert load_results(tmp_path / "out").measures["measure"].tolist() == ["accuracy"]
    nothing = ("scorers=[]", "near=[]", "far=[]")
    assert (
        command(data, tmp_path / "out", *(word for key in nothing for word in ("--set", key)), text=text).exit_code == 0
    )


def test_command_that_trains_runs_nothing_of_the_spec(tmp_path: Path) -> None:
    with pytest.raises(MissingData) as missing:
        find(ModelTable("resnet18", recipe='`id`"; id #'), 0, tmp_path)
    folder = tmp_path / 'runs/`id`"; id #'
    recipe = 'benchmarks/recipes/`id`"; id #.toml'
    assert shlex.split(missing.value.remedy) == ["ood-scores", "train", recipe, "--out", str(folder)]
