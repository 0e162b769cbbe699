"""Decode image files and encoded bytes: one rule for every dataset, for detectors, and for the command line."""

from __future__ import annotations

import functools
import io
import os
import stat
from os import PathLike
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ood_scores.errors import BadInput, FileSystemFault, MissingData, UnreadableImage

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
}
"""Formats that are decoded, with the suffixes that are searched for in folders.

Other formats of Pillow are refused whatever the suffix of the file: EPS, for one, is a program that Ghostscript runs.
"""

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused, since they are read whole."""

MAX_ASPECT_RATIO = 1000
"""Longer images are refused: resized to 256 pixels on the shorter side, they would need gigabytes."""


def read_rgb(source: str | PathLike[str] | bytes, name: str = "") -> Image.Image:
    """Decode an image as upright RGB.

    Args:
        source: the path of a file, or encoded bytes.
        name: what error messages call the image; defaults to its path.

    Raises:
        MissingData: if there is no such file.
        FileSystemFault: if the operating system does not deliver the file.
        UnreadableImage: if the image cannot be decoded, has another format than those of ``SUFFIXES``, or is refused by
            ``as_rgb``.
    """
    name = name or ("from bytes" if isinstance(source, bytes) else str(source))
    try:
        encoded = source if isinstance(source, bytes) else _content(Path(source))
        with Image.open(io.BytesIO(encoded), formats=_formats()) as file:
            return as_rgb(file, name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingData(f"there is no image {name}: restore it, or leave it out.") from error
    except BadInput:
        raise
    except UnidentifiedImageError as error:
        raise unreadable(name, f"its format is none of {', '.join(_formats())}") from error
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise unreadable(name, error) from error


def _content(path: Path) -> bytes:
    """Return the bytes of a file, read apart from decoding, whose libraries do not tell a failing disk from damage."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    if found.st_size > MAX_FILE_BYTES:
        raise OSError(f"it has {found.st_size >> 20:,} MiB, more than {MAX_FILE_BYTES >> 20:,}")
    return path.read_bytes()


def as_rgb(image: Image.Image, name: str = "") -> Image.Image:
    """Convert a PIL image to RGB, and rotate it as its EXIF orientation says.

    Raises:
        UnreadableImage: if the pixels have more than 8 bits per channel, since it is unknown which value is white; if
            one side is more than ``MAX_ASPECT_RATIO`` times as long as the other; or if it cannot be decoded.
        FileSystemFault: if the operating system does not deliver the file of the image.
    """
    if image.mode.startswith(("I", "F")):
        raise UnreadableImage(
            f"the image {name} has pixels of mode {image.mode}, which have more than 8 bits: scale its values to 0 to "
            "255, and save it with 8 bits per channel."
        )
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise UnreadableImage(
            f"the image {name} has {image.width} x {image.height} pixels: crop it so that no side is more than "
            f"{MAX_ASPECT_RATIO} times as long as the other."
        )
    try:
        image.load()
        return _upright(image).convert("RGB")
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise unreadable(name, error) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # damaged metadata: the pixels are still good
        return image
    return ImageOps.exif_transpose(image) if rotated else image


def unreadable(name: str, reason: object) -> BadInput:
    """Return the error of an image that cannot be decoded, or that the file system does not deliver."""
    if isinstance(reason, OSError) and reason.errno is not None:
        return FileSystemFault(f"cannot read the image {name} ({reason}): check the drive, then repeat the call.")
    return UnreadableImage(f"cannot read the image {name} ({reason}): replace or remove it.")


@functools.cache
def _formats() -> list[str]:
    """Return the formats that this build of Pillow can decode."""
    Image.init()
    return [name for name in SUFFIXES if name in Image.OPEN]
