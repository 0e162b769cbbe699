"""Opening HDF5 files for reading, with errors that say what to do, and with a check of the shards of a joined cache."""

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
    """Open an HDF5 file of any origin; errors of h5py become errors that say what to do."""
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
            zstd()  # h5py can read such a file once the module is imported
        if h5.attrs.get("format") == FORMAT and "shards" in h5:
            _require_shards(h5)
        yield h5


def zstd() -> Mapping[str, Any]:
    """The arguments of h5py that compress an HDF5 dataset with Zstandard."""
    import hdf5plugin

    return hdf5plugin.Zstd()


def _require_shards(joined: h5py.File) -> None:
    """Raise DamagedCache unless the shards of a joined cache are in its folder, complete, and those that were joined.

    HDF5 itself would return zeros for the rows of a missing shard.
    """
    names, identities = (joined[f"shards/{what}"].asstr()[()] for what in ("file", "identity"))
    advice = (
        f"{joined.filename} reads its rows from {len(names)} shards in its folder. Put the shard back, or delete "
        f"{joined.filename} and the shard and run the same torchrun command again, which extracts the missing rows."
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
    """Look for the signature at the start, or after a user block whose size is a power of two from 512 (MATLAB)."""
    with open(path, "rb") as file:
        places = itertools.takewhile(lambda at: at < path.stat().st_size, (0, *(512 << n for n in range(20))))
        return any(file.seek(at) == at and file.read(8) == b"\x89HDF\r\n\x1a\n" for at in places)
