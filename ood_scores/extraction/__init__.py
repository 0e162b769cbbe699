"""Extraction: the only place that runs a model for scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ood_scores.extraction.run import extract

__all__ = ["extract"]


def __getattr__(name: str) -> Any:
    """Import ``extract`` when it is first used: the command line reads the options without torch."""
    if name != "extract":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ood_scores.extraction.run import extract

    return extract
