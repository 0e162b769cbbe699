"""What a benchmark compares: models, sets and scorers. ``ood_scores.benchmark.spec_file`` reads it from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.probes import Probe
from ood_scores.scorers import Scorer, create_scorer, list_scorers

ALL: Literal["all"] = "all"


@dataclass(frozen=True)
class ModelTable:
    """`[[model]]`: a classifier, or several of one kind that differ in their seed.

    Attributes:
        name: timm's name, or that of a CIFAR network of this package.
        label: shown in tables; the name by default.
        checkpoint: a file of weights, or a list of them: the same network trained with several seeds, whose results
            are shown as mean and SD. Without it timm's pretrained weights are fetched.
        recipe: in its place, a recipe of ``benchmarks/recipes`` that makes the checkpoint: ``runs/RECIPE`` then holds
            it, or ``runs/RECIPE_seedN`` for each of ``seeds``.
        seeds: with ``recipe``, the seeds that it is trained with.
        num_classes: of the checkpoint, where they cannot be read off it.
        head: the last linear layer, where it cannot be found.
        arguments: every other key of the table goes to `timm.create_model`.
    """

    name: str
    label: str | None = None
    checkpoint: str | tuple[str, ...] | None = None
    recipe: str | None = None
    seeds: tuple[int, ...] = ()
    num_classes: int | None = None
    head: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    NOT_IN_DIGEST: ClassVar = frozenset({"label", "checkpoint", "recipe", "seeds"})
    """What only presents, and where the weights are, whose own digest counts instead."""

    @property
    def title(self) -> str:
        """As tables show it."""
        return self.label or self.name


@dataclass(frozen=True)
class Preprocessing:
    """`[preprocessing]`: what the model's own (timm's data configuration) is replaced with.

    Attributes:
        input_size: height and width in pixels.
        crop_pct: share of the resized image that the centre crop keeps; 1 with ``crop_mode = "squash"`` crops nothing.
        crop_mode: timm's ``center``, ``squash`` or ``border``.
        interpolation: ``bilinear``, ``bicubic``, …
        mean, std: of each channel, of pixels in 0 to 1.
    """

    input_size: tuple[int, ...] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Loading:
    """The keys of `[extraction]` that are no options of ``ood_scores.extract``.

    Attributes:
        batch_size, workers: of the loader.
        fit_probes: ``probes`` of the fit set, in place of those of the test sets.
        rows: number of rows of each set to use, evenly spaced, the fit set included; all by default.
    """

    batch_size: int = 64
    workers: int = 2
    fit_probes: tuple[str, ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class Extraction(ExtractionOptions, Loading):
    """`[extraction]`: how the models are run. ``head`` is a key of `[[model]]` instead."""

    def __post_init__(self) -> None:
        """Leaves the checks to those of the whole spec, which know the place of each key."""

    def options(self, probes: Iterable[str | Probe], head: str | None = None) -> ExtractionOptions:
        """The options for a set with its own probes.

        Raises:
            BadInput, UnknownName: as ``ExtractionOptions``.
        """
        given = {each.name: getattr(self, each.name) for each in fields(ExtractionOptions)}
        return ExtractionOptions(**{**given, "probes": probes, "head": head})


@dataclass(frozen=True)
class ScorerTable:
    """A scorer of `scorers`, by the label that tables show: a name and its parameters."""

    label: str
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def create(self, changes: Mapping[str, Any] | None = None) -> Scorer:
        """A new scorer, with some parameters changed; where one is a table with a name, it is a scorer itself.

        Raises:
            UnknownName, BadInput: as ``ood_scores.create_scorer``.
        """
        return _created(self.name, {**self.parameters, **(changes or {})})


def _created(name: str, parameters: Mapping[str, Any]) -> Scorer:
    return create_scorer(name, **{key: _parameter(value) for key, value in parameters.items()})


def _parameter(value: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        return _created(value["name"], {key: inner for key, inner in value.items() if key != "name"})
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Search:
    """`[search]`: parameters of scorers chosen on validation sets, which are named here and not reported.

    Attributes:
        id, ood: names of ``sets``; they must not be among those reported.
        metric: the headline metric whose mean over ``ood`` is best.
        grid: by label of a scorer, the values to try of its parameters: ``[search.grid.knn] k = [1, 10, 50]``.
    """

    id: str
    ood: tuple[str, ...]
    metric: str = "auroc"
    grid: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """One published number, in percent.

    Attributes:
        model: label of a model.
        scorer: label of a scorer, or None for a figure of the model itself, such as its accuracy.
        ood: an OoD set, or a group of them: ``near``, ``far``, ``mean``; None for a figure of the model itself.
        metric: a metric of ``METRICS``, ``accuracy``, …: the mean over the checkpoints; with ``_sd``, ``_min`` or
            ``_max`` behind it, that of them.
        value: as printed, in percent.
        source: paper and table.
    """

    model: str
    scorer: str | None
    ood: str | None
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Part:
    """One table of a benchmark: some models on one choice of sets. A `[[part]]` table, over what stands above it.

    Attributes:
        title: heading of the table.
        notes: what a reader has to know, in Markdown.
        models: at least one.
        fit: ID set that scorers are fitted on, usually of training.
        id: ID test set.
        near, far: OoD test sets, by how much they resemble the ID data.
        covariate: sets of ID classes under a shift (ImageNet-C, -R, …): counted as ID beside ``id`` ("full-spectrum").
        sets: by name, the text that ``ood_scores.data.sources.open_dataset`` opens.
        scorers: ``"all"`` that can read what is extracted, or those named.
        ensembles: by label, the models whose outputs are averaged and scored as one.
        relabel: rows of OoD sets that carry a label (0 and above) show an ID class and are counted as ID (SC-OOD).
        measures: figures of each model beside its scores: ``neural_collapse`` (on the fit set), ``long_tail``.
        published: numbers to put beside ours.
    """

    title: str
    models: tuple[ModelTable, ...]
    sets: Mapping[str, str]
    id: str
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    fit: str | None = None
    covariate: tuple[str, ...] = ()
    scorers: tuple[ScorerTable, ...] | Literal["all"] = ALL
    ensembles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: str = ""
    relabel: bool = False
    measures: tuple[str, ...] = ()
    preprocessing: Preprocessing = Preprocessing()
    extraction: Extraction = Extraction()
    search: Search | None = None
    published: tuple[Published, ...] = ()

    NOT_IN_DIGEST: ClassVar = frozenset(
        {"notes", "published", "models", "ensembles", "sets", "preprocessing", "extraction", "scorers"}
    )
    """What only presents, and what a unit has resolved: its jobs, and the tables of its scorers."""

    @property
    def ood(self) -> tuple[str, ...]:
        return (*self.near, *self.far)

    @property
    def scorer_tables(self) -> tuple[ScorerTable, ...]:
        """The scorers that the part names, or every one that is registered."""
        if isinstance(self.scorers, tuple):
            return self.scorers
        return tuple(ScorerTable(name, name) for name in list_scorers())

    @property
    def scored(self) -> tuple[str, ...]:
        """The names of all sets that scores are computed of, each once."""
        searched = (self.search.id, *self.search.ood) if self.search else ()
        return tuple(dict.fromkeys((self.id, *self.ood, *self.covariate, *searched)))


@dataclass(frozen=True)
class Spec:
    """A benchmark: its parts, in the order of the report.

    Attributes:
        name: of the file, without suffix.
        title: heading of the report.
        parts: at least one.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
