"""``ood-scores doctor`` shows what is installed, and finds what does not work."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner

from ood_scores.cli import app, doctor


def test_doctor_shows_versions_and_passes() -> None:
    shown = CliRunner().invoke(app, ["doctor", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["tests"] == {"extraction": "", "scores": "", "cache": ""}
    assert found["versions"]["torch"] == version("torch")
    assert found["versions"]["python"] == platform.python_version()
    assert found["devices"]["system"] == platform.platform()
    assert found["devices"]["threads"] == torch.get_num_threads()


def test_doctor_fails_where_a_score_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from ood_scores.scorers.registry import scorer_class

    energy = scorer_class("energy")
    monkeypatch.setattr(energy, "score_block", lambda self, block: -block.logits.double().logsumexp(dim=1))
    monkeypatch.setattr(doctor, "OPTIONAL", {"no_such_package": ("none", "nothing")})
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 1
    assert "✗ scores: the scores of energy differ from their formulas" in shown.output
    assert "✓ cache" in shown.output
    assert 'without no_such_package: nothing (pip install "ood_scores[none]")' in shown.output
