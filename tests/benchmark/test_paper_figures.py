"""The command ``ood-scores paper`` from nothing to tables and figures, at toy size."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny  # noqa: F401  registers the network
import torch
from PIL import Image
from typer.testing import CliRunner

from ood_scores import load
from ood_scores.benchmark import load_results, load_spec
from ood_scores.benchmark.figures import PLOTS
from ood_scores.benchmark.figures.page import file_names
from ood_scores.benchmark.figures.quantities import false_positives
from ood_scores.cli import app
from ood_scores.errors import BadInput, UnknownName
from ood_scores.evaluation.exposure_gradients import exposure_gradients
from ood_scores.evaluation.metrics import auroc
from ood_scores.evaluation.neural_collapse import neural_collapse
from ood_scores.features import FeatureSet

RECIPE = """
epochs = 3
batch_size = 64
[model]
name = "tiny_net"
[data]
train = "digits?classes=0-6&rows=0:240"
[auxiliary]
data = "digits?classes=7-8"
[objective]
name = "rna"
[optimizer]
name = "sgd"
lr = 0.05
"""

SPEC = """
title = "A paper on digits"
fit = "train"
id = "test"
far = ["nines", "noise"]
auxiliary = "sevens"

[extraction]
workers = 0

[sets]
train = "digits?classes=0-6&rows=0:240"
test = "digits?classes=0-6&rows=240:440"
sevens = "digits?classes=7-8"
nines = "digits?classes=9"
noise = "noise:gaussian?n=40&size=8"

[scorers]
RN = { name = "feature_norm" }
MSP = { name = "msp" }

[[part]]
title = "Table 1"
measures = ["representation"]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0]
num_classes = 7

[[part.published]]
source = "Nobody 2024, Table 1"
model = "Net"
metrics = ["auroc"]
ood = ["mean"]
[part.published.values]
RN = [50.0]

[[part.published]]
source = "Nobody 2024, Table 2"
model = "Net"
metrics = ["representation_norm_fit", "representation_norm_auxiliary"]
[part.published.values]
model = [1.0, 2.0]

[[part]]
title = "Figure 1: dynamics"
measures = ["representation", "neural_collapse", "training", "classifier_gradients"]

[part.figure]
plot = "lines"
y = [
    "auroc", "false_positives", "nc1", "training_accuracy", "log.loss_base", "log.loss_rna",
    ["representation_norm_fit", "representation_norm_auxiliary"], ["gradient_ratio_head", "gradient_ratio_tail"],
]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0, 1]
epochs = [1, 3]
num_classes = 7

[[part]]
title = "Figure 2: change"

[part.figure]
plot = "lines"
y = ["auroc"]
scorer = "MSP"
ood = "nines"
change = true

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0, 1]
epochs = [1, 3]
num_classes = 7

[[part]]
title = "Figure 3: collapse and AUROC"
measures = ["neural_collapse"]

[part.figure]
plot = "scatter"
x = "ea_means"
y = "auroc"
edges = [1]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0, 1]
epochs = [1, 3]
num_classes = 7

[[part]]
title = "Figure 4: sweep"

[part.figure]
plot = "lines"
y = ["auroc", "accuracy"]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
sweep = { "objective.weight" = [0.1, 0.5] }
num_classes = 7

[[part]]
title = "Figure 5: bars"

[part.figure]
plot = "comparison"
y = ["fpr95_id", "auroc"]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0]
num_classes = 7

[[part]]
title = "Figure 6: norms"

[part.figure]
plot = "histograms"
scorers = ["RN"]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0]
num_classes = 7

[[part]]
title = "Figure 7: groups"

[part.figure]
plot = "norm_groups"
edges = [0.5, 1.0]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0]
epochs = [1, 3]
num_classes = 7

[[part]]
title = "Figure 8: bins"

[part.figure]
plot = "norm_bins"
bins = 10
scale = 0.5

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0]
num_classes = 7

[[part]]
title = "Figure 9: singular values"

[part.figure]
plot = "singular_values"
first = 10

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0]
num_classes = 7

[[part]]
title = "Figure 11: norms alone"
scorers = []
measures = ["representation"]

[part.figure]
plot = "lines"
y = ["representation_norm_sd"]

