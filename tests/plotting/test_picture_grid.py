"""Grids of pictures show the right picture of every row, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

import ood_scores
from ood_scores.cli import app
from ood_scores.data import sources
from ood_scores.data.images import ImageArrays
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, MissingData
from ood_scores.evaluation.pictures import pictures_of
from ood_scores.evaluation.score_table import score_table
from ood_scores.features import FeatureSet
from ood_scores.plotting.picture_grid import extreme_rows, picture_grid

NAMES = [f"{'cat' if row < 5 else 'dog'}/${row}_=x$.png" for row in range(9)]
SCORES = torch.tensor([5.0, 1, 4, 4, 9, 2, 8, 7, 3])


def color(row: int) -> tuple[int, int, int]:
    return 20 * row, 0, 255 - 20 * row


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for row, name in enumerate(NAMES):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 4), color(row)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def cache(pictures: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 3))
    loader = DataLoader(open_dataset(f"folder:{pictures}", to_tensor), 4)
    ood_scores.extract(model, loader, pictures.parent / f"{pictures.name}.h5", progress=False)
    return pictures.parent / f"{pictures.name}.h5"


def shown(figure: Figure) -> list[tuple[int, int, int] | None]:
    """The colors of the pictures; None for a cell without one."""
    drawn = [axes for axes in figure.axes if axes.get_xlabel()]
    images: list[Any] = [np.asarray(axes.images[0].get_array()) if axes.images else None for axes in drawn]
    return [None if image is None else tuple(image[0, 0].tolist()) for image in images]


def colors(*rows: int) -> list[tuple[int, int, int]]:
    return [color(row) for row in rows]


def test_extreme_rows_keep_the_order_of_ties() -> None:
    assert extreme_rows(SCORES, 5).tolist() == [1, 5, 8, 2, 3]
    assert extreme_rows(SCORES, 3, "id").tolist() == [4, 6, 7]
    assert len(extreme_rows(SCORES, 100)) == 9
    for count, most in ((0, "ood"), (3, "odd")):
        with pytest.raises(BadInput, match="must be"):
            extreme_rows(SCORES, count, most)


def test_a_grid_shows_pictures_scores_and_names(pictures: Path, cache: Path, tmp_path: Path) -> None:
    feats = ood_scores.load(cache)
    figure = picture_grid(feats, SCORES, pictures, count=4, columns=3, title="energy")
    assert shown(figure) == colors(1, 5, 8, 2)
    assert feats.logits is not None
    predicted = feats.logits.argmax(1).tolist()
    assert figure.axes[1].get_xlabel() == f"2\ndog/$5_=x$.png\npredicted {predicted[5]}"
    assert str(figure.get_suptitle()).endswith("with the lowest energy, out of 9")
    figure.savefig(tmp_path / "grid.png")  # dollar signs are no formulas
    assert shown(picture_grid(feats[3:], SCORES[3:], pictures, most="id", count=3)) == colors(4, 6, 7)
    assert shown(picture_grid(feats[[8, 1]], SCORES[[8, 1]], pictures)) == colors(1, 8)


def test_long_names_keep_their_end(pictures: Path) -> None:
    names = ["a" * 12 + "/b/" + "c" * 12 + ".png", "d" * 40, "e\x1b[31m\n"]
    feats = FeatureSet(torch.zeros(3, 2), ids=names)
    data = ImageArrays(np.zeros((3, 2, 2, 3), np.uint8), names=names)
    labels = [axes.get_xlabel() for axes in picture_grid(feats, torch.arange(3.0), data).axes]
    assert labels == ["0\n…/b/cccccccccccc.png", f"1\n{'d' * 7}…{'d' * 15}", "2\ne\\x1b[31m "]


def test_pictures_are_found_by_name(pictures: Path, cache: Path) -> None:
    feats = ood_scores.load(cache)
    for data in (str(pictures), f"folder:{pictures}?rows=::-1", ImageFolder(str(pictures))):
        assert shown(picture_grid(feats, SCORES, data, count=3)) == colors(1, 5, 8)
    assert shown(picture_grid(feats, SCORES, count=3)) == colors(1, 5, 8)  # this process has opened them
    assert shown(picture_grid(feats, SCORES, f"folder:{pictures}?rows=:3", count=3)) == [color(1), None, None]
    with pytest.raises(BadInput, match=r"none of the pictures of the set, such as 'cat/\$0_=x\$.png'"):
        picture_grid(feats, SCORES, pictures / "cat")
    with pytest.raises(MissingData, match="does not record the dataset of its pictures"):
        picture_grid(feats[1:], SCORES[1:])
    with pytest.raises(BadInput, match="columns must be at least 1, got 0"):
        picture_grid(feats, SCORES, pictures, columns=0)


def test_rows_of_the_quick_start_are_looked_up_and_drawn(pictures: Path, tmp_path: Path) -> None:
    data = timm.data.create_dataset("folder", str(pictures), transform=to_tensor)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 3))
    feats = ood_scores.extract(model, DataLoader(data, 4), tmp_path / "timm.h5", progress=False)
    table = score_table(feats, SCORES)
    assert table.columns.tolist() == ["row", "id", "score", "label", "prediction"]
    assert table["id"].tolist() == NAMES
    for each in (str(pictures), data):
        assert shown(picture_grid(feats, SCORES, each, count=3)) == colors(1, 5, 8)
    arguments = ["--data", str(pictures), "--most-ood", "3", "--out", str(tmp_path / "grid.png")]
    assert CliRunner().invoke(app, ["show", str(tmp_path / "timm.h5"), *arguments]).exit_code == 0


def test_pictures_that_only_the_set_names_are_not_opened(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_OPENED", set())
    with pytest.raises(MissingData, match=r"records the pictures 'folder:.*' in the folder '.*name them yourself"):
        picture_grid(ood_scores.load(cache), SCORES)
    done = CliRunner().invoke(app, ["show", str(cache), "--out", str(tmp_path / "a.png")])
    assert done.exit_code == 1
    assert "name them yourself (data=, --data)" in " ".join(done.stderr.split())
    assert not (tmp_path / "a.png").exists()


def test_two_rows_of_one_name_are_told_apart_or_not_shown(pictures: Path) -> None:
    pixels = np.stack([np.full((2, 2, 3), 10 * row, np.uint8) for row in range(4)])
    data = ImageArrays(pixels, names=["a", "b", "a", "c"])
    feats = FeatureSet(torch.zeros(4, 2), ids=["a", "b", "a", "c"])
    assert pictures_of(feats, data).rows.tolist() == [-1, 1, -1, 3]
    assert pictures_of(feats[2:], data).rows.tolist() == [-1, 3]


def test_sets_without_names_are_found_by_number(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((5, 2, 2, 3), np.uint8))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    feats = ood_scores.extract(model, DataLoader(open_dataset(f"npz:{tmp_path}/a.npz", to_tensor), 2), progress=False)
    assert feats.ids is None
    assert pictures_of(feats, f"npz:{tmp_path}/a.npz").rows.tolist() == [0, 1, 2, 3, 4]
    for some, data in ((feats[:3], f"npz:{tmp_path}/a.npz"), (feats, f"npz:{tmp_path}/a.npz?rows=1:")):
        with pytest.raises(BadInput, match="the rows of the set have no names"):
            pictures_of(some, data)


def test_damaged_pictures_are_blank(pictures: Path, cache: Path, tmp_path: Path) -> None:
    for name in NAMES[:2]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"damaged")
    assert shown(picture_grid(ood_scores.load(cache), SCORES, tmp_path, count=2)) == [None, None]


def test_the_command_draws_a_grid(pictures: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    words = ["show", str(cache), "--scorer", "max_logit", "--most-ood", "2", "--out", str(out), "--data", str(pictures)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    assert Image.open(out).size[0] > 300
    for options, message in (
        (("--most-ood", "2", "--most-id", "2"), "cannot be combined"),
        (("--out", "grid.gif"), "use a file name that ends in .png"),
        (("--data", str(pictures / "dog")), "has none of the pictures"),
    ):
        refused = CliRunner().invoke(app, ["show", str(cache), *options])
        assert refused.exit_code == 1
        assert message in " ".join(refused.stderr.split())
