"""The scorers of a part: from its tables to objects, and back to what a table of results says of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ood_scores.benchmark.spec import Part, ScorerTable
from ood_scores.scorers import Scorer, create_scorer, list_scorers


def scorer_tables(part: Part) -> tuple[ScorerTable, ...]:
    """Those that the part names, or every one that is registered."""
    if isinstance(part.scorers, tuple):
        return part.scorers
    return tuple(ScorerTable(name, name) for name in list_scorers())


def create(table: ScorerTable, changes: Mapping[str, Any] | None = None) -> Scorer:
    """A new scorer, with some parameters changed; where one is a table with a name, it is a scorer itself.

    Raises:
        UnknownName, BadInput: as ``ood_scores.create_scorer``.
    """
    parameters = {**table.parameters, **(changes or {})}
    return create_scorer(table.name, **{key: _nested(value) for key, value in parameters.items()})


def _nested(value: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        inner = {key: _nested(each) for key, each in value.items() if key != "name"}
        return create_scorer(value["name"], **inner)
    return tuple(value) if isinstance(value, list) else value


def described(scorer: Scorer) -> str:
    """Its name and all its parameters, as JSON."""
    return json.dumps(_plain(scorer))


def _plain(value: Any) -> Any:
    if isinstance(value, Scorer):
        fields: Sequence[dataclasses.Field[Any]] = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        return {"name": value.name} | {each.name: _plain(getattr(value, each.name)) for each in fields if each.init}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
