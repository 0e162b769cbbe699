"""The properties that every scorer must have, each with its check."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ood_scores.errors import BadLabels, EmptyInput, MissingInput, NotFinite, NotFitted, ShapeMismatch, UnknownName
from ood_scores.evaluation import evaluate
from ood_scores.features import FeatureSet, Head, load
from ood_scores.scorers.registry import create_scorer, is_registered
from ood_scores.scorers.requirements import FIT_SET, requirements
from ood_scores.scorers.scoring import score
from ood_scores.scorers.storage import load_scorer
from ood_scores.testing.problem import CLASSES, Case, changed, converted, reduced, unusual_torch_state, without

ARRAYS = ("features", "logits")

Check = Callable[[Case], None]


@dataclass(frozen=True)
class Property:
    """A property: its check, which raises AssertionError if it is missing, and whether it applies to a case."""

    check: Check
    applies: Callable[[Case], Any]


PROPERTIES: dict[str, Property] = {}
"""All properties by name, as in ``tags.exceptions`` and in messages."""


def _property(applies: Callable[[Case], Any] = lambda case: True) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        PROPERTIES[check.__name__] = Property(check, applies)
        return check

    return add


def _needs_fit(case: Case) -> bool:
    return bool(case.make().fit_needs)


def _registered(case: Case) -> bool:
    return is_registered(case.cls)


@_property()
def one_finite_float64_per_row(case: Case) -> None:
    for feats in (case.id, case.ood, case.id[:1]):
        scores = case.fitted.score(feats)
        found = (tuple(scores.shape), scores.dtype, scores.device.type, scores.requires_grad)
        assert found == ((len(feats),), torch.float64, "cpu", False), f"shape, dtype, device, requires_grad are {found}"
        assert scores.isfinite().all(), f"row {int((~scores.isfinite()).nonzero()[0])} has a NaN or infinite score"


@_property()
def declares_needs(case: Case) -> None:
    assert case.make().needs, "needs is empty, so it would read nothing"


@_property()
def needs_nothing_undeclared(case: Case) -> None:
    scorer = case.make()
    scorer.fit(reduced(case.train, list(scorer.fit_needs)))
    _close(scorer.score(reduced(case.id, list(scorer.needs))), case.expected, "of sets with only the declared parts")


@_property()
def blocks_and_order_of_scored_rows(case: Case) -> None:
    for rows, order in _blocks_and_orders(len(case.id)):
        _close(case.fitted.score(case.id, block_rows=rows), case.expected, f"in blocks of {rows} rows")
        shuffled = case.fitted.score(case.id[order], block_rows=rows)
        _close(shuffled, case.expected[order], f"of shuffled rows in blocks of {rows}")


@_property()
def blocks_and_order_of_fit_rows(case: Case) -> None:
    for rows, order in _blocks_and_orders(len(case.train)):
        found = case.make().fit(case.train[order], block_rows=rows).score(case.id)
        _close(found, case.expected, f"after a fit on shuffled rows in blocks of {rows}", 1e-7)


@_property()
def row_alone(case: Case) -> None:
    _close(case.fitted.score(case.id[7:8]), case.expected[7:8], "of a row alone and among others")


@_property()
def sets_on_disk(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for feats, file in ((case.train, "train.h5"), (case.id, "id.h5")):
            feats.save(Path(folder) / file)
        scorer, feats = case.make().fit(load(Path(folder) / "train.h5")), load(Path(folder) / "id.h5")
        _equal(scorer.score(feats), case.expected, "of a set on disk")
        part = scorer.score(feats[10:20], block_rows=3)
        _equal(part, case.fitted.score(case.id[10:20], block_rows=3), "of a part of a set on disk")


@_property()
def numpy_arrays(case: Case) -> None:
    train, feats = converted(case.train, Tensor.numpy), converted(case.id, Tensor.numpy)
    _equal(case.make().fit(train).score(feats), case.expected, "of NumPy arrays")


@_property()
def stored_precision(case: Case) -> None:
    """Scores of narrow columns equal those of the same numbers stored as float64."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = [converted(feats, partial(Tensor.to, dtype=dtype)) for feats in (case.train, case.id)]
        wide = [converted(feats, Tensor.double) for feats in narrow]
        found, expected = (case.make().fit(train).score(feats) for train, feats in (narrow, wide))
        _close(found, expected, f"of columns stored as {dtype}", case.cls.tags.float32_tolerance)


