"""Digests of benchmark jobs and units include every field, except those that only affect the presentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from small_benchmark import part, spec

from ood_scores.benchmark import plan
from ood_scores.benchmark.digest import digest
from ood_scores.benchmark.networks import Network
from ood_scores.benchmark.planning import Job, Unit
from ood_scores.benchmark.spec import Extraction, ModelTable, Part, Preprocessing, Published, ScorerTable, Search
from ood_scores.benchmark.unit import key_of
from ood_scores.extraction.options import ExtractionOptions


def unit_of(data: Path, **changes: Any) -> Unit:
    search = Search("val_id", ("val_ood",), grid={"msp": {}})
    (unit,) = plan(
        spec(part(**{"scorers": (ScorerTable("msp", "msp"),), "search": search} | changes)), data, data
    ).units
    return unit


def with_field(instance: Any, value: Any) -> Any:
    """Copy an instance to a class with one more field."""
    cls = type(instance)
    added = ("added", int, field(metadata={"choices": ()}))
    wider = make_dataclass(cls.__name__, [added], bases=(cls,), frozen=True, kw_only=True)
    return wider(**{known.name: getattr(instance, known.name) for known in fields(cls)}, added=value)


def in_job(change: Callable[[Job], Job]) -> Callable[[Unit], Unit]:
    def changed(unit: Unit) -> Unit:
        return replace(unit, sets={name: tuple(map(change, jobs)) for name, jobs in unit.sets.items()})

    return changed


WIDER: dict[str, Callable[[Unit, Any], Unit]] = {
    "unit": with_field,
    "part": lambda unit, value: replace(unit, part=with_field(unit.part, value)),
    "search": lambda unit, value: replace(unit, part=replace(unit.part, search=with_field(unit.part.search, value))),
    "scorer": lambda unit, value: replace(
        unit, part=replace(unit.part, scorers=tuple(with_field(table, value) for table in unit.part.scorers))
    ),
    "job": lambda unit, value: in_job(lambda job: with_field(job, value))(unit),
    "options": lambda unit, value: in_job(lambda job: replace(job, options=with_field(job.options, value)))(unit),
    "preprocessing": lambda unit, value: in_job(
        lambda job: replace(job, preprocessing=with_field(job.preprocessing, value))
    )(unit),
    "network": lambda unit, value: in_job(lambda job: replace(job, network=with_field(job.network, value)))(unit),
    "model": lambda unit, value: in_job(
        lambda job: replace(job, network=replace(job.network, table=with_field(job.network.table, value)))
    )(unit),
}


@pytest.mark.parametrize("where", WIDER)
def test_added_field_changes_the_digest_of_a_unit(data: Path, where: str) -> None:
    unit = unit_of(data)
    one, other = WIDER[where](unit, 1), WIDER[where](unit, 2)
    assert len({key_of(unit), key_of(one), key_of(other)}) == 3
    assert key_of(WIDER[where](unit, 1)) == key_of(one)


@pytest.mark.parametrize("where", ["job", "options", "preprocessing", "network", "model"])
def test_added_field_changes_the_cache_of_a_job(data: Path, where: str) -> None:
    unit = unit_of(data)
    caches = {WIDER[where](unit, value).sets["test"][0].cache for value in (1, 2)} | {unit.sets["test"][0].cache}
    assert len(caches) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"notes": "Read this."},
        {"published": (Published("Net", "msp", "dark", "auroc", 50.0, "Nobody"),)},
        {"extraction": Extraction(batch_size=3, workers=1)},
    ],
    ids=["notes", "published", "speed"],
)
def test_presentation_does_not_change_the_digest_of_a_unit(data: Path, changes: dict[str, Any]) -> None:
    assert key_of(unit_of(data, **changes)) == key_of(unit_of(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"title": "Other"},
        {"fit": "test"},
        {"near": ()},
        {"relabel": True},
        {"measures": ("long_tail",)},
        {"scorers": (ScorerTable("msp", "energy"),)},
        {"search": None},
        {"models": (ModelTable("cifar_resnet20", "Net", "1.safetensors"),)},
        {"preprocessing": Preprocessing(input_size=(8, 8), crop_pct=0.5)},
        {"extraction": Extraction(rows=10)},
        {"extraction": Extraction(probes=("odin",))},
        {"extraction": Extraction(fit_probes=("odin",))},
        {"extraction": Extraction(channels_last=True)},
        {"extraction": Extraction(pool="mean")},
    ],
    ids=str,
)
def test_inputs_of_the_scores_change_the_digest_of_a_unit(data: Path, changes: dict[str, Any]) -> None:
    assert key_of(unit_of(data, **changes)) != key_of(unit_of(data))


def test_other_models_do_not_change_the_digest_of_a_unit(data: Path) -> None:
    both = (*part().models, ModelTable("cifar_resnet20", "Other", "1.safetensors"))
    first, second = plan(spec(part(models=both)), data, data).units
    (alone,) = plan(spec(part()), data, data).units
    assert key_of(first) == key_of(alone) != key_of(second)


def test_options_that_earlier_versions_lack_change_the_digest_only_if_they_are_set() -> None:
    known = {each.name: getattr(ExtractionOptions(), each.name) for each in fields(ExtractionOptions)}
    earlier = {name: value for name, value in known.items() if name not in ("on_error", "pool")}
    earlier["channels_last"] = False  # which was the default
    assert digest(ExtractionOptions()) == digest(["ExtractionOptions", earlier])
    assert digest(ExtractionOptions(pool="cls")) != digest(ExtractionOptions())


def test_label_does_not_change_the_digest_of_a_model() -> None:
    assert digest(ModelTable("cifar_resnet20", "Net")) == digest(ModelTable("cifar_resnet20", "Other"))
    assert digest(ModelTable("cifar_resnet20")) != digest(ModelTable("cifar_resnet20", arguments={"width": 2}))


@pytest.mark.parametrize("cls", [ModelTable, Part, Job, Network])
def test_fields_excluded_from_digests_exist(cls: Any) -> None:
    assert {known.name for known in fields(cls)} > cls.NOT_IN_DIGEST
