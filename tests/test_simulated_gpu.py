"""The tests that need a GPU, on a simulated one, as part of the checks before a release.

The environment variable ``OOD_SCORES_GPU_SIM`` names the folder of the simulation: ``build.sh`` compiles it with the
headers of torch, and ``sim COMMAND`` runs a command on it. Without the variable, the test is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.speed.gpu_day import ROOT, gpu_tests

SIMULATION = os.environ.get("OOD_SCORES_GPU_SIM", "")


@pytest.fixture(scope="module")
def simulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the simulation, built for this Python and torch."""
    if not SIMULATION:
        pytest.skip("OOD_SCORES_GPU_SIM does not name the simulation of a GPU")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the tests that need one run on it")
    folder = tmp_path_factory.mktemp("gpu") / "simulation"
    shutil.copytree(SIMULATION, folder, copy_function=shutil.copyfile)
    built = subprocess.run(
        ["sh", "build.sh"], cwd=folder, env=os.environ | {"VENV": sys.prefix}, capture_output=True, text=True
    )
    if built.returncode:
        pytest.skip(f"the simulation cannot be built here: {built.stderr.strip().splitlines()[-1]}")
    return folder


def test_tests_that_need_a_gpu_pass_on_a_simulated_one(simulation: Path) -> None:
    command = ["sh", str(simulation / "sim"), *gpu_tests()]
    two = os.environ | {"SIMCUDA_DEVICES": "2"}  # some tests need two GPUs
    done = subprocess.run(command, cwd=ROOT, env=two, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout.splitlines()[-1]
