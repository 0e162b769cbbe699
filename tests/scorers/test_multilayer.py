"""mahalanobis_layers against the formulas written out as loops, and the shared behavior of multi-layer scorers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from layered import CLASSES, FAR, ROWS, TEST, TRAIN, WIDTHS, problem, without
from sklearn.linear_model import LogisticRegression

import ood_scores
import ood_scores.probes
from ood_scores import FeatureSet, create_scorer
from ood_scores.errors import BadInput, BadLabels, MissingInput, NotFinite, ShapeMismatch


def layer_score(row: np.ndarray, values: np.ndarray, labels: np.ndarray) -> float:
    """max_c -1/2 d^2 with class means and the pooled covariance of the values."""
    classes = np.unique(labels)
    means = np.stack([values[labels == c].mean(axis=0) for c in classes])
    covariance = np.zeros((values.shape[1], values.shape[1]))
    for c, mean in zip(classes, means, strict=True):
        centered = values[labels == c] - mean
        covariance += centered.T @ centered / len(values)
    inverse = np.linalg.inv(covariance)
    return max(-0.5 * (row - mean) @ inverse @ (row - mean) for mean in means)


def layer_scores(feats: FeatureSet, fit: FeatureSet, names: list[str]) -> np.ndarray:
    assert fit.labels is not None
    labels = fit.labels.numpy()
    columns = []
    for name in names:
        values = fit.extras[f"layers.{name}"].double().numpy()
        rows = feats.extras[f"layers.{name}"].double().numpy()
        columns.append([layer_score(row, values, labels) for row in rows])
    return np.array(columns).T


def scores_left_out(fit: FeatureSet, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of each row and its perturbed copy, from a fit to all other rows."""
    assert fit.labels is not None
    labels = fit.labels.numpy()
    found: dict[str, list[list[float]]] = {"layers": [], "fgsm": []}
    for extra, columns in found.items():
        for name in names:
            values, rows = (fit.extras[f"{of}.{name}"].double().numpy() for of in ("layers", extra))
            columns.append(
                [layer_score(row, np.delete(values, i, 0), np.delete(labels, i)) for i, row in enumerate(rows)]
            )
    return np.array(found["layers"]).T, np.array(found["fgsm"]).T


