"""Checks that a scorer class has the properties that all scorers have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ood_scores.scorers.base import Scorer
from ood_scores.testing.problem import Case
from ood_scores.testing.scorer_properties import PROPERTIES, Property


def check_scorer(cls: type[Scorer], **parameters: Any) -> None:
    """Check that a scorer class has all properties that scorers have, on a small problem.

    What a class cannot have it declares in its ``tags``: ``exceptions`` maps the name of a property to the reason,
    ``small_parameters`` are the parameters to check it with, ``small_extras`` makes the extras that it reads, and
    ``float32_tolerance`` bounds the error that float32 inputs may cause.

    Args:
        cls: the class. Properties of saving and of names are checked only if it is registered.
        **parameters: parameters to check it with, beyond ``tags.small_parameters``.

    Raises:
        AssertionError: if it does not have a property; the message names the scorer, the property, and what was found.
    """
    for _, check in scorer_checks(cls, **parameters):
        check()


def scorer_checks(cls: type[Scorer], **parameters: Any) -> list[tuple[str, Callable[[], None]]]:
    """Return the checks of ``check_scorer`` by the name of the property, to run each as a test of its own.

    Properties that do not apply to the scorer, or that its tags declare as exceptions, are left out::

        @pytest.mark.parametrize(("property", "check"), scorer_checks(MyScorer))
        def test_my_scorer(property, check):
            check()

    Raises:
        AssertionError: if the tags declare an exception to a property that does not exist.
    """
    unknown = cls.tags.exceptions.keys() - PROPERTIES.keys()
    assert not unknown, f"{cls.name}: its tags declare exceptions to {sorted(unknown)}, there are {list(PROPERTIES)}"
    case = Case(cls, {**cls.tags.small_parameters, **parameters})
    return [
        (name, partial(_checked, known, case))
        for name, known in PROPERTIES.items()
        if name not in cls.tags.exceptions and known.applies(case)
    ]


def _checked(known: Property, case: Case) -> None:
    """Run a check; whatever it raises becomes an AssertionError that names scorer and property."""
    try:
        known.check(case)
    except Exception as error:
        found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"scorer {case.cls.name!r}, property {known.check.__name__!r}: {found}") from error
