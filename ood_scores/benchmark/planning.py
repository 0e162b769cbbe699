"""The plan of a benchmark: which network runs on which dataset, what exists already, and what is missing."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ood_scores.benchmark import networks
from ood_scores.benchmark.digest import digest
from ood_scores.benchmark.networks import Network, file_name
from ood_scores.benchmark.results import NotRun
from ood_scores.benchmark.spec import Loading, Part, Preprocessing, ScorerTable, Spec
from ood_scores.data.dataset_spec import parse
from ood_scores.data.images import ImageDataset
from ood_scores.data.kinds.base import DATASET_KINDS
from ood_scores.errors import CacheError, EmptyInput, MissingData, OodScoresError, UnknownName, UnreadableRow
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.probes import Probe, probe_from
from ood_scores.extraction.probes.base import parsed_probe
from ood_scores.extraction.unreadable import ROW_ERRORS, as_row_error
from ood_scores.features import FeatureSet, load
from ood_scores.models.kinds.base import MODEL_KINDS
from ood_scores.scorers.requirements import Has, Requirement, unmet
from ood_scores.user_code import is_reference, referenced, source_digests

CACHES = "caches"


@dataclass(frozen=True)
class Job:
    """The extraction of one dataset with one network.

    Attributes:
        set: name of the dataset in the spec.
        source: the text that ``open_dataset`` opens.
        options: options of ``extract``, with the probes for the role of this dataset.
        loading: batch size and workers of the loader.
        data: folder where relative paths start.
        out: folder of the run.
    """

    network: Network
    set: str
    source: str
    preprocessing: Preprocessing
    options: ExtractionOptions
    loading: Loading
    data: Path
    out: Path

    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset({"loading", "data", "out"})
    """Fields that only change speed and memory, and the locations of files."""

    @cached_property
    def cache(self) -> Path:
        """The file of features, named after everything that determines its content."""
        code = self._code()
        name = digest(self, code) if code else digest(self)
        return self.out / CACHES / self.network.key / f"{file_name(self.set)}-{name[:8]}.h5"

    def _code(self) -> dict[str, str]:
        """Return the digests of the user's own code that computes the features."""
        kind = DATASET_KINDS.get(parse(self.source).kind)
        names = [str(self.options.pool)]
        if self.network.table.name.partition(":")[0] not in MODEL_KINDS:
            names.append(self.network.table.name)
        if kind is None:
            names.append(self.source.partition("?")[0])
        functions = [referenced(name) for name in names if is_reference(name)]
        return source_digests([*functions, *map(type, self.options.all_probes), *([kind.open] if kind else [])])

    def features(self) -> FeatureSet | None:
        """Open the cache; return None if it does not exist, is not finished, or lacks rows that must not be lacking."""
        try:
            feats = load(self.cache)
        except (CacheError, FileNotFoundError):
            return None
        lacks_rows = feats.provenance is not None and bool(feats.provenance.skipped)
        return None if lacks_rows and self.options.on_error == "raise" else feats


@dataclass(frozen=True)
class Unit:
    """The scorers of a part on one checkpoint of a model, or on an ensemble.

    Attributes:
        part: the part.
        model: label of the model or the ensemble.
        checkpoint: number of the checkpoint among those of the model, from 0.
        sets: the job of every network, by name of each dataset that is scored; an ensemble has several networks.
        fit: the jobs for the fit set; empty if there is none.
    """

    part: Part
    model: str
    checkpoint: int
    sets: Mapping[str, tuple[Job, ...]]
    fit: tuple[Job, ...]

    @property
    def title(self) -> str:
        several = next((len(networks.checkpoints_of(m)) > 1 for m in self.part.models if m.title == self.model), False)
        return f"{self.model} ({self.checkpoint})" if several else self.model

    @property
    def jobs(self) -> Iterator[Job]:
        for jobs in (*self.sets.values(), self.fit):
            yield from jobs


@dataclass(frozen=True)
class SetFacts:
    """Facts about a dataset that need no model; ``rows`` is None if the number is not known yet."""

    rows: int | None
    labeled: bool


Failures = dict[Path, tuple[str, str]]
"""The reason and the remedy of failed extractions, by the cache that they would have written."""


@dataclass(frozen=True)
class Plan:
    """What a benchmark has to do.

    Attributes:
        units: the units that can run, as far as is known.
        pending: the extractions that the units need, longest first.
        facts: facts about the datasets of these extractions, by source.
        not_run: what cannot run.
    """

    units: tuple[Unit, ...]
    pending: tuple[Job, ...]
    facts: Mapping[str, SetFacts] = field(default_factory=dict)
    not_run: tuple[NotRun, ...] = ()


