"""``load``: a cache opened as a feature set."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ood_scores.errors import BadInput
from ood_scores.features.featureset import FeatureSet
from ood_scores.features.storage import columns as col
from ood_scores.runtime import find_device
from ood_scores.user_warnings import warn_user

if TYPE_CHECKING:
    from ood_scores.features.storage.checksums import Verify


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu", *, verify: Verify = "once") -> FeatureSet:
    """Open a feature cache, which is read lazily.

    Args:
        path: The file.
        device: The device on which blocks are fitted and scored; ``"auto"`` is a GPU if one is available.
        verify: When the checksums of rows are checked: the first time that this process reads them (``"once"``),
            whenever they are read (``"always"``), or never (False), such as for a cache that another program changed.
            With False, no stored statistics are used, and none are stored. A cache without a seal, in which nothing
            can be verified, is warned of unless this is False.

    Raises:
        BadInput: if the device is not available.
        FileNotFoundError: if the file does not exist.
        ForeignFile: if the file is not a cache of this package.
        UnfinishedCache: if the extraction has not finished; the message says how to continue it.
        DamagedCache: if the file is truncated or unreadable.
        CacheBusy: if another process is writing the file.
    """
    from ood_scores.features.storage import cache
    from ood_scores.features.storage.layout import column_names
    from ood_scores.features.storage.reading import how_to_seal, is_sealed, open_to_read

    found = find_device(device)
    if verify not in ("once", "always", False):
        raise BadInput(f"verify must be 'once', 'always', or False, got {verify!r}.")
    with open_to_read(path, sealed=verify is not False) as h5:
        cache.require_finished(h5)
        if verify and not is_sealed(h5):
            warn_user(how_to_seal(path))
        columns = {name: replace(col.disk_column(h5[name]), verify=verify) for name in column_names(h5)}
        provenance = cache.state(h5).provenance
        feats = FeatureSet(**col.as_arguments(columns), head=cache.read_head(h5), provenance=provenance)
        feats.is_whole_file = True
        feats.device = None if found.type == "cpu" else found
        return feats
