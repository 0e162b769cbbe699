"""A shorter name for ``ood_scores.extraction.probes``: ``from ood_scores.probes import ODIN``."""

from typing import Any

from ood_scores.extraction import probes
from ood_scores.extraction.probes import PROBES, LayerProbe, Pass, Probe, register_probe

__all__ = ["PROBES", "LayerProbe", "Pass", "Probe", "register_probe"]


def __getattr__(name: str) -> Any:
    """Return the registered probe class of that name."""
    return getattr(probes, name)
