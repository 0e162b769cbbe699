"""Parse command-line options, and write tables to files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ood_scores.atomic import replace_text, replacing, require_writable, user_path
from ood_scores.cli.printing import json_text, table_document
from ood_scores.errors import BadInput
from ood_scores.parameters import between_commas
from ood_scores.terminal import csv_text, encodable, with_texts
from ood_scores.user_code import import_referenced

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from ood_scores.extraction.layers import Layers
    from ood_scores.scorers import Scorer

_NOT_OF_THE_NETWORK = {
    "name": "it is the name of the model, so rename this argument of your function",
    "checkpoint": "pass --checkpoint, or rename this argument of your function",
    "num_classes": "pass --num-classes",
}
"""Arguments of ``load_model`` itself, and what to do instead."""

WITH_PARAMETERS = re.compile(r"(?P<name>.+?):(?P<parameters>\w+=.*)")
"""A scorer with parameters; its name may be that of code, which contains a colon, too."""

TABLE_SUFFIXES = (".csv", ".parquet", ".json")


def scorer_name(text: str) -> str:
    """Return the name of a scorer, and import the code that it names, if any."""
    from ood_scores.scorers.registry import SCORERS, scorer_class

    import_referenced(text, SCORERS)
    return scorer_class(text).name


def scorer_names(texts: Iterable[str]) -> list[str]:
    """Return the names of the scorers of an option that is repeated; see ``scorer_name``."""
    for text in texts:
        if "," in text:
            repeated = " ".join(f"--scorer {each.strip()}" for each in text.split(","))
            raise BadInput(f"--scorer takes one name, got {text!r}: repeat the option, as in {repeated}.")
    return [scorer_name(text) for text in texts]


def labeled_scorers(texts: Iterable[str]) -> dict[str, str | Scorer]:
    """Return the scorers of a repeated ``NAME`` or ``NAME:KEY=VALUE,KEY=VALUE``, each by its name or its whole text."""
    found: dict[str, str | Scorer] = {}
    for text in texts:
        label, scorer = _labeled_scorer(text)
        if label in found:
            raise BadInput(f"--scorer {label} is listed twice: remove one of them.")
        found[label] = scorer
    return found


def _labeled_scorer(text: str) -> tuple[str, str | Scorer]:
    from ood_scores.scorers import create_scorer

    parts = WITH_PARAMETERS.fullmatch(text)
    if parts is None:
        (name,) = scorer_names([text])
        return name, name
    name, values = scorer_name(parts["name"]), between_commas(parts["parameters"])
    return text, create_scorer(name, **parameters(name, values, "--scorer NAME:KEY=VALUE,KEY=VALUE"))


def import_named(model: str, datasets: Iterable[str], probes: Iterable[str], pool: str | None = None) -> None:
    """Import the code that names on the command line stand for."""
    import ood_scores.data.kinds
    import ood_scores.models.kinds  # noqa: F401  registers every kind, as the line above
    from ood_scores.data.kinds.base import DATASET_KINDS
    from ood_scores.extraction.probes import PROBES, probe_from
    from ood_scores.models.kinds.base import MODEL_KINDS

    import_referenced(model, MODEL_KINDS)
    for text in datasets:
        import_referenced(text, DATASET_KINDS)
    import_referenced(pool or "")
    for text in probes:
        import_referenced(text, PROBES)
        probe_from(text)  # registers a class that is not registered


def parameters(scorer: str, texts: Iterable[str], usage: str = "--param key=value") -> dict[str, Any]:
    """Return ``key=value`` texts as parameters of a scorer, each with the type of its default."""
    from ood_scores.parameters import from_texts
    from ood_scores.scorers.registry import scorer_class

    return from_texts(scorer_class(scorer), texts, usage)


def model_arguments(texts: Iterable[str] | None) -> dict[str, Any]:
    """Return ``key=value`` texts as arguments of a network."""
    from ood_scores.parameters import plain_values

    arguments = plain_values(texts or (), "--model-arg key=value")
    for key, instead in _NOT_OF_THE_NETWORK.items():
        if key in arguments:
            raise BadInput(f"--model-arg cannot set {key!r}: {instead}.")
    return arguments


def zero_shot(
    network: nn.Module,
    classes: Path | None,
    templates: Sequence[str] | None = None,
    negatives: Path | None = None,
    adjectives: Path | None = None,
) -> nn.Module:
    """Return a zero-shot classifier of a network if files of texts are given, else the network itself."""
    from ood_scores.models.zero_shot.build import as_classifier
    from ood_scores.models.zero_shot.negatives import NegativeWords
    from ood_scores.models.zero_shot.prompts import checked_templates

    if adjectives is not None and negatives is None:
        raise BadInput("--adjectives are negatives of a zero-shot classifier besides nouns: pass --negatives, too.")
    words = None if negatives is None else NegativeWords(negatives, adjectives or ())
    texts = [each for template in templates or () for each in checked_templates(template)]
    return as_classifier(network, classes, texts or None, words)


def layers(text: str | None) -> Layers | None:
    """Return ``stages``, or a list of module names from a comma-separated text."""
    return text if text in (None, "stages") else [part.strip() for part in text.split(",")]


def numbers(text: str | None) -> list[float] | None:
    """Return a comma-separated text, such as ``0.5,0.5,0.5``, as numbers."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"cannot read {text!r}: write numbers separated by commas.") from error


def named_caches(texts: Iterable[str]) -> dict[str, Path]:
    """Return ``NAME=CACHE`` or ``CACHE`` texts as paths by name; the default name is the stem of the file.

    A text with a slash before ``=``, or that is a path as a whole, has no name.
    """
    caches: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if equals and not (name and path):
            raise BadInput(f"cannot read --ood {text}: write --ood NAME=CACHE.")
        is_named = equals and os.sep not in name and not user_path(text).exists()
        cache = Path(path if is_named else text)
        name = name if is_named else cache.stem
        if name in caches:
            raise BadInput(f"two OoD sets are named {name!r}: write --ood NAME=CACHE.")
        caches[name] = cache
    return caches


def check_table_path(path: Path | None) -> None:
    """Check, before any work is done, that ``write_table`` can write this kind of file, and to this folder.

    Raises:
        BadInput: if it cannot write this kind of file, or a file is where its folder should be.
        CacheWriteFailed: if the folder may not be written.
    """
    if path is None:
        return
    if path.suffix not in TABLE_SUFFIXES:
        allowed = f"{', '.join(TABLE_SUFFIXES[:-1])}, or {TABLE_SUFFIXES[-1]}"
        raise BadInput(f"cannot write {path}: use a file name that ends in {allowed}.")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise BadInput(f"cannot write {path}, since pyarrow is not installed: pip install pyarrow, or use .csv.")
    require_writable(user_path(path).parent)


def write_table(table: pd.DataFrame, path: Path | None) -> None:
    """Write a table as CSV without formulas of spreadsheets, as Parquet, or as JSON with its ``attrs`` and its rows.

    Without a path, nothing is written. Commands write before they print, since the reader of their output may leave.
    """
    if path is None:
        return
    path = user_path(path)
    if path.suffix == ".csv":
        replace_text(path, csv_text(table))
    elif path.suffix == ".parquet":
        content = with_texts(table, encodable).to_parquet(None, index=False)
        with replacing(path) as file:
            file.write(content)
            file.check()
    else:
        replace_text(path, json_text(table_document(table)))