@_property(lambda case: torch.cuda.is_available())
def same_on_cuda(case: Case) -> None:
    on_gpu = [converted(feats, Tensor.cuda) for feats in (case.train, case.id)]
    train, feats = (changed(each, labels=each.labels.cuda()) for each in on_gpu if each.labels is not None)
    _close(case.make().fit(train).score(feats), case.expected, "on a GPU", 1e-6)
    _close(case.make().fit(train).score(case.id), case.expected, "on the CPU after a fit on a GPU", 1e-6)
    _close(case.fitted.score(feats), case.expected, "on a GPU after a fit on the CPU", 1e-6)


@_property()
def inputs_unchanged(case: Case) -> None:
    train, feats = (converted(each, Tensor.clone) for each in (case.train, case.id))
    case.make().fit(train).score(feats)
    for before, after in ((case.train, train), (case.id, feats)):
        for column in (*ARRAYS, "labels"):
            assert torch.equal(getattr(before, column), getattr(after, column)), f"it changes the {column} of the set"
    heads = [feats.head for feats in (case.problem(1, seed=0), case.id) if feats.head]
    assert torch.equal(heads[0].weight, heads[1].weight), "it changes the weight of the head"


@_property()
def deterministic(case: Case) -> None:
    _equal(case.make().fit(case.problem(120, seed=0)).score(case.id), case.expected, "after the same fit again")
    _equal(case.fitted.score(case.id), case.expected, "of the same set again")


@_property()
def caller_state_does_not_matter(case: Case) -> None:
    """Fits and scores are the same within the caller's autocast, inference mode, default dtype, and default device."""
    train, feats = (converted(each, Tensor.float) for each in (case.train, case.id))
    expected = case.make().fit(train).score(feats)
    with unusual_torch_state():
        found = case.make().fit(train).score(feats)
    _equal(found, expected, "within the caller's settings of torch")
    assert not found.is_inference(), "the scores are inference tensors"


@_property()
def second_fit_replaces_first(case: Case) -> None:
    twice = case.make().fit(case.train).fit(case.other)
    _equal(twice.score(case.id), case.make().fit(case.other).score(case.id), "after one fit and after two")


@_property()
def parameters_and_repr(case: Case) -> None:
    """The constructor stores parameters as given, a fit does not change them, and the repr creates an equal scorer."""
    scorer = case.make()
    for name, value in case.parameters.items():
        assert getattr(scorer, name) is value, f"{name}={value!r} became {getattr(scorer, name)!r}"
    unfitted = copy.deepcopy(scorer)
    assert unfitted == scorer, "a copy is not equal to the scorer: make it a dataclass"
    scorer.fit(case.train)
    assert scorer == unfitted, "a fitted scorer differs from an unfitted one: declare what the fit sets with fitted()"
    assert repr(scorer) == repr(unfitted), f"the fit changes the repr to {scorer!r}"
    call = repr(scorer).replace(case.cls.__qualname__, case.cls.__name__)
    remade = eval(call, vars(sys.modules[case.cls.__module__]) | {case.cls.__name__: case.cls, "inf": math.inf})
    assert remade == scorer, f"the repr {scorer!r} creates another scorer, {remade!r}"
    _equal(remade.fit(case.train).score(case.id), case.expected, "of a scorer created from its repr")


