"""Files with the results of a unit: every changed byte makes them unusable."""

from __future__ import annotations

import random
from pathlib import Path

import h5py
import numpy as np
import torch

from ood_scores.benchmark import unit_files
from ood_scores.benchmark.unit_files import Found, SetScores


def test_changed_or_cut_files_are_not_used(tmp_path: Path) -> None:
    scores = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(9)
    ids = np.array(["a/ü.png", b"\xff.png".decode("utf-8", "surrogateescape"), *[""] * 7])
    of_set = SetScores(scores, numbers % 3, numbers % 2, numbers, numbers * 0, ["set"], ids)
    path = tmp_path / "a.h5"
    facts = unit_files.write(path, "digest", Found("part", "model", 0, ["msp", "energy"], {"id": of_set}))
    content = path.read_bytes()
    chosen = random.Random(0)
    damaged = [content[: len(content) * share // 10] for share in range(10)] + [content[:-1], content + b"0"]
    for place in [chosen.randrange(len(content)) for _ in range(60)]:
        damaged.append(content[:place] + bytes([content[place] ^ (1 << chosen.randrange(8))]) + content[place + 1 :])
    for changed in damaged:
        path.write_bytes(changed)
        assert unit_files.read(path, "digest") is None
    path.write_bytes(content)
    assert unit_files.read(path, "digest") == facts
    scored = unit_files.scored(path, facts)
    assert torch.equal(scored.scores["energy"]["id"], scores[1])
    assert scored.ids["id"].tolist() == ids.tolist()
    table = scored.to_pandas("id")
    assert list(table) == ["set", "row", "id", "label", "prediction", "msp", "energy"]
    assert table["id"].tolist() == ids.tolist()
    assert table["energy"].tolist() == scores[1].tolist()


def test_sets_without_ids_have_empty_ones(tmp_path: Path) -> None:
    numbers = torch.arange(3)
    of_set = SetScores(torch.zeros(0, 3), numbers, numbers, numbers, numbers * 0, ["set"], np.full(3, ""))
    facts = unit_files.write(tmp_path / "a.h5", "digest", Found("part", "model", 0, [], {"id": of_set}))
    with h5py.File(tmp_path / "a.h5") as h5:
        assert "ids" not in h5["sets/0"]  # as earlier versions wrote it
    assert unit_files.scored(tmp_path / "a.h5", facts).ids["id"].tolist() == [""] * 3