def test_the_sum_is_that_of_the_layers() -> None:
    found = create_scorer("mahalanobis_layers", combine="sum").fit(TRAIN).score(TEST)
    expected = layer_scores(TEST, TRAIN, list(WIDTHS)).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_one_layer_is_mahalanobis_on_it() -> None:
    def as_features(feats: FeatureSet) -> FeatureSet:
        return FeatureSet(feats.extras["layers.block.1"].double(), feats.logits, feats.labels)

    ours = create_scorer("mahalanobis_layers", layers=["block.1"], combine="sum").fit(TRAIN).score(TEST)
    other = create_scorer("mahalanobis").fit(as_features(TRAIN)).score(as_features(TEST))
    torch.testing.assert_close(ours, other / 2, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("uneven", [False, True])
def test_the_regression_separates_rows_from_perturbed_rows_by_gaussians_without_them(uneven: bool) -> None:
    fit = TRAIN[[*range(20), *range(21, 60, 3)]] if uneven else TRAIN
    names = list(WIDTHS)
    rows, perturbed = scores_left_out(fit, names)
    columns = np.concatenate([rows, perturbed])
    mean, std = columns.mean(axis=0), columns.std(axis=0)
    model = LogisticRegression(tol=1e-10, max_iter=10_000)
    model.fit((columns - mean) / std, np.repeat([1, 0], len(fit)))
    expected = model.decision_function((layer_scores(TEST, fit, names) - mean) / std)
    scorer = create_scorer("mahalanobis_layers").fit(fit)
    np.testing.assert_allclose(scorer.score(TEST), expected, rtol=1e-5)
    assert scorer.layers_ == names  # type: ignore[attr-defined]


@pytest.mark.parametrize("sizes", [[30, 20, 1], [1, 30], [2, 40]])
def test_small_classes_left_out(sizes: list[int]) -> None:
    """If the only row of a class is left out, the fit lacks that class."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    feats = problem(len(labels), classes=len(sizes))
    fit = FeatureSet(feats.features, feats.logits, labels, extras=dict(feats.extras))
    scorer: Any = create_scorer("mahalanobis_layers").fit(fit)
    found = scorer._scores_left_out(fit, torch.tensor(sizes))
    for ours, expected in zip(found, scores_left_out(fit, list(WIDTHS)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-8)


def test_rows_in_the_fit_score_higher() -> None:
    few = TRAIN[:24]
    scorer: Any = create_scorer("mahalanobis_layers").fit(few)
    left_out, _ = scorer._scores_left_out(few, torch.tensor([8, 8, 8]))
    taken_part = layer_scores(few, few, list(WIDTHS))
    assert (left_out.mean(dim=0).numpy() < 1.5 * taken_part.mean(axis=0)).all()


def test_layers_are_chosen_and_remembered() -> None:
    scorer: Any = create_scorer("mahalanobis_layers", layers=["block.1"]).fit(TRAIN)
    assert scorer.layers_ == ["block.1"]
    assert scorer.needs == ("layers.block.1",)
    only = without(TEST, "layers.stem", "fgsm", "gram")
    torch.testing.assert_close(scorer.score(only), scorer.score(TEST))


def test_a_layer_that_does_not_vary_is_refused() -> None:
    class_only = torch.arange(ROWS)[:, None] % CLASSES + torch.tensor([[0.0, 1.0]])
    fit = without(TRAIN, "gram", **{"layers.c": class_only, "fgsm.c": class_only})
    with pytest.raises(BadInput, match="do not vary within any class"):
        create_scorer("mahalanobis_layers").fit(fit)


def test_a_channel_that_does_not_vary_is_left_out() -> None:
    def widened(feats: FeatureSet) -> FeatureSet:
        dead = {
            f"{of}.stem": torch.cat([feats.extras[f"{of}.stem"], torch.zeros(len(feats), 2)], dim=1)
            for of in ("layers", "fgsm")
        }
        return without(feats, "layers.stem", "fgsm.stem", **dead)

    names = ["stem", "block.1"]
    one = create_scorer("mahalanobis_layers", layers=names).fit(TRAIN).score(TEST)
    other = create_scorer("mahalanobis_layers", layers=names).fit(widened(TRAIN)).score(widened(TEST))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_row_that_is_alone_in_a_direction_is_not_in_the_regression() -> None:
    """The other rows do not determine that direction, so they cannot score the row."""
    alone = torch.zeros(ROWS, 1)
    alone[7] = 5.0
    wide = {f"{of}.stem": torch.cat([TRAIN.extras[f"{of}.stem"], alone], dim=1) for of in ("layers", "fgsm")}
    fit = without(TRAIN, "layers.stem", "fgsm.stem", **wide)
    scorer: Any = create_scorer("mahalanobis_layers").fit(fit)
    rows, perturbed = scorer._scores_left_out(fit, torch.tensor([20, 20, 20]))
    assert rows.shape == perturbed.shape == (ROWS - 1, 2)
    assert rows.isfinite().all()


def test_fewer_rows_than_channels() -> None:
    with pytest.raises(BadInput, match="no row can be left out of the covariance of every layer: fit on more rows"):
        create_scorer("mahalanobis_layers").fit(TRAIN[:6])
    assert create_scorer("mahalanobis_layers", combine="sum").fit(TRAIN[:6]).score(TEST).isfinite().all()


def test_scores_are_higher_for_rows_like_the_fit_set() -> None:
    for name in ("mahalanobis_layers", "gram"):
        scorer = create_scorer(name).fit(TRAIN)
        assert scorer.score(TEST).mean() > scorer.score(FAR).mean()


def test_probabilities_that_saturate_keep_their_order() -> None:
    scorer = create_scorer("mahalanobis_layers").fit(TRAIN)
    far = torch.stack([scorer.score(problem(20, seed=2, shift=shift)) for shift in (1e3, 1e4, 1e5)])
    assert (far.diff(dim=0) < 0).all()


def test_no_perturbed_rows() -> None:
    plain = without(TRAIN, "fgsm")
    with pytest.raises(MissingInput, match="'mahalanobis_layers' needs fgsm to be fitted on this feature set"):
        create_scorer("mahalanobis_layers").fit(plain)
    with pytest.raises(MissingInput, match=r"needs fgsm\.block\.1 to be fitted on"):
        create_scorer("mahalanobis_layers").fit(without(TRAIN, "fgsm.block"))
    assert create_scorer("mahalanobis_layers", combine="sum").fit(plain).score(TEST).isfinite().all()


def test_perturbed_rows_of_another_width() -> None:
    with pytest.raises(ShapeMismatch, match=r"the extras fgsm\.\* and layers\.\* differ in width"):
        create_scorer("mahalanobis_layers").fit(without(TRAIN, "fgsm.stem", **{"fgsm.stem": torch.zeros(ROWS, 3)}))


def test_perturbed_rows_that_are_not_finite() -> None:
    values = TRAIN.extras["fgsm.stem"].clone()
    values[17, 2] = torch.nan
    with pytest.raises(NotFinite, match=r"fgsm\.stem hold NaN or infinite values, first in row 17"):
        create_scorer("mahalanobis_layers").fit(without(TRAIN, "fgsm.stem", **{"fgsm.stem": values}))


def test_labels_outside_the_classes() -> None:
    fit = FeatureSet(TRAIN.features, TRAIN.logits, torch.arange(ROWS), extras=dict(TRAIN.extras))
    with pytest.raises(BadLabels, match="class indices must be in 0"):
        create_scorer("mahalanobis_layers").fit(fit)


@pytest.mark.parametrize(("name", "extra"), [("mahalanobis_layers", "layers"), ("gram", "gram")])
class TestLayers:
    def test_a_layer_missing_at_scoring(self, name: str, extra: str) -> None:
        scorer = create_scorer(name).fit(TRAIN)
        with pytest.raises(MissingInput, match=rf"'{name}' needs {extra}\.stem to score this feature set"):
            scorer.score(without(TEST, f"{extra}.stem"))

    def test_a_layer_below_the_one_that_is_missing(self, name: str, extra: str) -> None:
        below = {f"{extra}.stem.0": TEST.extras[f"{extra}.stem"]}
        scorer = create_scorer(name).fit(TRAIN)
        with pytest.raises(MissingInput, match=rf"'{name}' needs {extra}\.stem to score this .* {extra}\.stem\.0"):
            scorer.score(without(TEST, f"{extra}.stem", **below))

    def test_a_layer_missing_in_the_fit_set(self, name: str, extra: str) -> None:
        with pytest.raises(MissingInput, match=rf"needs {extra}\.body to be fitted on .*layers=\('body', 'stem'\)"):
            create_scorer(name, layers=["stem", "body"]).fit(TRAIN)

    def test_an_extra_without_layers(self, name: str, extra: str) -> None:
        fit = without(TRAIN, extra, **{extra: TRAIN.features})
        with pytest.raises(MissingInput, match=f"'{name}' needs {extra} to be fitted on"):
            create_scorer(name).fit(fit)

    def test_another_width_at_scoring(self, name: str, extra: str) -> None:
        narrow = {f"{extra}.stem": TEST.extras[f"{extra}.stem"][..., :-1]}
        scorer = create_scorer(name).fit(TRAIN)
        with pytest.raises(ShapeMismatch, match=rf"{extra}\.stem of shape \[.*4\], here they have \[.*3\]"):
            scorer.score(without(TEST, f"{extra}.stem", **narrow))

    def test_extras_of_another_shape(self, name: str, extra: str) -> None:
        odd = {f"{extra}.stem": torch.zeros(ROWS, 2, 2, 2)}
        with pytest.raises(
            ShapeMismatch,
            match=rf"reads extras of the probe '{extra}', but a row of {extra}\.stem has shape \[2, 2, 2\]",
        ):
            create_scorer(name).fit(without(TRAIN, f"{extra}.stem", **odd))

    @pytest.mark.parametrize("layers", ["stem", []])
    def test_layers_are_a_list_of_names(self, name: str, extra: str, layers: Any) -> None:
        with pytest.raises(BadInput, match="layers must be a list of module names or None"):
            create_scorer(name, layers=layers)

    def test_other_layers_of_the_scored_set_do_not_matter(self, name: str, extra: str) -> None:
        more = {f"{extra}.more": torch.full((20, 3), torch.nan)}
        scorer = create_scorer(name).fit(TRAIN)
        assert scorer.score(without(TEST, "nothing", **more)).equal(scorer.score(TEST))

    def test_a_loaded_scorer_reads_the_same_layers(self, name: str, extra: str, tmp_path: Any) -> None:
        scorer = create_scorer(name).fit(TRAIN)
        scorer.save(tmp_path / "scorer.safetensors")
        again: Any = ood_scores.load_scorer(tmp_path / "scorer.safetensors")
        assert again.needs == scorer.needs
        assert again.layers_ == list(WIDTHS)
        with pytest.raises(MissingInput, match=rf"needs {extra}\.stem"):
            again.score(without(TEST, f"{extra}.stem"))

    def test_two_fits_on_other_layers(self, name: str, extra: str) -> None:
        scorer = create_scorer(name).fit(TRAIN)
        one = without(TRAIN, f"{extra}.stem")
        assert scorer.fit(one).score(TEST).equal(create_scorer(name).fit(one).score(TEST))


def test_combine_is_one_of_two() -> None:
    with pytest.raises(BadInput, match="combine must be 'regression' or 'sum', got 'mean'"):
        create_scorer("mahalanobis_layers", combine="mean")


def test_from_extraction_to_a_table(tmp_path: Any) -> None:
    torch.manual_seed(0)
    stem, body = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 6, 3, stride=2)
    pooled = [torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 3)]
    model = torch.nn.Sequential(stem, torch.nn.ReLU(), body, *pooled)
    images = torch.rand(90, 3, 10, 10)
    batches: dict[str, list[Any]] = {
        "fit": [(images[:60], (images[:60].mean((1, 2, 3)) > 0.5).long())],
        "id": [images[60:]],
        "ood": [torch.randn(30, 3, 10, 10)],
    }
    probes = [ood_scores.probes.GramSums(layers=["0", "2"])]
    sets = {
        name: ood_scores.extract(
            model,
            batches[name],
            tmp_path / f"{name}.h5",
            layers=["0", "2"],
            probes=[*probes, ood_scores.probes.FGSM(layers=["0", "2"])] if name == "fit" else probes,
            progress=False,
        )
        for name in batches
    }
    names = ["mahalanobis_layers", "gram", "msp"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the model is untrained: some classes have no row
        table = ood_scores.evaluate(names, id=sets["id"], ood={"noise": sets["ood"]}, fit=sets["fit"])
    auroc = table.set_index("scorer").auroc
    assert (auroc[["mahalanobis_layers", "gram"]] > 0.9).all()
