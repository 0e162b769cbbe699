"""A process that is killed at any instant of ``Detector.save`` leaves the old detector or the new one."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detecting import PIXELS, Rows, network, same

from ood_scores import Detector, calibrate
from ood_scores.atomic import LockedFile
from ood_scores.detector.folder import LOCK
from ood_scores.errors import CacheBusy, DamagedCache, ForeignFile, OodScoresError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes")

children = multiprocessing.get_context("forkserver")
children.set_forkserver_preload(["detecting", "ood_scores.extraction.run", "rich.progress"])

STEPS = 80


def detector(scorer: str) -> Detector:
    torch.set_num_threads(1)
    return calibrate(scorer, network(), id=[Rows(64, 2).inputs])


def save_and_die(folder: Path, step: int) -> None:
    """Save a detector; kill the process before the given change of a file in the folder."""
    new, done = detector("energy"), [0]

    def count(event: str, args: Any) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir") or (event == "open" and args[1] not in ("r", "rb"))
        if changes and str(args[0]).startswith(str(folder)):
            done[0] += 1
            if done[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    new.save(folder)


def was_killed(folder: Path, step: int) -> bool:
    child = children.Process(target=save_and_die, args=(folder, step))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def names(folder: Path) -> set[str]:
    return {file.name.partition(".")[0] for file in folder.iterdir()}


def test_a_kill_at_any_step_leaves_the_old_or_the_new_detector(tmp_path: Path) -> None:
    old, new = detector("msp"), detector("energy")
    folder = tmp_path / "detector"
    found = []
    for step in range(1, STEPS):
        old.save(folder)
        assert names(folder) == {"detector", "scorer", "calibration", "model"}
        assert len(list(folder.iterdir())) == 4
        killed = was_killed(folder, step)
        prediction = Detector.load(folder).predict(PIXELS)
        is_new = same(prediction, new.predict(PIXELS))
        assert is_new or same(prediction, old.predict(PIXELS))
        found.append(is_new)
        if not killed:
            break
    assert found[-1]
    assert not killed
    assert len(found) > 10
    assert found == sorted(found)
    assert os.listdir(tmp_path) == ["detector"]


def test_a_killed_first_save_is_refused_until_it_is_repeated(tmp_path: Path) -> None:
    new = detector("energy")
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        killed = was_killed(folder, step)
        try:
            assert same(Detector.load(folder).predict(PIXELS), new.predict(PIXELS))
        except (FileNotFoundError, ForeignFile, DamagedCache):
            assert killed
        new.save(folder)
        assert same(Detector.load(folder).predict(PIXELS), new.predict(PIXELS))
        assert len(list(folder.iterdir())) == 4
        if not killed:
            break
    assert step > 10
    assert not killed


def test_two_processes_do_not_save_to_one_folder(tmp_path: Path) -> None:
    one = detector("msp")
    one.save(tmp_path / "detector")
    with LockedFile(tmp_path / "detector" / LOCK, "a"), pytest.raises(CacheBusy, match="written by another process"):
        detector("energy").save(tmp_path / "detector")
    assert same(Detector.load(tmp_path / "detector").predict(PIXELS), one.predict(PIXELS))


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(OodScoresError, match="contains other files"):
        detector("energy").save(tmp_path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
