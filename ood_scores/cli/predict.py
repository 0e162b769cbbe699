"""``ood-scores predict``."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ood_scores.atomic import require_writable, user_path
from ood_scores.cli import completion, options
from ood_scores.cli.parsing import check_table_path, scorer_names, write_table
from ood_scores.cli.printing import answer, console
from ood_scores.errors import BadInput, MissingData
from ood_scores.progress import ProgressBar, showing_work
from ood_scores.terminal import marked, safe

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from ood_scores.detector import Detector

SOME_OOD, SOME_UNREADABLE = 3, 4
"""Exit codes."""

HUB = "hf-hub:"
"""What the names of detectors on the Hugging Face hub start with."""

SHOWN, EXPLAINED = 5, 50
"""Number of rows to show on the screen, and on the page of --explain."""


def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES…", help="Files, folders, or quoted patterns.")],
    detector: Annotated[
        str, typer.Option(metavar="DIR", help="Folder from ood-scores calibrate, or hf-hub:OWNER/NAME.")
    ],
    out: Annotated[Path | None, typer.Option(help="File with a row per image: .csv, .parquet, or .json.")] = None,
    fail_on_ood: Annotated[bool, typer.Option("--fail-on-ood", help="Exit with code 3 if an image is OoD.")] = False,
    explain: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for a page that explains the rejected images.")
    ] = None,
    fit: Annotated[
        Path | None, typer.Option(help="Cache of the training data, in which --explain finds similar images.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|DATA",
            help="Folder or dataset with the pictures of --fit.",
            autocompletion=completion.paths_and_datasets,
        ),
    ] = None,
    id: Annotated[
        Path | None, typer.Option("--id", help="Cache of held-out ID data, for the p-values of --scorer.")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Further scorer whose p-values --explain shows; may be repeated. Needs --id.",
            autocompletion=completion.scorers,
        ),
    ] = None,
    batch_size: options.BatchSize = 64,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Number of processes that decode images.")] = 2,
    device: options.Device = "auto",
) -> None:
    """Classify images and flag those that are out of distribution.

    Folders are searched recursively. An image that cannot be read is a row with its error.

    \b
    [bold]Examples[/]
      ood-scores predict photos --detector detector --out results.csv
      ood-scores predict "inbox/**/*.jpg" cat.png --detector detector
      ood-scores predict new.png --detector detector --fail-on-ood || echo stop
      ood-scores predict photos --detector hf-hub:OWNER/NAME@v1
      ood-scores predict photos --detector detector --explain why \\
          --fit train.h5 --data folder:train

    \b
    [bold]Exit codes[/]
      0  every image was read
      1  nothing was done, for the reason in the message
      3  an image is OoD, with --fail-on-ood
      4  an image could not be read, whatever the others are
    """
    from ood_scores.detector import Detector

    check_table_path(out)
    if not explain and (fit or data or id or scorer):
        raise BadInput("--fit, --data, --id, and --scorer are for --explain: pass --explain DIR, too.")
    if explain:
        require_writable(user_path(explain))
    if detector.startswith(HUB):
        loaded = Detector.from_pretrained(detector.removeprefix(HUB), device=device)
    else:
        loaded = Detector.load(detector, device=device)
    files = image_files(images)
    table = results(loaded, files, batch_size, workers)
    write_table(table.astype(object).where(table.notna(), None), out)
    said = ""
    if explain:
        names = scorer_names(scorer or ())
        said = _explain(loaded, table, files, explain, {"fit": fit, "pictures": data, "id": id, "scorers": names})
    answer({"detector": detector, "rows": table}, lambda: _show(table))
    if out:
        console().print(f"[green]✓[/] every image in [bold]{marked(out)}[/]")
    if explain:
        console().print(said)
    if table["error"].notna().any():
        raise typer.Exit(SOME_UNREADABLE)
    if fail_on_ood and table["is_ood"].any():
        raise typer.Exit(SOME_OOD)


def _explain(
    detector: Detector, table: pd.DataFrame, files: Sequence[str], folder: Path, arguments: Mapping[str, Any]
) -> str:
    """Write a page that explains the rejected images with the lowest scores, and return the line that says so.

    The arguments are those of ``explain``.
    """
    rejected = table[table["is_ood"].fillna(False)]
    if rejected.empty:
        return "no image was rejected, so that there is nothing to explain"
    lowest = rejected.nsmallest(EXPLAINED, "score").index
    with showing_work("explaining …"):
        found = detector.explain([files[row] for row in lowest], **arguments)
        found = replace(found, images=int(table["error"].isna().sum()), rejected=len(rejected))
        page = found.save(folder)
    return f"[green]✓[/] why {len(found)} images were rejected: [bold]{marked(page)}[/]"


def image_files(texts: Iterable[str]) -> list[str]:
    """Return the image files in files, folders, and patterns, in this order and without repetition.

    A file that is named is returned even if it does not exist. A warning counts what is left out of folders.

    Raises:
        MissingData: if a folder or pattern has no images.
    """
    from ood_scores.data.image_files import IMAGE_SUFFIXES, Search

    files: dict[str, None] = {}
    for text in texts:
        search = Search()
        if Path(text).is_dir():
            found = sorted(search.below(text), key=lambda file: Path(file).parts)
        elif glob.has_magic(text) and not Path(text).exists():
            found = search.matching(text)
        else:
            found = [text]
        search.warn(text)
        if not found:
            raise MissingData(f"there is no image in {text}: image files end in {', '.join(IMAGE_SUFFIXES)}.")
        files |= dict.fromkeys(found)
    return list(files)


class Decoded:
    """A dataset of ``(file, tensor, "")``, or ``(file, None, error)`` for an image that cannot be read."""

    def __init__(self, files: Sequence[str], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Any, str]:
        from ood_scores.data.decoding import read_rgb
        from ood_scores.detector.preprocessing import model_input

        try:
            return self.files[index], model_input(self.transform, read_rgb(self.files[index])), ""
        except BadInput as error:
            return self.files[index], None, str(error)


def results(detector: Detector, files: Sequence[str], batch_size: int, workers: int) -> pd.DataFrame:
    """Return a row per file: ``image``, the detector's predictions, and ``error`` if the file cannot be read."""
    import pandas as pd
    from torch.utils.data import DataLoader

    if detector.transform is None:
        raise BadInput(
            "this detector only accepts tensors: calibrate it with a preprocessing= that can be saved, or call it in "
            "Python."
        )
    loader: Any = DataLoader(
        Decoded(files, detector.transform),  # type: ignore[arg-type]
        batch_size,
        num_workers=min(workers, len(files) // batch_size),
        collate_fn=list,
    )
    parts = []
    for batch in _with_progress(loader, len(files)):
        part = pd.DataFrame(
            {"image": [safe(file) for file, *_ in batch], "error": [safe(error) or None for *_, error in batch]}
        )
        readable = [tensor for _, tensor, _ in batch if tensor is not None]
        if readable:
            said = detector.predict(readable).to_pandas()
            part = part.join(said.set_index(part.index[part["error"].isna()]))
        parts.append(part)
    return _typed(pd.concat(parts, ignore_index=True))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Return the columns in order, with types for integers and booleans that allow missing values."""
    kinds = {"label": "Int64", "probability": "float64", "score": "float64", "p_value": "float64", "is_ood": "boolean"}
    names = [
        "image",
        "label",
        *(name for name in ("class_name", "label_set") if name in table),
        *list(kinds)[1:],
        "error",
    ]
    return table.reindex(columns=names).astype(kinds)


def _with_progress(batches: Iterable[Any], total: int) -> Iterator[Any]:
    with ProgressBar("predicting", total, "images") as bar:
        for batch in batches:
            yield batch
            bar.advance(len(batch))


def _show(table: pd.DataFrame) -> None:
    screen = console()
    unread = table[table["error"].notna()]
    read = table[table["error"].isna()]
    n_ood = int(read["is_ood"].sum())
    images = "image" if len(read) == 1 else "images"
    counts = f"[bold]{len(read):,}[/] {images}: {len(read) - n_ood:,} in-distribution, [bold]{n_ood:,}[/] OoD"
    screen.print(counts + (f" ({n_ood / len(read):.1%})" if len(read) else ""))
    if n_ood:
        screen.print(_lowest(read))
    for file in unread.head(SHOWN).itertuples():
        screen.print(f"[red]✗[/] {marked(file.error)}", soft_wrap=True)
    if len(unread) > SHOWN:
        screen.print(f"[red]✗[/] and {len(unread) - SHOWN:,} more that cannot be read")


def _lowest(read: pd.DataFrame) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Least in-distribution", title_justify="left", title_style="bold", header_style="dim")
    table.add_column("image", overflow="fold")
    for name in ("label", "probability", "score", "p-value"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = "class_name" if "class_name" in read else "label"
    for row in read[read["is_ood"]].nsmallest(SHOWN, ["p_value", "score"]).to_dict("records"):
        numbers = (f"{row['probability']:.3f}", f"{row['score']:.6g}", f"{row['p_value']:.2g}")
        table.add_row(Text(row["image"]), Text(str(row[shown])), *numbers)
    return table
