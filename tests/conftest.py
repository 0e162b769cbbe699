"""Test processes beside each other share the cores, and the longest tests start first."""

import os

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))  # before torch reads it


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "test_real_data" not in item.nodeid)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture
def registered_scorers(monkeypatch):
    """The registered scorers by name, restored after the test."""
    from ood_scores.registry import Registry
    from ood_scores.scorers import registry

    known = Registry("scorer", registry.SCORERS, registry.SCORERS.listing)
    monkeypatch.setattr(registry, "SCORERS", known)
    return known


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Files of the same weights in every supported form of checkpoint, by name."""
    from networks import write_checkpoints

    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))
