"""The commands calibrate and predict, compared with the functions that they call."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from detecting import extracted, network, same
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

import ood_scores
from ood_scores import Detector, calibrate
from ood_scores.cli import app
from ood_scores.cli.predict import image_files
from ood_scores.errors import MissingData
from ood_scores.extraction.options import ExtractionOptions
from ood_scores.models.opening import load_model
from ood_scores.probes import ODIN

NAMES = ["ant", "bee", "cow", "dog"]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "80"})


def refused(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("error: ")
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, caches, images, one of which cannot be read, and a detector."""
    folder = tmp_path_factory.mktemp("cli")
    model = network()
    save_file(model.state_dict(), folder / "weights.safetensors")
    for name, seed in (("fit", 1), ("id", 2)):
        extracted(model, 200, seed).save(folder / f"{name}.h5")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    rng = np.random.default_rng(0)
    (folder / "photos" / "below").mkdir(parents=True)
    for number in range(30):
        place = folder / "photos" / ("below" if number % 3 else ".") / f"{number:02}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place)
    (folder / "photos" / "notes.txt").write_text("no image")
    (folder / "broken").mkdir()
    (folder / "broken" / "cut.png").write_bytes(b"\x89PNG no more")
    words = ("tiny_net", "--checkpoint", folder / "weights.safetensors", "--scorer", "mahalanobis")
    data = ("--fit", folder / "fit.h5", "--id", folder / "id.h5", "--classes", folder / "names.txt")
    result = call("calibrate", *words, *data, "--keep", "0.9", "--out", folder / "detector")
    assert result.exit_code == 0, result.output
    assert "a detector in" in result.output
    assert "mahalanobis (one forward pass)" in result.output
    assert "at least 90.05% of ID rows are kept on average" in " ".join(result.output.split())
    return folder


def expected_detector(home: Path) -> Detector:
    fit, id = (ood_scores.load(home / f"{name}.h5") for name in ("fit", "id"))
    model = load_model("tiny_net", home / "weights.safetensors")
    return calibrate("mahalanobis", model, fit=fit, id=id, keep=0.9, classes=NAMES)


def test_calibrate_keeps_a_detector_unless_told_to_replace_it(home: Path, tmp_path: Path) -> None:
    words = ("calibrate", "tiny_net", "--checkpoint", home / "weights.safetensors", "--id", home / "id.h5")
    assert call(*words, "--out", tmp_path / "detector").exit_code == 0
    before = (tmp_path / "detector" / "detector.json").read_bytes()
    message = refused(*words, "--keep", "0.5", "--out", tmp_path / "detector")
    assert "pass --overwrite to replace it" in " ".join(message.split())
    assert (tmp_path / "detector" / "detector.json").read_bytes() == before
    assert call(*words, "--keep", "0.5", "--out", tmp_path / "detector", "--overwrite").exit_code == 0
    assert (tmp_path / "detector" / "detector.json").read_bytes() != before


def test_calibrate_saves_the_detector_of_the_function(home: Path) -> None:
    files = image_files([str(home / "photos")])
    assert same(Detector.load(home / "detector").predict(files), expected_detector(home).predict(files))


def test_calibrate_reads_caches_and_lists_of_any_name(home: Path, tmp_path: Path) -> None:
    (tmp_path / "id.cache").write_bytes((home / "id.h5").read_bytes())
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8-sig")
    words = ("calibrate", "tiny_net", "--checkpoint", home / "weights.safetensors", "--id", tmp_path / "id.cache")
    result = call(*words, "--classes", tmp_path / "names.txt", "--out", tmp_path / "detector")
    assert result.exit_code == 0, result.output
    assert Detector.load(tmp_path / "detector").classes == tuple(NAMES)
    (tmp_path / "names.txt").write_text("\n".join(NAMES), encoding="utf-16")
    message = refused(*words, "--classes", tmp_path / "names.txt", "--out", tmp_path / "other")
    assert "save it as UTF-8" in " ".join(message.split())


