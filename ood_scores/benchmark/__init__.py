"""Benchmarks: a file names models, datasets, and scorers; the results are tables and a report.

>>> import ood_scores
>>> results = ood_scores.benchmark.run("benchmarks/suites/real.toml")  # doctest: +SKIP
>>> results.table  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_scores.benchmark.planning import plan
    from ood_scores.benchmark.results import Results, load_results
    from ood_scores.benchmark.runner import run
    from ood_scores.benchmark.spec import Spec
    from ood_scores.benchmark.spec_file import load_spec

__all__ = ["Results", "Spec", "load_results", "load_spec", "plan", "run"]

_PLACES = {
    "Results": "results",
    "Spec": "spec",
    "load_results": "results",
    "load_spec": "spec_file",
    "plan": "planning",
    "run": "runner",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
