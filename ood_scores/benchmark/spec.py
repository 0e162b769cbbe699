"""The spec of a benchmark: models, datasets, and scorers. ``ood_scores.benchmark.spec_file`` reads it from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from ood_scores.evaluation.metrics import Rule
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.extraction.probes import Probe
from ood_scores.scorers import Scorer, create_scorer, list_scorers

ALL: Literal["all"] = "all"


@dataclass(frozen=True)
class ModelTable:
    """A ``[[model]]`` table: a classifier with one checkpoint, or with several that differ in the seed.

    Attributes:
        name: name of a model, see ``ood_scores.models.opening``. Code of the user runs only if it was imported.
        label: label in tables; defaults to the name.
        checkpoint: file of weights, or a list of files for the same network trained with several seeds, whose results
            are shown as mean and SD. By default, timm downloads its pretrained weights.
        recipe: recipe in ``benchmarks/recipes`` that creates the checkpoint, instead of ``checkpoint``. The file is in
            ``runs/RECIPE``, or in ``runs/RECIPE_seedN`` for each of ``seeds``.
        seeds: seeds of the trainings with ``recipe``.
        epoch: epoch after which the weights of ``recipe`` are taken; by default the last. ``epochs = [10, 20]`` in TOML
            makes one model for each.
        setting: key of the recipe that is set otherwise, such as ``objective.weight=0.1``, in a folder of its own.
            ``sweep = { "objective.weight" = [0.1, 0.5] }`` in TOML makes one model for each value.
        checkpoint_every: interval at which the training has to keep weights to have those of all epochs in the spec.
        num_classes: number of classes, if it cannot be inferred from the checkpoint.
        head: name of the last linear layer, if it cannot be found.
        arguments: all other keys of the table, which must be arguments of the network itself; or ``classes``,
            ``templates``, and ``negatives`` of a zero-shot classifier, whose files count with their content.
    """

    name: str
    label: str | None = None
    checkpoint: str | tuple[str, ...] | None = None
    recipe: str | None = None
    seeds: tuple[int, ...] = ()
    num_classes: int | None = None
    head: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    setting: str | None = None
    checkpoint_every: int | None = None

    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset(
        {"label", "checkpoint", "recipe", "seeds", "epoch", "setting", "checkpoint_every"}
    )
    """The label is only presented; the digest of the weights replaces the fields that locate them."""

    @property
    def series(self) -> str:
        """The label that the models of all epochs and settings share, as in the legend of a figure."""
        return self.label or self.name

    @property
    def title(self) -> str:
        """The label of the model in tables."""
        at = f"epoch {self.epoch}" if self.epoch is not None else None
        return ", ".join(filter(None, (self.series, self.setting, at)))


@dataclass(frozen=True)
class Preprocessing:
    """The ``[preprocessing]`` table: values that replace those of the model's data configuration in timm.

    Attributes:
        input_size: height and width in pixels.
        crop_pct: share of the resized image that the center crop keeps; 1 with ``crop_mode = "squash"`` crops nothing.
        crop_mode: ``center``, ``squash`` or ``border``, as in timm.
        interpolation: ``bilinear``, ``bicubic``, …
        mean: normalization mean of each channel, for pixels in [0, 1].
        std: normalization standard deviation of each channel.
    """

    input_size: tuple[int, ...] | None = None
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Loading:
    """The keys of ``[extraction]`` that are not options of ``ood_scores.extract``.

    Attributes:
        batch_size: batch size of the loader.
        workers: number of worker processes of the loader.
        fit_probes: probes of the fit set; ``probes`` are those of the test sets.
        rows: number of evenly spaced rows to use of each dataset, including the fit set; all by default.
    """

    batch_size: int = 64
    workers: int = 2
    fit_probes: tuple[str, ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class Extraction(ExtractionOptions, Loading):
    """The ``[extraction]`` table: how models run. ``head`` is a key of ``[[model]]`` instead."""

    def __post_init__(self) -> None:
        """Leave validation to the checks of the whole spec, which know the line of each key."""

    def options(self, probes: Iterable[str | Probe], head: str | None = None) -> ExtractionOptions:
        """Return the options of ``extract`` with the probes of a dataset and the head of a model.

        Raises:
            BadInput: see ``ExtractionOptions``.
            UnknownName: see ``ExtractionOptions``.
        """
        given = {each.name: getattr(self, each.name) for each in fields(ExtractionOptions)}
        return ExtractionOptions(**{**given, "probes": probes, "head": head})


@dataclass(frozen=True)
class ScorerTable:
    """A scorer of ``scorers``: its label in tables, its name, and its parameters."""

    label: str
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def create(self, changes: Mapping[str, Any] | None = None) -> Scorer:
        """Create the scorer with some parameters changed. A parameter that is a table with a name is a scorer itself.

        Raises:
            UnknownName: see ``ood_scores.create_scorer``.
            BadInput: see ``ood_scores.create_scorer``.
        """
        return _created(self.name, {**self.parameters, **(changes or {})})

    @property
    def texts(self) -> list[str]:
        """The name of the scorer, and the texts in its parameters, some of which name scorers, too."""
        return _texts({"name": self.name, **self.parameters})


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _created(name: str, parameters: Mapping[str, Any]) -> Scorer:
    return create_scorer(name, **{key: _parameter(value) for key, value in parameters.items()})


def _parameter(value: Any) -> Any:
    if isinstance(value, Mapping) and "name" in value:
        return _created(value["name"], {key: inner for key, inner in value.items() if key != "name"})
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Search:
    """The ``[search]`` table: parameters of scorers are tuned on validation sets, which are not reported.

    Attributes:
        id: name of the ID validation set in ``sets``.
        ood: names of the OoD validation sets in ``sets``.
        metric: headline metric to optimize, averaged over ``ood``.
        grid: values to try for each parameter, by label of the scorer: ``[search.grid.knn] k = [1, 10, 50]``.
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
        ood: an OoD dataset or a group (``near``, ``far``, ``mean``); None for a figure of the model itself.
        metric: a metric of ``METRICS``, ``accuracy``, …, averaged over checkpoints; the suffixes ``_sd``, ``_min`` and
            ``_max`` name the standard deviation, minimum and maximum instead.
        value: the printed value, in percent.
        source: paper and table.
    """

    model: str
    scorer: str | None
    ood: str | None
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class FigureTable:
    """The ``[figure]`` table of a part: how ``ood_scores.benchmark.figures`` draws its results.

    Attributes:
        plot: name in ``ood_scores.benchmark.figures.PLOTS``.
        options: options of the plot: every other key of the table.
    """

    plot: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A ``[[part]]`` table: one table of the report, with some models and datasets.

    Attributes:
        title: heading of the table.
        notes: remarks for the reader, in Markdown.
        models: at least one model.
        fit: name of the ID dataset that scorers are fitted on, usually the training set.
        id: name of the ID test set.
        near: names of near-OoD test sets, which resemble the ID data.
        far: names of far-OoD test sets.
        covariate: names of datasets with ID classes under a covariate shift (ImageNet-C, -R, …), which count as ID in
            addition to ``id`` ("full-spectrum").
        auxiliary: name of the OoD images that the models were trained with, which only measures read.
        sets: the texts that ``ood_scores.data.sources.open_dataset`` opens, by name.
        scorers: the scorers, or ``"all"`` for every registered scorer whose requirements are met.
        left_out: names of scorers that the part cannot run, by the reason, which the report repeats for each.
        ensembles: the models whose outputs are averaged and scored as one, by label.
        relabel: whether rows of OoD datasets with a label of 0 or above show an ID class and count as ID (SC-OOD).
        measures: other figures of each model: ``neural_collapse`` (on the fit set), ``long_tail``, ``calibration``
            (Brier score, negative log-likelihood, calibration errors), ``representation`` (norms and activation ratios
            of ID and OoD sets), ``batch_norm_gaps`` (distances from the running means of the last BatchNorm, with the
            probe ``batch_norm_gap``), ``training`` (loss and accuracy on the fit set), ``classifier_gradients`` (of ID
            and auxiliary images). Either their names, or their options by name: ``[measures.neural_collapse] normalize
            = true``.
        metrics: metrics on request, such as ``oscr`` or ``augrc_scod``, see ``evaluation.metrics.METRICS``.
        rule: threshold of FPR95, see ``evaluation.metrics.fpr_at_tpr_id``: ``first``, or ``nearest`` as in the code of
            several papers. Intervals are always those of ``first``.
        preprocessing: changes of the models' preprocessing.
        extraction: options of the extraction.
        search: parameters of scorers to tune on validation sets.
        published: published numbers to compare with.
        figure: how the results are drawn.
    """

    title: str
    models: tuple[ModelTable, ...]
    sets: Mapping[str, str]
    id: str
    near: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    fit: str | None = None
    covariate: tuple[str, ...] = ()
    auxiliary: str | None = None
    scorers: tuple[ScorerTable, ...] | Literal["all"] = ALL
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ensembles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: str = ""
    relabel: bool = False
    measures: tuple[str, ...] | Mapping[str, Mapping[str, Any]] = ()
    metrics: tuple[str, ...] = ()
    rule: Rule = "first"
    preprocessing: Preprocessing = Preprocessing()
    extraction: Extraction = Extraction()
    search: Search | None = None
    published: tuple[Published, ...] = ()
    figure: FigureTable | None = None

    NOT_IN_DIGEST: ClassVar[frozenset[str]] = frozenset(
        {"notes", "published", "figure", "left_out"}
        | {"models", "ensembles", "sets", "preprocessing", "extraction", "scorers"}
    )
    """Notes, published numbers, the figure and scorers that are left out are only presented; jobs and scorer tables
    replace the other fields."""

    @property
    def ood(self) -> tuple[str, ...]:
        return (*self.near, *self.far)

    @property
    def scorer_tables(self) -> tuple[ScorerTable, ...]:
        """The scorers of the part; for ``"all"``, the registered ones that are not left out."""
        if isinstance(self.scorers, tuple):
            return self.scorers
        without = {name for names in self.left_out.values() for name in names}
        return tuple(ScorerTable(name, name) for name in list_scorers() if name not in without)

    def measure_options(self, name: str) -> Mapping[str, Any]:
        """Return the options of a measure of the part."""
        return self.measures[name] if isinstance(self.measures, Mapping) else {}

    @property
    def scored(self) -> tuple[str, ...]:
        """The names of all datasets that are scored, without duplicates."""
        searched = (self.search.id, *self.search.ood) if self.search else ()
        seen = (self.auxiliary,) if self.auxiliary else ()
        return tuple(dict.fromkeys((self.id, *self.ood, *self.covariate, *seen, *searched)))


@dataclass(frozen=True)
class Spec:
    """A benchmark.

    Attributes:
        name: name of the file, without suffix.
        title: heading of the report.
        parts: at least one part, in the order of the report.
    """

    name: str
    title: str
    parts: tuple[Part, ...]
