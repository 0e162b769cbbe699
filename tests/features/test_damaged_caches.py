"""Caches that are damaged, or that a stranger made: refused, without reading other files or any amount of memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import ood_scores
from ood_scores.errors import DamagedCache, ForeignFile, OodScoresError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A finished cache of 64 rows, 16 features and 7 classes."""
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "a.h5"
    ood_scores.extract(torch.nn.Linear(16, 7), [(inputs, torch.arange(64) % 7)], path, device="cpu", progress=False)
    return path


def edited(path: Path, edit: Callable[[h5py.File], Any]) -> Path:
    with h5py.File(path, "r+") as h5:
        edit(h5)
    return path


def attribute(**values: Any) -> Callable[[h5py.File], Any]:
    """Set attributes; None removes one."""

    def edit(h5: h5py.File) -> None:
        for name, value in values.items():
            del h5.attrs[name]
            if value is not None:
                h5.attrs[name] = value

    return edit


def instead(name: str, make: Callable[[h5py.File, str], Any]) -> Callable[[h5py.File], Any]:
    """Put something else in the place of an object."""

    def edit(h5: h5py.File) -> None:
        del h5[name]
        make(h5, name)

    return edit


def array(*args: Any, **kwargs: Any) -> Callable[[h5py.File, str], Any]:
    return lambda h5, name: h5.create_dataset(name, *args, **kwargs)


def group(h5: h5py.File, name: str) -> None:
    h5.create_group(name)


def endless(h5: h5py.File) -> None:
    extras = h5.create_group("extras")
    extras["again"] = extras["once more"] = extras


