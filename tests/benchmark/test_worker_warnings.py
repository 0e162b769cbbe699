"""Warnings of extractions, which may run in processes of their own, are those of the process that waits for them."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from ood_scores.benchmark import extract_jobs
from ood_scores.benchmark.extract_jobs import extract_all, run_job
from ood_scores.errors import NearChance
from ood_scores.user_warnings import warn_user


def warned(job: Any, device: str, workers: int) -> list[int]:
    warn_user("a file was left out")
    warn_user("near chance", NearChance)
    warn_user("a file was left out")
    return [1, 2, 3]


def test_warnings_of_an_extraction_are_returned_and_then_raised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_jobs, "_extract", warned)
    job: Any = SimpleNamespace(
        network=SimpleNamespace(key="k", table=SimpleNamespace(title="net")),
        set="photos",
        loading=SimpleNamespace(workers=0),
        cache="c.h5",
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = run_job(job, "cpu", 0)
        assert caught == []
    assert (done.rows, done.warnings) == (3, ("a file was left out",))
    said: list[str] = []
    with pytest.warns(UserWarning, match="a file was left out") as told:
        assert extract_all([job], "cpu", 1, said.append) == {}
    assert len(told) == 1
    assert said[0].startswith("[green]✓[/] net · photos: 3 rows in")
