"""``ood-scores doctor``."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any

import typer

from ood_scores.cli.printing import answer, console, facts
from ood_scores.optional_packages import install
from ood_scores.terminal import marked
from ood_scores.version import __version__

if TYPE_CHECKING:
    from ood_scores.features import FeatureSet

REQUIRED = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "h5py", "safetensors", "pandas")
OPTIONAL = {
    "faiss": ("knn", "approximate indexes of knn, and a faster search on CPUs"),
    "matplotlib": ("report", "figures and HTML reports"),
    "transformers": ("hub", "models named hf:, and image processors"),
    "datasets": ("hub", "datasets named hf:"),
    "open_clip_torch": ("clip", "models named open_clip:"),
    "onnxruntime": ("export", "exporting detectors to ONNX"),
}
"""Packages that some uses need, with the extra that installs them, and the use."""


def doctor() -> None:
    """Show versions and devices, and test in a few seconds that extraction and scores work here.

    The exit code is 1 if a test fails. Paste the output into a bug report.

    \b
    [bold]Examples[/]
      ood-scores doctor
      ood-scores doctor --json > machine.json
    """
    found = {"versions": versions(), "devices": devices(), "tests": {name: test() for name, test in TESTS.items()}}
    answer(found, lambda: _show(found))
    if any(found["tests"].values()):
        raise typer.Exit(1)


def versions() -> dict[str, str]:
    """Return the version of Python and of each package; "" if it is missing."""
    found = {"ood_scores": __version__, "python": platform.python_version()} | {
        name: _version(name) for name in (*REQUIRED, *OPTIONAL)
    }
    return found | {"faiss": _version("faiss-gpu") or _version("faiss-cpu")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def devices() -> dict[str, Any]:
    """Return the operating system, the number of threads of the CPU, and what can be used beside it."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": names,
        "mps": torch.backends.mps.is_available(),
    }


def _extracted() -> tuple[FeatureSet, Any, Any]:
    """Extract digits with a small untrained network, and return the set, the features and the logits by hand."""
    import torch
    from torch import nn

    import ood_scores
    from ood_scores.data.kinds.digits import digits

    images = torch.from_numpy(digits()[0][:300]).float() / 255
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        trunk, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()), nn.Linear(32, 10)
    feats = ood_scores.extract(nn.Sequential(trunk, head), images.split(64), device="cpu", progress=False)
    with torch.no_grad():
        features = trunk(images)
        return feats, features.double(), head(features).double()


def _test_extraction() -> str:
    import torch

    feats, features, logits = _extracted()
    kept = [torch.as_tensor(values).double() for values in (feats.features, feats.logits)]
    same = all(torch.allclose(*pair, atol=1e-5) for pair in zip(kept, (features, logits), strict=True))
    return "" if same else "the features or logits of a small network differ from those computed directly"


def _test_scores() -> str:
    import torch

    import ood_scores

    feats, features, logits = _extracted()
    unit = torch.nn.functional.normalize(features)
    near = torch.cdist(unit, unit).kthvalue(5, dim=1).values
    expected = {
        "energy": logits.logsumexp(dim=1),
        "gradnorm": (logits.softmax(dim=1) - 0.1).abs().sum(dim=1) * features.abs().sum(dim=1),
        "knn": -near,
    }
    knn = ood_scores.create_scorer("knn", k=5).fit(feats)
    found = {name: ood_scores.score(name, feats) for name in ("energy", "gradnorm")} | {"knn": knn.score(feats)}
    wrong = [name for name, by_hand in expected.items() if not torch.allclose(found[name], by_hand, atol=1e-3)]
    return f"the scores of {', '.join(wrong)} differ from their formulas" if wrong else ""


def _test_cache() -> str:
    import tempfile
    from pathlib import Path

    import torch

    import ood_scores

    feats, *_ = _extracted()
    with tempfile.TemporaryDirectory() as folder:
        feats.save(Path(folder) / "test.h5")
        again = ood_scores.load(Path(folder) / "test.h5")
        same = torch.equal(torch.as_tensor(again.features), torch.as_tensor(feats.features))
    return "" if same else "features read from a cache differ from those written"


TESTS: dict[str, Callable[[], str]] = {
    "extraction": _test_extraction,
    "scores": _test_scores,
    "cache": _test_cache,
}
"""Tests by name; each returns what is wrong, or ""."""


def _show(found: dict[str, Any]) -> None:
    screen = console()
    screen.print(facts({name: version or "not installed" for name, version in found["versions"].items()}))
    there = found["devices"]
    gpus = ", ".join(there["gpus"]) or "none"
    screen.print(facts({"system": there["system"], "CPU threads": str(there["threads"]), "GPUs": gpus}))
    for name, (extra, use) in OPTIONAL.items():
        if not found["versions"][name]:
            screen.print(f"[yellow]without {name}[/]: {use} ({marked(install(extra))})", soft_wrap=True)
    for name, failure in found["tests"].items():
        screen.print(f"[red]✗[/] {name}: {marked(failure)}" if failure else f"[green]✓[/] {name}")
