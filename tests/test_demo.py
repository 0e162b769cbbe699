"""One run of the demo command: its output, files, and suggestions."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

import ood_scores
from ood_scores import demo
from ood_scores.cli import app
from ood_scores.data.kinds.digits import digits

SETS = ("train", "test", "unseen", "photo", "noise")
METRICS = ["auroc", "aupr_in", "aupr_out", "fpr95_id", "fpr95_ood"]


class Ran(NamedTuple):
    out: Path
    output: str
    table: pd.DataFrame


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = tmp_path_factory.mktemp("demo") / "out"
    result = CliRunner().invoke(app, ["demo", "--out", str(out)], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return Ran(out, result.output, pd.read_csv(out / "results.csv"))


def feats(ran: Ran, training: str) -> dict[str, ood_scores.FeatureSet]:
    (folder,) = ran.out.glob(f"caches/{training}-*")
    return {name: ood_scores.load(path) for name in SETS for path in folder.glob(f"{name}-*.h5")}


def test_table_contains_every_scorer_dataset_and_training(ran: Ran) -> None:
    sets = feats(ran, "l2_norm")
    made = [ood_scores.create_scorer(name) for name in ood_scores.list_scorers()]
    scorers = [
        s.name for s in made if all(map(sets["train"].has, s.fit_needs)) and all(map(sets["noise"].has, s.needs))
    ]
    assert {"msp", "energy", "gradnorm", "feature_norm", "mahalanobis", "knn", "gmm"} <= set(scorers)
    rows = ran.table.set_index(["model", "scorer", "ood"]).index
    assert sorted(rows) == sorted((t, s, o) for t in demo.TRAININGS for s in scorers for o in demo.OOD)
    assert ran.table[METRICS].to_numpy().min() >= 0
    assert ran.table[METRICS].to_numpy().max() <= 1


def test_table_matches_evaluate_on_the_caches(ran: Ran) -> None:
    for training in demo.TRAININGS:
        sets = feats(ran, training)
        ood = {name: sets[name] for name in demo.OOD}
        again = ood_scores.evaluate(["energy", "knn"], id=sets["test"], ood=ood, fit=sets["train"])
        rows = ran.table[(ran.table["model"] == training) & ran.table["scorer"].isin(["energy", "knn"])]
        rows = rows[again.columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, again, check_dtype=False)


def test_networks_learned_their_classes(ran: Ran) -> None:
    accuracies = [float(found) / 100 for found in re.findall(r": ([\d.]+)% of new digits", ran.output)]
    for training, shown in zip(demo.TRAININGS, accuracies, strict=True):
        test: Any = feats(ran, training)["test"]
        assert (test.logits.argmax(1) == test.labels).double().mean() == pytest.approx(shown, abs=0.0006)
        assert shown > 0.97
    near = ran.table[(ran.table["ood"] == "unseen") & (ran.table["scorer"] == "mahalanobis")]
    assert (near["auroc"] > 0.9).all()


def test_caches_contain_the_datasets_they_are_named_after(ran: Ran) -> None:
    for training in demo.TRAININGS:
        sets = feats(ran, training)
        known, unknown = (len(digits(classes)[1]) for classes in (demo.ID_CLASSES, demo.UNSEEN_CLASSES))
        assert len(sets["train"]) + len(sets["test"]) == known
        assert len(sets["unseen"]) == unknown
        assert len(sets["photo"]) == len(sets["noise"]) == demo.FAR_IMAGES
        assert [name for name in SETS if sets[name].has("labels")] == ["train", "test"]
        assert (sets["test"].num_features, sets["test"].num_classes) == (64, 7)


def test_demo_prints_the_table(ran: Ran) -> None:
    assert max(map(len, ran.output.splitlines())) <= 100 + len(str(ran.out)) * 2
    (line,) = [line for line in ran.output.splitlines() if line.strip().startswith("gradnorm")]
    rows: Any = ran.table[ran.table["scorer"] == "gradnorm"].set_index(["ood", "model"])
    cells = [100 * rows.loc[(o, t), m] for o in demo.OOD for t in demo.TRAININGS for m in ("auroc", "fpr95_id")]
    assert [float(cell) for cell in line.split()[1:]] == pytest.approx(cells, abs=0.051)


def test_demo_draws_the_figure(ran: Ran) -> None:
    pixels = imread(ran.out / "scores.png")[..., :3]
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels[::9, ::9].reshape(-1, 3), axis=0)) > 100


def test_commands_suggested_by_the_demo_work(ran: Ran) -> None:
    suggested = ran.output.split("Try next")[1].replace("\\\n", " ").strip().splitlines()
    assert len(suggested) == 2
    for line in suggested:
        name, *words = line.split()
        assert name == "ood-scores"
        assert CliRunner().invoke(app, words).exit_code == 0


def test_second_run_of_the_demo_equals_the_first(tmp_path: Path) -> None:
    first, second = (demo.run(tmp_path, seed=1, epochs=1, progress=False) for _ in range(2))
    pd.testing.assert_frame_equal(first.results.table, second.results.table)
    assert first.caches == second.caches


def test_seed_determines_the_images() -> None:
    first, again, other = (demo.image_sets(seed) for seed in (0, 0, 1))
    for name in SETS:
        assert np.array_equal(first[name].images, again[name].images)
        assert np.array_equal(first[name].images, other[name].images) == (name == "unseen")
