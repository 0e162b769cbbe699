"""How to get the datasets that this package does not carry.

Nothing is fetched here: `remedy` says the command or address, and a person decides.
"""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import PurePosixPath

from ood_scores.data.catalog import CATALOG, OPENOOD, KnownSet
from ood_scores.data.dataset_spec import parse
from ood_scores.data.kinds.torchvision_sets import can_download


def remedy(spec: str, root: str | PathLike[str] | None = None) -> str:
    """How to get the data that `spec` names: a command, an address, or "" where none is known.

    Args:
        spec: as `ood_scores.data.sources.open_dataset` takes it; nothing is opened, no variable is expanded.
        root: where its relative paths start.
    """
    kind, target, options = parse(spec)
    if kind == "hf":
        return _from_hub(target, options)
    if kind == "torchvision" and can_download(target):
        return "" if options.get("download") == "true" else _with_download(spec, root)
    if kind not in ("folder", "imglist", "npz", "torchvision"):
        return ""
    for known in CATALOG:
        if f"/{target}".endswith(f"/{_path(known)}"):
            return _instruction(known, _below(root, target.removesuffix(_path(known))))
    return _by_folder(target, root)


def _from_hub(target: str, options: dict[str, str]) -> str:
    arguments = [repr(target), *([repr(options["config"])] if "config" in options else [])]
    call = f"from datasets import load_dataset; load_dataset({', '.join(arguments)})"
    return f'pip install datasets && python -c "{call}"'


def _with_download(spec: str, root: str | PathLike[str] | None) -> str:
    kept = spec.replace("?download=false&", "?").replace("&download=false", "").removesuffix("?download=false")
    whole = f"{kept}{'&' if '?' in kept else '?'}download=true"
    arguments = repr(whole) if root is None else f"{whole!r}, root={fspath(root)!r}"
    call = f"from ood_scores.data.sources import open_dataset; open_dataset({arguments})"
    return f'add download=true to the spec, or run: python -c "{call}"'


def _by_folder(target: str, root: str | PathLike[str] | None) -> str:
    """For a path that no set has as its own: OpenOOD's layout, else the innermost name that is known."""
    path = PurePosixPath(target)
    names = [part.lower().replace("-", "_") for part in (*path.parent.parts, path.stem)]
    for place, name in enumerate(names):
        if name in OPENOOD.folders:
            return _instruction(OPENOOD, _below(root, str(PurePosixPath(*path.parts[:place]))))
    for name in reversed(names):
        for known in CATALOG:
            if name in known.folders:
                opened = f"; {known.spec} then opens it" if known.get else ""
                return _instruction(known, _below(root, "")) + opened
    return ""


def _path(known: KnownSet) -> str:
    return parse(known.spec).target


def _below(root: str | PathLike[str] | None, folder: str) -> str:
    """The folder as a command takes it; variables and `~` are left to the shell."""
    start = "" if root is None or folder.startswith(("~", "$")) else fspath(root)
    path = str(PurePosixPath(start, folder))
    return f'"{path}"' if " " in path else path


def _instruction(known: KnownSet, folder: str) -> str:
    if known.spec.endswith("download=true"):
        return f"write {known.spec}"
    return f"{known.get.replace('{data}', folder)} (see {known.page})" if known.get else f"see {known.page}"
