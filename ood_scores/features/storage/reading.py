"""Opening HDF5 files for reading, with errors that say what to do, and with a check of the shards of a joined cache."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from ood_scores.atomic import NO_LOCKS, user_path
from ood_scores.errors import CacheBusy, DamagedCache, ForeignFile, OodScoresError
from ood_scores.features.storage.seal import check_seal
from ood_scores.features.storage.structure import check_structure, objects
from ood_scores.registry import did_you_mean

FORMAT = "ood_scores features"
OWN = "ood_scores"
"""Start of the format of all HDF5 files of this package."""

DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that are raised for files whose structure is not the expected one."""


@contextmanager
def open_to_read(file: str | os.PathLike[str], sealed: bool = True) -> Iterator[h5py.File]:
    """Open an HDF5 file of any origin to read its structure.

    Errors of h5py become errors that say what to do, also those that are raised in the context.
    """
    with opened(file, sealed) as h5, damage_named(file):
        yield h5


@contextmanager
def opened(file: str | os.PathLike[str], sealed: bool = True) -> Iterator[h5py.File]:
    """Open an HDF5 file of any origin, for a context whose own errors stay as they are.

    A file of this package is checked: its seal must be right, if it has one and unless ``sealed`` is False; it must
    contain what it declares, and refer to no other files than its shards.
    """
    path = user_path(file)
    with _open(path, sealed) as h5:
        with damage_named(path):
            if h5.attrs.get("compressed", False):
                zstd()  # h5py can read such a file once the module is imported
            if str(h5.attrs.get("format", "")).startswith(OWN):
                check_structure(h5)
            if h5.attrs.get("format") == FORMAT and "shards" in h5:
                _require_shards(h5)
        yield h5


def _open(path: Path, sealed: bool = True) -> h5py.File:
    if not path.exists():
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"there is no file {path}{did_you_mean(path.name, beside)}.")
    if path.is_dir():
        raise ForeignFile(f"{path} is a folder: pass the file of a cache, such as {path / 'val.h5'}.")
    if not is_hdf5(path):
        raise ForeignFile(f"{path} is not an HDF5 file: pass a cache that extract wrote.")
    if sealed:
        check_seal(path)
    try:
        return _with_or_without_lock(path)
    except BlockingIOError as error:
        raise CacheBusy(f"{path} is being written by another process and is not finished: wait for it.") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _damaged(path, error) from error


def _with_or_without_lock(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return h5py.File(path, "r", locking=False)


@contextmanager
def damage_named(file: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors that h5py and torch raise for damaged files into DamagedCache."""
    try:
        yield
    except (OodScoresError, ConnectionError):
        raise
    except DAMAGE as error:
        raise _damaged(file, error) from error


def _damaged(file: str | os.PathLike[str], error: BaseException) -> DamagedCache:
    return DamagedCache(
        f"{os.fspath(file)} is truncated or damaged ({error!r:.200}): delete it, or pass overwrite=True to extract "
        "again."
    )


def zstd() -> Mapping[str, Any]:
    """The arguments of h5py that compress an HDF5 dataset with Zstandard."""
    import hdf5plugin

    return hdf5plugin.Zstd()


def _require_shards(joined: h5py.File) -> None:
    """Raise DamagedCache unless the shards of a joined cache are in its folder, complete, and those that were joined.

    HDF5 itself would return zeros for the rows of a missing shard.
    """
    shards, identities = shard_files(joined), joined["shards/identity"].asstr()[()]
    advice = (
        f"{joined.filename} reads its rows from {len(shards)} shards in its folder. Put the shard back, or delete "
        f"{joined.filename} and the shard and run the same torchrun command again, which extracts the missing rows."
    )
    virtual = [each for each in objects(joined) if isinstance(each, h5py.Dataset) and each.is_virtual]
    rows = dict.fromkeys((column.name for column in virtual), 0)
    for shard, identity in zip(shards, identities, strict=True):
        try:
            with opened_shard(shard) as h5:
                found = h5.attrs.get("identity")
                shapes = {column.name: h5[column.name].shape for column in virtual} if found == identity else {}
        except FileNotFoundError as error:
            raise DamagedCache(f"the shard {shard} is missing. {advice}") from error
        except (ForeignFile, DamagedCache) as error:
            raise DamagedCache(f"the shard {shard} is truncated or damaged. {advice}") from error
        if found != identity or any(column.shape[1:] != shapes[column.name][1:] for column in virtual):
            raise DamagedCache(f"the shard {shard} is not the one that was joined. {advice}")
        rows = {column: count + shapes[column][0] for column, count in rows.items()}
    if any(column.shape[0] != rows[column.name] for column in virtual):
        raise DamagedCache(f"{joined.filename} has another number of rows than its shards. {advice}")


def shard_files(joined: h5py.File) -> list[Path]:
    """Return the files of the shards of a joined cache in the order of their rows."""
    folder = Path(joined.filename).resolve().parent
    return [folder / name for name in joined["shards/file"].asstr()[()]]


def is_sealed(h5: h5py.File) -> bool:
    """Return whether a cache and each of its shards has a seal."""
    shards = shard_files(h5) if "shards" in h5 else []
    return all(check_seal(file) for file in (Path(h5.filename), *shards))


def how_to_seal(path: str | os.PathLike[str]) -> str:
    """Return a sentence about a cache without a seal: nothing in it can be verified."""
    return (
        f"{os.fspath(path)} has no seal, because an earlier version wrote it, or another program changed it: nothing "
        "in it can be verified. Extract it again; or, if its content is known to be right, seal it as it is, with "
        f"ood_scores.load({os.fspath(path)!r}, verify=False).save({os.fspath(path)!r})."
    )


@contextmanager
def opened_shard(shard: Path) -> Iterator[h5py.File]:
    """Open a shard, which has no shards itself."""
    with _open(shard) as h5, damage_named(shard):
        check_structure(h5)
        if h5.attrs.get("format") != FORMAT or "shards" in h5:
            raise ForeignFile(f"{shard} is not a shard.")
        yield h5


def is_hdf5(path: Path) -> bool:
    """Return whether a file has the signature of HDF5: at the start, or after a user block of 512 · 2**n bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        places = itertools.takewhile(lambda at: at < path.stat().st_size, (0, *(512 << n for n in range(20))))
        return any(file.seek(at) == at and file.read(8) == b"\x89HDF\r\n\x1a\n" for at in places)
