"""What the tab key completes in the arguments of commands: names, and files after the prefix of a dataset.

A shell completes files alone where nothing is returned.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def scorers(incomplete: str) -> list[str]:
    """Return the names of scorers that start with a text."""
    from ood_scores.scorers import list_scorers

    return starting(incomplete, list_scorers())


def probes(incomplete: str) -> list[str]:
    """Return the names of probes that start with a text."""
    from ood_scores.extraction.probes import PROBES

    return starting(incomplete, PROBES)


def datasets(incomplete: str) -> list[str]:
    """Return the kinds of datasets that start with a text; of a single one, the paths that it opens, and folders."""
    from ood_scores.data.sources import DATASET_KINDS

    name, colon, path = incomplete.partition(":")
    kinds = [name] if colon and name in DATASET_KINDS else starting(incomplete, DATASET_KINDS)
    is_opened = DATASET_KINDS[kinds[0]].suggested_for if len(kinds) == 1 else None
    paths = [each for each in _paths(path) if is_opened and (each.endswith("/") or is_opened(Path(each)))]
    return [f"{kinds[0]}:{each}" for each in paths] or [f"{kind}:" for kind in kinds if not colon]


def paths_and_datasets(incomplete: str) -> list[str]:
    """Return files and folders that start with a text, and what ``datasets`` returns."""
    return [*datasets(incomplete), *_paths(incomplete)]


def starting(incomplete: str, names: Iterable[str]) -> list[str]:
    """Return the names that start with a text, sorted."""
    return sorted(name for name in names if name.startswith(incomplete))


def _paths(start: str) -> list[str]:
    """Return the paths that start with a text as it is written, folders with a slash; hidden ones only if it is."""
    folder, slash, name = start.rpartition("/")
    try:
        found = sorted(Path(folder + slash).expanduser().iterdir())
    except OSError:
        return []
    shown = [path for path in found if path.name.startswith(name) and (name or not path.name.startswith("."))]
    return [f"{folder}{slash}{path.name}{'/' if path.is_dir() else ''}" for path in shown]