def plan(spec: Spec, out: Path, data: Path, download: bool = True) -> Plan:
    """Find checkpoints and caches, and open the datasets that still have to be extracted.

    Args:
        spec: the benchmark.
        out: folder of the run.
        data: folder where relative paths start.
        download: whether datasets may be downloaded, if the spec says so.
    """
    units, not_run = _units(spec, out, data)
    not_run += [
        NotRun(part.title, name, reason)
        for part in spec.parts
        for reason, names in part.left_out.items()
        for name in names
    ]
    unfinished = {job.cache: job for unit in units for job in unit.jobs if job.features() is None}
    skipping = {job.source for job in unfinished.values() if job.options.on_error == "skip"}
    facts, missing = _inspect_all({job.source: job.set for job in unfinished.values()}, data, download, skipping)
    not_run += _missing_with_all_models(spec, units, data)
    failures = {cache: missing[job.source] for cache, job in unfinished.items() if job.source in missing}
    units, more = without(units, failures)
    wanted = {job.cache: job for unit in units for job in unit.jobs if job.cache in unfinished}
    longest_first = sorted(wanted.values(), key=lambda job: -_cost(job, facts[job.source]))
    return Plan(tuple(units), tuple(longest_first), facts, tuple(dict.fromkeys([*not_run, *more])))


def without(units: Iterable[Unit], failures: Failures) -> tuple[list[Unit], list[NotRun]]:
    """Remove the datasets whose extraction failed from the units, and the units that lack a required dataset or
    have no OoD dataset left."""
    kept, not_run = [], []
    for unit in units:
        lost = {job.cache: job for job in unit.jobs if job.cache in failures}
        not_run += [NotRun(unit.part.title, job.set, *failures[job.cache]) for job in lost.values()]
        basis = [name for name, jobs in _basis(unit).items() if any(job.cache in lost for job in jobs)]
        if basis:
            names = " and ".join(map(repr, basis))
            reason = f"required dataset{'s' * (len(basis) > 1)} {names} {'are' if len(basis) > 1 else 'is'} unavailable"
            not_run.append(NotRun(unit.part.title, unit.title, reason, _remedy(lost.values(), failures)))
            continue
        sets = {name: jobs for name, jobs in unit.sets.items() if not any(job.cache in lost for job in jobs)}
        if unit.part.ood and sets.keys().isdisjoint(unit.part.ood) and not unit.part.measures:
            reason = "none of its OoD datasets is available"
            not_run.append(NotRun(unit.part.title, unit.title, reason, _remedy(lost.values(), failures)))
            continue
        kept.append(replace(unit, sets=sets))
    return kept, not_run


def numbers_by_network(units: Sequence[Unit]) -> list[int]:
    """Return the numbers of the units, those with the same networks next to each other."""
    networks = [[job.network.key for job in unit.sets[unit.part.id]] for unit in units]
    return sorted(range(len(units)), key=lambda number: networks.index(networks[number]))


def _basis(unit: Unit) -> dict[str, tuple[Job, ...]]:
    """The jobs without which a unit cannot run, by dataset."""
    part = unit.part
    searched = (part.search.id, *part.search.ood) if part.search else ()
    basis = {name: unit.sets[name] for name in (part.id, *searched)}
    return basis | ({part.fit: basis.get(part.fit, ()) + unit.fit} if part.fit else {})


def _remedy(jobs: Iterable[Job], failures: Failures) -> str:
    return next((failures[job.cache][1] for job in jobs if failures[job.cache][1]), "")


def _units(spec: Spec, out: Path, data: Path) -> tuple[list[Unit], list[NotRun]]:
    units, not_run = [], []
    for part in spec.parts:
        found: dict[str, list[Network]] = {}
        for model in part.models:
            several = len(networks.checkpoints_of(model)) > 1
            found[model.title] = []
            for number in range(len(networks.checkpoints_of(model))):
                try:
                    network = networks.find(model, number, data)
                except MissingData as error:
                    title = f"{model.title} ({number})" if several else model.title
                    not_run.append(NotRun(part.title, title, error.reason, error.remedy))
                    continue
                found[model.title].append(network)
                units.append(_unit(part, model.title, number, [network], out, data))
        for label, members in part.ensembles.items():
            all_of = {m.title: len(networks.checkpoints_of(m)) for m in part.models}
            lost = [member for member in members if len(found[member]) < all_of[member]]
            if lost:
                not_run.append(NotRun(part.title, label, f"its member {lost[0]!r} is not available"))
            else:
                joint = [network for member in members for network in found[member]]
                units.append(_unit(part, label, 0, joint, out, data))
    return units, not_run


def _unit(part: Part, model: str, checkpoint: int, members: list[Network], out: Path, data: Path) -> Unit:
    def jobs(name: str, probes: Iterable[str | Probe]) -> tuple[Job, ...]:
        return tuple(_job(network, part, name, probes, out, data) for network in members)

    fit = jobs(part.fit, part.extraction.fit_probes) if part.fit else ()
    return Unit(part, model, checkpoint, {name: jobs(name, part.extraction.probes) for name in part.scored}, fit)


