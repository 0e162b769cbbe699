"""faiss indexes of a bank: created from a factory string, trained, and stored next to the cache of the bank.

The file of an index can be read by faiss. It ends with a SHA-256 of the index, of the identity of the cache, of the
bank, and of the settings; an index with another digest is ignored. The file is replaced as a whole and may be deleted
at any time. If it cannot be written, the index is not stored.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from ood_scores.atomic import COPY_BYTES, replacing
from ood_scores.errors import BadInput, CacheError
from ood_scores.features import FeatureSet
from ood_scores.features.storage.statistics_store import cache_of
from ood_scores.optional_packages import require
from ood_scores.runtime import version_of

DIGEST_BYTES = hashlib.sha256().digest_size


def faiss_library() -> Any:
    """Return the module of faiss.

    Raises:
        MissingPackage: if it is not installed.
    """
    require("indexes other than 'Flat' need", "knn", "faiss")
    import faiss

    return faiss


def trained_index(description: str, bank: Tensor) -> Any:
    """Return the faiss index of a factory string that holds, and is trained on, the bank ``[N, D]``, float32.

    Raises:
        BadInput: if faiss has no such index, or cannot train it on this bank.
    """
    faiss = faiss_library()
    rows, width = bank.shape
    try:
        index = faiss.index_factory(width, description)
        index.train(bank.numpy())
    except RuntimeError as error:
        reason = re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: )?", "", str(error)).strip()
        raise BadInput(
            f"knn: faiss cannot create the index {description!r} for {rows} rows of {width} features ({reason}): use "
            "another factory string, such as 'Flat', or more rows."
        ) from error
    index.add(bank.numpy())
    return index


def index_of_bytes(content: np.ndarray, bank: Tensor) -> Any:
    """Return the faiss index in some bytes, which must be one of the bank ``[N, D]``.

    Raises:
        BadInput: if it is an index of another bank.
        RuntimeError: if faiss cannot read it.
    """
    faiss = faiss_library()
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):
        index = faiss.deserialize_index(content)
    else:
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(len(content))  # faiss allocates what the bytes declare
        try:
            index = faiss.deserialize_index(content)
        finally:
            faiss.set_deserialization_vector_byte_limit(before)
    if (index.ntotal, index.d) != tuple(bank.shape):
        raise BadInput(f"knn: the index holds {index.ntotal} rows of width {index.d}, the bank {tuple(bank.shape)}.")
    return index


def kept_index(description: str, bank: Tensor, feats: FeatureSet, bank_of: str) -> Any:
    """Return the ``trained_index`` of a bank, stored next to the cache of its feature set if the set has one.

    Args:
        description: the factory string.
        bank: the bank ``[N, D]``, float32.
        feats: the set from which the bank was taken.
        bank_of: a description of how it was taken.
    """
    faiss = faiss_library()
    cache = cache_of(feats)
    if not cache:
        return trained_index(description, bank)
    file, identity = cache
    made_by = [description, bank_of]
    place = file.with_name(f"{file.name}.{_sha256(made_by).hexdigest()[:16]}.faiss")
    rows = xxhash.xxh3_128_hexdigest(bank.contiguous().numpy().data)
    settings = [identity, rows, *made_by, faiss.__version__, version_of("ood_scores")]
    with suppress(OSError, RuntimeError):
        if place.is_file() and _is_whole(place, settings):
            return faiss.read_index(str(place))
    index = trained_index(description, bank)
    with suppress(OSError, RuntimeError, CacheError):
        _keep(index, place, settings)
    return index


def _keep(index: Any, place: Path, settings: list[str]) -> None:
    with replacing(place) as file:
        faiss_library().write_index(index, str(file.name))
        size = os.stat(file.name).st_size
        file.write_at(size, np.frombuffer(_of_file(file, size, settings), np.uint8))


def _is_whole(place: Path, settings: list[str]) -> bool:
    with open(place, "rb", buffering=0) as file:
        size = os.stat(place).st_size - DIGEST_BYTES
        digest = _of_file(file, size, settings)
        return file.read(DIGEST_BYTES) == digest


def _of_file(file: io.FileIO, size: int, settings: list[str]) -> bytes:
    """Return the digest of the first ``size`` bytes of a file and of the settings."""
    digest = _sha256(settings)
    file.seek(0)
    for done in range(0, size, COPY_BYTES):
        digest.update(file.read(min(COPY_BYTES, size - done)))
    return digest.digest()


def _sha256(parts: list[str]) -> Any:
    return hashlib.sha256(repr(parts).encode())
