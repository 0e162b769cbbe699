"""Benchmark results in experiment trackers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_benchmark

from ood_scores.benchmark import Results, runner
from ood_scores.benchmark.spec import ScorerTable
from ood_scores.errors import BadInput
from ood_scores.integrations.tracking import log_results, metrics_by_name


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("benchmark")
    small_benchmark.write_data(folder)
    scorers = tuple(ScorerTable(name, name) for name in ("msp", "energy"))
    spec = small_benchmark.spec(small_benchmark.part(scorers=scorers))
    return runner.run(spec, out=folder / "out", data=folder, jobs=1, device="cpu", progress=False)


class Recorder:
    """Keeps the arguments of the calls of one method of a tracker, and allows others that are named."""

    def __init__(self, **methods: Any) -> None:
        self.calls: list[Any] = []
        for name in methods:
            setattr(self, name, lambda *args, _name=name, **options: self.calls.append((_name, args, options)))


def test_names_lead_to_the_rows_of_the_table(results: Results) -> None:
    found = metrics_by_name(results)
    for row in results.table.to_dict("records"):
        name = f"{row['part']}/{row['model']}/{row['scorer']}/{row['ood']}"
        assert found[f"{name}/auroc"] == row["auroc"]
        assert found[f"{name}/fpr95_id"] == row["fpr95_id"]
    assert len(found) == len(results.table) * len(results.metrics)


def test_tensorboard_gets_scalars_and_the_report(results: Results) -> None:
    writer = Recorder(add_scalar=..., add_text=...)
    log_results(results, writer, step=3)
    scalars = {args[0]: args[1:] for name, args, _ in writer.calls if name == "add_scalar"}
    assert scalars == {name: (value, 3) for name, value in metrics_by_name(results).items()}
    assert writer.calls[-1] == ("add_text", ("report", (results.folder / "report.md").read_text(), 3), {})


def test_mlflow_gets_metrics_and_files(results: Results) -> None:
    mlflow = Recorder(log_metrics=..., log_artifact=...)
    log_results(results, mlflow, step=2)
    assert mlflow.calls[0] == ("log_metrics", (metrics_by_name(results),), {"step": 2})
    assert [Path(args[0]).name for _, args, _ in mlflow.calls[1:]] == ["results.csv", "report.html"]


def test_results_without_an_html_report_are_logged(results: Results, tmp_path: Path) -> None:
    mlflow = Recorder(log_metrics=..., log_artifact=...)
    log_results(replace(results, folder=tmp_path), mlflow)
    assert mlflow.calls[0][1] == (metrics_by_name(results),)
    assert [Path(args[0]).name for _, args, _ in mlflow.calls[1:]] == ["results.csv"]


def test_other_objects_are_refused(results: Results) -> None:
    with pytest.raises(BadInput, match="cannot log to dict: pass a TensorBoard SummaryWriter"):
        log_results(results, {})