[[part.model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0, 1]
epochs = [1, 3]
num_classes = 7

[[part]]
title = "Figure 10: not there"

[part.figure]
plot = "embedding"

[[part.model]]
label = "Gone"
name = "tiny_net"
recipe = "gone"
seeds = [0]
num_classes = 7
"""


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which every command that the first run named was run, and the paper again."""
    folder = tmp_path_factory.mktemp("paper")
    for name, text in {"recipes/tiny.toml": RECIPE, "papers/toy.toml": SPEC}.items():
        path = folder / "benchmarks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ood_scores.benchmark.report.write_report", lambda results, images: [])
        patch.setattr("ood_scores.benchmark.unit.explained", lambda *_: None)  # only reports show it
        first = command("paper", "toy", "--figures", "--quiet")
        assert first.exit_code == 1, first.output
        lines = [line.partition("→")[2].split() for line in first.output.splitlines() if "→ ood-scores train" in line]
        trainings = [line[1:] for line in lines if "gone" not in " ".join(line)]
        assert len(trainings) == 4, first.output
        for training in trainings:
            trained = command(*training, "--quiet", "--device", "cpu")
            assert trained.exit_code == 0, shlex.join(training) + trained.output
        second = command("paper", "toy", "--figures", "--quiet", "--jobs", "1")
        assert second.exit_code == 0, second.output
        (folder / "output.txt").write_text(second.output)
        yield folder


def drawn(paper: Path, start: str) -> pd.DataFrame:
    (path,) = (paper / "runs" / "toy" / "figures").glob(f"{start}_*.csv")
    with Image.open(path.with_suffix(".png")) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert (pixels < 250).mean() > 0.005  # something is drawn
    return pd.read_csv(path)


def features(paper: Path, model: str, name: str) -> FeatureSet:
    (path,) = (paper / "runs" / "toy" / "caches").glob(f"{model}-*/{name}-*.h5")
    return load(path)


SEEDS = (0, 1)
EPOCHS = (1, 3)


def by_epoch(paper: Path, of: Any) -> dict[int, list[float]]:
    """Return a quantity of the caches for each epoch, one value per seed."""
    found: dict[int, list[float]] = {epoch: [] for epoch in EPOCHS}
    for folder in sorted((paper / "runs" / "toy" / "caches").glob("Net_epoch_*")):
        sets = {path.name.rpartition("-")[0]: load(path) for path in folder.glob("*.h5")}
        found[int(folder.name.split("_")[2].partition("-")[0])].append(of(sets))
    return found


def norms(feats: FeatureSet) -> np.ndarray:
    return torch.as_tensor(feats.features[:]).double().norm(dim=1).numpy()


def logits(feats: FeatureSet) -> torch.Tensor:
    assert feats.logits is not None
    return torch.as_tensor(feats.logits[:]).double()


def test_published_tables_are_shown_with_our_numbers(paper: Path) -> None:
    output = (paper / "output.txt").read_text()
    assert "Nobody 2024, Table 1" in output
    results = load_results(paper / "runs" / "toy")
    row = results.comparison.iloc[0]
    sets = {name: features(paper, "Net", name) for name in ("train", "test", "nines", "noise", "sevens")}
    expected = 50 * sum(auroc(norms(sets["test"]), norms(sets[name])) for name in ("nines", "noise"))
    assert row["ours"] == pytest.approx(expected)
    assert f"{expected:.2f} / 50.00" in output
    assert "ours / published" in output
    found = results.comparison[results.comparison["source"] == "Nobody 2024, Table 2"]["ours"].tolist()
    assert found == pytest.approx([norms(sets["train"]).mean(), norms(sets["sevens"]).mean()])
    assert "ood-scores train benchmarks/recipes/gone.toml --set seed=0 --out runs/gone_seed0" in output


def test_dynamics_are_means_and_deviations_over_seeds(paper: Path) -> None:
    table = drawn(paper, "Figure_1").set_index(["panel", "line", "x"])
    assert set(table["n"]) == {2}
    expected = {
        ("AUROC", "Net"): by_epoch(
            paper,
            lambda sets: 50 * sum(auroc(norms(sets["test"]), norms(sets[name])) for name in ("nines", "noise")),
        ),
        ("NC1: variability within classes", "Net"): by_epoch(paper, lambda sets: neural_collapse(sets["train"]).nc1),
        ("norm of training images", "norm of training images, OoD"): by_epoch(
            paper, lambda sets: norms(sets["sevens"]).mean()
        ),
    }
    for (panel, line), values in expected.items():
        for epoch in EPOCHS:
            row: Any = table.loc[(panel, line, epoch), :]
            assert row["mean"] == pytest.approx(np.mean(values[epoch]))
            assert row["sd"] == pytest.approx(np.std(values[epoch], ddof=1))


