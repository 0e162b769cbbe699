"""Recipes from TOML files, read by ``ood_scores.toml_tables``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ood_scores.atomic import user_path
from ood_scores.errors import BadInput, UnknownName
from ood_scores.toml_tables import Raw, Source, Table, check, converted, filled, hints_of, merged, read, with_overrides
from ood_scores.training.recipe import (
    AuxiliaryTable,
    DataTable,
    ModelTable,
    ObjectiveTable,
    OptimizerTable,
    Recipe,
    ScheduleTable,
    Stage,
)

TABLES: dict[str, Any] = {
    "model": ModelTable,
    "data": DataTable,
    "auxiliary": AuxiliaryTable,
    "objective": ObjectiveTable,
    "optimizer": OptimizerTable,
    "schedule": ScheduleTable,
}
OPEN = {"model": "arguments", "objective": "settings"}
"""Tables with open-ended keys, and the field that stores those keys."""
STAGE_TABLES = ("objective", "optimizer", "schedule")

_STAGE_KEYS = hints_of(Stage, STAGE_TABLES)
_RECIPE_KEYS = hints_of(Recipe, (*TABLES, "stages", "name"))
_TABLES = {
    name: Table(hints_of(cls, OPEN.values()), rest=Any if name in OPEN else None) for name, cls in TABLES.items()
}
_STAGE = Table(_STAGE_KEYS | {name: _TABLES[name] for name in STAGE_TABLES})
_RECIPE = Table(_RECIPE_KEYS | _STAGE_KEYS | {"extends": str} | _TABLES | {"stage": [_STAGE]})


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a TOML file.

    ``extends = "base.toml"`` at its top inherits missing keys from another file in the same folder. Tables are merged
    key by key, but a table with another ``name`` inherits nothing, and a list replaces the inherited one.

    Args:
        path: Path of the file.
        overrides: ``key=value`` texts such as ``optimizer.lr=0.05`` or ``stage.1.epochs=3`` that override the file.

    Raises:
        BadInput: if the file is missing, is not TOML, lacks a key, or has a value of a wrong type or range.
        UnknownName: if recipes have no such key; the message tells its line and lists the known keys.
    """
    path = user_path(path)
    raw, _ = read(path, _RECIPE, "recipe")
    raw = with_overrides(raw, overrides, _RECIPE, "recipe", "optimizer.lr=0.05")
    try:
        return dataclasses.replace(recipe_from(raw), name=path.stem)
    except (BadInput, UnknownName) as error:
        raise type(error)(f"{path}: {error}") from error


def recipe_from(tables: Mapping[str, Any]) -> Recipe:
    """Create a recipe from the tables of a TOML file or of ``Recipe.to_dict``.

    Raises:
        BadInput: if a key is missing, or a value has a wrong type or is out of range.
        UnknownName: if recipes have no such key.
    """
    raw = dict(tables)
    check(raw, _RECIPE, Source("the recipe", "a recipe"))
    base = {key: value for key, value in raw.items() if key in _STAGE_KEYS or key in STAGE_TABLES}
    stages = [merged(base, other) for other in ({}, *raw.get("stage", ()))]
    return Recipe(
        model=_table("model", raw),
        data=_table("data", raw),
        auxiliary=_table("auxiliary", raw) if "auxiliary" in raw else None,
        stages=tuple(_stage(stage) for stage in stages),
        **{key: value for key, value in raw.items() if key in _RECIPE_KEYS},
    )


def _stage(raw: Raw) -> Stage:
    if "epochs" not in raw:
        raise BadInput("the recipe has no epochs: write epochs = 60 above its first table.")
    simple = {key: converted(raw[key], hint) for key, hint in _STAGE_KEYS.items() if key in raw}
    optimizer = _table("optimizer", raw)
    return Stage(**simple, optimizer=optimizer, objective=_table("objective", raw), schedule=_table("schedule", raw))


def _table(table: str, raw: Raw) -> Any:
    return filled(TABLES[table], raw.get(table, {}), table, OPEN.get(table))
