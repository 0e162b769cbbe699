"""A dataset that papers use: what it shows, where it is, and what opens it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NONE_STATED = "none stated by its authors"
"""The license of a dataset whose authors' page was read and names none."""

IMAGENET_TERMS = "ImageNet's terms of access: non-commercial research and education"
IMAGES_OF_IMAGENET = "the images are ImageNet's, whose terms of access forbid commercial use"


def repository_under(license: str) -> str:
    """Return the license of images in whose repository only the code's license is stated."""
    return f"none stated for the images; the authors' repository is under {license}"


@dataclass(frozen=True)
class KnownSet:
    """A dataset that papers use.

    Attributes:
        name: a short name.
        what: what the images show, and other facts about the dataset.
        images: number of images; 0 if it depends on the release or the list.
        page: the authors' page, or that of the paper's code.
        get: the command that puts the dataset into the folder ``{data}``, or what to do by hand; "" if torchvision
            downloads it.
        spec: the text that opens the dataset afterwards, with ``open_dataset(spec, root=data)``.
        folders: names of files and folders that identify a path to it, in lower case and with ``_`` for ``-``.
        license: the license or terms that ``page``, or the address in the text, states for the images;
            ``NONE_STATED`` if ``page`` names none, and "unknown" where nothing could be read.
        size: size of the download; "" if it is not known.
        md5: MD5 of the downloaded file, or of each file by its name; "" if none is known.
    """

    name: str
    what: str
    images: int
    page: str
    get: str
    spec: str
    folders: tuple[str, ...] = ()
    license: str = "unknown"
    size: str = ""
    md5: str | Mapping[str, str] = ""

    @property
    def checksums(self) -> str:
        """The MD5 sums in one line."""
        if isinstance(self.md5, str):
            return self.md5
        return ", ".join(f"{file}: {md5}" for file, md5 in self.md5.items())


def unpacked(url: str, folder: str = "") -> str:
    """Return the command that downloads and unpacks an archive, into a subfolder if one is named."""
    file, into = url.rpartition("/")[2], f"{{data}}/{folder}" if folder else "{data}"
    unpack = f"unzip {{data}}/{file} -d {into}" if file.endswith(".zip") else f"tar -xf {{data}}/{file} -C {into}"
    make = f"mkdir -p {into} && " if folder else ""
    return f"{make}wget -P {{data}} {url} && {unpack}"
