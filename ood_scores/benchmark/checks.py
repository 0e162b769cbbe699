"""Find problems of a spec before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

from ood_scores.benchmark.measures import FIGURES, MEASURES, OF_SCORERS
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Published, Spec
from ood_scores.data.sources import require_kind
from ood_scores.errors import BadInput, OodScoresError, UnknownName
from ood_scores.evaluation.metrics import METRICS, headline_metrics
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.probes import Probe
from ood_scores.extraction.probes.base import parsed_probe
from ood_scores.registry import unknown
from ood_scores.runtime import MOST_WORKERS
from ood_scores.scorers import list_scorers
from ood_scores.scorers.registry import SCORERS
from ood_scores.toml_tables import KeyPath
from ood_scores.user_code import code_to_import, not_imported

GROUPS = ("near", "far", "mean")
AXES = ("ood", "scorer")
"""Values of ``x`` of the plot ``comparison``, which are no quantities."""
MISSPELLED = 0.8
"""Similarity from which an argument that a network does not take is a misspelled key of ``[[model]]``."""
STATISTICS = ("_sd", "_min", "_max")
"""Suffixes of published figures: statistics over the checkpoints of a model other than the mean."""


@dataclass(frozen=True)
class Problem:
    """A problem of a part.

    Attributes:
        part: number of the part, from 0.
        path: the key and the tables that contain it.
        message: what is wrong, and what to do.
        error: BadInput, or UnknownName for a name that does not exist.
    """

    part: int
    path: KeyPath
    message: str
    error: type[OodScoresError] = BadInput


def figure_of(metric: str) -> tuple[str, str]:
    """Split the name of a published figure into the metric and the suffix of the statistic, "" for the mean."""
    statistic = next((end for end in STATISTICS if metric.endswith(end)), "")
    return metric.removesuffix(statistic), statistic


def check(spec: Spec) -> None:
    """Raise the first problem of a spec that was created in Python."""
    for problem in problems(spec):
        raise problem.error(f"{spec.parts[problem.part].title}: {problem.message}")


def problems(spec: Spec) -> Iterator[Problem]:
    yield from _code(spec)
    titles = Counter(part.title for part in spec.parts)
    for number, part in enumerate(spec.parts):
        if titles[part.title] > 1:
            yield Problem(number, ("title",), f"two parts are called {part.title!r}: give each its own title.")
        for path, message, error in _of_part(part):
            yield Problem(number, path, message, error)


Found = Iterator[tuple[KeyPath, str, type[OodScoresError]]]


def _code(spec: Spec) -> Iterator[Problem]:
    """Yield one problem for all files of code that the spec names, and that have not been imported."""
    named = [(number, *each) for number, part in enumerate(spec.parts) for each in _names_of(part)]
    if missing := not_imported(text for *_, text in named):
        number, path, _ = next(each for each in named if each[2].startswith(missing[0]))
        yield Problem(number, path, str(code_to_import(missing)))


def _names_of(part: Part) -> Iterator[tuple[KeyPath, str]]:
    """Yield the texts of a part that may name code, and where they are."""
    for number, model in enumerate(part.models):
        yield ("model", number, "name"), model.name
    for name, source in part.sets.items():
        yield ("sets", name), source
    for table in part.scorer_tables:
        yield from ((("scorers", table.label), text) for text in table.texts)
    for key in ("probes", "fit_probes"):
        yield from ((("extraction", key), str(probe)) for probe in getattr(part.extraction, key))
    yield ("extraction", "pool"), str(part.extraction.pool)


def _of_part(part: Part) -> Found:
    for check_some in (_models, _sets, _scorers, _extraction, _metrics, _measures, _searches, _figure):
        yield from check_some(part)
    for number in part.published:
        yield from _published(part, number)


def _unknown(path: KeyPath, what: str, name: str, known: Iterable[str], listing: str = "") -> Found:
    """Yield a problem if a name is unknown."""
    known = list(known)
    if name not in known:
        yield path, str(unknown(f"there is no {what}", name, known, listing=listing)), UnknownName


def _wrong(condition: bool, path: KeyPath, message: str) -> Found:
    if condition:
        yield path, message, BadInput


def _twice(path: KeyPath, names: Iterable[str], what: str, remedy: str = "give each its own label") -> Found:
    for name, times in Counter(names).items():
        yield from _wrong(times > 1, path, f"{what} {name!r} is listed {times} times: {remedy}.")


def _metrics(part: Part) -> Found:
    for name in part.metrics:
        yield from _unknown(("metrics",), "metric", name, METRICS)


def _arguments(path: KeyPath, model: ModelTable) -> Found:
    from ood_scores.models.opening import require_known

    keys = [each.name for each in fields(ModelTable) if each.name != "arguments"]
    for key, value in model.arguments.items():
        try:
            require_known(model.name, {key: value})
        except BadInput as error:
            meant = get_close_matches(key, keys, 1, MISSPELLED)
            text = f"[[model]] has no key {key!r} (did you mean {meant[0]!r}?): correct it." if meant else str(error)
            yield (*path, key), text, BadInput


def _models(part: Part) -> Found:
    from ood_scores.models.opening import require_known

    yield from _twice(("model",), [*(model.title for model in part.models), *part.ensembles], "the model")
    for number, model in enumerate(part.models):
        path = ("model", number)
        try:
            require_known(model.name)
        except UnknownName as error:
            yield (*path, "name"), str(error), UnknownName
        else:
            yield from _arguments(path, model)
        both = model.recipe is not None and model.checkpoint is not None
        yield from _wrong(both, (*path, "recipe"), "a model has a checkpoint or a recipe: remove one of them.")
        alone = bool(model.seeds) and model.recipe is None
        yield from _wrong(alone, (*path, "seeds"), "seeds belong to a recipe: list several checkpoints instead.")
        early = model.epoch is not None and model.epoch < 1
        yield from _wrong(early, (*path, "epochs"), f"epochs has {model.epoch}: epochs are counted from 1.")
        for key, value in (("epochs", model.epoch), ("sweep", model.setting)):
            alone = value is not None and model.recipe is None
            yield from _wrong(alone, (*path, key), f"{key} belongs to a recipe: write recipe = ….")
    for label, members in part.ensembles.items():
        for member in members:
            titles = [model.title for model in part.models]
            yield from _unknown(("ensembles", label), "model", member, titles)
        yield from _twice(("ensembles", label), members, "the model", "list it once")
        yield from _wrong(not members, ("ensembles", label), f"the ensemble {label!r} has no members: list models.")


def _sets(part: Part) -> Found:
    named = {"id": [part.id], "near": part.near, "far": part.far, "covariate": part.covariate}
    named |= {"fit": [part.fit]} if part.fit is not None else {}
    named |= {"auxiliary": [part.auxiliary]} if part.auxiliary is not None else {}
    for key, names in named.items():
        for name in names:
            yield from _unknown((key,), "dataset", name, part.sets)
    used = {*part.scored, *([part.fit] if part.fit else [])} & part.sets.keys()
    for name in (name for name in part.sets if name in used):
        yield from _raised(("sets", name), partial(require_kind, part.sets[name]))
    for name in part.ood:
        yield from _wrong(name in (*GROUPS, "id"), ("sets", name), f"{name!r} cannot be an OoD dataset: rename it.")
        known = name in (part.id, *part.covariate)
        key = "near" if name in part.near else "far"
        yield from _wrong(known, (key,), f"{name!r} is both in-distribution and OoD: remove it from one of the lists.")
    yield from _twice(("far",), part.ood, "the OoD dataset", "list it once")
    yield from _twice(("covariate",), part.covariate, "the dataset", "list it once")
    again = f"{part.id!r} is the ID dataset, and is in covariate, too: remove it there, or its rows count twice."
    yield from _wrong(part.id in part.covariate, ("covariate",), again)


def _scorers(part: Part) -> Found:
    tables = part.scorer_tables
    yield from _twice(("scorers",), [table.label for table in tables], "the scorer")
    for table in tables:
        path = ("scorers", table.label)
        yield from _raised(path, table.create)
    alone = bool(tables) and not part.ood
    without = "the scorers have no OoD dataset to compare with: list some in near or far, or write scorers = []."
    yield from _wrong(alone, ("scorers",), without)
    for reason, names in part.left_out.items():
        for name in names:
            yield from _unknown(("left_out", reason), "scorer", name, list_scorers(), SCORERS.listing)
            twice = name in [table.label for table in tables]
            yield from _wrong(twice, ("left_out", reason), f"{name!r} is also in scorers: remove it from one of them.")


def _raised(path: KeyPath, make: Callable[[], Any]) -> Found:
    try:
        make()
    except (BadInput, UnknownName) as error:
        yield path, str(error), type(error)


def _extraction(part: Part) -> Found:
    extraction = part.extraction
    for option in fields(ExtractionOptions):
        alone = {option.name: getattr(extraction, option.name)}
        yield from _raised(("extraction", option.name), partial(ExtractionOptions, **alone))
    for key in ("probes", "fit_probes"):
        yield from _raised(("extraction", key), partial(_without_files, extraction, getattr(extraction, key)))
    for key, least in (("batch_size", 1), ("workers", 0), ("rows", 1)):
        value = getattr(extraction, key)
        small = value is not None and value < least
        yield from _wrong(small, ("extraction", key), f"{key} = {value} is out of range: give at least {least}.")
    many = f"workers = {extraction.workers} is out of range: give at most {MOST_WORKERS}."
    yield from _wrong(extraction.workers > MOST_WORKERS, ("extraction", "workers"), many)


def _without_files(extraction: Extraction, probes: Iterable[str | Probe]) -> ExtractionOptions:
    """Create the options without probes that read files: only a run knows the folder where their paths start."""
    opened = [each for each in probes if isinstance(each, Probe) or not parsed_probe(each)[0].reads_a_file]
    return extraction.options(opened)


def _measures(part: Part) -> Found:
    for name in part.measures:
        yield from _unknown(("measures",), "measure", name, MEASURES)
        lacking = part.fit is None and name in MEASURES and MEASURES[name].needs_fit
        yield from _wrong(lacking, ("measures",), f"{name} needs a fit set: write fit = ….")
        for option in part.measure_options(name) if name in MEASURES else ():
            yield from _unknown(("measures", name, option), f"option of {name}", option, MEASURES[name].options)


def _searches(part: Part) -> Found:
    search = part.search
    if search is None:
        return
    reported = {part.sets.get(name): name for name in (part.id, *part.ood, *part.covariate)}
    for key, names in (("id", (search.id,)), ("ood", search.ood)):
        for name in names:
            yield from _unknown(("search", key), "dataset", name, part.sets)
            same = reported.get(part.sets.get(name, ""))
            message = f"{name!r} is reported as {same!r}: choose parameters on a dataset that is not reported."
            yield from _wrong(same is not None, ("search", key), message)
    yield from _twice(("search", "ood"), search.ood, "the OoD dataset", "list it once")
    yield from _wrong(not search.ood, ("search", "ood"), "the search has no OoD dataset: write ood = […].")
    yield from _unknown(("search", "metric"), "metric", search.metric, [metric.name for metric in headline_metrics()])
    tables = {table.label: table for table in part.scorer_tables}
    for label, grid in search.grid.items():
        path = ("search", "grid", label)
        yield from _unknown(path, "scorer", label, tables)
        for parameter, values in grid.items() if label in tables else ():
            yield from _wrong(not values, (*path, parameter), f"{parameter} has no values to try: list at least one.")
            for value in values:
                yield from _raised(
                    (*path, parameter),
                    partial(tables[label].create, {parameter: value}),
                )


def _figure(part: Part) -> Found:
    if part.figure is None:
        return
    from ood_scores.benchmark.figures.plots import PLOTS, options_of

    plot, given = part.figure.plot, part.figure.options
    yield from _unknown(("figure", "plot"), "plot", plot, PLOTS)
    if plot in PLOTS:
        options = options_of(plot)
        for option in given:
            yield from _unknown(("figure", option), f"option of {plot}", option, options)
        for option, required in options.items():
            lacking = required and option not in given
            yield from _wrong(lacking, ("figure",), f"the plot {plot!r} needs {option}: write {option} = ….")
        yield from _quantities(given)


def _quantities(options: Mapping[str, Any]) -> Found:
    """Yield the quantities of a figure that do not exist."""
    from ood_scores.benchmark.figures.quantities import FALSE_POSITIVES, LOG

    for key in ("x", "y"):
        given = options.get(key, ())
        entries = [given] if isinstance(given, str) else given
        names = [name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)]
        known = [*METRICS, *FIGURES, FALSE_POSITIVES, *(AXES if key == "x" else ())]
        for name in names:
            if not name.startswith(LOG):
                yield from _unknown(("figure", key), "quantity", name, known)


def _published(part: Part, number: Published) -> Found:
    path = ("published", "values", number.scorer or "model")
    yield from _unknown(
        ("published", "model"), "model", number.model, [*(m.title for m in part.models), *part.ensembles]
    )
    if number.scorer is not None:
        yield from _unknown(path, "scorer", number.scorer, [table.label for table in part.scorer_tables])
        yield from _unknown(("published", "metrics"), "metric", figure_of(number.metric)[0], [*METRICS, *OF_SCORERS])
        yield from _unknown(("published", "ood"), "OoD dataset", str(number.ood), [*part.ood, *GROUPS])
    else:
        figure = figure_of(number.metric)[0]
        yield from _unknown(("published", "metrics"), "figure of a model", figure, FIGURES)
