"""Opening HDF5 files to read: h5py's errors say what to do, and what a joined cache reads from is there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from ood_scores.errors import CacheBusy, DamagedCache, ForeignFile

FORMAT = "ood_scores features"


@contextmanager
def open_to_read(file: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """An open HDF5 file of any origin; the errors of h5py become errors that say what to do."""
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}.")
    if not path.is_file() or not _has_hdf5_signature(path):
        raise ForeignFile(f"{path} is not an HDF5 file.")
    try:
        h5 = h5py.File(path, "r")
    except BlockingIOError as error:
        raise CacheBusy(f"{path} is being written by another process and is not finished: wait for it.") from error
    except OSError as error:
        raise DamagedCache(
            f"{path} is truncated or damaged ({error}): delete it, or pass overwrite=True to extract again."
        ) from error
    with h5:
        if h5.attrs.get("compressed", False):
            zstd()  # importing it is what lets h5py read such a file
        if h5.attrs.get("format") == FORMAT and "shards" in h5:
            _require_shards(h5)
        yield h5


def zstd() -> Mapping[str, Any]:
    import hdf5plugin

    return hdf5plugin.Zstd()


def _require_shards(joined: h5py.File) -> None:
    """Raises DamagedCache unless the shards of a joined cache are beside it, whole and the ones that were joined: HDF5
    itself would give zeros for the rows of a shard that it does not find."""
    names, identities = (joined[f"shards/{what}"].asstr()[()] for what in ("file", "identity"))
    advice = (
        f"{joined.filename} reads its rows from {len(names)} shards beside it. Put the shard back; or delete "
        f"{joined.filename} and the shard and run the torchrun command that made them, which extracts what is missing."
    )
    for name, identity in zip(names, identities, strict=True):
        shard = Path(joined.filename).resolve().parent / name
        try:
            with open_to_read(shard) as h5:
                found = h5.attrs.get("identity")
        except FileNotFoundError as error:
            raise DamagedCache(f"the shard {shard} is missing. {advice}") from error
        except (ForeignFile, DamagedCache) as error:
            raise DamagedCache(f"the shard {shard} is truncated or damaged. {advice}") from error
        if found != identity:
            raise DamagedCache(f"the shard {shard} is not the one that was joined. {advice}")


def _has_hdf5_signature(path: Path) -> bool:
    """At the start, or after a user block of 512 bytes or a power of two more (MATLAB)."""
    with open(path, "rb") as file:
        places = itertools.takewhile(lambda at: at < path.stat().st_size, (0, *(512 << n for n in range(20))))
        return any(file.seek(at) == at and file.read(8) == b"\x89HDF\r\n\x1a\n" for at in places)
