"""Rows that cannot be read are left out of an extraction and listed, or stop it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import exit_code_of_fork
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

import ood_scores
import ood_scores.models.networks  # makes its networks known to timm
from ood_scores.cli import app
from ood_scores.data.sources import open_dataset
from ood_scores.errors import (
    BadInput,
    EmptyInput,
    FileSystemFault,
    MissingData,
    RowsLeftOut,
    TooManyUnreadableRows,
    UnreadableImage,
    UnreadableRow,
)
from ood_scores.features.storage import cache as caches

ROWS, BATCH = 80, 4
BAD = (0, 1, 2, 3, 9, 22, 39)
"""A whole batch, and rows of others."""
KEPT = [row for row in range(ROWS) if row not in BAD]


def picture(row: int) -> Image.Image:
    return Image.effect_noise((16, 16), 60).convert("RGB").point(lambda value: (value + 5 * row) % 256)


def truncated(folder: Path, row: int) -> Path:
    buffer = io.BytesIO()
    picture(row).save(buffer, "JPEG")
    file = folder / f"{row:02}.jpg"
    file.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return file


def strip(folder: Path, row: int) -> Path:
    Image.new("RGB", (60_000, 1)).save(folder / f"{row:02}.png")
    return folder / f"{row:02}.png"


def damaged(suffix: str) -> Any:
    def write(folder: Path, row: int) -> Path:
        file = folder / f"{row:02}{suffix}"
        file.write_bytes(b"\x00\x00\x00\x1cftypavif" + os.urandom(100))
        return file

    return write


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 80 images, 7 of which cannot be read, for five different reasons."""
    folder = tmp_path_factory.mktemp("images")
    makers = dict(zip(BAD, [truncated, strip, damaged(".avif"), damaged(".dds"), damaged(".eps")], strict=False))
    lines = []
    for row in range(ROWS):
        if row in BAD:
            file = makers.get(row, truncated)(folder, row)
        else:
            file = folder / f"{row:02}.png"
            picture(row).save(file)
        lines.append(f"{file.name} {row % 3}")
    (folder / "list.txt").write_text("\n".join(lines))
    return folder


def loader(images: Path, workers: int = 0) -> DataLoader[Any]:
    return DataLoader(open_dataset(f"imglist:{images}/list.txt", to_tensor), BATCH, num_workers=workers)


def readable(images: Path) -> DataLoader[Any]:
    """The batches of the readable rows, in batches of the same rows as those of ``loader``."""
    data = open_dataset(f"imglist:{images}/list.txt", to_tensor)
    groups = [[row for row in range(start, start + BATCH) if row in KEPT] for start in range(0, ROWS, BATCH)]
    return DataLoader(data, batch_sampler=[group for group in groups if group])


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def extract(batches: Iterable[Any], cache: Path | None = None, **options: Any) -> ood_scores.FeatureSet:
    chosen: dict[str, Any] = {"on_error": "skip", "device": "cpu", "progress": False, "name": "pictures"} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RowsLeftOut)
        return ood_scores.extract(network(), batches, cache, **chosen)


