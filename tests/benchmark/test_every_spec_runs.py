"""Every network of every spec of this repository is trained, extracted, and scored, at toy size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import ood_scores
import ood_scores.models.networks
from ood_scores.benchmark import Spec, load_spec
from ood_scores.benchmark.networks import file_name
from ood_scores.benchmark.spec import ModelTable, Part
from ood_scores.training import Recipe, load_recipe, setup, train
from ood_scores.training.recipe import ScheduleTable, Stage

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SPECS = [path for folder in ("suites", "papers") for path in sorted((BENCHMARKS / folder).glob("*.toml"))]
COUNTS = (14, 12, 10, 6, 4, 2)
CLASSES = len(COUNTS)
SIZE = 32
KEPT_EPOCH = re.compile(r"runs/(\w+)_seed\d+/epoch_\d+\.safetensors")

SMALL: dict[str, dict[str, Any]] = {
    "haas_resnet": {"width": 2},
    "rna_resnet": {"width": 2},
    "haas_vgg16": {"stages": ((4, 4), (4,), (8,), (8,), (8,))},
    "haas_cct7_3x1": {"dim": 16, "depth": 2},
    "haas_convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)},
    "cifar_": {},
    "resnetv2_": {"channels": (128, 128, 128, 128), "stem_chs": 32},
    "resnet": {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)},
    "tf_efficientnet_": {},
    "densenet121": {"growth_rate": 4, "block_config": (1, 1, 1, 1)},
}
"""Arguments that make a network tiny, by the start of its name."""


def small(name: str) -> dict[str, Any]:
    return next(arguments for start, arguments in SMALL.items() if name.startswith(start))


ROWS = {"fit": sum(COUNTS), "id": 18, "shifted": 6, "val_id": 6, "ood": 8, "val_ood": 8}
AT_TOY_SIZE = re.compile("more rows|fit more|is predicted correctly|need at least 30 rows")
"""Reasons of scorers that few rows, or a network that has learned nothing, cause."""
OF_OTHER_SPECS = re.compile(
    "was not extracted|the model does not have|does not apply|needs a fit set|an ensemble of several"
)
"""Reasons of scorers that ``"all"`` includes and the spec does not serve."""


class Workshop:
    """A folder with images and networks, each trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trained: dict[str, Path] = {}
        rng = np.random.default_rng(0)
        for name, rows in ROWS.items():
            labels = np.full(rows, -1) if "ood" in name else np.arange(rows) % CLASSES
            labels = np.repeat(np.arange(CLASSES), COUNTS) if name == "fit" else labels
            images = rng.integers(0, 128, (rows, SIZE, SIZE, 3)) + 40 * labels[:, None, None, None].clip(0)
            np.savez(folder / f"{name}.npz", images=images.astype(np.uint8), labels=labels)

    def text(self, name: str) -> str:
        return f"npz:{self.folder}/{name}.npz"

    def checkpoint(self, model: ModelTable) -> Path:
        """Return weights of a small version of a network: those of its recipe, or untrained ones."""
        files = model.checkpoint if isinstance(model.checkpoint, tuple) else (model.checkpoint or "",)
        kept = KEPT_EPOCH.fullmatch(files[0])
        if kept:
            return self.train(kept[1], model) / "epoch_001.safetensors"
        if model.recipe:
            return self.train(model.recipe, model) / "last.safetensors"
        path = self.folder / f"{file_name(f'{model.name} {model.arguments}')}.safetensors"
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = timm.create_model(model.name, num_classes=CLASSES, **{**model.arguments, **small(model.name)})
            save_file(network.state_dict(), path)
        return path

    def train(self, name: str, model: ModelTable | None = None) -> Path:
        """Train a recipe for one epoch in each stage, after the recipe whose network it starts from."""
        recipe = self.small_recipe(load_recipe(BENCHMARKS / "recipes" / f"{name}.toml"))
        if model is not None:
            assert recipe.model.name == model.name
            changed = {key for key, value in model.arguments.items() if recipe.model.arguments.get(key) != value}
            assert changed <= {"normalize_eval"}, "the spec opens another network than its recipe trains"
        out = self.folder / "runs" / f"{name}_seed0"
        start = recipe.model.checkpoint_for(recipe.seed, out)
        if start is not None:
            assert self.train(start.parent.name.removesuffix("_seed0")) == start.parent
        form = form_of(recipe)
        if form not in self.trained:
            train(recipe, out, device="cpu", progress=False)
            self.trained[form] = out
        elif not out.exists():
            out.symlink_to(self.trained[form])
        return out

    def small_recipe(self, recipe: Recipe) -> Recipe:
        auxiliary = recipe.auxiliary
        if auxiliary is not None:
            outside = auxiliary.data if auxiliary.data == "train" else self.text("ood")
            auxiliary = replace(auxiliary, data=outside, batch_size=8)
        data = replace(recipe.data, train=self.text("fit"), test=None, long_tail=1.0)
        return replace(
            recipe,
            model=replace(recipe.model, arguments={**recipe.model.arguments, **small(recipe.model.name)}),
            data=data,
            auxiliary=auxiliary,
            stages=tuple(map(small_stage, recipe.stages)),
            checkpoint_every=min(1, recipe.checkpoint_every),
            workers=0,
            name="small",
        )

    def small_spec(self, spec: Spec) -> Spec:
        """Return a spec with small images and networks, each in the first of the parts that score it alike."""
        done: set[Any] = set()
        parts = [self.small_part(part, done) for part in spec.parts]
        return replace(spec, parts=tuple(part for part in parts if part.models))

    def small_part(self, part: Part, done: set[Any]) -> Part:
        models: dict[Any, ModelTable] = {}
        for model in part.models:
            checkpoint = self.checkpoint(model)
            form = checkpoint.resolve(), model.name, str([model.arguments, part.scorers, part.measures]), part.id
            if form in done and not part.ensembles:
                continue
            done.add(form)
            arguments = {**model.arguments, **small(model.name)}
            there = replace(
                model,
                checkpoint=str(checkpoint),
                recipe=None,
                seeds=(),
                epoch=None,
                setting=None,
                num_classes=CLASSES,
                arguments=arguments,
            )
            models.setdefault(form, there)
        labels = [model.title for model in models.values()]
        roles = {part.id: "id", **dict.fromkeys(part.covariate, "shifted")}
        if part.search:
            roles |= {part.search.id: "val_id", **dict.fromkeys(part.search.ood, "val_ood")}
        if part.fit:
            roles.setdefault(part.fit, "fit")
        kept = *part.near[:1], *part.far[:1]
        fewer = part.preprocessing.input_size or part.extraction.rows
        here = partial(re.sub, "proxy=.*", f"proxy={self.text('ood')}")
        return replace(
            part,
            models=tuple(models.values()),
            near=part.near[:1],
            far=part.far[:1],
            sets={name: self.text(roles.get(name, "ood")) for name in part.sets},
            preprocessing=replace(
                part.preprocessing, input_size=(64, 64) if part.preprocessing.input_size else (SIZE, SIZE)
            ),
            extraction=replace(
                part.extraction,
                batch_size=16,
                workers=0,
                rows=12 if fewer else None,
                fit_probes=tuple(map(here, part.extraction.fit_probes)),
            ),
            published=tuple(
                number
                for number in part.published
                if number.model in [*labels, *part.ensembles] and number.ood in (None, *kept, "near", "far", "mean")
            ),
        )


