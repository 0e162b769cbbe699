"""Registries, and parameters from texts and types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from ood_scores.errors import BadInput, UnknownName
from ood_scores.parameters import check_choices, from_texts, plain_values, require_known
from ood_scores.registry import Registry, did_you_mean, unknown


@pytest.fixture
def animals() -> Registry[Any]:
    return Registry("animal", {"horse": 1, "cat": 2, "cow": 3})


def test_names_are_looked_up_and_listed(animals: Registry[Any]) -> None:
    assert animals["cat"] == 2
    assert "dog" not in animals
    assert animals.get("dog") is None
    assert animals.matching() == ["cat", "cow", "horse"]
    assert animals.matching("c*") == ["cat", "cow"]


def test_unknown_name_suggests_the_closest_one(animals: Registry[Any]) -> None:
    with pytest.raises(UnknownName) as error:
        animals["hoarse"]
    assert str(error.value) == "there is no animal 'hoarse' (did you mean 'horse'?): choose from cat, cow, horse."
    with pytest.raises(UnknownName, match=r"^there is no animal 'x': choose from cat, cow, horse\.$"):
        animals["x"]


def test_unknown_name_has_close_ones_and_the_command_that_lists_all() -> None:
    long = Registry("animal", {"cat": 1, "cow": 2, "horse": 3, "cot": 4}, listing="zoo list")
    with pytest.raises(UnknownName) as error:
        long["coat"]
    assert str(error.value) == "there is no animal 'coat' (did you mean 'cot' or 'cat'?): zoo list shows all."
    with pytest.raises(UnknownName, match=r"^there is no animal 'x': choose from cat, cot, cow, horse\.$"):
        long["x"]


def test_class_is_registered_under_its_name(animals: Registry[Any]) -> None:
    @animals.register("dog")
    class Dog:
        name: str

    assert animals["dog"] is Dog
    assert Dog.name == "dog"


def test_name_belongs_to_one_class(animals: Registry[Any]) -> None:
    def define() -> type:
        class Dog:
            pass

        return Dog

    animals.register("dog")(define())
    again = animals.register("dog")(define())  # as when a module is reloaded
    assert animals["dog"] is again

    class Wolf:
        pass

    with pytest.raises(BadInput, match=r"the animal 'dog' exists already: test_registry\..*define\.<locals>\.Dog\."):
        animals.register("dog")(Wolf)


def test_closest_name() -> None:
    assert did_you_mean("enrgy", ["energy", "msp"]) == " (did you mean 'energy'?)"
    assert did_you_mean("zzz", ["energy", "msp"]) == ""
    assert did_you_mean("MSP", ["energy", "msp"]) == " (did you mean 'msp'?)"
    assert did_you_mean("grad-norm", ["CIFAR10", "gradnorm"]) == " (did you mean 'gradnorm'?)"
    assert did_you_mean("cifar-10", ["CIFAR10", "gradnorm"]) == " (did you mean 'CIFAR10'?)"
    assert str(unknown("x has no", "y", [])) == "x has no 'y': there are none."


@dataclass
class Settings:
    size: int = 3
    share: float = 0.5
    strict: bool = False
    kind: Literal["wide", "deep"] = "wide"
    layers: tuple[str, ...] | None = None


def test_texts_are_converted_to_the_types_of_the_defaults() -> None:
    texts = ["size=4", "share=1", "strict=True", "kind=deep", "layers=('a', 'b')"]
    params = from_texts(Settings, texts, "key=value")
    assert params == {"size": 4, "share": 1.0, "strict": True, "kind": "deep", "layers": ("a", "b")}
    assert from_texts(Settings, ["layers=a"], "key=value") == {"layers": "a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size", "cannot read the parameter 'size': write --param key=value."),
        ("size=x", "size is a value such as 3, got 'x'."),
        ("strict=1", "strict is a value such as false, got '1'."),
    ],
)
def test_invalid_texts(text: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        from_texts(Settings, [text], "--param key=value")
    assert str(error.value) == message


def test_plain_values_have_the_types_that_they_show() -> None:
    texts = ["a=1", "b=0.5", "c=true", "d=None", "e=max", "f=[8, 8]", "g=a=b"]
    expected = {"a": 1, "b": 0.5, "c": True, "d": None, "e": "max", "f": [8, 8], "g": "a=b"}
    assert plain_values(texts, "--model-arg key=value") == expected
    for text in ("a", "=1"):
        with pytest.raises(BadInput, match="write --model-arg key=value"):
            plain_values([text], "--model-arg key=value")


def test_unknown_parameters_are_refused() -> None:
    require_known(Settings, ["size", "kind"], "model 'm'")
    message = r"model 'm' has no setting 'sizes' \(did you mean 'size'\?\): choose from size, share, strict, kind\."
    with pytest.raises(UnknownName, match=message):
        require_known(Settings, ["size", "sizes"], "model 'm'", "setting", exclude=["layers"])


def test_choices_come_from_the_type() -> None:
    check_choices(Settings(kind="deep"), "model")
    with pytest.raises(BadInput, match=r"model: kind must be 'wide' or 'deep', got 'tall'\."):
        check_choices(Settings(kind="tall"), "model")  # type: ignore[arg-type]
