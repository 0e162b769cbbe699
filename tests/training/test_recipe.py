"""Recipes: reading TOML files, errors, and the recipes of papers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm

import ood_scores.models.networks  # noqa: F401  registers the CIFAR networks
from ood_scores.data.kinds.base import DATASET_KINDS
from ood_scores.errors import BadInput, OodScoresError, UnknownName
from ood_scores.training import Recipe, load_recipe
from ood_scores.training.augment import AUGMENTATIONS
from ood_scores.training.objectives import create_objective
from ood_scores.training.recipe import OptimizerTable, ScheduleTable, Stage, flat_tables
from ood_scores.training.recipe_file import recipe_from

RECIPES = Path(__file__).parents[2] / "benchmarks" / "recipes"
NAMED = sorted(path for path in RECIPES.glob("*.toml"))

SMALL = """
epochs = 4
batch_size = 32
[model]
name = "cifar_resnet20"
in_chans = 1
[data]
train = "digits"
[objective]
name = "rna"
weight = 0.25
[auxiliary]
data = "digits?classes=7-9"
[optimizer]
lr = 1
"""


def toml(folder: Path, text: str = SMALL, name: str = "small") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def refused(path: Path, *overrides: str, error: type[OodScoresError] = BadInput) -> str:
    with pytest.raises(error) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# ---- reading


def test_byte_order_mark_is_not_part_of_the_file(tmp_path: Path) -> None:
    marked = tmp_path / "small.toml"
    marked.write_text(SMALL, encoding="utf-8-sig")
    assert load_recipe(marked) == load_recipe(toml(tmp_path))


def test_recipe_file_overrides_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(toml(tmp_path))
    assert recipe.name == "small"
    assert (recipe.model.name, recipe.model.arguments) == ("cifar_resnet20", {"in_chans": 1})
    assert (recipe.data.train, recipe.data.validation, recipe.data.long_tail) == ("digits", 0.0, 1.0)
    assert recipe.auxiliary is not None
    assert recipe.auxiliary.data == "digits?classes=7-9"
    (stage,) = recipe.stages
    assert (stage.epochs, stage.batch_size, stage.drop_last, stage.trainable) == (4, 32, False, ())
    assert (stage.objective.name, stage.objective.settings) == ("rna", {"weight": 0.25})
    assert isinstance(stage.optimizer.lr, float)
    assert stage.optimizer == OptimizerTable(lr=1.0, name="sgd", weight_decay=0.0, momentum=None, nesterov=False)
    assert stage.schedule == ScheduleTable("constant")
    assert (recipe.seed, recipe.amp, recipe.checkpoint_every, recipe.compile) == (0, "none", 0, False)


def test_recipe_survives_conversion_to_a_dictionary(tmp_path: Path) -> None:
    path = toml(tmp_path, SMALL + '[[stage]]\nepochs = 2\nobjective = {name = "oe"}\ntrainable = ["head"]\n')
    recipe = load_recipe(path, ["seed=3", "data.long_tail=10"])
    again = recipe_from(recipe.to_dict())
    assert again.to_dict() == recipe.to_dict()
    assert again.stages == recipe.stages
    assert (again.seed, again.data, again.model, again.auxiliary) == (3, recipe.data, recipe.model, recipe.auxiliary)


def test_stages_inherit_from_the_recipe(tmp_path: Path) -> None:
    more = (
        '[[stage]]\nepochs = 2\nbatch_size = 64\n[stage.objective]\nname = "oe"\n[[stage]]\n[stage.optimizer]\nlr = 2'
    )
    first, second, third = load_recipe(toml(tmp_path, SMALL + more)).stages
    assert (first.epochs, second.epochs, third.epochs) == (4, 2, 4)
    assert (first.batch_size, second.batch_size, third.batch_size) == (32, 64, 32)
    assert second.objective.settings == {}
    assert (third.objective, third.optimizer.lr) == (first.objective, 2.0)


def test_stage_of_counts_epochs_over_all_stages(tmp_path: Path) -> None:
    recipe = load_recipe(toml(tmp_path, SMALL + "[[stage]]\nepochs = 2\n"))
    assert recipe.epochs == 6
    assert [recipe.stage_of(epoch) for epoch in (0, 3, 4, 5)] == [(0, 0), (0, 3), (1, 0), (1, 1)]
    with pytest.raises(BadInput, match="no epoch 6: it has 6 epochs"):
        recipe.stage_of(6)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (ScheduleTable(), [1, 1, 1, 1]),
        (ScheduleTable("steps", (1, 3), 0.5), [1, 0.5, 0.5, 0.25]),
        (ScheduleTable("cosine"), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_learning_rate_schedules(schedule: ScheduleTable, factors: list[float]) -> None:
    assert [schedule.factor(epoch, 4) for epoch in range(4)] == pytest.approx(factors)


def test_cosine_per_step_falls_within_an_epoch() -> None:
    stage = Stage(2, OptimizerTable(1.0), schedule=ScheduleTable("cosine", per_step=True))
    assert [stage.lr(epoch, step, 2) for epoch in (0, 1) for step in (0, 1)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert Stage(2, OptimizerTable(1.0), schedule=ScheduleTable("cosine")).lr(1, 1, 2) == 0.5
    with pytest.raises(BadInput, match="per_step belongs to"):
        ScheduleTable("constant", per_step=True)


# ---- inheritance and overrides


def test_extends_inherits_missing_keys(tmp_path: Path) -> None:
    toml(tmp_path)
    path = toml(tmp_path, 'extends = "small.toml"\nepochs = 9\n[objective]\ntau = 2\n[optimizer]\nlr = 0.5', "child")
    grandchild = toml(tmp_path, 'extends = "child.toml"\n[objective]\nname = "oe"\n', "grandchild")
    child = load_recipe(path)
    assert (child.stages[0].epochs, child.stages[0].batch_size, child.stages[0].optimizer.lr) == (9, 32, 0.5)
    assert child.stages[0].objective.settings == {"weight": 0.25, "tau": 2}
    assert load_recipe(grandchild).stages[0].objective.settings == {}
    assert load_recipe(grandchild).stages[0].optimizer.lr == 0.5


def test_overrides_win_and_are_parsed_as_toml_or_text(tmp_path: Path) -> None:
    texts = ["model.name=resnet18", "optimizer.lr=0.5", "schedule.name=steps", "schedule.milestones=[2, 3]", "amp=bf16"]
    recipe = load_recipe(toml(tmp_path), [*texts, "data.test=digits?classes=0-6", "compile = true"])
    assert (recipe.model.name, recipe.model.arguments) == ("resnet18", {})
    assert recipe.stages[0].optimizer.lr == 0.5
    assert recipe.stages[0].schedule.milestones == (2, 3)
    assert (recipe.data.test, recipe.amp, recipe.compile) == ("digits?classes=0-6", "bf16", True)


def test_overrides_can_change_stages(tmp_path: Path) -> None:
    path = toml(tmp_path, SMALL + "[[stage]]\nepochs = 2\n")
    assert load_recipe(path, ["stage.1.epochs=7", "stage.1.optimizer.lr=3"]).stages[1].optimizer.lr == 3
    assert load_recipe(path, ["stage.1.epochs=7"]).epochs == 11
    assert "1 [[stage]] tables" in refused(path, "stage.2.epochs=7")
    assert "did you mean 'epochs'" in refused(path, "stage.1.epoch=7", error=UnknownName)


# ---- errors


@pytest.mark.parametrize(
    ("wrong", "line", "words"),
    [
        ("epochs = 4\nepochz = 5", 3, "a recipe has no 'epochz' (did you mean 'epochs'?)"),
        ("epochs = 4\n[optimiser]\nlr = 1", 3, "did you mean 'optimizer'"),
        ('epochs = 4\n[data]\ntrian = "digits"', 4, "[data] has no 'trian' (did you mean 'train'?)"),
        ("epochs = 4\n[optimizer]\nlearning_rate = 1", 4, "choose from lr, name, weight_decay, momentum, nesterov"),
        ("epochs = 4\n[[stage]]\nseed = 3", 4, "[stage] has no 'seed'"),
        ("epochs = 4\n[[stage]]\n[stage.optimizer]\nlearn = 3", 5, "[stage.optimizer] has no 'learn'"),
    ],
)
def test_unknown_recipe_keys_are_named_with_their_line(tmp_path: Path, wrong: str, line: int, words: str) -> None:
    message = refused(toml(tmp_path, f"# a comment\n{wrong}\n"), error=UnknownName)
    assert message.startswith(f"{tmp_path}/small.toml, line {line}: ")
    assert words in message


def test_errors_in_an_extended_recipe_name_that_file(tmp_path: Path) -> None:
    toml(tmp_path, "epochs = 4\nbatch = 3", "base")
    message = refused(toml(tmp_path, 'extends = "base.toml"', "child"), error=UnknownName)
    assert message.startswith(f"{tmp_path}/base.toml, line 2: a recipe has no 'batch'")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ('epochs = "4"', "epochs is '4': give a whole number"),
        ("epochs = 4.5", "give a whole number"),
        ("epochs = true", "give a whole number"),
        ("epochs = 4\ncompile = 1", "compile is 1: give true or false"),
        ("epochs = 4\n[model]\nname = 3", "model.name is 3: give a string in quotes"),
        ("epochs = 4\n[optimizer]\nlr = [1]", "optimizer.lr is [1]: give a number"),
        ('epochs = 4\n[schedule]\nmilestones = ["a"]', "a list, each a whole number"),
        ('epochs = 4\n[auxiliary]\nbatch_size = "a"', "give a whole number"),
        ('model = "resnet18"', "model is 'resnet18', not a table: write [model]"),
        ("stage = 3", "write [[stage]]"),
    ],
)
def test_recipe_values_of_wrong_type_are_refused(tmp_path: Path, wrong: str, words: str) -> None:
    message = refused(toml(tmp_path, wrong))
    assert f"{tmp_path}/small.toml, line " in message
    assert words in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epochs=0", "epochs = 0 is out of range: it must be at least 1"),
        ("data.validation=1.0", "data.validation = 1.0"),
        ("data.long_tail=0.5", "data.long_tail = 0.5"),
        ("optimizer.lr=0", "optimizer.lr = 0.0 is out of range: it must be a positive number"),
        ("optimizer.momentum=1", "optimizer.momentum"),
        ("auxiliary.batch_size=0", "auxiliary.batch_size"),
        ("seed=-1", "seed = -1"),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay = inf"),
        ("schedule={name='steps', milestones=[1], gamma=-1.0}", "schedule.gamma = -1.0 is out of range"),
        ("schedule={name='steps', milestones=[1], gamma=0.0}", "it must be a positive number"),
        ("schedule={name='steps', milestones=[-1, 5]}", "schedule.milestones = [-1, 5] is out of range"),
        ("schedule={name='steps', milestones=[0]}", "it must be numbers of epochs of at least 1"),
        ("optimizer={lr=1, momentum=0.0, nesterov=true}", "nesterov = true needs a momentum above 0"),
        ("schedule.milestones=[3]", "milestones and"),
        ("schedule.name=steps", "milestones and"),
    ],
)
def test_recipe_values_out_of_range_are_refused(tmp_path: Path, override: str, words: str) -> None:
    assert words in refused(toml(tmp_path), override)


def test_unknown_choices_and_conflicting_keys_are_refused(tmp_path: Path) -> None:
    path = toml(tmp_path)
    message = "optimizer.name is 'lion': give 'sgd' or 'adam' or 'adamw'."
    assert message in refused(path, "optimizer={name='lion', lr=1}")
    assert "amp is 'fp16': give 'none' or 'bf16'." in refused(path, "amp=fp16")
    with pytest.raises(BadInput, match="optimizer: name must be 'sgd' or 'adam' or 'adamw', got 'lion'"):
        OptimizerTable(lr=1, name="lion")  # type: ignore[arg-type]
    assert "adam has neither momentum nor nesterov" in refused(path, "optimizer={name='adam', lr=1, momentum=0.9}")
    assert "write --set key=value" in refused(path, "epochs")
    assert "set to a value already" in refused(path, "optimizer=1", "optimizer.lr=1")


def test_missing_and_invalid_recipe_files_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.toml") == f"there is no recipe {tmp_path}/none.toml."
    assert "cannot read the recipe" in refused(toml(tmp_path, "epochs = = 3"))
    assert f"there is no recipe {tmp_path}/none.toml" in refused(toml(tmp_path, 'extends = "none.toml"'))
    assert "extends itself" in refused(toml(tmp_path, 'extends = "small.toml"'))
    assert "[data] has no train" in refused(toml(tmp_path, 'epochs = 1\n[model]\nname = "a"\n'))
    assert "[model] has no name" in refused(toml(tmp_path, "epochs = 1\n"))
    assert "no epochs" in refused(toml(tmp_path, SMALL.replace("epochs = 4", "")))


def test_flat_tables_joins_keys_with_dots() -> None:
    assert flat_tables({"a": 1, "b": {"c": [1, 2]}, "stage": [{"d": 3}]}) == {"a": 1, "b.c": [1, 2], "stage.1.d": 3}


# ---- recipes of papers


@pytest.mark.parametrize("path", NAMED, ids=lambda path: path.stem)
def test_published_recipes_name_existing_objects(path: Path) -> None:
    recipe = load_recipe(path)
    assert timm.is_model(recipe.model.name)
    auxiliary = [recipe.auxiliary] if recipe.auxiliary else []
    for spec in (recipe.data.train, recipe.data.test, *(table.data for table in auxiliary if table.data != "train")):
        assert spec is None or spec.partition("?")[0].partition(":")[0] in DATASET_KINDS
    for name in (recipe.data.augmentation, *(table.augmentation for table in auxiliary)):
        assert name is None or name in AUGMENTATIONS
    for stage in recipe.stages:
        objective = create_objective(
            stage.objective.name, class_counts=[5, 3], num_features=4, **stage.objective.settings
        )
        assert recipe.auxiliary or not objective.auxiliary


def named(name: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.toml")


@pytest.mark.parametrize(
    ("name", "model", "epochs", "milestones", "batch", "l2"),
    [
        ("haas_resnet18_60_l2", "haas_resnet18", 60, (40, 50), 1024, True),
        ("haas_resnet18_60", "haas_resnet18", 60, (40, 50), 1024, False),
        ("haas_resnet50_100_l2", "haas_resnet50", 100, (75, 90), 768, True),
        ("haas_resnet50_100", "haas_resnet50", 100, (75, 90), 768, False),
        ("haas_resnet18_350_l2", "haas_resnet18", 350, (150, 250), 1024, True),
        ("haas_resnet18_350", "haas_resnet18", 350, (150, 250), 1024, False),
        ("haas_resnet50_350_l2", "haas_resnet50", 350, (150, 250), 768, True),
        ("haas_resnet50_350", "haas_resnet50", 350, (150, 250), 768, False),
        ("haas2022_resnet50_100_l2", "haas_resnet50", 100, (75, 90), 1024, True),
        ("haas2022_resnet50_350", "haas_resnet50", 350, (150, 250), 1024, False),
    ],
)
def test_recipes_of_haas_et_al(
    name: str, model: str, epochs: int, milestones: tuple[int, ...], batch: int, l2: bool
) -> None:
    recipe = named(name)
    (stage,) = recipe.stages
    assert (recipe.model.name, recipe.model.arguments["l2_head"]) == (model, l2)
    assert (stage.epochs, stage.schedule, stage.batch_size) == (epochs, ScheduleTable("steps", milestones, 0.1), batch)
    assert stage.optimizer == OptimizerTable(0.1, "sgd", 5e-4, 0.9)
    assert (recipe.data.train, recipe.data.validation) == ("torchvision:CIFAR10?split=train", 0.1)
    assert recipe.data.augmentation == "crop_flip"


def test_nc_intervention_starts_at_epoch_50() -> None:
    first, second = named("haas_nc_intervention").stages
    assert (first.epochs, first.batch_size, first.objective.name, first.lr(49)) == (50, 1024, "cross_entropy", 0.1)
    assert (second.epochs, second.batch_size, second.objective.name) == (20, 2048, "nc_loss")
    assert [second.lr(epoch) for epoch in (0, 9, 10, 19)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    control = named("haas_nc_control").stages
    assert control[0] == first
    assert (control[1].objective.name, control[1].schedule) == ("cross_entropy", second.schedule)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize(
    ("row", "objective"),
    [
        ("rna", "rna"),
        ("ce", "cross_entropy"),
        ("la", "logit_adjustment"),
        ("oe", "oe"),
        ("energy_oe", "energy_oe"),
        ("balanced_energy", "balanced_energy"),
        ("oecc", "oecc"),
        ("pascl", "pascl"),
    ],
)
def test_recipes_of_cifar_lt(row: str, objective: str, data: str) -> None:
    recipe = named(f"{row}_{data}_lt")
    stage = recipe.stages[0]
    assert recipe.data.train == f"torchvision:{data.upper()}?split=train"
    tuned = {"energy_oe": 10, "oecc": 15, "balanced_energy": 20}
    assert (recipe.model.name, recipe.data.long_tail) == ("rna_resnet18", 100)
    assert stage.epochs == tuned.get(row, 200)
    shortcuts = {"shortcut_affine": True} if row == "rna" else {}
    assert recipe.model.arguments == {"bn_affine": row != "rna", **shortcuts}
    batch_size = 256 if row == "pascl" else 128
    assert (stage.batch_size, stage.drop_last, stage.objective.name) == (batch_size, True, objective)
    assert (recipe.auxiliary is None) == (row in ("ce", "la"))
    if row in tuned:
        out = Path("runs/x_seed2")
        assert recipe.model.checkpoint_for(2, out) == Path(f"runs/ce_{data}_lt_seed2/last.safetensors")
        assert stage.optimizer == OptimizerTable(1e-3, "sgd", 5e-4, 0.9, nesterov=True)
        assert stage.schedule == ScheduleTable("cosine", per_step=True)
        assert recipe.auxiliary is not None
        assert recipe.auxiliary.batch_size == 256
    else:
        assert recipe.model.checkpoint is None
        assert stage.optimizer == OptimizerTable(1e-3, "adam", 5e-4)
        assert stage.schedule == ScheduleTable("cosine")


def test_networks_of_rna_are_those_of_the_authors_code() -> None:
    found = {path.stem: load_recipe(path) for path in RECIPES.glob("rna_*cifar*.toml")}
    assert len(found) > 20
    for recipe in found.values():
        assert recipe.model.arguments["shortcut_affine"]


def test_counts_of_balanced_energy_are_those_of_all_auxiliary_images() -> None:
    for data, classes in (("cifar10", 10), ("cifar100", 100)):
        counts = named(f"balanced_energy_{data}_lt").stages[0].objective.settings["ood_counts"]
        assert (len(counts), sum(counts)) == (classes, 300_000)


def test_few_auxiliary_images_end_the_epoch() -> None:
    for name in ("rna_cifar10_lt_aux300", "rna_cifar10_lt_aux3k"):
        auxiliary = named(name).auxiliary
        assert auxiliary is not None
        assert not auxiliary.repeat


def test_settings_of_ablation_recipes() -> None:
    def settings(name: str) -> dict[str, Any]:
        return dict(named(name).stages[0].objective.settings)

    assert settings("rna_cifar10_lt")["weight"] == 0.5
    assert settings("energy_oe_cifar10_lt") == {"m_in": -23.0, "m_out": -5.0, "weight": 0.1}
    assert settings("energy_oe_cifar100_lt")["m_in"] == -27.0
    assert settings("balanced_energy_cifar100_lt")["shift"] == 100.0
    assert settings("pascl_cifar10_lt")["temperature"] == 0.07
    assert settings("pascl_cifar100_lt") == {"contrast_weight": 0.02, "temperature": 0.2, "ood_weight": 0.5}
    _, second = named("pascl_cifar10_lt").stages
    assert (second.objective.name, second.trainable) == ("logit_adjustment", ("batchnorm", "head"))
    assert (second.epochs, second.batch_size, second.optimizer) == (10, 128, OptimizerTable(5e-4, "adam", 5e-4))
    first, second = named("pascl_imagenet_lt").stages
    assert dict(first.objective.settings) == {"contrast_weight": 0.1, "temperature": 0.07, "ood_weight": 0.5}
    assert (first.optimizer.weight_decay, first.schedule) == (5e-5, ScheduleTable("steps", (60, 80)))
    assert (second.batch_size, second.optimizer) == (128, OptimizerTable(0.01, "sgd", 5e-5, 0.9))
    assert second.schedule.factor(1, 3) == pytest.approx(0.75)


def test_recipes_of_imagenet_lt_and_fine_tuning() -> None:
    recipe = named("rna_imagenet_lt")
    stage = recipe.stages[0]
    assert (stage.epochs, stage.batch_size, stage.trainable) == (100, 256, ("!batchnorm",))
    assert stage.optimizer == OptimizerTable(0.1, "sgd", 5e-4, 0.9, nesterov=True)
    tuned = named("finetune_rna_ce_la_cifar10_lt")
    out = Path("data/runs/finetune_rna_ce_la_cifar10_lt_seed3")
    assert tuned.model.checkpoint_for(3, out) == Path("data/runs/ce_cifar10_lt_seed3/last.safetensors")
    assert (tuned.epochs, tuned.stages[0].objective.name) == (10, "rna")
    assert named("ce_cifar10_lt").model.arguments == {"bn_affine": True}
    assert tuned.model.arguments == {"bn_affine": True, "shortcut_affine": True}, "the same network"
    assert tuned.stages[0].trainable == ("!batchnorm",)


def test_recipe_in_the_documentation_is_valid(tmp_path: Path) -> None:
    text = (RECIPES.parents[1] / "docs" / "training.md").read_text()
    blocks = [block.partition("```")[0] for block in text.split("```toml\n")[1:]]
    recipe = load_recipe(toml(tmp_path, "".join(blocks)))
    assert set(flat_tables(recipe.to_dict())) >= {"auxiliary.batch_size", "objective.weight", "model.l2_head"}
    assert [stage.epochs for stage in recipe.stages] == [60, 10]
    assert recipe.stages[1].trainable == ("batchnorm", "head")