def test_logged_losses_sum_to_the_loss(paper: Path) -> None:
    table = drawn(paper, "Figure_1").set_index(["panel", "x"])["mean"]
    logs = [pd.read_csv(paper / "runs" / f"tiny_seed{seed}" / "log.csv") for seed in SEEDS]
    for epoch in (1, 2, 3):
        base, rna = (table[(panel, epoch)] for panel in ("loss base, training", "loss rna, training"))
        assert rna < 0
        assert base + 0.5 * rna == pytest.approx(np.mean([log["loss"][epoch - 1] for log in logs]), rel=1e-5)


def test_gradients_of_head_and_tail_are_those_of_the_classes(paper: Path) -> None:
    def tail(sets: dict[str, FeatureSet]) -> float:
        found = exposure_gradients(sets["train"], sets["sevens"])
        return float(found.sort_values("rows", ascending=False, kind="stable")["log_ratio"][-3:].mean())

    table = drawn(paper, "Figure_1").set_index(["line", "x"])["mean"]
    for epoch, values in by_epoch(paper, tail).items():
        assert table["log-ratio of gradients, tail classes", epoch] == pytest.approx(np.mean(values))


def test_measures_are_drawn_without_a_scorer(paper: Path) -> None:
    table: Any = drawn(paper, "Figure_11").set_index("x")
    for epoch, values in by_epoch(paper, lambda sets: norms(sets["test"]).std(ddof=1)).items():
        assert table.loc[epoch, "mean"] == pytest.approx(np.mean(values))


def test_change_starts_at_zero(paper: Path) -> None:
    table: Any = drawn(paper, "Figure_2").set_index("x")

    def score(sets: dict[str, FeatureSet]) -> float:
        id, ood = (logits(sets[name]).softmax(dim=1).amax(dim=1) for name in ("test", "nines"))
        return 100 * auroc(id, ood)

    values = by_epoch(paper, score)
    assert table.loc[1, ["mean", "sd"]].tolist() == [0, 0]
    assert table.loc[3, "mean"] == pytest.approx(np.mean(np.subtract(values[3], values[1])), abs=0.02)


def test_scatter_has_a_point_for_each_seed_and_epoch(paper: Path) -> None:
    table = drawn(paper, "Figure_3")
    assert table[["epoch", "seed"]].to_numpy().tolist() == [[1, 0], [1, 1], [3, 0], [3, 1]]
    assert table["line"].tolist() == ["epochs to 1"] * 2 + ["epochs after 1"] * 2
    angles = by_epoch(paper, lambda sets: neural_collapse(sets["train"]).ea_means)
    assert sorted(table["x"]) == pytest.approx(sorted([*angles[1], *angles[3]]))


def test_sweep_trains_a_network_for_each_value(paper: Path) -> None:
    table = drawn(paper, "Figure_4").set_index(["panel", "x"])["mean"]
    assert (paper / "runs" / "tiny_objective.weight=0.1" / "last.safetensors").is_file()
    for value in (0.1, 0.5):
        sets = [features(paper, f"Net_objective.weight={value}", name) for name in ("test", "nines", "noise")]
        id, *ood = map(norms, sets)
        assert table["AUROC", value] == pytest.approx(50 * sum(auroc(id, each) for each in ood))
        predictions = logits(sets[0]).argmax(dim=1)
        accuracy = (predictions == sets[0].class_labels()).double().mean()
        assert table["ID accuracy", value] == pytest.approx(100 * float(accuracy))


def test_comparison_has_a_bar_for_each_scorer_set_and_mean(paper: Path) -> None:
    table = drawn(paper, "Figure_5").set_index(["panel", "scorer", "ood"])["mean"].sort_index()
    assert len(table) == 2 * 2 * 3
    assert table["AUROC", "RN", "mean"] == pytest.approx(table["AUROC", "RN"][["nines", "noise"]].mean())


