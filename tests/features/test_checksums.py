"""Caches in which something changed after they were written: noticed before HDF5 or a scorer uses it."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xxhash
from typer.testing import CliRunner

import ood_scores
from ood_scores import FeatureSet, Head, load
from ood_scores.cli import app
from ood_scores.errors import BadInput, DamagedCache, OodScoresError
from ood_scores.features import Provenance
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import FeatureMean
from ood_scores.features.storage import cache as caches
from ood_scores.features.storage import checksums, layout, shards
from ood_scores.features.storage.columns import read_all
from ood_scores.features.storage.seal import check_seal

ROWS = 700


def problem(rows: int = ROWS, seed: int = 0) -> FeatureSet:
    features = torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))
    head = Head(torch.eye(6, 40), torch.zeros(6))
    return FeatureSet(features, head(features), torch.arange(rows) % 6, head, {"pooled": features[:, :3].half()})


def provenance(shard: str | None = None) -> Provenance:
    made = ood_scores.extract(torch.nn.Linear(2, 2), [torch.rand(2, 2)], device="cpu", progress=False).provenance
    assert made is not None
    return replace(made, shard=shard)


def plain(path: Path) -> Path:
    problem().save(path)
    return path


def compressed(path: Path) -> Path:
    problem().save(path, compress=True)
    return path


def extracted(path: Path) -> Path:
    """A cache of unknown length, written in runs of rows that are not those of the blocks."""
    feats = problem()
    shapes = {name: (column.shape[1:], column[:0].numpy().dtype) for name, column in feats.columns.items()}  # type: ignore[index]
    with caches.CacheWriter.create(path, shapes, None, feats.head, None) as writer:
        for start in range(0, 400, 90):
            writer.append(run(feats, start, min(start + 90, 400)))
    with caches.CacheWriter.resume(path, caches.CacheState(400, False, None)) as writer:
        for start in range(400, ROWS, 77):
            writer.append(run(feats, start, min(start + 77, ROWS)))
        writer.finish()
    return path


def run(feats: FeatureSet, start: int, stop: int) -> dict[str, Any]:
    return {name: column[start:stop] for name, column in feats.columns.items()}  # type: ignore[index]


def joined(path: Path) -> Path:
    parts = {shards.shard_path(path, rank, 2): provenance(f"rank {rank}") for rank in range(2)}
    for (start, stop), (place, made) in zip(((0, 300), (300, ROWS)), parts.items(), strict=True):
        part = problem()[start:stop]
        extras = {"pooled": part.extras["pooled"]}
        FeatureSet(part.features, part.logits, part.labels, part.head, extras, made).save(place)
    shards.join(path, parts)
    return path


MAKERS = [plain, compressed, extracted, joined]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(layout, "UNKNOWN_LENGTH_ROWS", 64)


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return request.param(tmp_path / "a.h5")


def changed(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def file_and_place(path: Path, column: str, row: int) -> tuple[Path, int]:
    """The file that holds a row of a column, and the place of the row, or of its chunk, in the file."""
    with h5py.File(path) as h5:
        values = h5[column]
        if values.is_virtual:
            shard, row = (0, row) if row < 300 else (1, row - 300)
            return file_and_place(shards.shard_path(path, shard, 2), column, row)
        if values.chunks:
            chunk = values.id.get_chunk_info_by_coord(
                (row // values.chunks[0] * values.chunks[0], *([0] * (values.ndim - 1)))
            )
            return path, chunk.byte_offset + chunk.size // 2
        return path, values.id.get_offset() + row * values.nbytes // len(values)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_open_block_hashes_what_is_appended_in_runs_of_any_length() -> None:
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, 3210, np.uint8)
    block, sums = checksums.OpenBlock(100), []
    for run in np.split(data, np.sort(generator.integers(0, len(data), 12))):
        block, full = block.extended(run)
        sums += full.tolist()
    expected = [xxhash.xxh3_64_intdigest(data[start : start + 100].tobytes()) for start in range(0, len(data), 100)]
    assert [*sums, *block.sum.tolist()] == expected
    assert (block.number, block.filled) == (32, 10)


def test_unchanged_rows_are_read_whatever_is_verified(path: Path) -> None:
    for verify in ("once", "always", False, "once"):
        feats = load(path, verify=verify)
        assert torch.equal(feats.features, problem().features)
        assert torch.equal(feats[331:333].extras["pooled"], problem().extras["pooled"][331:333])
        assert torch.equal(torch.cat([block.features for block in feats.blocks(13)]), problem().features)


@pytest.mark.parametrize(("column", "row"), [("features", 0), ("logits", 299), ("labels", 300), ("extras/pooled", 699)])
def test_changed_row_is_noticed_when_its_block_is_read(path: Path, column: str, row: int) -> None:
    file, place = file_and_place(path, column, row)
    changed(file, place)
    feats = load(path)
    for read in (lambda: read_all(feats.columns[column]), feats.check_finite):
        with pytest.raises(DamagedCache, match=rf"{file.name} is (truncated or )?damaged"):
            read()
    others = [name for name in feats.columns if name != column]
    assert len(list(feats.blocks(only=[name.removeprefix("extras/") for name in others]))) > 0
    changed(file, place)
    assert torch.equal(load(path).features, problem().features)


def test_blocks_without_the_changed_row_are_read(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    changed(*file_and_place(path, "features", 30))
    feats = load(path)
    assert torch.equal(feats[50:].features, problem().features[50:])
    with pytest.raises(DamagedCache, match=r"its features changed after they were written, in rows 25 to 49\. Pass"):
        read_all(feats[49:].columns["features"])


def test_change_during_a_pass_is_noticed_by_always(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    os.utime(path, (1, 1))
    for verify, noticed in (("once", False), ("always", True)):
        feats = load(path, verify=verify)  # type: ignore[arg-type]
        column = feats.columns["features"]
        with column.reader() as read:  # type: ignore[union-attr]
            read(0, 10)
            with open(path, "r+b") as file:
                file.seek(file_and_place(path, "features", 3)[1])
                file.write(b"\1\2\3\4")
            if noticed:
                with pytest.raises(DamagedCache):
                    read(0, 10)
            else:
                read(0, 10)
        problem().save(path)


def test_changed_rows_are_read_without_statistics_if_asked_for(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    mean = collect(load(path), [FeatureMean()])[FeatureMean()]
    with h5py.File(path, "r+") as h5:
        h5["features"][:] += 1
    with pytest.raises(DamagedCache, match=r"verify=False\) and save the set to another file"):
        collect(load(path), [FeatureMean()])
    feats = load(path, verify=False)
    torch.testing.assert_close(collect(feats, [FeatureMean()])[FeatureMean()], mean + 1)
    feats.save(tmp_path / "b.h5")
    torch.testing.assert_close(collect(load(tmp_path / "b.h5"), [FeatureMean()])[FeatureMean()], mean + 1)


def test_statistics_of_a_copied_cache_are_used_after_its_rows_are_verified(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    mean = collect(load(path), [FeatureMean()])[FeatureMean()]
    os.utime(path, (1, 1))
    before = (tmp_path / "a.h5.statistics").read_bytes()
    assert torch.equal(collect(load(path), [FeatureMean()])[FeatureMean()], mean)
    after = (tmp_path / "a.h5.statistics").read_bytes()
    assert after != before  # the time of the cache
    changed(*file_and_place(path, "logits", 3))
    with pytest.raises(DamagedCache, match="its logits changed"):
        collect(load(path), [FeatureMean()])


def without_checksums(path: Path) -> None:
    with h5py.File(path, "r+") as h5:
        del h5["checksums"]


def test_caches_without_checksums_are_read_and_their_statistics_computed_again_once_they_change(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    without_checksums(path)
    mean = collect(load(path), [FeatureMean()])[FeatureMean()]
    assert torch.equal(load(path).features, problem().features)
    with h5py.File(path, "r+") as h5:
        h5["features"][:] += 1
    os.utime(path, (1, 1))
    torch.testing.assert_close(collect(load(path), [FeatureMean()])[FeatureMean()], mean + 1)


def test_verify_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="verify must be 'once', 'always', or False, got True"):
        load(plain(tmp_path / "a.h5"), verify=True)  # type: ignore[arg-type]


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_verifies_all_rows(path: Path) -> None:
    shown = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert shown.exit_code == 0
    assert "verified: every row is the one that was written" in shown.output
    changed(*file_and_place(path, "labels", 600))
    shown = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert isinstance(shown.exception, DamagedCache) or "damaged" in shown.output
    assert shown.exit_code != 0


def test_inspect_tells_that_a_cache_has_no_checksums(tmp_path: Path) -> None:
    without_checksums(plain(tmp_path / "a.h5"))
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "a.h5"), "--verify"])
    assert shown.exit_code == 0
    text = " ".join(shown.output.split())
    assert f"not verified: {tmp_path / 'a.h5'} has no seal, because an earlier version wrote it" in text
    assert "nothing in it can be verified" in text


@pytest.mark.parametrize("verify", ["once", "always"])
def test_load_tells_that_nothing_can_be_verified_and_how_to_seal(verify: Any, tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = load(path, verify=verify)
        features = before.features
    without_checksums(path)
    with pytest.warns(UserWarning, match="a.h5 has no seal, .*: nothing in it can be verified") as found:
        load(path, verify=verify)
    remedy = re.search(r"with (ood_scores\..*\))\.$", str(found[0].message))
    assert remedy is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eval(remedy[1], {"ood_scores": ood_scores})
        after = load(path, verify=verify)
    assert torch.equal(after.features, features)
    assert after.provenance == before.provenance
    shown = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert "verified: every row is the one that was written" in shown.output


def test_a_cache_that_another_program_changed_is_not_called_verified(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    with h5py.File(path, "r+") as h5:
        h5.attrs["dataset"] = "another"
    with pytest.warns(UserWarning, match="a.h5 has no seal"):
        load(path)
    shown = CliRunner().invoke(app, ["inspect", str(path), "--verify"])
    assert "not verified" in shown.output


# --- structure --------------------------------------------------------------------------------------------------------


def test_changed_structure_is_noticed_before_hdf5_reads_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_seal(path)
    changed(path, 60)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("HDF5 was asked")

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(DamagedCache, match=r"its structure was changed after it was written\): delete it"):
        load(path)


def test_programs_that_write_hdf5_cut_the_seal_off(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    with h5py.File(path, "r+") as h5:
        h5.attrs["note"] = "mine"
    assert not check_seal(path)
    assert torch.equal(load(path).features, problem().features)


def test_cut_or_changed_end_of_a_seal_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for damaged in (content[:-1], content[:-20], content + b"0"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedCache, match="its last bytes are neither of HDF5 nor a seal"):
            load(path)


@pytest.mark.parametrize("count", [2**64 - 1, 2**40, 10**6, 3])
def test_impossible_seals_are_refused(count: int, tmp_path: Path) -> None:
    path = plain(tmp_path / "a.h5")
    content = path.read_bytes()
    path.write_bytes(content[:-16] + np.array([count], "<u8").tobytes() + content[-8:])
    with pytest.raises(DamagedCache, match="structure was changed"):
        load(path)


# --- anywhere ---------------------------------------------------------------------------------------------------------


def outcomes(path: Path, file: Path, contents: list[bytes], result: Callable[[], torch.Tensor]) -> list[str]:
    """What the result is after each of the contents was written to a file, each tried for at most 20 seconds."""
    truth = result()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for content in contents:
            file.write_bytes(content)
            signal.alarm(20)
            try:
                found = b"+" if torch.equal(result(), truth) else b"wrong scores"
            except OodScoresError:
                found = b"-"
            except BaseException as error:
                found = repr(error).encode()
            os.write(writing, found + b"\n")
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as lines:
        found_lines = lines.read().split("\n")[:-1]
    assert os.waitpid(child, 0)[1] == 0, f"ended after {len(found_lines)} of {len(contents)}"
    return found_lines


def flips(content: bytes, count: int) -> list[bytes]:
    chosen = random.Random(0)
    places = [chosen.randrange(len(content)) for _ in range(count)]
    return [
        content[:place] + bytes([content[place] ^ (1 << chosen.randrange(8))]) + content[place + 1 :]
        for place in places
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("make", MAKERS)
def test_no_changed_byte_gives_other_scores(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5")
    file = shards.shard_path(path, 1, 2) if make is joined else path
    content = file.read_bytes()
    lengths = [len(content) * share // 100 for share in range(0, 100, 5)]
    contents = flips(content, 60) + [content[:length] for length in lengths]
    found = outcomes(path, file, contents, lambda: ood_scores.score("energy", load(path)))
    assert set(found) <= {"+", "-"}
    assert found.count("-") > 30


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_no_changed_byte_of_stored_statistics_gives_other_scores(tmp_path: Path) -> None:
    path, scored = plain(tmp_path / "a.h5"), problem(30, seed=1)

    def fit() -> torch.Tensor:
        return ood_scores.create_scorer("mahalanobis").fit(load(path)).score(scored)

    fit()
    file = tmp_path / "a.h5.statistics"
    content = file.read_bytes()
    contents = flips(content, 25) + [content[: len(content) * share // 5] for share in range(5)]
    assert outcomes(path, file, contents, fit) == ["+"] * len(contents)
