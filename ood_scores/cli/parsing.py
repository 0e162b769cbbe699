"""From the words of a command line to arguments, and from tables to files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_scores.errors import BadInput

if TYPE_CHECKING:
    import pandas as pd

    from ood_scores.extraction.layers import Layers

TABLE_SUFFIXES = (".csv", ".json")


def parameters(scorer: str, texts: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as parameters of a scorer, each of the type of its default."""
    from ood_scores.parameters import from_texts
    from ood_scores.scorers.registry import scorer_class

    return from_texts(scorer_class(scorer), texts, "--param key=value")


def layers(text: str | None) -> Layers | None:
    """``stages``, or names of modules with commas between them."""
    return text if text in (None, "stages") else [part.strip() for part in text.split(",")]


def numbers(text: str | None) -> list[float] | None:
    """``0.5,0.5,0.5`` as numbers."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"cannot read {text!r}: write numbers with commas between them.") from error


def named_caches(texts: Iterable[str]) -> dict[str, Path]:
    """``NAME=CACHE`` or ``CACHE`` texts as paths by name; the file's stem where no name is given."""
    caches: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        cache = Path(path if equals else text)
        name = name if equals else cache.stem
        if name in caches:
            raise BadInput(f"two OoD sets are called {name!r}: write --ood NAME=CACHE.")
        caches[name] = cache
    return caches


def check_table_path(path: Path | None) -> None:
    """Raises BadInput, before any work is done, for a file that ``write_table`` would not write."""
    if path is not None and path.suffix not in TABLE_SUFFIXES:
        raise BadInput(f"cannot write {path}: a table's name ends in {' or '.join(TABLE_SUFFIXES)}.")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """As CSV; or as JSON, with what the table knows about itself beside its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        path.write_text(json.dumps(table.attrs | {"rows": table.to_dict("records")}, indent=2) + "\n")
