"""Checks that a scorer class has the properties that all scorers must have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ood_scores.scorers.base import Scorer
from ood_scores.testing.problem import Case
from ood_scores.testing.scorer_properties import PROPERTIES, Property


def check_scorer(cls: type[Scorer], **parameters: Any) -> None:
    """Check, on a small problem, that a scorer class has all properties that scorers must have.

    The ``tags`` of the class adapt the checks: ``exceptions`` maps the name of a property that it cannot have to the
    reason, ``small_parameters`` are its parameters in the checks, ``small_extras`` creates the extras that it reads,
    and ``float32_tolerance`` bounds the error caused by float32 inputs.

    Args:
        cls: the class. Saving, loading, and creation by name are checked only if it is registered.
        **parameters: its parameters in the checks, in addition to ``tags.small_parameters``.

    Raises:
        AssertionError: if a property is missing; the message names the scorer, the property, and what was found.
    """
    for _, check in scorer_checks(cls, **parameters):
        check()


def scorer_checks(cls: type[Scorer], **parameters: Any) -> list[tuple[str, Callable[[], None]]]:
    """Return the checks of ``check_scorer`` by the name of the property, so that each can be a separate test.

    Properties that do not apply to the scorer, and exceptions declared in its tags, are left out::

        @pytest.mark.parametrize(("property", "check"), scorer_checks(MyScorer))
        def test_my_scorer(property, check):
            check()

    Raises:
        AssertionError: if the tags declare an exception to a property that does not exist.
    """
    unknown = cls.tags.exceptions.keys() - PROPERTIES.keys()
    assert not unknown, (
        f"the tags of {cls.name} except unknown properties {sorted(unknown)}; there are {list(PROPERTIES)}"
    )
    case = Case(cls, {**cls.tags.small_parameters, **parameters})
    return [
        (name, partial(_checked, known, case))
        for name, known in PROPERTIES.items()
        if name not in cls.tags.exceptions and known.applies(case)
    ]


def _checked(known: Property, case: Case) -> None:
    """Run a check, and turn any error into an AssertionError that names the scorer and the property."""
    try:
        known.check(case)
    except Exception as error:
        found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        raise AssertionError(f"scorer {case.cls.name!r}, property {known.check.__name__!r}: {found}") from error