def test_calibrate_keeps_the_names_that_the_dataset_lists(home: Path, tmp_path: Path) -> None:
    pictures = sorted((home / "photos").rglob("*.png"))
    for number, picture in enumerate(pictures):
        (tmp_path / "set" / NAMES[number % 4]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / NAMES[number % 4] / picture.name).write_bytes(picture.read_bytes())
    listed = [NAMES[2], NAMES[0], NAMES[3], NAMES[1]]
    (tmp_path / "names.txt").write_text("\n".join(listed))
    words = ("calibrate", "tiny_net", "--checkpoint", home / "weights.safetensors", "--keep", 0.5, "--workers", 0)
    data = f"folder:{tmp_path / 'set'}"
    result = call(*words, "--id", f"{data}?classes={tmp_path / 'names.txt'}", "--out", tmp_path / "detector")
    assert result.exit_code == 0, result.output
    detector = Detector.load(tmp_path / "detector")
    assert detector.classes == tuple(listed)
    found = json.loads(call("predict", pictures[0], "--detector", tmp_path / "detector", "--json").stdout)
    assert found["rows"][0]["class_name"] == listed[detector.predict([pictures[0]]).label[0]]
    assert call(*words, "--id", data, "--out", tmp_path / "other").exit_code == 0
    assert Detector.load(tmp_path / "other").classes is None  # of folders alone, it is not known that they are in order


def test_calibrate_takes_the_options_of_extract(home: Path) -> None:
    words = ["calibrate", "tiny_net", "--checkpoint", home / "weights.safetensors", "--scorer", "odin"]
    options = ["--channels-last", "--dtype", "float16", "--probe", "odin:epsilon=0.1,std=(0.5,0.5,0.5)"]
    result = call(*words, "--id", f"folder:{home / 'photos'}", "--out", home / "odin", "--keep", 0.5, *options)
    assert result.exit_code == 0, result.output
    probe = ODIN(epsilon=0.1, std=(0.5, 0.5, 0.5))
    expected = ExtractionOptions(channels_last=True, dtype="float16", probes=[probe])
    assert Detector.load(home / "odin").forward.options == expected
    assert "channels_last apply to loaders" in refused(
        *words, "--id", home / "id.h5", "--out", home / "energy", "--scorer", "energy", "--channels-last"
    )


def test_predict_writes_a_row_for_every_image(home: Path) -> None:
    out = home / "results.csv"
    result = call("predict", home / "photos", "--detector", home / "detector", "--out", out, "--batch-size", 7)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(out)
    columns = ["image", "label", "class_name", "probability", "score", "p_value", "is_ood", "error"]
    assert list(table) == columns
    files = image_files([str(home / "photos")])
    assert list(table["image"]) == files
    assert len(files) == 30
    expected = expected_detector(home).predict(files).to_pandas()
    pd.testing.assert_frame_equal(table[columns[1:-1]], expected[columns[1:-1]], check_dtype=False, rtol=1e-6)
    assert table["error"].isna().all()
    n_ood = int(expected["is_ood"].sum())
    assert n_ood > 0
    assert f"30 images: {30 - n_ood} in-distribution, {n_ood} OoD ({n_ood / 30:.1%})" in result.output


def test_workers_do_not_change_the_results(home: Path) -> None:
    tables = []
    for workers in (0, 2):
        out = home / f"workers{workers}.csv"
        call("predict", home / "photos", "--detector", home / "detector", "--out", out, "--workers", workers)
        tables.append(out.read_text())
    assert tables[0] == tables[1]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_an_unreadable_image_is_a_row_with_its_error(home: Path, suffix: str) -> None:
    out = home / f"unreadable.{suffix}"
    images = [home / "photos" / "00.png", home / "broken", home / "missing.png", home / "photos" / "03.png"]
    result = call("predict", *images, "--detector", home / "detector", "--out", out, "--fail-on-ood")
    assert result.exit_code == 4, result.output
    assert "2 images: " in result.output
    table = pd.read_csv(out) if suffix == "csv" else pd.DataFrame(json.loads(out.read_text())["rows"])
    assert list(table["error"].notna()) == [False, True, True, False]
    assert "cannot read the image" in table["error"][1]
    assert table["error"][2] == f"there is no image {home / 'missing.png'}: restore it, or leave it out."
    assert table.loc[1:2, "label":"is_ood"].isna().all(axis=None)
    expected = expected_detector(home).predict([images[0], images[3]])
    assert list(table["label"].dropna()) == list(expected.label)
    assert list(table["is_ood"].dropna()) == list(expected.is_ood)


def test_only_unreadable_images(home: Path) -> None:
    result = call("predict", home / "broken", "--detector", home / "detector", "--out", home / "none.csv")
    assert result.exit_code == 4
    assert "0 images: 0 in-distribution, 0 OoD\n" in result.output
    assert len(pd.read_csv(home / "none.csv")) == 1


