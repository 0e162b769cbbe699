"""Fixtures of the benchmark tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_benchmark import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the datasets and three checkpoints of the small benchmark; tests do not change it."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, checkpoints=3)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ood_scores.benchmark.report.write_report", lambda results, images: [])
        patch.setattr("ood_scores.benchmark.unit.explained", lambda *_: None)
        yield
