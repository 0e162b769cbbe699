"""Rows that cannot be read stop an extraction, or are left out of it and listed."""

from __future__ import annotations

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
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

import ood_scores
import ood_scores.models.networks  # makes its networks known to timm
from ood_scores.cli import app
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, EmptyInput, RowsLeftOut, UnreadableRow
from ood_scores.features.storage import cache as caches

ROWS, BATCH = 40, 4
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
    """A list of 40 images, 7 of which cannot be read, for five different reasons."""
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def extract(batches: Iterable[Any], cache: Path | None = None, **options: Any) -> ood_scores.FeatureSet:
    chosen: dict[str, Any] = {"on_error": "skip", "progress": False, "name": "pictures"} | options
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
    with pytest.warns(RowsLeftOut, match=r"^7 of 40 rows of pictures cannot be read .*row 0: .*00.jpg.*and 4 more"):
        found = ood_scores.extract(
            network(), loader(images, workers), cache, on_error="skip", progress=False, name="pictures"
        )
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


def test_without_the_option_the_error_says_how_to_go_on(images: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        with pytest.raises(UnreadableRow, match=r"00.jpg .*replace or remove it.*continue, pass on_error='skip'"):
            extract(loader(images, workers), tmp_path / "c.h5", on_error="raise")
    with pytest.raises(BadInput, match="on_error must be 'raise' or 'skip', got 'ignore'"):
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
    assert found.provenance.skipped_rows == (16, 17, 18, 19, 20, 26, 39)
    whole = extract(data, tmp_path / "whole.h5")
    assert torch.equal(found.features, whole.features)
    assert found.provenance.skipped == whole.provenance.skipped  # type: ignore[union-attr]


def test_a_cache_that_lacks_rows_is_not_taken_for_a_full_one(images: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.h5"
    assert_same(extract(loader(images), cache), extract(readable(images), on_error="raise"))
    with pytest.warns(RowsLeftOut, match="7 of 40 rows"):
        ood_scores.extract(network(), loader(images), cache, on_error="skip", progress=False, name="pictures")
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
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        extract(DataLoader(Dies(loader(images).dataset, row), BATCH), cache)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


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
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        extract(loader(images), cache)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    state = caches_state(cache)
    assert (state.rows, state.finished, state.has_gaps) == (ROWS, False, True)
    assert_same(extract(loader(images), cache), extract(loader(images)))


def test_nothing_that_can_be_read(images: Path) -> None:
    data = open_dataset(f"imglist:{images}/list.txt?rows=0:4", to_tensor)
    with pytest.raises(EmptyInput, match=r"no row of list\[rows=0:4\] can be read: cannot read the image .*00.jpg"):
        extract(DataLoader(data, BATCH))


def test_a_loader_of_ones_own_leaves_out_rows_itself() -> None:
    with pytest.raises(BadInput, match="got generator: leave out unreadable rows in the loader itself"):
        extract(batch for batch in [torch.zeros(2, 3, 8, 8)])


def test_the_command_skips_and_lists(images: Path, tmp_path: Path) -> None:
    command = ["extract", "cifar_resnet20", f"imglist:{images}/list.txt", str(tmp_path / "c.h5"), "--workers", "0"]
    torch.save(_weights(), tmp_path / "w.pth")
    command += ["--checkpoint", str(tmp_path / "w.pth")]
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code == 1
    assert "here: add --on-error skip to the same command" in stopped.stderr
    done = CliRunner().invoke(app, [*command, "--on-error", "skip"])
    assert done.exit_code == 0, done.stderr
    assert "7 of 40 rows of list cannot be read and are left out" in " ".join(done.stderr.split())
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "c.h5")], env={"COLUMNS": "300"}).output
    assert "left out" in shown
    assert "7 of 40 rows of list" in shown
    CliRunner().invoke(app, ["score", "msp", str(tmp_path / "c.h5"), "--out", str(tmp_path / "s.csv")])
    rows = [line.split(",")[0] for line in (tmp_path / "s.csv").read_text().split()[1:]]
    assert rows == list(map(str, KEPT))


def _weights() -> Any:
    import timm

    return timm.create_model("cifar_resnet20", num_classes=3).state_dict()