def test_exit_codes_of_ood(home: Path) -> None:
    detector = expected_detector(home)
    files = image_files([str(home / "photos")])
    is_ood = detector.predict(files).is_ood
    bad, good = files[int(is_ood.argmax())], files[int(is_ood.argmin())]
    codes = [
        call("predict", image, "--detector", home / "detector", *option).exit_code
        for image in (good, bad)
        for option in ([], ["--fail-on-ood"])
    ]
    assert codes == [0, 0, 0, 3]


def test_files_folders_and_patterns(home: Path) -> None:
    photos = home / "photos"
    everything = image_files([str(photos)])
    assert everything == sorted(everything)
    assert {Path(file).suffix for file in everything} == {".png"}
    assert image_files([str(photos / "*.png")]) == [file for file in everything if "below" not in file]
    assert sorted(image_files([str(photos / "**" / "*.png")])) == everything
    assert image_files([everything[3], str(photos), everything[3]]) == [everything[3], *everything[:3], *everything[4:]]
    (home / "odd[1].png").write_bytes(b"")
    assert image_files([str(home / "odd[1].png")]) == [str(home / "odd[1].png")]
    for nothing in (photos / "*.tiff", home / "empty"):
        (home / "empty").mkdir(exist_ok=True)
        with pytest.raises(MissingData, match="there is no image in"):
            image_files([str(nothing)])


def test_every_readable_format_and_linked_folder_is_searched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    image = Image.new("RGB", (16, 16))
    image.save(tmp_path / "elsewhere" / "deep" / "f.png")
    for name, kind in {"b.gif": "GIF", "c.jfif": "JPEG", "d.jp2": "JPEG2000"}.items():
        image.save(tmp_path / "photos" / name, kind)
    (tmp_path / "photos" / "._b.gif").write_bytes(b"Mac OS X")
    (tmp_path / "photos" / "scan.dcm").touch()
    (tmp_path / "photos" / "album.jpg").mkdir()
    (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "loop").symlink_to(".")
    with pytest.warns(UserWarning, match=r"left out in .*photos: ") as told:
        files = image_files([str(tmp_path / "photos")])
    assert [file.removeprefix(f"{tmp_path}/photos/") for file in files] == [
        "b.gif",
        "c.jfif",
        "d.jp2",
        "linked/deep/f.png",
    ]
    for counted in (".dcm files (1)", "hidden files (1)", "links to folders that are read anyway (1)"):
        assert counted in str(told[0].message)
    with pytest.warns(UserWarning, match="read anyway"):
        assert image_files([str(tmp_path / "**" / "*.png")]) == [str(tmp_path / "elsewhere" / "deep" / "f.png")]
    with pytest.warns(UserWarning, match="read anyway"):
        assert image_files([f"{tmp_path}/pho*/**/deep/?.png"]) == [f"{tmp_path}/photos/linked/deep/f.png"]


def test_names_of_any_kind_are_shown_and_written(home: Path) -> None:
    """Brackets, formulas, and bytes that are not UTF-8 in names of images that can and cannot be read."""
    folder = home / "names"
    for name in (b"caf\xe9.png", b"=SUM(A1).png", b"scans [b].png"):
        path = folder / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (folder / "broken [final].jpg").write_bytes(b"not an image")
    (folder / "broken [b").mkdir()
    (folder / "broken [b" / "].jpg").write_bytes(b"not an image")
    for suffix in ("csv", "json"):
        out = home / f"names.{suffix}"
        result = call("predict", folder, "--detector", home / "detector", "--out", out, "--workers", 0)
        assert result.exit_code == 4, result.output
        assert "broken [final].jpg" in result.output.replace("\n", "")
        assert "broken [b/].jpg" in result.output.replace("\n", "")
    shown = [name.removeprefix(f"{folder}/") for name in pd.read_csv(home / "names.csv")["image"]]
    assert shown == ["=SUM(A1).png", "broken [b/].jpg", "broken [final].jpg", "caf\\xe9.png", "scans [b].png"]
    rows = json.loads((home / "names.json").read_text())["rows"]
    assert rows[3]["image"] == f"{folder}/caf\\xe9.png"