def assert_same(found: ood_scores.FeatureSet, expected: ood_scores.FeatureSet) -> None:
    assert len(found) == len(KEPT)
    assert found.labels is not None
    assert expected.labels is not None
    for one, other in zip(*((each.features, each.logits, each.labels) for each in (found, expected)), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("to_disk", [False, True])
def test_skipped_rows_leave_the_others_as_they_are(images: Path, workers: int, to_disk: bool, tmp_path: Path) -> None:
    expected = extract(readable(images), on_error="raise")
    cache = tmp_path / "c.h5" if to_disk else None
    with pytest.warns(RowsLeftOut, match=r"^7 of 80 rows of pictures cannot be read .*row 0: .*00.jpg.*and 4 more"):
        found = ood_scores.extract(network(), loader(images, workers), cache, progress=False, name="pictures")
    assert torch.equal(found.features, expected.features)
    assert torch.equal(found.logits, expected.logits)  # type: ignore[arg-type]
    assert found.labels is not None
    assert found.labels.tolist() == [row % 3 for row in KEPT]
    assert found.provenance is not None
    assert found.provenance.skipped_rows == BAD
    assert all(f"{row:02}." in reason for row, reason in found.provenance.skipped)
    assert found.provenance.rows_in_dataset(len(found)).tolist() == KEPT
    if cache:
        again = ood_scores.load(cache)
        assert again.provenance == found.provenance
        again.save(tmp_path / "copy.h5", compress=True)
        assert ood_scores.load(tmp_path / "copy.h5").provenance == found.provenance


def test_raise_stops_with_an_error_that_says_how_to_go_on(images: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        with pytest.raises(UnreadableRow, match=r"00.jpg .*replace or remove it.*continue, pass on_error='skip'"):
            extract(loader(images, workers), tmp_path / "c.h5", on_error="raise")
    with pytest.raises(BadInput, match="on_error must be 'skip' or 'raise', got 'ignore'"):
        extract(loader(images), on_error="ignore")


def test_a_stopped_extraction_is_continued_with_skip(images: Path, tmp_path: Path) -> None:
    good = images / "good.txt"
    lines = (images / "list.txt").read_text().split("\n")
    good.write_text("\n".join([*lines[23:], *lines[:23]]))  # 16 rows can be read first
    data = DataLoader(open_dataset(f"imglist:{good}", to_tensor), BATCH)
    cache = tmp_path / "c.h5"
    with pytest.raises(UnreadableRow):
        extract(data, cache, on_error="raise")
    with caches.open_to_read(cache) as h5:
        assert caches.state(h5).rows == 16
    found = extract(data, cache)
    assert found.provenance is not None
    assert found.provenance.skipped_rows == (16, 57, 58, 59, 60, 66, 79)
    whole = extract(data, tmp_path / "whole.h5")
    assert torch.equal(found.features, whole.features)
    assert found.provenance.skipped == whole.provenance.skipped  # type: ignore[union-attr]


def test_a_cache_that_lacks_rows_is_not_taken_for_a_full_one(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    assert_same(extract(loader(images), cache), extract(readable(images), on_error="raise"))
    with pytest.warns(RowsLeftOut, match="7 of 80 rows"):
        ood_scores.extract(network(), loader(images), cache, progress=False, name="pictures")
    whole = DataLoader(open_dataset(f"imglist:{images}/list.txt?rows=4:9", to_tensor), BATCH)
    extract(whole, tmp_path / "whole.h5", on_error="raise")
    assert len(extract(whole, tmp_path / "whole.h5")) == 5  # a full cache serves both


class Dies(Dataset[Any]):
    """A dataset that kills the process at a row."""

    def __init__(self, data: Any, row: int) -> None:
        self.data, self.row, self.name, self.transform = data, row, data.name, data.transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> Any:
        if row == self.row:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data[row]


def killed(images: Path, cache: Path, row: int) -> None:
    data = Dies(loader(images).dataset, row)
    assert exit_code_of_fork(lambda: extract(DataLoader(data, BATCH), cache)) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("rows", [(21,), (30,), (9, 26, 38)])
def test_a_killed_extraction_continues_with_the_same_rows(images: Path, rows: tuple[int, ...], tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    for row in rows:
        killed(images, cache, row)
    if rows[-1] > 25:
        with pytest.raises(BadInput, match=r"c.h5 lacks rows that could not be read: pass on_error='skip'"):
            # the first rows are readable here, so that the error is about the cache
            ood_scores.extraction.one_pass.state_of(
                cache, caches_state(cache).provenance, resume=True, overwrite=False, skip=False
            )
    found = extract(loader(images), cache)
    whole = extract(loader(images))
    assert_same(found, whole)
    assert found.provenance is not None
    assert whole.provenance is not None
    assert found.provenance.skipped == whole.provenance.skipped
    assert [file.name for file in tmp_path.iterdir()] == ["c.h5"]


def caches_state(path: Path) -> Any:
    with caches.open_to_read(path) as h5:
        return caches.state(h5)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_kill_before_the_gaps_are_removed(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"

    def work() -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        extract(loader(images), cache)

    assert exit_code_of_fork(work) == -signal.SIGKILL
    state = caches_state(cache)
    assert (state.rows, state.finished, state.has_gaps) == (ROWS, False, True)
    assert_same(extract(loader(images), cache), extract(loader(images)))


def test_nothing_that_can_be_read(images: Path) -> None:
    data = open_dataset(f"imglist:{images}/list.txt?rows=0:4", to_tensor)
    with pytest.raises(TooManyUnreadableRows, match=r"at least 4 of the 4 rows of list\[rows=0:4\] cannot be read"):
        extract(DataLoader(data, BATCH))
    one = open_dataset(f"imglist:{images}/list.txt?rows=0:1", to_tensor)
    with pytest.raises(EmptyInput, match=r"no row of list\[rows=0:1\] can be read: cannot read the image .*00.jpg"):
        extract(DataLoader(one, BATCH))


class Fails(Dataset[Any]):
    """Rows of zeros, some of which raise an error: after ``reads`` attempts, only if ``reads`` is 0."""

    def __init__(self, errors: dict[int, Exception], reads: int = 0, rows: int = 40) -> None:
        self.errors, self.reads, self.rows, self.attempts = errors, reads, rows, 0

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Any:
        if row in self.errors:
            self.attempts += 1
            if not self.reads or self.attempts <= self.reads:
                raise self.errors[row]
        return torch.full((3, 8, 8), float(row))


FAULTS = [OSError(errno.EIO, "Input/output error"), FileNotFoundError(errno.ENOENT, "No such file", "a.png"),
          PermissionError(errno.EACCES, "Permission denied"), OSError(errno.ESTALE, "Stale file handle"),
          OSError(errno.ENETDOWN, "Network is down")]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: errno.errorcode[fault.errno])
def test_faults_of_the_file_system_always_stop(fault: OSError, tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    for on_error, row in [("skip", 2), ("raise", 2), ("raise", 30), ("skip", 30)]:
        with pytest.raises(FileSystemFault, match=rf"\[Errno {fault.errno}\].*: check the drive, then repeat"):
            extract(DataLoader(Fails({row: fault}), BATCH), cache, on_error=on_error)
    assert caches_state(cache).rows == 28
    found = extract(DataLoader(Fails({}), BATCH), cache)  # the drive is back
    assert len(found) == 40
    assert found.provenance is not None
    assert found.provenance.skipped == ()


@pytest.mark.parametrize("on_error", ["skip", "raise"])
def test_a_fault_in_a_worker_is_one_line(on_error: str) -> None:
    with pytest.raises(FileSystemFault) as raised:
        extract(DataLoader(Fails({2: FAULTS[0]}), BATCH, num_workers=1), on_error=on_error)
    row = "row 2" if on_error == "skip" else "a row of Fails"
    text = f"{row} cannot be read ([Errno 5] Input/output error): check the drive, then repeat the call."
    assert str(raised.value) == text


def test_a_fault_that_is_gone_at_once_costs_no_row() -> None:
    assert len(extract(DataLoader(Fails({9: FAULTS[0]}, reads=1), BATCH))) == 40


def test_a_missing_file_of_a_list_stops(images: Path, tmp_path: Path) -> None:
    listed = images / "gone.txt"
    listed.write_text((images / "list.txt").read_text().replace("30.png", "gone.png"))
    for workers in (0, 1):
        with pytest.raises(MissingData, match=r"^there is no image .*gone\.png: restore it"):
            extract(DataLoader(open_dataset(f"imglist:{listed}", to_tensor), BATCH, num_workers=workers))


def test_a_file_that_the_disk_does_not_deliver(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        if path.name == "30.png":
            raise OSError(errno.EIO, "Input/output error")
        return path.open("rb").read()

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(FileSystemFault, match=r"cannot read the image .*30\.png \(\[Errno 5\].*check the drive"):
        extract(loader(images))


DAMAGED = OSError("image file is truncated")


@pytest.mark.parametrize(("rows", "most"), [(40, 4), (8, 1), (19, 1), (20, 2)])
def test_at_most_a_tenth_of_the_rows_is_left_out(rows: int, most: int, tmp_path: Path) -> None:
    def data(count: int) -> Any:
        return DataLoader(Fails({rows - 1 - row: DAMAGED for row in range(count)}, rows=rows), BATCH)

    assert len(extract(data(most))) == rows - most
    with pytest.raises(
        TooManyUnreadableRows,
        match=rf"at least {most + 1} of the {rows} rows of Fails cannot be read \(row .*: row \d+ cannot be read "
        r"\(image file is truncated\): replace or remove it.*no more than a tenth",
    ):
        extract(data(most + 1))


def test_the_share_counts_the_rows_of_an_interrupted_extraction(tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    errors: dict[int, Exception] = dict.fromkeys((0, 5, 20), DAMAGED)
    with pytest.raises(FileSystemFault):
        extract(DataLoader(Fails({**errors, 30: FAULTS[0]}), BATCH), cache)
    assert caches_state(cache).has_gaps
    for _ in range(2):
        with pytest.raises(TooManyUnreadableRows, match="at least 5 of the 40 rows"):
            extract(DataLoader(Fails({**errors, 30: DAMAGED, 36: DAMAGED}), BATCH), cache)
    found = extract(DataLoader(Fails({**errors, 30: DAMAGED}), BATCH), cache)
    assert found.provenance is not None
    assert found.provenance.skipped_rows == (0, 5, 20, 30)
    assert [reason[: len("row 0 cannot be")] for _, reason in found.provenance.skipped[:1]] == ["row 0 cannot be"]


def test_other_loaders_stop_at_the_first_error() -> None:
    class Iterated(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from (torch.zeros(3, 8, 8) for _ in range(30))
            raise DAMAGED

    def batches() -> Any:
        yield torch.zeros(20, 3, 8, 8)
        raise UnreadableImage("cannot read the image a.png (it is cut): replace or remove it.")

    shuffled = DataLoader(Fails({7: DAMAGED}), BATCH, shuffle=True)
    for made, named in [(DataLoader(Iterated(), BATCH), "a row of Iterated cannot be read (image file is truncated)"),
                        (DataLoader(Iterated(), BATCH, num_workers=1), "a row of Iterated cannot be read (image file"),
                        (batches(), "cannot read the image a.png (it is cut): replace or remove it."),
                        (shuffled, "a row of Fails cannot be read (image file is truncated)")]:  # fmt: skip
        with pytest.raises(UnreadableRow) as raised:
            extract(made)
        assert str(raised.value).startswith(named)
        assert "Rows of this loader cannot be left out: leave them out in the loader itself, or" in str(raised.value)


def test_a_loader_of_healthy_rows_is_read_itself() -> None:
    class Own(DataLoader):
        batches = 0

        def _get_iterator(self) -> Any:
            Own.batches += 1
            return super()._get_iterator()

    extract(Own(Fails({}), BATCH))
    assert Own.batches == 1


def test_calibrate_leaves_out_rows(images: Path) -> None:
    with pytest.warns(RowsLeftOut, match="7 of 80 rows of list"):
        detector = ood_scores.calibrate("energy", network(), id=loader(images))
    assert len(detector.calibration.scores) == len(KEPT)


def test_the_command_skips_and_lists(images: Path, tmp_path: Path) -> None:
    command = ["extract", "cifar_resnet20", f"imglist:{images}/list.txt", str(tmp_path / "c.h5"), "--workers", "0"]
    torch.save(_weights(), tmp_path / "w.pth")
    command += ["--checkpoint", str(tmp_path / "w.pth")]
    stopped = CliRunner().invoke(app, [*command, "--on-error", "raise"])
    assert stopped.exit_code == 1
    assert "here: leave out --on-error raise" in stopped.stderr
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert "7 of 80 rows of list cannot be read and are left out" in " ".join(done.stderr.split())
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "c.h5")], env={"COLUMNS": "300"}).output
    assert "left out" in shown
    assert "7 of 80 rows of list" in shown
    CliRunner().invoke(app, ["score", "msp", str(tmp_path / "c.h5"), "--out", str(tmp_path / "s.csv")])
    rows = [line.split(",")[0] for line in (tmp_path / "s.csv").read_text().split()[1:]]
    assert rows == list(map(str, KEPT))


def _weights() -> Any:
    import timm

    return timm.create_model("cifar_resnet20", num_classes=3).state_dict()