def _job(network: Network, part: Part, name: str, probes: Iterable[str | Probe], out: Path, data: Path) -> Job:
    extraction = part.extraction
    options = extraction.options([_located(probe, data) for probe in probes], network.table.head)
    source = limited(part.sets[name], extraction.rows)
    return Job(network, name, source, part.preprocessing, options, extraction, data, out)


def _located(probe: str | Probe, data: Path) -> str | Probe:
    """Create a probe that reads files with its relative paths in the folder of the data; leave others as they are."""
    if isinstance(probe, Probe) or data == Path() or not parsed_probe(probe)[0].reads_a_file:
        return probe
    return probe_from(probe, str(data))


def limited(source: str, rows: int | None) -> str:
    """Limit a source to a number of evenly spaced rows."""
    taken = parse(source).options.get("take")
    if rows is None or (taken and taken.isdecimal() and int(taken) <= rows):
        return source
    return f"{source}{'&' if '?' in source else '?'}take={rows}"


def _missing_with_all_models(spec: Spec, units: Iterable[Unit], data: Path) -> Iterator[NotRun]:
    """List the missing datasets of parts that have none of their models."""
    alive = {unit.part.title for unit in units}
    for part in spec.parts:
        if part.title not in alive:
            names = {part.sets[name]: name for name in (*part.scored, *([part.fit] if part.fit else ()))}
            _, missing = _inspect_all(names, data, download=False)
            yield from (NotRun(part.title, names[source], *why) for source, why in missing.items())


def _inspect_all(
    names: Mapping[str, str], data: Path, download: bool, skipping: Container[str] = ()
) -> tuple[dict[str, SetFacts], dict[str, tuple[str, str]]]:
    """Return the facts about the sources that can be opened, and reason and remedy for the others.

    Rows that cannot be read are left out of the sources ``skipping``.
    """
    facts, missing = {}, {}
    for source, name in names.items():
        try:
            facts[source] = _inspect(source, data, download, source in skipping)
        except MissingData as error:
            missing[source] = error.reason, error.remedy
        except UnknownName as error:
            raise UnknownName(f"dataset {name!r}: {error}") from error
        except OodScoresError as error:
            missing[source] = str(error), ""
    return facts, missing


def _inspect(source: str, data: Path, download: bool, skip: bool) -> SetFacts:
    from ood_scores.data.sources import offline, open_dataset

    text = source if download else offline(source)
    if text is None:
        return SetFacts(None, True)
    images = open_dataset(text, root=data)
    return SetFacts(len(images), _is_labeled(images, skip))


def _is_labeled(images: ImageDataset, skip: bool) -> bool:
    """Return whether the first row has a label, or the first that can be read."""
    last = min(len(images) - 1, max(1, len(images) // 10)) if skip else 0
    for row in range(last + 1):
        try:
            return images.load(row)[1] is not None
        except ROW_ERRORS as error:
            found = as_row_error(error, f"row {row} of {images.name}")
            if row == last or not isinstance(found, UnreadableRow):
                raise found from (error if found is not error else error.__cause__)
    raise EmptyInput(f"{images.name} has no images.")


def _cost(job: Job, facts: SetFacts) -> float:
    """Estimate the cost of a job: a probe runs the model again, some several times."""
    return (facts.rows or 0) * (1 + 3 * len(job.options.all_probes))


def runnable(part: Part, fit: Has | None, sets: Sequence[Has]) -> tuple[dict[str, ScorerTable], dict[str, Requirement]]:
    """Return the scorers of a part that can run, by label, and the first requirement that each of the others lacks."""
    tables = {table.label: table for table in part.scorer_tables}
    unmets = {label: unmet(table.create(), fit, sets) for label, table in tables.items()}
    lacking = {label: missing for label, missing in unmets.items() if missing}
    return {label: table for label, table in tables.items() if label not in lacking}, lacking


def runnable_after_extraction(
    unit: Unit, facts: Mapping[str, SetFacts]
) -> tuple[dict[str, ScorerTable], dict[str, Requirement]]:
    """Return ``runnable`` for a unit, as far as it is known before the extraction."""
    fit = _has(unit.fit, facts) if unit.fit else None
    return runnable(unit.part, fit, [_has(jobs, facts) for jobs in unit.sets.values()])


def _has(jobs: tuple[Job, ...], facts: Mapping[str, SetFacts]) -> Has:
    """Return a function that tells what a dataset will have, or the datasets of all members of an ensemble."""
    if len(jobs) > 1:
        labeled = _has(jobs[:1], facts)("labels")
        there = {"features", "logits", "head", "ensemble"} | ({"labels"} if labeled else set())
        return lambda name: name.partition(".")[0] in there
    (job,) = jobs
    feats = job.features()
    if feats is not None:
        return feats.has
    there = {"features", *(probe.name for probe in job.options.all_probes)}
    there |= set() if job.options.pool else {"logits", "head"}
    there |= {"labels"} if facts[job.source].labeled else set()
    return lambda name: name.partition(".")[0] in there
