"""What every registered scorer must do. A new scorer is found by its name; see the tables below for what it may add."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ood_scores import FeatureSet, Head, Scorer, create_scorer, evaluate, list_scorers, load, load_scorer, score
from ood_scores.errors import BadLabels, EmptyInput, MissingInput, NotFinite, NotFitted, ShapeMismatch, UnknownName
from ood_scores.scorers.registry import scorer_class

PARAMS: dict[str, dict[str, Any]] = {"corp": {"directions": 40}, "knn": {"k": 3}, "openmax": {"tail": 5}}
"""Parameters of scorers whose defaults want more data, or that have none."""

EXTRAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layers.a": lambda features, logits: features[:, :5],
    "layers.b": lambda features, logits: features[:, 2:].square(),
    "fgsm.a": lambda features, logits: 0.6 * features[:, :5],
    "fgsm.b": lambda features, logits: 0.8 * features[:, 2:].square(),
    "gram.a": lambda features, logits: torch.stack([features, features.square()], dim=1),
    "gram.b": lambda features, logits: logits[:, None] * features.sum(dim=1)[:, None, None],
    "odin": lambda features, logits: 1.1 * logits,
    "rankfeat": lambda features, logits: 0.5 * logits,
    "mc_dropout.mean": lambda features, logits: (0.5 * logits).softmax(dim=1),
    "ensemble.mean": lambda features, logits: (0.7 * logits).softmax(dim=1),
    "gradnorm.all": lambda features, logits: features.sum(dim=1),
    "norms.a": lambda features, logits: features.square().mean(dim=1),
    "gradients.inputs": lambda features, logits: features + 0.1,
    "gradients.noise": lambda features, logits: 0.3 * features.flip(1) + 0.1,
}
"""How to make an extra that a scorer reads from features and logits."""

NOT_HIGHER_ON_ID: dict[str, str] = {
    "residual": "small rows have small residuals, and the OoD rows here are the small ones",
}
"""Scorers that need not score the easy problem's ID rows higher, and why."""

NOT_FOR_ONE_CLASS: dict[str, str] = {
    "fdbd": "a single class has no decision boundary",
    "margin": "a single class has no second largest logit",
    "ora": "a single class has no decision boundary",
}
"""Scorers that are not defined for a model with a single class, and why."""

COARSE: dict[str, float] = {"weiper": 1e-3}
"""Scorers that count float32 numbers in bins, of which one may lie on the edge of two, and how far that takes them."""

NAMES = [name for name in list_scorers() if scorer_class(name).__module__.startswith("ood_scores.")]
COLUMNS = ("features", "logits")
CLASSES, WIDTH = 4, 8