def form_of(recipe: Recipe) -> str:
    """Return what distinguishes recipes but the numbers of their stages."""
    stages = re.sub(r"\d+(\.\d+)?", "0", str(recipe.stages))
    return f"{recipe.model} {recipe.data} {recipe.auxiliary} {stages}"


def small_stage(stage: Stage) -> Stage:
    settings = {
        key: value[:CLASSES] if isinstance(value, list) else value for key, value in stage.objective.settings.items()
    }
    objective = replace(stage.objective, settings=settings)
    return replace(stage, epochs=1, batch_size=16, schedule=ScheduleTable(), objective=objective)


def small_input(input_of: Any, model: Any) -> Any:
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, SIZE, SIZE)}
    return input_of(model)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ood_scores.training.setup.input_of", partial(small_input, setup.input_of))
        patch.setattr("ood_scores.benchmark.report.write_report", lambda results, images: [])
        patch.setattr("ood_scores.benchmark.unit.explained", lambda *_: None)  # only reports show it
        yield Workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_every_network_of_the_spec_runs(path: Path, workshop: Workshop, tmp_path: Path) -> None:
    spec = workshop.small_spec(load_spec(path))
    results = ood_scores.benchmark.run(spec, out=tmp_path, jobs=1, device="cpu", progress=False)
    assert {(each.part, each.model) for each in results.scored} == {
        (part.title, title)
        for part in spec.parts
        for title in [*(model.title for model in part.models), *part.ensembles]
    }
    stated = {
        (part.title, name, reason) for part in spec.parts for reason in part.left_out for name in part.left_out[reason]
    }
    excused = [each for each in results.not_run if (each.part, each.what, each.reason) in stated]
    excused += [each for each in results.not_run if AT_TOY_SIZE.search(each.reason)]
    of_more = {part.title for part in spec.parts if part.scorers == "all" or part.ensembles}
    excused += [each for each in results.not_run if OF_OTHER_SPECS.search(each.reason) and each.part in of_more]
    assert set(results.not_run) == set(excused)
    numbers = results.comparison[~results.comparison["metric"].str.endswith("_sd")]
    without = {(each.part, each.what) for each in excused}
    missing = numbers[numbers["ours"].isna()]
    assert [row for row in zip(missing["part"], missing["scorer"], strict=True) if row not in without] == []


def test_networks_that_normalize_in_eval_mode_have_unit_features(workshop: Workshop, tmp_path: Path) -> None:
    part = load_spec(BENCHMARKS / "papers" / "haas2022.toml").parts[0]
    (model, *_) = (model for model in part.models if model.arguments.get("normalize_eval"))
    small_part = workshop.small_part(replace(part, models=(model,)), set())
    ood_scores.benchmark.run(Spec("one", "One", (small_part,)), out=tmp_path, jobs=1, device="cpu", progress=False)
    for cache in (tmp_path / "caches").glob("*/*.h5"):
        feats = ood_scores.load(cache)
        norms = torch.linalg.vector_norm(torch.as_tensor(feats.features[:]), dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
        assert feats.head is not None
