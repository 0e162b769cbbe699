"""Every registered scorer has the properties that ``ood_scores.testing`` checks; tags list the exceptions."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from ood_scores import list_scorers
from ood_scores.scorers.registry import scorer_class
from ood_scores.testing import scorer_checks

SCORERS = [scorer_class(name) for name in list_scorers() if scorer_class(name).__module__.startswith("ood_scores.")]
CHECKS = [
    pytest.param(check, id=f"{scorer.name}-{name}") for scorer in SCORERS for name, check in scorer_checks(scorer)
]


@pytest.mark.parametrize("check", CHECKS)
def test_scorer(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.name)
def test_is_documented(scorer: type) -> None:
    text = inspect.getdoc(scorer) or ""
    assert all(part in text for part in ("Source:", "Cost:", "Fails")), "source, cost, and failure cases"
    assert all(f"{parameter}: " in text for parameter in inspect.signature(scorer).parameters)
