"""File systems whose locks fail, and HDF5 that is told not to lock."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

FAILING_LOCKS = """
    #include <errno.h>
    #include <stdlib.h>
    int flock(int file, int operation) { (void)file; (void)operation; errno = atoi(getenv("LOCK_ERROR")); return -1; }
"""

WRITE_AND_READ = """
    import os, warnings
    from pathlib import Path
    import pytest, torch, ood_scores
    from ood_scores.benchmark import unit_files

    warnings.simplefilter("always")
    model, inputs = torch.nn.Linear(4, 3), torch.rand(8, 4)
    for number in (38, 37, 95, 524, 5):  # ENOSYS, ENOLCK, EOPNOTSUPP, ENOTSUPP, EIO
        os.environ["LOCK_ERROR"] = str(number)
        with warnings.catch_warnings(record=True) as seen:
            feats = ood_scores.extract(model, [inputs], f"{number}.h5", device="cpu", progress=False)
            assert torch.equal(feats.features, inputs)
            assert torch.equal(ood_scores.load(f"{number}.h5").features, inputs)
            assert seen
            assert all(" has no locks (" in str(each.message) for each in seen)
            found = unit_files.Found("part", "model", 0, not_run=[{"number": number}])
            unit = Path(f"unit{number}.h5")
            unit_files.write(unit, "digest", found)
            assert unit_files.read(unit, "digest")["not_run"] == [{"number": number}]
            with open(f"{number}.h5", "r+b") as file:
                file.truncate(500)
        with pytest.raises(ood_scores.errors.DamagedCache):
            ood_scores.load(f"{number}.h5")
"""


@pytest.mark.skipif(not (sys.platform == "linux" and shutil.which("gcc")), reason="replaces flock of the C library")
def test_caches_and_results_are_written_and_read_without_locks(tmp_path: Path) -> None:
    (tmp_path / "locks.c").write_text(FAILING_LOCKS)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", "locks.so", "locks.c"], cwd=tmp_path, check=True)
    environment = {key: value for key, value in os.environ.items() if key != "HDF5_USE_FILE_LOCKING"}
    environment |= {"LD_PRELOAD": str(tmp_path / "locks.so"), "LOCK_ERROR": "38"}
    assert not failure_of(WRITE_AND_READ, tmp_path, environment)


REPLACE_A_FILE_THAT_IS_WRITTEN = """
    import numpy as np, pytest, torch
    from pathlib import Path
    from ood_scores import FeatureSet, extract, load
    from ood_scores.errors import CacheBusy
    from ood_scores.features.storage import cache as caches

    path, model, inputs = Path("a.h5"), torch.nn.Linear(2, 3), torch.rand(4, 2)
    shapes = {"features": ((2,), np.dtype("float32"))}
    with caches.CacheWriter.create(path, shapes, 4, None, None) as writer:
        writer.append({"features": torch.ones(2, 2)})
        with pytest.raises(CacheBusy, match="is being written by another process"):
            extract(model, [inputs], path, overwrite=True, progress=False)
        with pytest.raises(CacheBusy, match="is being written by another process"):
            FeatureSet(inputs).save(path)
        with pytest.raises(CacheBusy, match="is being written by another process"):
            caches.CacheWriter.create(path, shapes, 4, None, None, replace=True)
        writer.append({"features": torch.ones(2, 2)})
        writer.finish()
    assert torch.equal(load(path).features, torch.ones(4, 2))
    with caches.open_to_read(path):
        FeatureSet(inputs).save(path)  # readers do not matter
    assert [each.name for each in Path().iterdir()] == ["a.h5"]
"""


@pytest.mark.parametrize("locking", ["FALSE", "TRUE"])
def test_file_that_is_written_is_not_replaced_whatever_hdf5_locks(locking: str, tmp_path: Path) -> None:
    environment = os.environ | {"HDF5_USE_FILE_LOCKING": locking}
    assert not failure_of(REPLACE_A_FILE_THAT_IS_WRITTEN, tmp_path, environment)


def failure_of(program: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a program in a folder; return the exit code and the errors of one that fails, such as by its own asserts."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return f"{done.returncode}: {done.stderr}" if done.returncode else ""
