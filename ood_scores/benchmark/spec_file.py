"""Read benchmark specs from TOML files; see ``ood_scores.toml_tables``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, fields, replace
from math import gcd
from typing import Any, Literal

from ood_scores.atomic import user_path
from ood_scores.benchmark.checks import Problem, problems
from ood_scores.benchmark.spec import (
    ALL,
    Extraction,
    FigureTable,
    Loading,
    ModelTable,
    Part,
    Preprocessing,
    Published,
    ScorerTable,
    Search,
    Spec,
)
from ood_scores.errors import BadInput, UnknownName
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.toml_tables import (
    KeyPath,
    Raw,
    Source,
    Table,
    converted,
    filled,
    hints_of,
    merged,
    read,
    with_overrides,
)

TABLES = (
    "models", "sets", "scorers", "left_out", "measures", "ensembles", "preprocessing", "extraction", "search",
    "published", "figure"
)  # fmt: skip
OF_A_TRAINING = ("epoch", "setting", "checkpoint_every")
"""Fields of a model that the keys ``epochs`` and ``sweep`` set."""


def _option_hint(option: Field[Any]) -> Any:
    """Return the TOML type of an option of ``extract``; ``ExtractionOptions`` validates the value."""
    if option.metadata["flag"]:
        return bool
    return tuple[str, ...] if isinstance(option.default, tuple) else str | tuple[str, ...]


NO_NUMBER = "-"
"""The cell of a row of published values for which the paper prints no number."""
OF_THE_MODEL = "model"
"""The label for figures of the model itself, in place of the label of a scorer."""

_PART_KEYS = hints_of(Part, TABLES)
_EXTRACTION_KEYS = hints_of(Loading) | {
    option.name: _option_hint(option) for option in fields(ExtractionOptions) if option.name != "head"
}
_PART: dict[str, Any] = {
    **_PART_KEYS,
    "sets": Table(rest=str),
    "model": [
        Table(
            hints_of(ModelTable, ("arguments", *OF_A_TRAINING))
            | {"epochs": tuple[int, ...], "sweep": Table(rest=tuple[float, ...])},
            rest=Any,
        )
    ],
    "scorers": Table(rest=Table(rest=Any), instead=str | tuple[str, ...]),
    "left_out": Table(rest=tuple[str, ...]),
    "measures": Table(rest=Table(rest=Any), instead=tuple[str, ...]),
    "ensembles": Table(rest=tuple[str, ...]),
    "preprocessing": Table(hints_of(Preprocessing)),
    "extraction": Table(_EXTRACTION_KEYS),
    "search": Table(
        {"id": str, "ood": tuple[str, ...], "metric": str, "grid": Table(rest=Table(rest=tuple[Any, ...]))}
    ),
    "published": [
        Table(
            {
                "source": str,
                "model": str,
                "metrics": tuple[str, ...],
                "ood": tuple[str, ...],
                "values": Table(rest=tuple[Any, ...]),
            }
        )
    ],
    "figure": Table({"plot": str}, rest=Any),
}
_MEANT = {"ood": ("near", "far"), "train": ("fit",), "test": ("id",), "datasets": ("sets",)}
_SPEC = Table({**_PART, "extends": str, "part": [Table(_PART, meant=_MEANT)]}, meant=_MEANT)


def load_spec(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Spec:
    """Read a benchmark from a TOML file.

    ``extends = "base/openood.toml"`` at the top inherits from another file, relative to this one: tables are merged
    key by key, and lists are replaced. Keys above the ``[[part]]`` tables apply to all of them. A file without
    ``[[part]]`` tables is one part.

    Args:
        path: the file.
        overrides: ``key=value`` texts that override the file, such as ``extraction.rows=500`` or
            ``part.2.fit=cifar10_train``.

    Raises:
        BadInput: if the file does not exist, is not TOML, lacks a key, or has contradicting values.
        UnknownName: if a key, or the name of a dataset, model, scorer, probe or measure, does not exist. Messages name
            the file and, if it is known, the line.
    """
    path = user_path(path)
    raw, sources = read(path, _SPEC, "spec")
    raw = with_overrides(raw, overrides, _SPEC, "spec", "extraction.rows=500")
    try:
        spec = _spec(raw, path.stem)
    except (BadInput, UnknownName) as error:
        raise type(error)(f"{path}: {error}") from error
    for problem in problems(spec):
        raise problem.error(f"{_place(problem, sources, 'part' in raw)}: {problem.message}")
    return spec


def _place(problem: Problem, sources: Iterable[Source], in_parts: bool) -> str:
    """Return the file and line of a problem: in its part, else above the parts, in the file or in one it extends."""
    sources = list(sources)
    paths: list[KeyPath] = [problem.path]
    if in_parts:
        paths.insert(0, ("part", problem.part, *problem.path))
    for length in range(len(problem.path), 0, -1):
        for path in paths:
            for source in sources:
                wanted = path[: len(path) - len(problem.path) + length]
                if wanted in source.lines:
                    return source.place(wanted)
    return sources[0].name


def _spec(raw: Raw, name: str) -> Spec:
    title = raw.get("title", name)
    above = {key: value for key, value in raw.items() if key != "part"}
    parts = raw.get("part") or [{"title": title}]
    for number, part in enumerate(parts, start=1):
        if "title" not in part:
            raise BadInput(f"[[part]] number {number} has no title: write title = … in it.")
    made = [_part(_over(above, part)) for part in parts]
    every = _intervals(model for part in made for model in part.models)
    return Spec(name, title, tuple(replace(part, models=_keeping(part.models, every)) for part in made))


def _intervals(models: Iterable[ModelTable]) -> dict[tuple[str | None, str | None], int]:
    """Return the interval at which each training has to keep weights to have those of all epochs in the spec."""
    every: dict[tuple[str | None, str | None], int] = {}
    for model in models:
        if model.epoch is not None:
            training = model.recipe, model.setting
            every[training] = gcd(every.get(training, 0), model.epoch)
    return every


def _keeping(
    models: Iterable[ModelTable], every: Mapping[tuple[str | None, str | None], int]
) -> tuple[ModelTable, ...]:
    return tuple(replace(model, checkpoint_every=every.get((model.recipe, model.setting))) for model in models)


def _over(above: Raw, part: Raw) -> Raw:
    """Merge a part into the keys above the parts; its scorers replace those above."""
    if "scorers" in part:
        above = {key: value for key, value in above.items() if key != "scorers"}
    return merged(above, part)


def _part(raw: Raw) -> Part:
    for key in ("id", "sets", "model"):
        if not raw.get(key):
            raise BadInput(f"the part {raw['title']!r} has no {key}: write {_HOW[key]}.")
    return Part(
        **{key: converted(raw[key], hint) for key, hint in _PART_KEYS.items() if key in raw},
        models=tuple(model for table in raw["model"] for model in _models(table)),
        sets=raw["sets"],
        scorers=_scorers(raw.get("scorers", ALL)),
        left_out={reason: tuple(names) for reason, names in raw.get("left_out", {}).items()},
        measures=_measures(raw.get("measures", ())),
        ensembles={label: tuple(members) for label, members in raw.get("ensembles", {}).items()},
        preprocessing=filled(Preprocessing, raw.get("preprocessing", {}), "preprocessing"),
        extraction=Extraction(
            **{key: converted(value, _EXTRACTION_KEYS[key]) for key, value in raw.get("extraction", {}).items()}
        ),
        search=_search(raw["search"]) if "search" in raw else None,
        published=tuple(number for table in raw.get("published", ()) for number in _published(table)),
        figure=filled(FigureTable, raw["figure"], "figure", "options") if "figure" in raw else None,
    )


def _models(table: Raw) -> Iterator[ModelTable]:
    """Yield one model for each epoch and each value of the sweep of a ``[[model]]`` table."""
    epochs, sweep = table.get("epochs"), table.get("sweep", {})
    if epochs == [] or len(sweep) > 1 or [] in sweep.values():
        raise BadInput(f"the model {table.get('label')!r} has epochs = {epochs} and sweep = {sweep}: {_SERIES}.")
    kept = {key: value for key, value in table.items() if key not in ("epochs", "sweep")}
    settings: list[str | None] = [f"{key}={value}" for key, values in sweep.items() for value in values]
    for setting in settings or [None]:
        for epoch in epochs or [None]:
            series = {"setting": setting, "epoch": epoch}
            yield filled(ModelTable, {**kept, **series}, "[model]", "arguments")


_SERIES = "list at least one epoch, and the values of one key of the recipe"


_HOW = {
    "id": 'id = "…", the name of the in-distribution test set',
    "sets": '[sets] with a line such as mine = "folder:/data/mine"',
    "model": "[[model]] with its name",
}


def _scorers(given: Any) -> tuple[ScorerTable, ...] | Literal["all"]:
    if isinstance(given, str):
        if given != ALL:
            raise UnknownName(f'scorers is {given!r}: write scorers = "all", or a list of names.')
        return ALL
    if isinstance(given, Mapping):
        return tuple(_scorer(label, dict(table)) for label, table in given.items())
    return tuple(ScorerTable(name, name) for name in given)


def _scorer(label: str, table: Raw) -> ScorerTable:
    return ScorerTable(label, table.pop("name", label), table)


def _measures(given: Any) -> tuple[str, ...] | Mapping[str, Mapping[str, Any]]:
    return given if isinstance(given, Mapping) else tuple(given)


def _search(table: Raw) -> Search:
    grid = {
        label: {parameter: tuple(values) for parameter, values in parameters.items()}
        for label, parameters in table.get("grid", {}).items()
    }
    return filled(Search, {**table, "grid": grid}, "search")


def _published(table: Raw) -> Iterator[Published]:
    """Yield the printed numbers of a ``[[published]]`` table."""
    for key in ("source", "model", "metrics", "values"):
        if key not in table:
            raise BadInput(f"[[published]] has no {key}: write {key} = … in it.")
    sets = table.get("ood")
    for label, rows in table["values"].items():
        of_model = label == OF_THE_MODEL and sets is None
        for ood, cells in zip([None] if sets is None else sets, _rows(table, label, rows), strict=True):
            for metric, cell in zip(table["metrics"], cells, strict=True):
                if cell != NO_NUMBER:
                    scorer = None if of_model else label
                    yield Published(table["model"], scorer, ood, metric, float(cell), table["source"])


def _rows(table: Raw, label: str, rows: list[Any]) -> list[list[Any]]:
    """Return one row of cells for each OoD dataset, or a single row for figures of the model.

    With a single metric, rows may be bare numbers.
    """
    sets, metrics = table.get("ood"), table["metrics"]
    if sets is None:
        rows = [rows]
    elif len(metrics) == 1:
        rows = [row if isinstance(row, list) else [row] for row in rows]
    fits = len(rows) == (1 if sets is None else len(sets)) and all(
        isinstance(row, list) and len(row) == len(metrics) and all(map(_is_cell, row)) for row in rows
    )
    if not fits:
        wanted = f"{len(metrics)} numbers" if sets is None else f"{len(sets)} lists of {len(metrics)} numbers"
        where = f"published.values.{label} ({table['source']})"
        raise BadInput(f'{where} is {rows}: give {wanted}, with "-" where none is printed.')
    return rows


def _is_cell(cell: Any) -> bool:
    return cell == NO_NUMBER or (isinstance(cell, (int, float)) and not isinstance(cell, bool))
