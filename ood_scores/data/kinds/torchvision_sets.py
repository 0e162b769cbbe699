"""torchvision's classification datasets, by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ood_scores.data.dataset_spec import located
from ood_scores.data.images import TorchvisionImages
from ood_scores.errors import BadInput, MissingData, UnknownName


def open_torchvision(
    target: str, base: Path, *, split: str | None = None, root: str | None = None, download: str = "false"
) -> TorchvisionImages:
    """The dataset `target`; see `ood_scores.data.sources.open_dataset`."""
    classes = _classes()
    if target not in classes:
        raise UnknownName(f"no torchvision dataset {target!r}; there are: {', '.join(classes)}")
    folder = _user_data() if root is None else located(root, base)
    takes = inspect.signature(classes[target]).parameters
    arguments = _split_argument(target, takes, split) | _download_argument(target, takes, download)
    try:
        dataset = classes[target](root=str(folder), **arguments)
    except ValueError as error:
        raise BadInput(f"cannot open {target} in {folder}: {error}") from error
    except (RuntimeError, OSError) as error:
        raise MissingData(f"cannot open {target} in {folder}: {error}") from error
    return TorchvisionImages(dataset, None, f"{target}[{split}]" if split else target)


def can_download(target: str) -> bool:
    """Whether torchvision has the dataset `target` and downloads it itself."""
    found = _classes().get(target)
    return found is not None and "download" in inspect.signature(found).parameters


def _classes() -> dict[str, Callable[..., Any]]:
    """The datasets that `root` is enough to open, but for EMNIST, whose `split` names an alphabet."""
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
            raise BadInput(f"{name} has no split {split!r}; there are: train, test")
        return {"train": split == "train"}
    if "split" in takes:
        return {"split": split or "test"}
    if split is not None:
        raise BadInput(f"{name} is not split; leave split={split} away")
    return {}


def _download_argument(name: str, takes: Iterable[str], download: str) -> dict[str, bool]:
    if download not in ("true", "false"):
        raise BadInput(f"cannot read download={download}; write download=true or download=false")
    if download == "false":
        return {}
    if "download" not in takes:
        raise BadInput(f"torchvision cannot download {name}; get it from its authors and name its folder with root=DIR")
    return {"download": True}


def _user_data() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ood_scores" / "data"
