"""One rule for images, whatever they come as: a file, encoded bytes, a PIL image, a row of a dataset."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ood_scores.data.decoding import SUFFIXES, as_rgb, read_rgb
from ood_scores.data.image_files import Search
from ood_scores.data.images import TorchvisionImages
from ood_scores.data.sources import open_dataset
from ood_scores.errors import BadInput, MissingData

GRAY = ((np.arange(64) * 3)[None] + np.arange(48)[:, None]).astype(np.uint8)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(KEPT) (w) file dup (lost) writestring "
    b"closefile\nshowpage\n%%EOF\n"
)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize(
    ("kind", "dtype"), [("PNG", "uint16"), ("TIFF", "uint16"), ("TIFF", "int32"), ("TIFF", "float32")]
)
def test_pixels_of_more_than_8_bits_are_refused(kind: str, dtype: str, tmp_path: Path) -> None:
    image = Image.fromarray(GRAY.astype(dtype))
    (tmp_path / "scan.png").write_bytes(saved(image, kind))
    for read in (
        lambda: open_dataset(f"folder:{tmp_path}")[0],
        lambda: read_rgb(tmp_path / "scan.png"),
        lambda: read_rgb(saved(image, kind)),
        lambda: as_rgb(image),
    ):
        with pytest.raises(BadInput, match="more than 8 bits: scale its values to 0 to 255"):
            read()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_to_every_form(kind: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.stack([GRAY, GRAY, 255 - GRAY], 2))
    encoded = saved(image, kind, exif=ROTATED)
    (tmp_path / "photo.png").write_bytes(encoded)
    plain = np.asarray(read_rgb(saved(image, kind)))
    upright = [read_rgb(encoded), open_dataset(f"folder:{tmp_path}")[0]]
    with Image.open(io.BytesIO(encoded)) as opened:
        upright.append(as_rgb(opened))
        upright.append(as_rgb(opened.convert("RGB") if kind != "TIFF" else opened))
    upright.append(TorchvisionImages([(upright[0], 0)], None, "again").load(0)[0])
    for each in upright:
        assert np.array_equal(np.asarray(each), np.rot90(plain, -1))


def test_formats_that_run_programs_are_refused_whatever_the_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = tmp_path / "called"
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {called}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    (tmp_path / "holiday.jpg").write_bytes(EPS)
    for source in (tmp_path / "holiday.jpg", EPS):
        with pytest.raises(BadInput, match="its format is none of JPEG, PNG, WEBP"):
            read_rgb(source)
    assert not called.exists()


def test_strips_bombs_and_pipes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (60_000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(BadInput, match=r"strip\.png has 60000 x 1 pixels: crop it"):
        read_rgb(tmp_path / "strip.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadInput, match=r"cannot read the image .*bomb\.png .*decompression bomb"):
        read_rgb(tmp_path / "bomb.png")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(BadInput, match=r"pipe\.png \(it is not a regular file\)"):
        read_rgb(tmp_path / "pipe.png")
    with pytest.raises(MissingData, match=r"no image .*strip\.png/a\.png"):
        read_rgb(tmp_path / "strip.png" / "a.png")


def test_every_suffix_that_is_searched_for_can_be_read(tmp_path: Path) -> None:
    Image.init()
    for kind, suffixes in SUFFIXES.items():
        if kind in Image.SAVE:
            for suffix in suffixes:
                Image.new("RGB", (16, 16), (255, 255, 255)).save(tmp_path / f"a{suffix}", kind)
    files = Search().below(tmp_path)
    assert len(files) == len(list(tmp_path.iterdir())) > 10
    assert all(read_rgb(file).size == (16, 16) for file in files)


def test_damaged_rows_of_a_torchvision_dataset_are_named() -> None:
    class Damaged:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            if index:
                raise OSError("image file is truncated")
            return Image.new("L", (2, 2)), 3

    dataset = TorchvisionImages(Damaged(), None, "DTD")
    assert dataset[0][1] == 3
    with pytest.raises(BadInput, match=r"cannot read the image in row 1 of DTD \(image file is truncated\)"):
        dataset[1]
