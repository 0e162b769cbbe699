"""Activation shapers against float64 references and pytorch-ood 0.4, composed and at neutral settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_ood import detector as peer
from scipy.special import logsumexp
from scipy.stats import spearmanr
from torch import Tensor, nn

from ood_scores import FeatureSet, Head, Scorer, create_scorer, evaluate, score
from ood_scores.errors import BadInput, MissingInput, NotFinite, NotFitted
from ood_scores.features import Block
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import FeatureMean
from ood_scores.features.statistics.moments import ClassMoments
from ood_scores.features.statistics.row_hashes import RowHashes
from ood_scores.features.statistics.row_samples import Rows, SampledRows, quantiles
from ood_scores.scorers.shapers.base import ShapedSet, Shaper
from ood_scores.scorers.shapers.pruning import largest, ratio

Array = NDArray[Any]
CLASSES, WIDTH = 5, 20
FEATURE_SHAPERS = ["react", "vra", "ash_p", "ash_b", "ash_s", "scale"]
SHAPERS = [*FEATURE_SHAPERS, "dice", "lts"]
LAYER = nn.Linear(WIDTH, CLASSES, dtype=torch.float64)
with torch.no_grad():
    LAYER.weight.copy_(torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7)) / 4)
    LAYER.bias.copy_(torch.linspace(-0.2, 0.2, CLASSES))
HEAD = Head(LAYER.weight, LAYER.bias)
W, B = HEAD.weight.numpy(), HEAD.bias.numpy()


def feature_set(seed: int, rows: int, scale: float = 1.0, relu: bool = True) -> FeatureSet:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    features = scale * (4 * HEAD.weight[labels] + torch.randn(rows, WIDTH, generator=generator).double())
    features = features.relu() if relu else features
    return FeatureSet(features, HEAD(features), labels, HEAD)


FIT, FEATS = feature_set(0, 150), feature_set(1, 40, scale=1.3)
Z, FIT_Z = FEATS.features.numpy(), FIT.features.numpy()


def top(z: Array, count: int) -> Array:
    """Mask of the ``count`` largest values of each row."""
    order = np.argsort(-z, axis=1, kind="stable")
    kept = np.zeros(z.shape, dtype=bool)
    np.put_along_axis(kept, order[:, :count], True, axis=1)
    return kept


def kept(z: Array, percentile: float) -> Array:
    return top(z, z.shape[1] - round(z.shape[1] * percentile))


def head(z: Array) -> Array:
    return z @ W.T + B


def ref_react(z: Array, q: float = 0.9) -> tuple[Array, Array]:
    z = np.minimum(z, np.quantile(FIT_Z, q))
    return z, head(z)


def ref_vra(z: Array, low: float = 0.6, high: float = 0.95, below: str = "zero") -> tuple[Array, Array]:
    axis = None if below == "clip_all" else 0
    lows, highs = np.quantile(FIT_Z, low, axis=axis), np.quantile(FIT_Z, high, axis=axis)
    z = np.where(z < lows, 0 if below == "zero" else lows, np.where(z > highs, highs, z))
    return z, head(z)


def ref_ash_p(z: Array, percentile: float = 0.9) -> tuple[Array, Array]:
    z = z * kept(z, percentile)
    return z, head(z)


def ref_ash_b(z: Array, percentile: float = 0.9) -> tuple[Array, Array]:
    which = kept(z, percentile)
    z = which * (z.sum(axis=1) / which.sum(axis=1))[:, None]
    return z, head(z)


def ref_ash_s(z: Array, percentile: float = 0.9) -> tuple[Array, Array]:
    pruned = z * kept(z, percentile)
    z = pruned * np.exp(z.sum(axis=1) / pruned.sum(axis=1))[:, None]
    return z, head(z)


def ref_scale(z: Array, percentile: float = 0.85) -> tuple[Array, Array]:
    z = z * np.exp(z.sum(axis=1) / (z * kept(z, percentile)).sum(axis=1))[:, None]
    return z, head(z)


def sparse_weight(sparsity: float = 0.9) -> Array:
    contributions = W * FIT_Z.mean(axis=0)
    return W * (contributions > np.percentile(contributions, 100 * sparsity))


def ref_dice(z: Array, sparsity: float = 0.9) -> tuple[Array, Array]:
    return z, z @ sparse_weight(sparsity).T + B


def ref_lts(z: Array, top: float = 0.05) -> tuple[Array, Array]:
    positive = np.maximum(z, 0)
    factor = (positive.sum(axis=1) / (positive * kept(positive, 1 - top)).sum(axis=1)) ** 2
    return z, head(z) * factor[:, None]


REFERENCES: dict[str, Callable[..., tuple[Array, Array]]] = {name: globals()[f"ref_{name}"] for name in SHAPERS}


def shaped(name: str, feats: FeatureSet, **params: Any) -> FeatureSet:
    """The set as shaped by the reference."""
    z, logits = REFERENCES[name](feats.features.numpy(), **params)
    sparse = Head(sparse_weight(**params), B) if name == "dice" else HEAD
    return FeatureSet(z, logits, feats.labels, sparse)


def assert_close(found: Tensor, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected).double(), rtol=rtol, atol=rtol)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in SHAPERS),
    *(("react", {"q": q}) for q in (0.0, 0.5, 0.99, 1.0)),
    ("vra", {"low": 0.1, "high": 0.9, "below": "clip"}),
    ("vra", {"low": 0.1, "high": 0.9, "below": "clip_all"}),
    ("vra", {"low": 0.0, "high": 0.5}),
    *((name, {"percentile": p}) for name in ("ash_p", "ash_b", "ash_s", "scale") for p in (0.0, 0.3, 0.65, 0.95)),
    *(("dice", {"sparsity": p}) for p in (0.1, 0.5, 0.99)),
    *(("lts", {"top": p}) for p in (0.1, 0.5, 1.0)),
]


@pytest.mark.parametrize(("name", "params"), SETTINGS, ids=str)
def test_equals_the_reference(name: str, params: dict[str, Any]) -> None:
    _, logits = REFERENCES[name](Z, **params)
    assert_close(score(name, FEATS, fit=FIT, **params), logsumexp(logits, axis=1))


@pytest.mark.parametrize("name", ["react", "vra", "dice", "lts"])
def test_equals_the_reference_on_features_of_both_signs(name: str) -> None:
    feats = feature_set(1, 40, relu=False)
    _, logits = REFERENCES[name](feats.features.numpy())
    assert_close(score(name, feats, fit=FIT), logsumexp(logits, axis=1))


# --- pytorch-ood 0.4, where higher = out-of-distribution ---


def maps(features: Tensor) -> Tensor:
    """Pooled features as the feature maps that pytorch-ood expects."""
    return features[:, :, None, None]


def on_maps(kind: Any, fit: bool = False, **params: Any) -> Tensor:
    detector = kind(None, lambda z: LAYER(z.flatten(1)), **params)
    if fit:
        detector.fit_feature_maps(maps(FIT.features), FIT.labels)
    return -detector.predict_feature_maps(maps(FEATS.features)).double().detach()


def their_dice(p: float) -> Tensor:
    detector: Any = peer.DICE(None, LAYER.weight, LAYER.bias, p).fit_features(FIT.features, FIT.labels)
    return -detector.predict_features(FEATS.features).double()


def their_lts(p: float) -> Tensor:
    return -peer.LTS(None, LAYER, p=p).predict_features(FEATS.features).double().detach()


PAIRS: list[tuple[str, dict[str, Any], Callable[[], Tensor], float]] = [
    ("react", {}, lambda: on_maps(peer.ReAct, fit=True), 1e-9),
    ("react", {"q": 0.7}, lambda: on_maps(peer.ReAct, fit=True, percentile=0.7), 1e-9),
    # their default is 0.65; OpenOOD's and ours is 0.90
    *(
        (
            f"ash_{kind}",
            {"percentile": p},
            lambda kind=kind, p=p: on_maps(peer.ASH, variant=f"ash-{kind}", percentile=p),
            1e-9,
        )
        for kind in "pbs"
        for p in (0.65, 0.9)
    ),
    # their default is 0.65; the paper's and ours is 0.85
    *(("scale", {"percentile": p}, lambda p=p: on_maps(peer.SCALE, percentile=p), 1e-9) for p in (0.65, 0.85)),
    # they raise low activations to the low quantile of each unit, while the authors, and our default, set them to zero;
    # their thresholds are rounded to float32
    ("vra", {"low": 0.01, "high": 0.99, "below": "clip"}, lambda: on_maps(peer.VRA, fit=True), 1e-6),
    (
        "vra",
        {"low": 0.1, "high": 0.9, "below": "clip"},
        lambda: on_maps(peer.VRA, fit=True, lower_percentile=0.1, upper_percentile=0.9),
        1e-6,
    ),
    # their weights are float32
    *(("dice", {"sparsity": p}, lambda p=p: their_dice(p), 1e-5) for p in (0.5, 0.9)),
    *(("lts", {"top": p}, lambda p=p: their_lts(p), 1e-9) for p in (0.05, 0.2)),
]


@pytest.mark.parametrize(("name", "params", "theirs", "rtol"), PAIRS, ids=[f"{p[0]} {p[1]}" for p in PAIRS])
def test_equals_pytorch_ood(name: str, params: dict[str, Any], theirs: Callable[[], Tensor], rtol: float) -> None:
    rows = torch.ones(len(FEATS), dtype=torch.bool)
    if name == "ash_b":  # if some zeros of a row must be raised, they raise any of them, while we raise the first
        rows = (FEATS.features > 0).sum(dim=1) >= WIDTH - round(WIDTH * params["percentile"])
        assert rows.double().mean() > 0.9
    ours, others = score(name, FEATS, fit=FIT, **params)[rows], theirs()[rows]
    assert_close(ours, others, rtol)
    assert spearmanr(ours, others).statistic > 1 - 1e-9


def test_a_row_of_zeros_is_nan_in_pytorch_ood_and_the_bias_here() -> None:
    zeros = torch.zeros(1, WIDTH, dtype=torch.float64)
    feats, theirs = FeatureSet(zeros, HEAD(zeros), head=HEAD), peer.LTS(None, LAYER).predict_features(zeros)
    assert theirs.isnan().all()
    for name in ("ash_s", "scale", "lts", "ash_b", "ash_p"):
        assert_close(score(name, feats), [logsumexp(B)])


def test_pruning_everything_keeps_one_here() -> None:
    """Where rounding leaves none, pytorch-ood sums over nothing."""
    detector = peer.SCALE(None, lambda z: LAYER(z.flatten(1)), percentile=0.99)
    assert not detector.predict_feature_maps(maps(FEATS.features)).isfinite().any()
    _, logits = ref_scale(Z, percentile=0.95)
    assert_close(score("scale", FEATS, percentile=0.99), logsumexp(logits, axis=1))


# --- composition ---


def test_react_and_gradnorm() -> None:
    """ "RG", by hand."""
    clipped = np.minimum(Z, np.quantile(FIT_Z, 0.9))
    logits = head(clipped)
    softmax = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    expected = np.abs(clipped).sum(axis=1) * np.abs(1 - CLASSES * softmax).sum(axis=1) / CLASSES
    assert_close(score("react", FEATS, fit=FIT, base="gradnorm"), expected)
    assert_close(create_scorer("react", base="gradnorm").fit(FIT).score(FEATS), expected)


BASES: list[tuple[str, dict[str, Any]]] = [
    *((base, {}) for base in ("msp", "max_logit", "entropy", "gradnorm", "scaled_msp", "feature_norm")),
    ("energy", {"temperature": 2.0}),
    ("gradnorm", {"p": 2.0, "target": "predicted"}),
    *((base, {}) for base in ("mahalanobis", "gmm", "prior_msp")),
    ("gmm", {"space": "logits"}),
    ("knn", {"k": 3}),
]


def reads_what_is_shaped(name: str, base: Scorer) -> bool:
    changed = {"dice": {"logits", "head"}, "lts": {"logits"}}.get(name, {"features", "logits"})
    return bool(changed & set(base.needs))


@pytest.mark.parametrize("name", SHAPERS)
@pytest.mark.parametrize(("base", "params"), BASES, ids=str)
def test_any_base_scores_the_shaped_rows(name: str, base: str, params: dict[str, Any]) -> None:
    """A base that must be fitted is fitted on the shaped fit set."""
    inner = create_scorer(base, **params)
    if not reads_what_is_shaped(name, inner):
        with pytest.raises(BadInput, match=f"{name}: it changes .*, which base='{base}' does not read"):
            create_scorer(name, base=inner)
        return
    expected = score(base, shaped(name, FEATS), fit=shaped(name, FIT), **params)
    found = score(name, FEATS, fit=FIT, base=inner)
    assert_close(found, expected, rtol=1e-6)
    if not inner.fit_needs:
        assert_close(found, expected, rtol=1e-9)


def test_nested_shapers_apply_from_the_outside_in() -> None:
    clipped = np.minimum(Z, np.quantile(FIT_Z, 0.9))
    _, logits = ref_ash_s(clipped)
    expected = score("msp", FeatureSet(clipped, logits))
    found = score("react", FEATS, fit=FIT, base=create_scorer("ash_s", base="msp"))
    assert_close(found, expected)
    _, logits = ref_lts(clipped)
    assert_close(score("react", FEATS, fit=FIT, base="lts"), logsumexp(logits, axis=1))


def test_nested_shapers_are_fitted_on_their_own_input() -> None:
    clip = np.quantile(FIT_Z, 0.9)
    clipped = np.minimum(Z, clip)
    contributions = W * np.minimum(FIT_Z, clip).mean(axis=0)
    sparse = W * (contributions > np.percentile(contributions, 90))
    expected = logsumexp(clipped @ sparse.T + B, axis=1)
    assert_close(score("react", FEATS, fit=FIT, base="dice"), expected)
    expected = logsumexp(clipped @ sparse_weight().T + B, axis=1)
    assert_close(score("dice", FEATS, fit=FIT, base="react"), expected)


def test_the_given_base_is_neither_fitted_nor_changed() -> None:
    base = create_scorer("mahalanobis")
    scorer = create_scorer("react", base=base).fit(FIT)
    assert isinstance(scorer, Shaper)
    assert scorer.base is base
    assert not base.is_fitted
    before = copy.deepcopy(base.fit(FIT).score(FEATS))
    create_scorer("react", base=base).fit(FIT[:60])
    assert torch.equal(base.score(FEATS), before)


def test_a_fitted_base_is_fitted_anew() -> None:
    """A base that was fitted on unshaped rows has seen no shaped ones."""
    scorer = create_scorer("ash_s", base=create_scorer("mahalanobis").fit(FIT))
    with pytest.raises(NotFitted, match="'ash_s' is fitted on in-distribution features"):
        scorer.score(FEATS)
    assert_close(
        scorer.fit(FIT).score(FEATS), score("mahalanobis", shaped("ash_s", FEATS), fit=shaped("ash_s", FIT)), 1e-6
    )


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("react", {"q": 1.0}),
        ("vra", {"low": 0.0, "high": 1.0}),
        ("vra", {"low": 0.0, "high": 1.0, "below": "clip"}),
        ("ash_p", {"percentile": 0.0}),
        ("dice", {"sparsity": 0.0}),
        ("lts", {"top": 1.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", ["energy", "gradnorm", "msp"])
def test_neutral_settings_keep_the_score_of_the_base(name: str, params: dict[str, Any], base: str) -> None:
    if name == "lts" and base == "gradnorm":
        base = "max_logit"
    assert_close(score(name, FIT, fit=FIT, base=base, **params), score(base, FIT))


@pytest.mark.parametrize("name", ["ash_s", "scale"])
def test_scaling_without_pruning_multiplies_by_e(name: str) -> None:
    assert_close(score(name, FEATS, percentile=0.0), logsumexp(head(Z * np.e), axis=1))


def test_ash_b_without_pruning_makes_all_activations_equal() -> None:
    level = np.repeat(Z.mean(axis=1, keepdims=True), WIDTH, axis=1)
    assert_close(score("ash_b", FEATS, percentile=0.0), logsumexp(head(level), axis=1))


def test_needs_follow_from_the_base() -> None:
    assert set(create_scorer("react").needs) == {"features", "head"}
    assert set(create_scorer("react").fit_needs) == {"features"}
    assert set(create_scorer("react", base="knn").needs) == {"features"}
    assert set(create_scorer("react", base="prior_msp").fit_needs) == {"features", "head", "labels"}
    assert set(create_scorer("ash_s", base="mahalanobis").fit_needs) == {"features", "labels"}
    assert create_scorer("ash_s").fit_needs == ()
    assert set(create_scorer("dice").needs) == {"features"}
    assert set(create_scorer("dice").fit_needs) == {"features", "head"}
    assert set(create_scorer("lts").needs) == {"features", "logits"}


@pytest.mark.parametrize("name", FEATURE_SHAPERS)
def test_a_missing_head(name: str) -> None:
    scorer = create_scorer(name).fit(FIT)
    with pytest.raises(MissingInput, match=f"'{name}' needs head to score this feature set: pass head=Head"):
        scorer.score(FeatureSet(FEATS.features, FEATS.logits))


def test_a_missing_head_at_fit() -> None:
    bare = FeatureSet(FIT.features, FIT.logits, FIT.labels)
    with pytest.raises(MissingInput, match="'dice' needs head to be fitted on"):
        create_scorer("dice").fit(bare)
    with pytest.raises(MissingInput, match="'react' needs head to be fitted on"):
        create_scorer("react", base="prior_msp").fit(bare)
    with pytest.raises(MissingInput, match="'react' needs labels to be fitted on"):
        create_scorer("react", base="mahalanobis").fit(FeatureSet(FIT.features))


def test_logits_are_not_needed() -> None:
    bare = FeatureSet(FEATS.features, head=HEAD)
    for name in (*FEATURE_SHAPERS, "dice"):
        assert torch.equal(score(name, bare, fit=FIT), score(name, FEATS, fit=FIT))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("react", {"q": 1.1}, r"q must be in \[0, 1\], got 1.1"),
        ("react", {"q": float("nan")}, "q must be in"),
        ("vra", {"low": 0.9, "high": 0.5}, "0 <= low <= high <= 1"),
        ("vra", {"below": "drop"}, "below must be 'zero' or 'clip' or 'clip_all', got 'drop'"),
        ("dice", {"sparsity": 1.0}, "sparsity must be in"),
        ("ash_s", {"percentile": 1.0}, "percentile must be in"),
        ("scale", {"percentile": 85}, "percentile must be in"),
        ("lts", {"top": 0.0}, "top must be in"),
        ("react", {"base": 3}, "scorer must be a registered name or a Scorer object"),
        ("lts", {"base": "react"}, "it changes logits, which base='react' does not read"),
        ("lts", {"base": "scaled_msp"}, "it changes logits, which base='scaled_msp' does not read"),
    ],
)
def test_parameters_out_of_range(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        create_scorer(name, **params)


def test_two_settings_of_a_shaper_in_one_table() -> None:
    table = evaluate(
        [create_scorer("react"), create_scorer("react", base="gradnorm")], id=FEATS, ood={"ood": FIT}, fit=FIT
    )
    assert table["scorer"].tolist() == ["ReAct(base='energy', q=0.9)", "ReAct(base='gradnorm', q=0.9)"]


def test_the_command_line_takes_a_base_by_name() -> None:
    from ood_scores.cli.parsing import parameters

    params = parameters("react", ["base=gradnorm", "q=0.8"])
    assert params == {"base": "gradnorm", "q": 0.8}
    assert_close(score("react", FEATS, fit=FIT, **params), score("react", FEATS, fit=FIT, base="gradnorm", q=0.8))


# --- ties, zeros, and extremes ---


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_of_tied_values_the_first_are_the_largest(rows: list[list[int]], count: int) -> None:
    values = torch.tensor(rows, dtype=torch.float64)
    np.testing.assert_array_equal(largest(values, count / 6).numpy(), top(values.numpy(), count))


def test_the_ratio_is_bounded_and_one_for_rows_without_positive_activations() -> None:
    values = torch.tensor([[0.0, 0, 0, 0], [-1, -2, -3, -4], [1, 1, 1, 1], [5, 0, 0, 0]])
    assert ratio(values, largest(values, 0.25)).flatten().tolist() == [1, 1, 4, 1]


@pytest.mark.parametrize("name", ["ash_p", "ash_b", "ash_s", "scale"])
def test_extreme_rows_stay_finite(name: str) -> None:
    """Float32 has no exp(100), the factor for 200 equal activations of which 1% are kept."""
    features = torch.stack([torch.zeros(200), torch.full((200,), 3.0), -torch.ones(200), 1e-30 * torch.ones(200)])
    feats = FeatureSet(features, head=Head(torch.randn(3, 200, generator=torch.Generator().manual_seed(0))))
    for base in ("energy", "msp", "gradnorm"):
        assert score(name, feats, percentile=0.99, base=base).isfinite().all()


def test_dice_drops_contributions_at_the_threshold() -> None:
    """Four equal contributions, one of which is the median, are all removed, as in the authors' code; sparsity=0 keeps
    all.
    """
    feats = FeatureSet(torch.ones(3, 2), head=Head(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([0.5, 0.0])))
    assert_close(score("dice", feats, fit=feats, base="max_logit", sparsity=0.5), [2.0] * 3)
    assert_close(score("dice", feats, fit=feats, base="max_logit", sparsity=0.0), [3.0] * 3)


def test_vra_sets_low_activations_to_zero_or_to_the_quantile() -> None:
    fit = FeatureSet(torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]))
    rows = FeatureSet(torch.tensor([[0.5], [1.0], [2.5], [9.0]]))
    params: dict[str, Any] = {"low": 0.25, "high": 0.75, "base": "feature_norm"}
    assert_close(score("vra", rows, fit=fit, **params), [0, 1, 2.5, 3])
    assert_close(score("vra", rows, fit=fit, below="clip", **params), [1, 1, 2.5, 3])


def test_vra_clips_at_one_quantile_of_all_activations_as_openood_does() -> None:
    """OpenOOD takes ``np.percentile`` of the flattened activations; pytorch-ood one quantile for each unit."""
    fit = FeatureSet(torch.tensor([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0]]))
    rows = FeatureSet(torch.tensor([[0.0, 20.0], [3.0, 3.0]]))
    params: dict[str, Any] = {"low": 0.2, "high": 0.8, "base": create_scorer("feature_norm", p=1.0)}
    assert_close(score("vra", rows, fit=fit, below="clip_all", **params), [1.0 + 11.0, 3.0 + 3.0])
    assert_close(score("vra", rows, fit=fit, below="clip", **params), [0.4 + 11.6, 1.6 + 10.4])


# --- the statistics ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 150, 1000])
def test_all_rows_are_sampled_if_they_fit(dtype: torch.dtype, rows: int) -> None:
    features = FIT.features.to(dtype)
    found = collect(FeatureSet(features).in_blocks(rows), [SampledRows()])[SampledRows()]
    assert torch.equal(found, features.float() if dtype == torch.float16 else features)
    assert found.data_ptr() != features.data_ptr()


@pytest.mark.parametrize(("values", "numbers"), [(60, [0, 50, 100]), (99, [0, 37, 75, 112]), (1, [0]), (3000, None)])
def test_rows_beyond_the_budget_are_evenly_spaced(values: int, numbers: list[int] | None) -> None:
    statistic = SampledRows(values)
    found = collect(FeatureSet(FIT.features), [statistic])[statistic]
    assert torch.equal(found, FIT.features if numbers is None else FIT.features[numbers])


@pytest.mark.parametrize("shares", [[0.9], [0.0, 1.0], [0.25, 0.6, 0.95]])
def test_quantiles_equal_numpy(shares: list[float]) -> None:
    found = collect(FeatureSet(FIT.features), [SampledRows()])[SampledRows()]
    np.testing.assert_array_equal(quantiles(found, shares).numpy(), np.quantile(FIT_Z, shares, axis=0))
    np.testing.assert_array_equal(quantiles(found.flatten(), shares).numpy(), np.quantile(FIT_Z, shares))


def test_quantiles_of_more_values_than_torch_accepts() -> None:
    values = torch.arange(2**24 + 3, dtype=torch.float32)
    assert float(quantiles(values, [1.0])) == float(values[-1])


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_the_feature_mean(rows: int) -> None:
    found = collect(FeatureSet(FIT.features).in_blocks(rows), [FeatureMean()])[FeatureMean()]
    torch.testing.assert_close(found, FIT.features.mean(dim=0), rtol=1e-13, atol=1e-13)
    constant = FeatureSet(torch.full((50, 3), 1e8 + 0.1, dtype=torch.float64))
    assert (collect(constant.in_blocks(rows), [FeatureMean()])[FeatureMean()] == 1e8 + 0.1).all()


def test_one_pass_serves_all_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    passes, blocks = [], FeatureSet.blocks

    def counted(self: FeatureSet, *args: Any, **kwargs: Any) -> Iterator[Block]:
        passes.append(self)
        return blocks(self, *args, **kwargs)

    fit = feature_set(0, 150)
    monkeypatch.setattr(FeatureSet, "blocks", counted)
    scorers: list[Any] = ["react", create_scorer("react", q=0.8), "vra", "dice", "mahalanobis", "knn"]
    evaluate(scorers, id=FEATS, ood={"ood": FIT}, fit=fit)
    assert sum(feats is fit for feats in passes) == 1
    assert set(fit.statistics) == {SampledRows(), FeatureMean(), ClassMoments(), Rows(True), RowHashes()}
    passes.clear()
    score("mahalanobis", FEATS, fit=feature_set(0, 140))
    assert len(passes) == 2  # the rows of both sets are hashed in the passes that fit and score
    passes.clear()
    create_scorer("react", base="mahalanobis").fit(fit)
    assert sum(feats is fit for feats in passes) == 1  # the shaped rows; the quantiles are known already
    assert ClassMoments() in fit.statistics


# --- the shaped set ---


@pytest.mark.parametrize("name", SHAPERS)
def test_the_shaped_set_is_a_feature_set(name: str) -> None:
    base = "msp" if name in ("dice", "lts") else "gradnorm"
    scorer = create_scorer(name, base=base).fit(FIT)
    assert isinstance(scorer, Shaper)
    view, expected = ShapedSet(FEATS, scorer), shaped(name, FEATS)
    assert (len(view), view.num_features, view.num_classes) == (len(FEATS), WIDTH, CLASSES)
    for one, other in ((view, expected), (view[5:9], expected[5:9]), (view[[3, 1]], expected[[3, 1]])):
        assert_close(one.features, other.features)
        assert one.logits is not None
        assert_close(one.logits, other.logits)
        assert torch.equal(one.class_labels(), other.class_labels())
    assert view.head is not None
    assert_close(view.head.weight, expected.head.weight)  # type: ignore[union-attr]
    view.check_finite()


def test_a_fit_set_that_is_not_finite_is_named_by_its_row() -> None:
    features = FIT.features.clone()
    features[33, 2] = float("nan")
    for name in ("react", "ash_s"):
        with pytest.raises(NotFinite, match="features hold NaN or infinite values, first in row 33"):
            create_scorer(name, base="mahalanobis").fit(FeatureSet(features, labels=FIT.labels, head=HEAD))


def test_a_block_with_parts_replaced() -> None:
    (block,) = FEATS[:4].blocks()
    block.softmax()
    other = block.replaced(logits=2 * block.logits)
    assert torch.equal(other.features, block.features)
    assert_close(other.softmax(), torch.softmax(2 * block.logits, dim=1))
    assert torch.equal(other.labels, block.labels)
    assert other.head is block.head
    for stale in (block.replaced(features=block.features + 1), block.replaced(head=HEAD)):
        with pytest.raises(AttributeError, match="no logits"):
            stale.logits  # noqa: B018
