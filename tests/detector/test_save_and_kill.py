"""A process that is killed at any instant of ``Detector.save`` leaves the old detector or the new one."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from detecting import PIXELS, Rows, network, same

from ood_scores import Detector, calibrate
from ood_scores.atomic import LockedFile
from ood_scores.detector.folder import LOCK
from ood_scores.errors import CacheBusy, DamagedCache, ForeignFile, OodScoresError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills processes")


def detector(scorer: str) -> Detector:
    torch.set_num_threads(1)
    return calibrate(scorer, network(), id=[Rows(64, 2).inputs])


DRIVER = """
import os, signal, sys
from interrupted import hide_gpus
from test_save_and_kill import detector
from pathlib import Path

hide_gpus()
old, new = detector("msp"), detector("energy")
folders, first = Path(sys.argv[1]), sys.argv[2] == "first"
for step in range(1, 80):
    folder = folders / str(step)
    if not first:
        old.save(folder)
    child = os.fork()
    if child == 0:
        done = [0]

        def count(event, args):
            changes = event in ("os.rename", "os.remove", "os.mkdir") or event == "open" and args[1] not in ("r", "rb")
            if changes and str(args[0]).startswith(str(folder)):
                done[0] += 1
                if done[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        new.save(folder)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""
"""Saves a detector to the folders 1, 2, ...; the process is killed before that change of a file, except in the last."""


def killed_folders(folder: Path, kind: str) -> list[Path]:
    paths = os.pathsep.join(path for path in sys.path if path) + os.pathsep + str(Path(__file__).parent)
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), kind], check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    found = sorted(folder.iterdir(), key=lambda path: int(path.name))
    assert len(found) > 10
    return found


def is_clean(folder: Path) -> bool:
    return sorted(file.name.partition(".")[0] for file in folder.iterdir()) == [
        "calibration",
        "detector",
        "model",
        "scorer",
    ]


def test_a_kill_at_any_step_leaves_the_old_or_the_new_detector(tmp_path: Path) -> None:
    old, new = detector("msp"), detector("energy")
    before, after = old.predict(PIXELS), new.predict(PIXELS)
    found = []
    for folder in killed_folders(tmp_path, "again"):
        prediction = Detector.load(folder).predict(PIXELS)
        assert same(prediction, before) or same(prediction, after)
        found.append(same(prediction, after))
        new.save(folder)
        assert same(Detector.load(folder).predict(PIXELS), after)
        assert is_clean(folder)
    assert not found[0]
    assert found[-1]
    assert found == sorted(found)


def test_a_killed_first_save_is_refused_until_it_is_repeated(tmp_path: Path) -> None:
    new = detector("energy")
    expected = new.predict(PIXELS)
    *killed, complete = killed_folders(tmp_path, "first")
    assert same(Detector.load(complete).predict(PIXELS), expected)
    for folder in killed:
        with suppress(FileNotFoundError, ForeignFile, DamagedCache):
            assert same(Detector.load(folder).predict(PIXELS), expected)
        new.save(folder)
        assert same(Detector.load(folder).predict(PIXELS), expected)
        assert is_clean(folder)


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