DAMAGES: dict[str, Callable[[h5py.File], Any]] = {
    "no version": attribute(version=None),
    "version is a text": attribute(version="new"),
    "no library versions": attribute(versions=None),
    "library versions are not JSON": attribute(versions="{"),
    "deep JSON": attribute(versions="[" * 50_000),
    "probes are a number": attribute(probes="3"),
    "format is a list": attribute(format=["a", "b"]),
    "identity is a list": attribute(identity=[1, 2]),
    "identity is a number": attribute(identity=3),
    "architecture is a list": attribute(architecture=[1.0, 2.0]),
    "progress of 5": instead("progress", array(data=np.arange(5))),
    "progress is a text": instead("progress", array(data="many")),
    "fewer rows counted": instead("progress", array(data=np.array([32, 1]))),
    "more rows counted": instead("progress", array(data=np.array([65, 1]))),
    "negative rows counted": instead("progress", array(data=np.array([-1, 0]))),
    "finished is 2": instead("progress", array(data=np.array([64, 2]))),
    "head without bias": lambda h5: h5.__delitem__("head/bias"),
    "head is no group": instead("head", array(data=np.ones(3))),
    "features are a group": instead("features", group),
    "features are texts": instead("features", array(data=["a"] * 64)),
    "features are records": instead("features", array((64,), "f4,i4")),
    "features are a scalar": instead("features", array(data=1.0)),
    "features are empty": instead("features", array(data=h5py.Empty("f4"))),
    "an extra is a group": lambda h5: h5.create_group("extras/x"),
    "extras are no group": lambda h5: h5.create_dataset("extras", data=np.ones(64)),
    "dangling link": instead("features", lambda h5, name: h5.__setitem__(name, h5py.SoftLink("/zz"))),
    "link to a missing file": instead("features", lambda h5, name: h5.__setitem__(name, h5py.ExternalLink("/no", "/"))),
    "shards without identity": lambda h5: h5.__setitem__("shards/file", ["a"]),
    "groups in themselves": endless,
    "head of 3.6 TiB": instead("head/weight", array((10**7, 10**5), "f4", chunks=(1, 1024))),
    "10^12 rows in chunks": instead("features", array((10**12, 16), "f4", chunks=(1024, 16))),
    "10^9 rows in one piece": instead("features", array((10**9, 16), "f4")),
    "one large chunk": instead("head/weight", array((2**14, 2**13), "f4", chunks=(2**14, 2**13), compression="gzip")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_caches_end_in_errors_of_this_package(damage: str, cache: Path) -> None:
    edited(cache, DAMAGES[damage])
    with pytest.raises(OodScoresError):
        ood_scores.score("energy", ood_scores.load(cache))


def test_cache_that_names_itself_as_a_shard_is_refused(cache: Path) -> None:
    def edit(h5: h5py.File) -> None:
        h5["shards/file"], h5["shards/identity"] = [cache.name], [h5.attrs["identity"]]

    with pytest.raises(DamagedCache, match="refers to something that caches do not refer to"):
        ood_scores.load(edited(cache, edit))


def _external_link(h5: h5py.File, secret: Path) -> None:
    h5["features"] = h5py.ExternalLink(str(secret), "/features")


def _external_storage(h5: h5py.File, secret: Path) -> None:
    h5.create_dataset("features", (64, 16), "f4", external=[(str(secret), 0, 64 * 16 * 4)])


def _virtual(h5: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((64, 16), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "features", (64, 16))
    h5.create_virtual_dataset("features", layout)


def _virtual_shard(h5: h5py.File, secret: Path) -> None:
    _virtual(h5, secret)
    with h5py.File(secret) as other:
        h5["shards/file"], h5["shards/identity"] = [str(secret)], [other.attrs["identity"]]


@pytest.mark.parametrize(
    "refer", [_external_link, _external_storage, _virtual, _virtual_shard], ids=lambda f: f.__name__
)
def test_other_files_of_the_machine_are_not_read(refer: Callable[..., None], cache: Path) -> None:
    secret = cache.parent / "elsewhere" / "secret.h5"
    secret.parent.mkdir()
    ood_scores.FeatureSet(torch.ones(64, 16), torch.ones(64, 7)).save(secret)

    def edit(h5: h5py.File) -> None:
        del h5["features"]
        refer(h5, secret)

    with pytest.raises(DamagedCache, match=r"refers to something|does not contain the values of /features"):
        ood_scores.load(edited(cache, edit))


def test_link_to_statistics_elsewhere_is_refused(cache: Path) -> None:
    place = instead("statistics", lambda h5, name: h5.__setitem__(name, h5py.ExternalLink("/etc/passwd", "/")))
    with pytest.raises(DamagedCache, match="/statistics refers to something"):
        ood_scores.load(edited(cache, place))


def test_rows_that_cannot_be_read_are_a_damaged_cache(tmp_path: Path) -> None:
    feats = ood_scores.FeatureSet(torch.rand(4000, 16), torch.rand(4000, 7))
    feats.save(tmp_path / "c.h5", compress=True)
    loaded = ood_scores.load(tmp_path / "c.h5")
    with h5py.File(tmp_path / "c.h5") as h5:
        chunk = h5["logits"].id.get_chunk_info(0)
    with open(tmp_path / "c.h5", "r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(b"\0" * chunk.size)
    with pytest.raises(DamagedCache, match="truncated or damaged"):
        ood_scores.score("energy", loaded)


def test_errors_of_code_that_reads_rows_stay_as_they_are(cache: Path) -> None:
    column = ood_scores.load(cache).columns["features"]
    with pytest.raises(KeyError, match="mine"), column.reader():  # type: ignore[union-attr]
        raise KeyError("mine")


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(ForeignFile, match="is not an HDF5 file"):
        ood_scores.load(tmp_path / "a.h5")
    with pytest.raises(ForeignFile, match="is not a scorer"):
        ood_scores.load_scorer(tmp_path / "a.h5")
    with pytest.raises(OodScoresError, match="is not a feature cache"):
        ood_scores.FeatureSet(torch.ones(2, 3), torch.ones(2, 3)).save(tmp_path / "a.h5")
    os.mkfifo(tmp_path / "detector.json")
    with pytest.raises(ForeignFile, match="is not a detector"):
        ood_scores.Detector.load(tmp_path)