def test_errors_are_one_line(home: Path) -> None:
    checkpoint = ("tiny_net", "--checkpoint", home / "weights.safetensors", "--out", home / "new")
    assert "pass fit=" in refused("calibrate", *checkpoint, "--id", home / "id.h5", "--scorer", "vim")
    assert "there is no scorer 'vin'" in refused("calibrate", *checkpoint, "--id", home / "id.h5", "--scorer", "vin")
    assert f"(did you mean 'folder:{home / 'photos'}'?)" in refused("calibrate", *checkpoint, "--id", home / "photos")
    assert "no.h5" in refused("calibrate", *checkpoint, "--id", home / "no.h5")
    assert not (home / "new").exists()
    words = ("calibrate", *checkpoint[:-1], home / "photos", "--id", home / "id.h5", "--scorer", "energy")
    assert "contains other files than a detector" in refused(*words)
    assert "is not a detector" in refused("predict", home / "photos", "--detector", home / "photos")
    assert "there is no image in" in refused("predict", home / "no*.png", "--detector", home / "detector")
    to_text = ("--detector", home / "detector", "--out", home / "results.txt")
    assert "use a file name that ends in .csv, .parquet, or .json" in refused("predict", home / "photos", *to_text)


def test_calibrate_on_images_and_with_other_arguments(home: Path) -> None:
    """A dataset instead of a cache, and a checkpoint of the trainer, which stores the arguments of its network."""
    torch.manual_seed(0)
    facts = {"architecture": '"tiny_net"', "arguments": '{"norm": false}'}
    save_file(timm.create_model("tiny_net", norm=False, num_classes=4).state_dict(), home / "plain.safetensors", facts)
    words = ("calibrate", "tiny_net", "--checkpoint", home / "plain.safetensors", "--id", f"folder:{home / 'photos'}")
    options = ("--mean", "0.5", "--param", "temperature=2", "--workers", 0, "--per-class", "--keep", "0.5")
    result = call(*words, *options, "--out", home / "plain")
    assert result.exit_code == 0, result.output
    loaded = Detector.load(home / "plain")
    assert isinstance(loaded.preprocessing, dict)
    assert loaded.preprocessing["mean"] == [0.5]
    assert loaded.scorer == ood_scores.create_scorer("energy", temperature=2.0)
    assert loaded.calibration.predicted is not None
    files = image_files([str(home / "photos")])
    assert loaded.predict(files).is_ood.mean() <= 0.5


@pytest.mark.parametrize("command", ["calibrate", "predict"])
def test_help_fits_a_terminal_and_shows_examples(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"ood-scores {command} " in result.output
    assert "Examples" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_the_screen_fits_a_terminal(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    result = call("predict", "photos", "--detector", "detector")
    assert "Least in-distribution" in result.output
    assert max(map(len, result.output.splitlines())) <= 80


def test_a_folder_that_may_not_be_written_is_found_before_any_work(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    commands = (
        ("calibrate", "no_such_model", "--id", "folder:gone", "--out", tmp_path / "detector"),
        ("predict", "gone", "--detector", "gone", "--out", tmp_path / "rows.csv"),
        ("predict", "gone", "--detector", "gone", "--explain", tmp_path / "why"),
        ("linear-probe", home / "fit.h5", "--out", tmp_path / "probed"),
        ("show", home / "fit.h5", "--out", tmp_path / "grid.png"),
    )
    for words in commands:
        assert "the folder may not be written, so choose another." in " ".join(refused(*words).split())
    assert list(tmp_path.iterdir()) == []


def test_predict_writes_its_files_though_the_reader_of_the_output_leaves(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("ood_scores.cli.predict.answer", closed)
    words = ("predict", home / "photos", "--detector", home / "detector")
    call(*words, "--out", tmp_path / "rows.csv", "--explain", tmp_path / "why")
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 30
    assert (tmp_path / "why" / "index.html").exists()


def test_predict_explains_rejected_images(home: Path, tmp_path: Path) -> None:
    detector = ("--detector", home / "detector")
    words = ("--explain", tmp_path / "why", "--fit", home / "fit.h5", "--id", home / "id.h5", "--scorer", "msp")
    result = call("predict", home / "photos", *detector, *words)
    assert result.exit_code == 0, result.output
    assert "images were rejected: " in " ".join(result.output.split())
    found = expected_detector(home).predict([Image.open(file) for file in image_files([str(home / "photos")])])
    page = (tmp_path / "why" / "index.html").read_text()
    assert page.count('<section class="row">') == found.is_ood.sum() > 0
    assert f"<b>{found.is_ood.sum()}</b> of 30 images were rejected" in page
    assert page.count(">msp</span>") == found.is_ood.sum()
    assert all(name in page for name in NAMES[:1])
    message = refused("predict", home / "photos", *detector, "--fit", home / "fit.h5")
    assert "--fit, --data, --id, and --scorer are for --explain" in " ".join(message.split())