def problem(
    rows: int, seed: int, ood: bool = False, dtype: torch.dtype = torch.float64, classes: int = CLASSES
) -> FeatureSet:
    """An easy problem after a ReLU: ID rows are large and near their class mean; OoD rows are small and anywhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    noise = torch.randn(rows, WIDTH, generator=generator)
    means = 1.5 + 3 * torch.eye(classes, WIDTH)
    features = (0.4 * noise if ood else means[labels] + 0.4 * noise).relu().to(dtype)
    head = Head((means - means.mean(dim=1, keepdim=True)).to(dtype), torch.full((classes,), 0.1, dtype=dtype))
    logits = head(features)
    extras = {name: make(features, logits) for name, make in EXTRAS.items()}
    return FeatureSet(features, logits, labels, head, extras)


TRAIN, ID, OOD = problem(120, seed=0), problem(50, seed=1), problem(50, seed=2, ood=True)


def make(name: str) -> Scorer:
    return create_scorer(name, **PARAMS.get(name, {}))


def those(kind: Callable[[Scorer], Any]) -> pytest.MarkDecorator:
    """Runs a test for the scorers of a kind."""
    return pytest.mark.parametrize("name", [name for name in NAMES if kind(make(name))])


every_scorer = those(lambda scorer: True)
fitted_scorer = those(lambda scorer: scorer.fit_needs)


@cache
def fitted(name: str) -> Scorer:
    """Fitted on TRAIN; shared by tests that only score with it."""
    return make(name).fit(TRAIN)


def change(feats: FeatureSet, **changes: Any) -> FeatureSet:
    """The same set with some parts replaced."""
    parts = {"features": feats.features, "logits": feats.logits, "labels": feats.labels, "head": feats.head}
    return FeatureSet(**(parts | {"extras": dict(feats.extras)} | changes))


def cast(feats: FeatureSet, convert: Callable[[Tensor], Any]) -> FeatureSet:
    """The same set with its floating-point columns converted."""
    assert feats.logits is not None
    extras = {name: convert(values) for name, values in feats.extras.items()}
    return change(feats, features=convert(feats.features), logits=convert(feats.logits), extras=extras)


def assert_close(found: Tensor, expected: Tensor, rtol: float = 1e-8) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@every_scorer
def test_gives_one_finite_float64_for_each_row(name: str) -> None:
    for feats in (ID, OOD, ID[:1]):
        scores = fitted(name).score(feats)
        assert scores.shape == (len(feats),)
        assert scores.dtype == torch.float64
        assert scores.device.type == "cpu"
        assert not scores.requires_grad
        assert scores.isfinite().all()


@every_scorer
def test_is_described_and_declares_what_it_reads(name: str) -> None:
    scorer = make(name)
    assert scorer.name == name
    text = inspect.getdoc(type(scorer)) or ""
    assert all(part in text for part in ("Source:", "Cost:", "Fails")), "where it comes from, costs and fails"
    assert all(f"{parameter}: " in text for parameter in inspect.signature(type(scorer)).parameters)
    assert scorer.needs


@every_scorer
@given(rows=st.integers(1, 60), order=st.permutations(range(50)))
@settings(max_examples=8, deadline=None)
def test_block_size_and_row_order_do_not_matter(name: str, rows: int, order: list[int]) -> None:
    expected = fitted(name).score(ID)
    assert_close(fitted(name).score(ID, block_rows=rows), expected)
    assert_close(fitted(name).score(ID[order], block_rows=rows), expected[order])


@every_scorer
@given(rows=st.integers(1, 130), order=st.permutations(range(120)))
@settings(max_examples=8, deadline=None)
def test_blocks_and_order_of_the_fit_set_do_not_matter(name: str, rows: int, order: list[int]) -> None:
    found = make(name).fit(TRAIN[order], block_rows=rows).score(ID)
    assert_close(found, fitted(name).score(ID), rtol=1e-7)


@every_scorer
def test_disk_is_memory(name: str, tmp_path: Path) -> None:
    for feats, file in ((TRAIN, "train.h5"), (ID, "id.h5")):
        feats.save(tmp_path / file)
    on_disk = make(name).fit(load(tmp_path / "train.h5"))
    assert torch.equal(on_disk.score(load(tmp_path / "id.h5")), fitted(name).score(ID))
    assert torch.equal(
        on_disk.score(load(tmp_path / "id.h5")[10:20], block_rows=3), on_disk.score(ID[10:20], block_rows=3)
    )


@every_scorer
def test_numpy_is_torch(name: str) -> None:
    train, feats = cast(TRAIN, Tensor.numpy), cast(ID, Tensor.numpy)
    assert torch.equal(make(name).fit(train).score(feats), fitted(name).score(ID))


@every_scorer
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float16, 1e-4), (torch.bfloat16, 1e-4)])
def test_precision_of_the_storage(name: str, dtype: torch.dtype, rtol: float) -> None:
    """Narrow columns are widened, not computed with: as if the same numbers had been stored as float64."""
    narrow, wide = [], []
    for feats in (TRAIN, ID):
        narrow.append(cast(feats, lambda values: values.to(dtype)))
        wide.append(cast(narrow[-1], Tensor.double))
    found, expected = make(name).fit(narrow[0]).score(narrow[1]), make(name).fit(wide[0]).score(wide[1])
    assert_close(found, expected, max(rtol, COARSE.get(name, 0)))


@every_scorer
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_does_not_matter(name: str) -> None:
    train, feats = (change(cast(feats, Tensor.cuda), labels=feats.labels.cuda()) for feats in (TRAIN, ID))  # type: ignore[union-attr]
    expected = fitted(name).score(ID)
    assert_close(make(name).fit(train).score(feats), expected, rtol=1e-6)
    assert_close(make(name).fit(train).score(ID), expected, rtol=1e-6)
    assert_close(fitted(name).score(feats), expected, rtol=1e-6)


@every_scorer
def test_leaves_its_inputs_alone(name: str) -> None:
    train, feats = (cast(feats, Tensor.clone) for feats in (TRAIN, ID))
    make(name).fit(train).score(feats)
    for before, after in ((TRAIN, train), (ID, feats)):
        for column in ("features", "logits", "labels"):
            assert torch.equal(getattr(before, column), getattr(after, column))
    assert torch.equal(ID.head.weight, problem(1, seed=0).head.weight)  # type: ignore[union-attr]


@every_scorer
def test_is_deterministic(name: str) -> None:
    again = problem(120, seed=0)
    assert torch.equal(make(name).fit(again).score(ID), fitted(name).score(ID))
    assert torch.equal(fitted(name).score(ID), fitted(name).score(ID))


@every_scorer
def test_a_refit_replaces_the_first_fit(name: str) -> None:
    other = problem(40, seed=5)
    twice = make(name).fit(TRAIN).fit(other)
    assert torch.equal(twice.score(ID), make(name).fit(other).score(ID))


@every_scorer
def test_is_its_parameters(name: str) -> None:
    """The constructor stores parameters as given, a fit leaves them alone, and the repr makes the scorer again."""
    scorer = make(name)
    names = {type(scorer).__name__: type(scorer), "inf": math.inf}
    unfitted = copy.deepcopy(scorer)
    for param, value in PARAMS.get(name, {}).items():
        assert getattr(scorer, param) is value
    scorer.fit(TRAIN)
    assert scorer == unfitted
    assert repr(scorer) == repr(unfitted)
    remade = eval(repr(scorer), names)
    assert remade == scorer
    assert torch.equal(remade.fit(TRAIN).score(ID), scorer.score(ID))


@every_scorer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))])
def test_copies_and_pickles(name: str, duplicate: Callable[[Scorer], Scorer]) -> None:
    twin = duplicate(fitted(name))
    assert twin.is_fitted
    assert torch.equal(twin.score(ID), fitted(name).score(ID))
    assert torch.equal(duplicate(make(name)).fit(TRAIN).score(ID), fitted(name).score(ID))


@every_scorer
def test_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    file = tmp_path / "scorer.safetensors"
    other = problem(40, seed=5)
    for scorer in (fitted(name), make(name).fit(TRAIN).fit(other)):
        scorer.save(file)
        again = load_scorer(file)
        assert type(again) is type(scorer)
        assert again == scorer
        assert repr(again) == repr(scorer)
        assert again.is_fitted
        assert torch.equal(again.score(ID), scorer.score(ID))
        assert torch.equal(again.fit(other).score(ID), make(name).fit(other).score(ID))


@every_scorer
def test_a_saved_file_is_tensors_and_json(name: str, tmp_path: Path) -> None:
    file = tmp_path / "scorer.safetensors"
    fitted(name).save(file)
    content = file.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    described = json.loads(header.pop("__metadata__")["scorer"])
    assert described["scorer"]["name"] == name
    assert len(content) - stop == max((tensor["data_offsets"][1] for tensor in header.values()), default=0)


@fitted_scorer
def test_is_not_saved_before_it_is_fitted(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotFitted, match=f"'{name}' has nothing to save before it is fitted"):
        make(name).save(tmp_path / "scorer.safetensors")
    assert not list(tmp_path.iterdir())


@every_scorer
def test_a_row_scores_alone_as_among_others(name: str) -> None:
    assert_close(fitted(name).score(ID[7:8]), fitted(name).score(ID)[7:8])


@every_scorer
def test_is_higher_in_distribution(name: str) -> None:
    if name in NOT_HIGHER_ON_ID:
        pytest.skip(NOT_HIGHER_ON_ID[name])
    assert fitted(name).score(ID).mean() > fitted(name).score(OOD).mean()


@every_scorer
def test_a_model_with_a_single_class(name: str) -> None:
    if name in NOT_FOR_ONE_CLASS:
        pytest.skip(NOT_FOR_ONE_CLASS[name])
    feats = problem(30, seed=3, classes=1)
    assert make(name).fit(feats).score(feats).isfinite().all()


@fitted_scorer
def test_unfitted(name: str) -> None:
    scorer = make(name)
    message = f"'{name}' is fitted on in-distribution features: pass fit=train_feats, or call .fit"
    assert not scorer.is_fitted
    with pytest.raises(NotFitted, match=message):
        scorer.score(ID)
    with pytest.raises(NotFitted, match=message):
        evaluate([scorer], id=ID, ood={"ood": OOD})


def stands_for(name: str, extra: str) -> bool:
    """Whether a need is met by an extra: by the one of its name, or those below it."""
    return extra == name or extra.startswith(f"{name}.")


def missing(names: Any) -> Iterator[tuple[FeatureSet, str]]:
    """ID without each of the parts, and the message that is due."""
    how = {
        "logits": "logits.*: pass logits=.* to FeatureSet, for instance head",
        "head": "head.*: pass head=Head",
        "labels": "labels.*: extract from a loader that yields",
    }
    for name in names:
        if name in how:
            yield change(TRAIN, **{name: None}), how[name]
        elif name != "features":
            kept = {extra: values for extra, values in TRAIN.extras.items() if not stands_for(name, extra)}
            yield change(TRAIN, extras=kept), f"{name}.*: (extract it with extract\\(|score a list)"


@every_scorer
def test_says_what_is_missing_and_where_to_get_it(name: str) -> None:
    for feats, message in missing(fitted(name).needs):
        with pytest.raises(MissingInput, match=f"'{name}' needs {message}"):
            fitted(name).score(feats)
    for feats, message in missing(fitted(name).fit_needs):
        with pytest.raises(MissingInput, match=f"'{name}' needs {message}"):
            make(name).fit(feats)


@every_scorer
def test_needs_nothing_it_does_not_declare(name: str) -> None:
    def only(feats: FeatureSet, names: Any) -> FeatureSet:
        parts = {part: getattr(feats, part) if part in names else None for part in ("logits", "labels", "head")}
        features = feats.features if "features" in names else torch.zeros_like(feats.features)
        kept = {extra: values for extra, values in feats.extras.items() if any(stands_for(n, extra) for n in names)}
        return change(feats, features=features, extras=kept, **parts)

    scorer = make(name)
    bare = scorer.fit(only(TRAIN, scorer.fit_needs)).score(only(ID, scorer.needs))
    assert_close(bare, fitted(name).score(ID))


@every_scorer
def test_an_empty_set(name: str) -> None:
    empty = ID[:0]
    with pytest.raises(EmptyInput, match="no rows"):
        fitted(name).score(empty)
    if make(name).fit_needs:
        with pytest.raises(EmptyInput, match="no rows"):
            make(name).fit(empty)


@every_scorer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_names_the_row_that_is_not_finite(name: str, value: float) -> None:
    for column in set(COLUMNS) & set(fitted(name).needs):
        values = getattr(ID, column).clone()
        values[33, 2] = value
        with pytest.raises(NotFinite, match=f"{column} hold NaN or infinite values, first in row 33"):
            fitted(name).score(change(ID, **{column: values}), block_rows=10)


@those(lambda scorer: scorer.statistics())
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_is_not_fitted_on_what_is_not_finite(name: str, value: float) -> None:
    for column in set(COLUMNS) & set(make(name).fit_needs):
        values = getattr(TRAIN, column).clone()
        values[33, 2] = value
        scorer = make(name)
        with pytest.raises(NotFinite, match=f"{column} hold NaN or infinite values, first in row 33"):
            scorer.fit(change(TRAIN, **{column: values}))
        assert not scorer.is_fitted


@those(lambda scorer: "labels" in scorer.fit_needs)
@pytest.mark.parametrize("label", [-1, CLASSES])
def test_is_not_fitted_on_labels_of_other_classes(name: str, label: int) -> None:
    assert TRAIN.labels is not None
    labels = TRAIN.labels.clone()
    labels[5] = label
    with pytest.raises(BadLabels, match=rf"class indices must be in 0 \.\. {CLASSES - 1}"):
        make(name).fit(change(TRAIN, labels=labels))


@fitted_scorer
def test_labels_of_the_scored_set_do_not_matter(name: str) -> None:
    for labels in (None, torch.full((50,), 999), torch.full((50,), -1)):
        assert torch.equal(fitted(name).score(change(ID, labels=labels)), fitted(name).score(ID))


@fitted_scorer
def test_a_set_of_another_model_is_refused(name: str) -> None:
    for column in COLUMNS:
        if column in fitted(name).needs:
            parts = {part: getattr(ID, part) if part in fitted(name).needs else None for part in ("logits", "head")}
            parts[column] = getattr(ID, column)[:, :-1]
            if parts["head"]:
                narrow = parts["head"].weight[:, :-1] if column == "features" else parts["head"].weight[:-1]
                parts["head"] = Head(narrow)
            with pytest.raises(ShapeMismatch, match=f"'{name}' was fitted on {column} of width"):
                fitted(name).score(change(ID, **parts))


@fitted_scorer
def test_a_class_without_rows_in_the_fit_set(name: str) -> None:
    assert TRAIN.labels is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert make(name).fit(TRAIN[TRAIN.labels != 3]).score(ID).isfinite().all()


@every_scorer
def test_by_name_is_by_object(name: str) -> None:
    params = PARAMS.get(name, {})
    assert torch.equal(score(name, ID, fit=TRAIN, **params), fitted(name).score(ID))
    assert torch.equal(score(make(name), ID, fit=TRAIN), fitted(name).score(ID))
    assert torch.equal(score(fitted(name), ID), fitted(name).score(ID))


@every_scorer
def test_an_unknown_parameter(name: str) -> None:
    known = ", ".join(inspect.signature(scorer_class(name)).parameters) or "none"
    with pytest.raises(UnknownName, match=f"scorer '{name}' has no parameter 'colour'; it has: {known}"):
        create_scorer(name, colour="red")


def test_the_tables_name_registered_scorers() -> None:
    for table in (PARAMS, NOT_HIGHER_ON_ID, NOT_FOR_ONE_CLASS):
        assert set(table) <= set(NAMES)


def test_the_problem_is_what_it_says() -> None:
    assert ID.logits is not None
    assert ID.labels is not None
    assert (ID.logits.argmax(dim=1) == ID.labels).all()
    assert np.linalg.norm(OOD.features, axis=1).max() < np.linalg.norm(ID.features, axis=1).min()
