"""Probes: what ``extract`` computes for every input in addition to features and logits, and stores as named extras.

Importing this package registers the probes of all its modules. Their classes are attributes of the package:
``ood_scores.probes.ODIN``.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ood_scores.extraction.probes.base import PROBES, LayerProbe, Pass, Probe, as_probes, probe_from, register_probe

__all__ = ["PROBES", "LayerProbe", "Pass", "Probe", "as_probes", "probe_from", "register_probe"]

for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def __getattr__(name: str) -> Any:
    """Return the registered probe class of that name."""
    for cls in PROBES.values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