def test_histograms_groups_bins_and_singular_values_are_drawn(paper: Path) -> None:
    table = drawn(paper, "Figure_6")
    assert set(table["set"]) == {"id", "nines", "noise"}
    assert table.groupby("set")["height"].max().tolist() == [1, 1, 1]
    moved = drawn(paper, "Figure_7")
    assert moved.groupby("x")["rows"].sum().to_dict() == {1: 200, 3: 200}
    assert (moved[moved["x"] == 1]["total"] == 0).all()
    assert (moved[moved["x"] == 3]["total"] > 0).all()
    bins = drawn(paper, "Figure_8")
    assert bins.groupby("set")["rows"].sum().to_dict() == {"nines": 180, "noise": 40, "test": 200}
    values = drawn(paper, "Figure_9")
    expected = np.linalg.svd(np.asarray(features(paper, "Net", "train").features[:], np.float64))[1] / np.sqrt(240)
    assert values[values["set"] == "train"]["value"].to_numpy() == pytest.approx(expected, rel=1e-5)


def test_page_shows_what_is_drawn_and_what_is_missing(paper: Path) -> None:
    page = (paper / "runs" / "toy" / "figures" / "index.html").read_text()
    pictures = [path.name for path in (paper / "runs" / "toy" / "figures").glob("*.png")]
    assert len(pictures) == 10
    assert all(name in page for name in pictures)
    assert "Not drawn: there is nothing to draw" in page
    assert "ood-scores train benchmarks/recipes/gone.toml --set seed=0 --out runs/gone_seed0" in page


def test_weights_that_a_finished_training_did_not_keep_need_overwrite(paper: Path, tmp_path: Path) -> None:
    spec = tmp_path / "late.toml"
    spec.write_text(
        SPEC.split("[[part]]")[0]
        + """
[[model]]
label = "Net"
name = "tiny_net"
recipe = "tiny"
seeds = [0]
epochs = [2]
num_classes = 7
"""
    )
    (paper / "runs" / "tiny_seed0" / "epoch_002.safetensors").unlink(missing_ok=True)
    result = command("paper", str(spec), "--quiet")
    train = "ood-scores train benchmarks/recipes/tiny.toml --set seed=0 --set checkpoint_every=2 --out runs/tiny_seed0"
    assert f"{train} --overwrite" in result.output


def test_papers_are_listed_and_found(paper: Path) -> None:
    assert command("paper").output == "toy  A paper on digits\n"
    assert "there is no paper 'tou' (did you mean 'toy'?)" in command("paper", "tou").output


def test_figures_whose_titles_make_one_name_have_files_of_their_own() -> None:
    names = file_names(["Figure 1: norms", "Figure 1 (norms)", "figure 1: norms", "Figure 1_norms_2", "Table"])
    assert names == ["Figure_1_norms", "Figure_1_norms_2", "figure_1_norms_3", "Figure_1_norms_2_2", "Table"]


def test_false_positives_are_ood_rows_among_the_highest_scores() -> None:
    assert false_positives(np.array([5.0, 4, 3]), np.array([2.0, 1])) == 0
    assert false_positives(np.array([5.0, 1, 0]), np.array([4.0, 3, 2, -1])) == 2
    assert false_positives(np.array([1.0, 1]), np.array([1.0, 1])) == 1  # half of the four tied rows


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (('plot = "embedding"', 'plot = "embeding"'), UnknownName, "there is no plot 'embeding' (did you mean 'emb"),
        (("first = 10", "last = 10"), UnknownName, "there is no option of singular_values 'last'"),
        (('"nc1"', '"nc11"'), UnknownName, "there is no quantity 'nc11' (did you mean 'nc1'?)"),
        (("edges = [0.5, 1.0]\n", ""), BadInput, "the plot 'norm_groups' needs edges: write edges = …."),
        (("epochs = [1, 3]", "epochs = []"), BadInput, "list at least one epoch"),
        (("epochs = [1, 3]", "epochs = [0, 3]"), BadInput, "epochs are counted from 1"),
        (('auxiliary = "sevens"', 'auxiliary = "seven"'), UnknownName, "there is no dataset 'seven'"),
    ],
)
def test_wrong_figures_are_refused(
    tmp_path: Path, change: tuple[str, str], error: type[Exception], message: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SPEC.replace(*change))
    with pytest.raises(error) as raised:
        load_spec(path)
    assert message in str(raised.value)


def test_every_plot_is_drawn_in_a_test() -> None:
    assert set(PLOTS) - {each for each in PLOTS if f'plot = "{each}"' in SPEC} == set()
