"""Tables replace older ones in one step: a write that the disk refuses leaves the old table."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from ood_scores.cli import app, parsing
from ood_scores.cli.parsing import check_table_path, write_table
from ood_scores.errors import BadInput, CacheWriteFailed

TABLE = pd.DataFrame({"row": [0, 1], "score": [0.5, 0.25]})


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json"])
def test_a_refused_table_leaves_the_old_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / name
    write_table(TABLE, path)
    old = path.read_bytes()
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, refuse)
            with pytest.raises(CacheWriteFailed, match=r"could not write .*No space left on device"):
                write_table(pd.concat([TABLE] * 9), path)
        assert path.read_bytes() == old
        assert [file.name for file in path.parent.iterdir()] == [name]


def test_tables_contain_their_rows(tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet", "a.json"):
        write_table(TABLE, tmp_path / name)
    assert pd.read_parquet(tmp_path / "a.parquet").equals(TABLE)
    assert np.array_equal(pd.read_csv(tmp_path / "a.csv").to_numpy(), TABLE.to_numpy())
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == TABLE.to_dict("records")


HOSTILE = ["=1+1.png", "a\x1b[31m.png", b"\xff.png".decode("utf-8", "surrogateescape"), 'a,"b"\n.png']


def test_tables_contain_hostile_names(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": pd.Series(HOSTILE, dtype=object)})
    for name in ("a.csv", "a.parquet", "a.json"):
        write_table(table, tmp_path / name)
    escaped = ["'=1+1.png", "a\\x1b[31m.png", "\\xff.png", 'a,"b"\n.png']
    assert pd.read_csv(tmp_path / "a.csv")["id"].tolist() == escaped
    assert pd.read_parquet(tmp_path / "a.parquet")["id"].tolist() == [*HOSTILE[:2], "\\udcff.png", HOSTILE[3]]
    assert [row["id"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == HOSTILE


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_table_path(tmp_path / "a.parquet")
    monkeypatch.setattr(parsing, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pyarrow is not installed: pip install pyarrow, or use \.csv"):
        check_table_path(tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"ends in \.csv, \.parquet, or \.json"):
        check_table_path(tmp_path / "a.xlsx")


def test_predict_reads_the_detector_before_it_looks_for_images(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "empty"), "--detector", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "there is no folder" in str(result.exception) + result.output