@_property()
def copies_and_pickles(case: Case) -> None:
    for duplicate in (copy.deepcopy, lambda scorer: pickle.loads(pickle.dumps(scorer))):
        twin = duplicate(case.fitted)
        assert twin.is_fitted, "the copy of a fitted scorer is not fitted"
        _equal(twin.score(case.id), case.expected, "of a copy")
        _equal(duplicate(case.make()).fit(case.train).score(case.id), case.expected, "of a copy that was fitted later")


@_property(_registered)
def saved_and_loaded(case: Case) -> None:
    with _file() as file:
        for scorer in (case.fitted, case.make().fit(case.train).fit(case.other)):
            scorer.save(file)
            again = load_scorer(file)
            assert type(again) is type(scorer)
            assert again == scorer, f"the loaded scorer is {again!r}"
            assert repr(again) == repr(scorer)
            assert again.is_fitted, "the loaded scorer is not fitted"
            _equal(again.score(case.id), scorer.score(case.id), "of the loaded scorer")
            refitted = case.make().fit(case.other).score(case.id)
            _equal(again.fit(case.other).score(case.id), refitted, "of the loaded scorer after another fit")


@_property(_registered)
def saved_as_tensors_and_json(case: Case) -> None:
    with _file() as file:
        case.fitted.save(file)
        content = file.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:stop])
    described = json.loads(header.pop("__metadata__")["scorer"])
    assert described["scorer"]["name"] == case.cls.name
    assert len(content) - stop == max((tensor["data_offsets"][1] for tensor in header.values()), default=0)


@_property(_needs_fit)
def not_saved_before_fit(case: Case) -> None:
    with _file() as file, _raises(NotFitted, f"{case.cls.name!r} cannot be saved before it is fitted"):
        case.make().save(file)
    assert not file.exists(), "a file was written"


@_property(_needs_fit)
def not_scored_before_fit(case: Case) -> None:
    scorer = case.make()
    assert not scorer.is_fitted, "it is fitted before fit is called"
    message = (f"{scorer.name!r} is fitted on in-distribution features", FIT_SET.how_to_get("python"))
    with _raises(NotFitted, *message):
        scorer.score(case.id)
    with _raises(NotFitted, *message):
        evaluate([scorer], id=case.id, ood={"ood": case.ood})


@_property()
def higher_on_id(case: Case) -> None:
    id, ood = float(case.expected.mean()), float(case.fitted.score(case.ood).mean())
    assert id > ood, f"the mean score is {id:.6g} for ID rows and {ood:.6g} for OoD rows"


@_property()
def single_logit(case: Case) -> None:
    two = case.problem(30, seed=3, classes=2)
    assert two.logits is not None
    assert two.head is not None
    weight, bias = (values[1:] - values[:1] for values in (two.head.weight, two.head.bias))
    head = Head(weight, bias, two.head.negatives)
    feats = changed(two, logits=two.logits[:, 1:] - two.logits[:, :1], head=head)
    assert case.make().fit(feats).score(feats).isfinite().all(), "some scores are NaN or infinite"


@_property(_needs_fit)
def class_without_fit_rows(case: Case) -> None:
    assert case.train.labels is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        scores = case.make().fit(case.train[case.train.labels != 3]).score(case.id)
    assert scores.isfinite().all(), "some scores are NaN or infinite"


@_property()
def missing_parts_named(case: Case) -> None:
    """Errors name the missing part and how to get it."""
    for scorer, fitting, call in ((case.fitted, False, case.fitted.score), (case.make(), True, case.make().fit)):
        for need in requirements(scorer, fitting):
            if need.name != "features":
                with _raises(MissingInput, f"{case.cls.name!r} needs {need.name}", need.how_to_get("python")):
                    call(without(case.train, need.name))


@_property()
def empty_sets_refused(case: Case) -> None:
    with _raises(EmptyInput, "no rows"):
        case.fitted.score(case.id[:0])
    if _needs_fit(case):
        with _raises(EmptyInput, "no rows"):
            case.make().fit(case.id[:0])


@_property()
def scored_rows_finite(case: Case) -> None:
    for column in set(ARRAYS) & set(case.fitted.needs):
        for feats in _not_finite(case.id, column):
            with _raises(NotFinite, f"{column} hold NaN or infinite values, first in row 33"):
                case.fitted.score(feats, block_rows=10)


