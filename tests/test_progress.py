"""The progress bar."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from ood_scores import FeatureSet, create_scorer, evaluate, progress
from ood_scores.features import Block
from ood_scores.features.statistics.base import Found, Statistic
from ood_scores.features.statistics.collect import collect
from ood_scores.features.statistics.means import FeatureMean
from ood_scores.progress import ProgressBar, showing_work, stderr_console, tell_cost
from ood_scores.runtime import Cost
from ood_scores.scorers.base import Scorer
from ood_scores.scorers.one_pass import fit_all
from ood_scores.scorers.scorer_runs import fit_each
from ood_scores.terminal import SafeConsole


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_bar_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("digits[rows=0:9] → features", 9, "rows", done=2, keep=True) as bar:
        bar.advance(3)
        bar.describe("loss 0.5", "digits[rows=0:9] → again")
        bar.update(8)
        bar.advance()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "digits[rows=0:9] → again" in shown.err
    assert "9/9 rows" in shown.err
    assert "loss 0.5" in shown.err


def test_a_bar_with_a_long_label_stays_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with ProgressBar("missing → features, resumed after 448 rows", 501, "rows", done=448, keep=True):
        pass
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "resumed after 448 rows ━" in line
    assert "448/501 rows" in line
    with ProgressBar("epoch 4", 192, "steps", done=101, keep=True) as bar:
        bar.describe("loss 0.312  accuracy 98.0%  ‖z‖ 10.87  lr 0.0075  validation 98.0%")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"epoch 4 ━+╸? +101/192 steps 0:00:00 -:--:-- loss 0\.312  .*…$", line)


def test_invisible_bar_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", None, "steps", visible=False, keep=True) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")


def test_line_printed_while_a_bar_is_visible_stands_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(SafeConsole, "is_terminal", True)
    with ProgressBar("training", 3, "steps") as bar:
        assert stderr_console() is bar.console
        with ProgressBar("invisible", 3, "steps", visible=False):
            assert stderr_console() is bar.console
        stderr_console().print("warning: few rows")
    assert stderr_console() is not bar.console
    line = next(line for line in capsys.readouterr().err.split("\n") if "warning" in line)
    assert "training" not in line.rpartition("\x1b[2K")[2]


def test_progress_in_a_file_is_a_line_each_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    with ProgressBar("digits[rows=0:9]", 9000, "rows") as bar, ProgressBar("hidden", 9, "rows", visible=False) as other:
        for second, done in ((59, 1000), (61, 2000), (119, 3000), (122, 4000)):
            now[0] = second
            bar.update(done)
            other.advance()
        bar.describe("loss 0.5")
        now[0] = 200
        bar.advance(5000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", 0:00:00 elapsed")[0] for line in lines] == [
        "digits[rows=0:9]: 2,000 of 9,000 rows",
        "digits[rows=0:9]: 4,000 of 9,000 rows",
        "digits[rows=0:9]: 9,000 of 9,000 rows, loss 0.5",
    ]
    assert all("\x1b" not in line and line.endswith(" left") for line in lines)


def test_bar_of_work_names_what_is_fitted_and_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[object] = []
    monkeypatch.setattr(ProgressBar, "begin", lambda bar, label, total, unit: said.append((label, total, unit)))
    monkeypatch.setattr(ProgressBar, "describe", lambda bar, note, label=None: said.append(note))
    fit = FeatureSet(torch.randn(60, 4), torch.randn(60, 3), torch.arange(60) % 3)
    sets: dict[str, Any] = {
        "id": FeatureSet(torch.randn(20, 4)),
        "ood": {"b": FeatureSet(torch.randn(30, 4))},
        "fit": fit,
    }
    names = ["relative_mahalanobis", "mahalanobis"]
    evaluate(names, **sets)
    assert ("collecting 2 statistics of the fit set", 60, "rows") in said
    assert said.count(("fitting", 2, "scorers")) == 2
    assert [note for note in said if note in names] == names * 3
    assert ("scoring a set", 20, "rows") in said
    said.clear()
    evaluate(["relative_mahalanobis"], **sets, progress=False)
    assert not said


def test_work_that_took_long_or_much_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with showing_work("evaluating"):
        tell_cost("the fit of knn", Cost(9.9, 2**30 - 1))
        tell_cost("the fit of gmm", Cost(42.4, 0))
        tell_cost("the fit of gmm[500]", Cost(42.4, 36 * 2**30 // 10))
    tell_cost("outside", Cost(1000.0))
    with showing_work("evaluating", visible=False):
        tell_cost("hidden", Cost(1000.0))
    assert capsys.readouterr().err.splitlines() == [
        "the fit of gmm took 42 s",
        "the fit of gmm[500] took 42 s and raised the peak memory by 3.6 GB",
    ]


def test_slow_fit_and_score_are_told_with_the_name_of_the_scorer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LONG", 0.0)
    feats = FeatureSet(torch.randn(60, 4), labels=torch.arange(60) % 3)
    with showing_work("fitting"):
        scorer = create_scorer("mahalanobis")
        fit_all([scorer], feats)
        scorer.score(feats)
    assert capsys.readouterr().err.splitlines() == [
        "the fit of mahalanobis took 0 s",
        "scoring 60 rows with mahalanobis took 0 s",
    ]


def test_cost_is_time_and_the_growth_of_the_peak_memory() -> None:
    cost = Cost()
    peaks = iter([100, 130, 130, 130])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ood_scores.runtime._peak_memory", lambda: next(peaks))
        for _ in range(2):
            with cost.measured():
                pass
        with cost.measured(memory=False):
            pass
    assert cost.memory == 30
    assert 0 < cost.seconds < 1
    assert cost + Cost(1.0, 5) == Cost(cost.seconds + 1.0, 35)
    spent: dict[Statistic, Cost] = {}
    collect(FeatureSet(torch.randn(60, 4)), [FeatureMean()], spent)
    assert spent[FeatureMean()].seconds > 0


def test_scorer_that_cannot_be_fitted_does_not_make_the_others_fit_twice() -> None:
    class Counting(Scorer):
        fits = 0
        fit_needs = ("features",)

        def fit_statistics(self, found: Found, feats: FeatureSet) -> None:
            self.fits += 1

        def score_block(self, block: Block) -> torch.Tensor:
            return block.features.double().sum(dim=1)

    feats = FeatureSet(torch.randn(60, 4))
    first, last, spent = Counting(), Counting(), list[Cost]()
    errors = fit_each([first, create_scorer("knn", k=100), create_scorer("energy"), last], feats, spent=spent)
    assert [str(error)[:12] for error in errors] == ["None", "knn: k=100 n", "None", "None"]
    assert (first.fits, last.fits, first.is_fitted, last.is_fitted) == (1, 1, True, True)
    assert len(spent) == 4
