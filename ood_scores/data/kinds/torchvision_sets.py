"""Classification datasets of torchvision, by name."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ood_scores.data.dataset_spec import located, parse
from ood_scores.data.decoding import read_rgb
from ood_scores.data.images import TorchvisionImages
from ood_scores.data.kinds.base import register_dataset_kind
from ood_scores.data.remedies import literal, python_command, remedy_for_path
from ood_scores.errors import BadInput, MissingData
from ood_scores.registry import unknown


def _remedy(text: str, root: str | PathLike[str] | None) -> str:
    _, target, options = parse(text)
    found = _classes().get(target)
    if found is None or "download" not in inspect.signature(found).parameters:
        return remedy_for_path(text, root)
    if options.get("download") == "true":
        return ""
    kept = text.replace("?download=false&", "?").replace("&download=false", "").removesuffix("?download=false")
    whole = f"{kept}{'&' if '?' in kept else '?'}download=true"
    arguments = literal(whole) if root is None else f"{literal(whole)}, root={literal(fspath(root))}"
    call = f"from ood_scores.data.sources import open_dataset; open_dataset({arguments})"
    return f"add download=true to the spec, or run: {python_command(call)}"


def _without_download(text: str) -> str:
    return re.sub(r"([?&])download=true", r"\1download=false", text)


@register_dataset_kind("torchvision", _remedy, _without_download)
def open_torchvision(
    target: str, base: Path, *, split: str | None = None, root: str | None = None, download: str = "false"
) -> TorchvisionImages:
    """Open ``torchvision:CIFAR10?split=test``: one of torchvision's classification datasets.

    ``split`` becomes the dataset's argument ``train`` or ``split``, whichever it has, and defaults to test. ``root``
    defaults to ``ood_scores/data`` in the user's cache (``$XDG_CACHE_HOME``, else ``~/.cache``). Nothing is downloaded
    without ``download=true``.
    """
    classes = _classes()
    if target not in classes:
        raise unknown("there is no torchvision dataset", target, classes)
    folder = _user_data() if root is None else located(root, base)
    takes = inspect.signature(classes[target]).parameters
    arguments = _split_argument(target, takes, split) | _download_argument(target, takes, download)
    if "loader" in takes or target == "ImageNet":  # ImageNet passes its keywords on
        arguments["loader"] = read_rgb
    try:
        dataset = classes[target](root=str(folder), **arguments)
    except ValueError as error:
        raise BadInput(f"cannot open {target} in {folder} ({error}): write another split=NAME.") from error
    except (RuntimeError, OSError) as error:
        raise MissingData(f"cannot open {target} in {folder}: {error}") from error
    return TorchvisionImages(dataset, None, f"{target}[{split}]" if split else target)


def _classes() -> dict[str, Callable[..., Any]]:
    """Return the datasets that need no argument but ``root``, without EMNIST, whose ``split`` names an alphabet."""
    from torchvision import datasets

    return {
        name: getattr(datasets, name)
        for name in sorted(datasets.__all__)
        if name != "EMNIST" and _required(getattr(datasets, name)) == ["root"]
    }


def _required(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


def _split_argument(name: str, takes: Iterable[str], split: str | None) -> dict[str, Any]:
    if "train" in takes:
        if split not in ("train", "test", None):
            raise BadInput(f"{name} has no split {split!r}; there are: train, test.")
        return {"train": split == "train"}
    if "split" in takes:
        return {"split": split or "test"}
    if split is not None:
        raise BadInput(f"{name} has no splits: leave out split={split}.")
    return {}


def _download_argument(name: str, takes: Iterable[str], download: str) -> dict[str, bool]:
    if download not in ("true", "false"):
        raise BadInput(f"cannot read download={download}: write download=true or download=false.")
    if download == "false":
        return {}
    if "download" not in takes:
        raise BadInput(f"torchvision cannot download {name}: get it from its authors and write root=DIR.")
    return {"download": True}


def _user_data() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ood_scores" / "data"