@_property(lambda case: case.make().statistics())
def fit_rows_finite(case: Case) -> None:
    for column in set(ARRAYS) & set(case.make().fit_needs):
        for feats in _not_finite(case.train, column):
            scorer = case.make()
            with _raises(NotFinite, f"{column} hold NaN or infinite values, first in row 33"):
                scorer.fit(feats)
            assert not scorer.is_fitted, "it is fitted after a failed fit"


@_property(lambda case: "labels" in case.make().fit_needs)
def fit_labels_are_classes(case: Case) -> None:
    assert case.train.labels is not None
    for label in (-1, CLASSES):
        labels = case.train.labels.clone()
        labels[5] = label
        with _raises(BadLabels, f"class indices must be in 0 .. {CLASSES - 1}"):
            case.make().fit(changed(case.train, labels=labels))


@_property(_needs_fit)
def scored_labels_do_not_matter(case: Case) -> None:
    for labels in (None, torch.full((50,), 999), torch.full((50,), -1)):
        _equal(case.fitted.score(changed(case.id, labels=labels)), case.expected, "of a set with other labels")


@_property(_needs_fit)
def other_model_refused(case: Case) -> None:
    for column in set(ARRAYS) & set(case.fitted.needs):
        narrow = getattr(case.id, column)[:, :-1]
        parts = {part: getattr(case.id, part) if part in case.fitted.needs else None for part in ("logits", "head")}
        head: Head | None = parts["head"]
        if head:
            parts["head"] = Head(head.weight[:, :-1] if column == "features" else head.weight[:-1])
        with _raises(ShapeMismatch, f"{case.cls.name!r} was fitted on {column} of width"):
            case.fitted.score(changed(case.id, **parts | {column: narrow}))


@_property(_registered)
def by_name(case: Case) -> None:
    made = score(case.cls.name, case.id, case.train, **case.parameters)
    _equal(made, case.expected, "of the scorer given by name")
    _equal(score(case.make(), case.id, case.train), case.expected, "of the scorer given as an object")
    _equal(score(case.fitted, case.id), case.expected, "of the fitted scorer given as an object")


@_property(_registered)
def unknown_parameters_refused(case: Case) -> None:
    known = inspect.signature(case.cls).parameters or ("none",)
    with _raises(UnknownName, f"scorer {case.cls.name!r} has no parameter 'color'", *known):
        create_scorer(case.cls.name, color="red")


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    assert torch.equal(found, expected), (
        f"the scores {what} differ by up to {float((found - expected).abs().max()):.3g}"
    )


def _close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-8) -> None:
    """Check that scores are equal up to a tolerance relative to the largest score."""
    allowed = tolerance * float(expected.abs().max())
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=allowed, msg=lambda details: f"the scores {what} differ: {details}"
    )


@contextmanager
def _raises(error: type[Exception], *parts: str) -> Iterator[None]:
    """Check that an error is raised within this context and that its message contains some parts."""
    try:
        yield
    except error as raised:
        message = str(raised)
    except Exception as raised:
        raise AssertionError(f"{type(raised).__name__} was raised instead of {error.__name__}: {raised}") from raised
    else:
        raise AssertionError(f"{error.__name__} was not raised")
    for part in parts:
        assert part in message, f"the message of {error.__name__} should contain {part!r}, but is {message!r}"


@contextmanager
def _file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "scorer.safetensors"


def _blocks_and_orders(rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield eight block sizes, each with a random order of the rows."""
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 11, 23, rows - 1, rows, rows + 10):
        yield size, torch.randperm(rows, generator=generator)


def _not_finite(feats: FeatureSet, column: str) -> Iterator[FeatureSet]:
    for value in (math.nan, math.inf, -math.inf):
        values = getattr(feats, column).clone()
        values[33, 2] = value
        yield changed(feats, **{column: values})
