"""Results of a benchmark that an earlier version ran."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from legacy_files import ARRAYS, FACTS, FOLDER, without_new_parameters

import ood_scores
from ood_scores.benchmark import Results, load_results, run

OLD = FOLDER / "benchmark"


def assert_as_recorded(results: Results, tolerance: float = 0.0, changed: str = "") -> None:
    facts = FACTS["benchmark"]
    for name in ("table", "comparison", "measures"):
        found = getattr(results, name).to_dict("records")
        assert len(found) == len(facts[name])
        for row, expected in zip(found, facts[name], strict=True):
            for key, value in expected.items():
                if value is not None and key != changed:
                    now = without_new_parameters(row[key]) if key == "parameters" else row[key]
                    assert now == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key
    (scored,) = results.scored
    for label, sets in scored.scores.items():
        for name, values in sets.items():
            np.testing.assert_allclose(values, ARRAYS[f"benchmark/{label}/{name}"], rtol=tolerance, atol=tolerance)


def test_results_of_an_earlier_version_still_load() -> None:
    assert_as_recorded(load_results(OLD / "run"))


@pytest.mark.usefixtures("one_thread", "no_report")
def test_a_repeated_run_of_an_earlier_version_finds_the_same(tmp_path: Path) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    again = run(
        OLD / "legacy.toml",
        out=tmp_path / "run",
        data=OLD / "data",
        overrides=["extraction.channels_last=true"],  # which the earlier version did not ask about
        jobs=1,
        device="cpu",
        progress=False,
    )
    assert_as_recorded(again, tolerance=1e-5, changed="versions")
    assert {json.loads(text)["ood_scores"] for text in again.table["versions"]} == {ood_scores.__version__}
