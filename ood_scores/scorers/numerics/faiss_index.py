"""faiss indexes of a bank: made from a factory string, trained, and kept beside the cache that the bank comes from.

An index is kept in a file that faiss reads, followed by a SHA-256 of it, of the cache's identity and of what made it:
it counts only if that is right, is replaced as a whole, and may be deleted at any time. Where it cannot be written,
nothing is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ood_scores.atomic import COPY_BYTES, replacing
from ood_scores.errors import BadInput, CacheError
from ood_scores.features import FeatureSet
from ood_scores.features.storage.statistics_store import cache_of

DIGEST_BYTES = hashlib.sha256().digest_size


def trained_index(description: str, bank: Tensor) -> Any:
    """The faiss index of that factory string, trained on the bank ``[N, D]``, float32, which it holds.

    Raises:
        BadInput: faiss knows no such index, or cannot train it on such a bank.
    """
    import faiss

    rows, width = bank.shape
    try:
        index = faiss.index_factory(width, description)
        index.train(bank.numpy())
    except RuntimeError as error:
        reason = re.sub(r"^Error in .* at \S+:\d+: (Error: '.*' failed: )?", "", str(error)).strip()
        raise BadInput(
            f"knn: faiss cannot make the index {description!r} of {rows} rows of {width} features ({reason}): use "
            "another factory string, or 'Flat', or more rows."
        ) from error
    index.add(bank.numpy())
    return index


def kept_index(description: str, bank: Tensor, feats: FeatureSet, bank_of: str) -> Any:
    """The ``trained_index`` of a bank of the set; read from beside the set's cache, or kept there, if it is one.

    Args:
        description: the factory string.
        bank: ``[N, D]``, float32.
        feats: the set that the bank comes from.
        bank_of: how it comes from it.
    """
    import faiss

    cache = cache_of(feats)
    if not cache:
        return trained_index(description, bank)
    file, identity = cache
    made_by = [description, bank_of]
    place = file.with_name(f"{file.name}.{_sha256(made_by).hexdigest()[:16]}.faiss")
    made_of = [identity, *made_by, faiss.__version__, importlib.metadata.version("ood_scores")]
    with suppress(OSError, RuntimeError):
        if _is_whole(place, made_of):
            return faiss.read_index(str(place))
    index = trained_index(description, bank)
    with suppress(OSError, RuntimeError, CacheError):
        _keep(index, place, made_of)
    return index


def _keep(index: Any, place: Path, made_of: list[str]) -> None:
    import faiss

    with replacing(place) as file:
        faiss.write_index(index, str(file.name))
        size = os.stat(file.name).st_size
        file.write_at(size, np.frombuffer(_of_file(file, size, made_of), np.uint8))


def _is_whole(place: Path, made_of: list[str]) -> bool:
    with open(place, "rb", buffering=0) as file:
        size = os.stat(place).st_size - DIGEST_BYTES
        digest = _of_file(file, size, made_of)
        return file.read(DIGEST_BYTES) == digest


def _of_file(file: io.FileIO, size: int, made_of: list[str]) -> bytes:
    """The digest of the first bytes of a file and of what made it."""
    digest = _sha256(made_of)
    file.seek(0)
    for done in range(0, size, COPY_BYTES):
        digest.update(file.read(min(COPY_BYTES, size - done)))
    return digest.digest()


def _sha256(parts: list[str]) -> Any:
    return hashlib.sha256(repr(parts).encode())
