"""``ood-scores inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ood_scores.cli.printing import console, facts
from ood_scores.terminal import marked

if TYPE_CHECKING:
    import h5py

    from ood_scores.features import Provenance
    from ood_scores.features.storage.cache import CacheState


def inspect(
    cache: Annotated[Path, typer.Argument(help="File from ood-scores extract, finished or not.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read all rows and check their checksums.")] = False,
) -> None:
    """Show the contents of a cache, whether it is finished, and how it was created.

    \b
    [bold]Examples[/]
      ood-scores inspect val.h5
      ood-scores inspect val.h5 --verify
      for cache in cache/*.h5; do ood-scores inspect $cache; done
    """
    from ood_scores.features.storage import cache as caches
    from ood_scores.features.storage import statistics_store
    from ood_scores.features.storage.layout import column_names

    screen = console()
    with caches.open_to_read(cache) as h5:
        found = caches.state(h5)
        head = [name for name in ("head/weight", "head/bias") if name in h5]
        screen.print(
            f"[bold]{marked(cache)}[/]  {cache.stat().st_size / 1e6:,.1f} MB  {_progress(found)}", soft_wrap=True
        )
        screen.print(_arrays(h5, column_names(h5), head, found.rows))
        statistics = statistics_store.names(cache, h5.attrs["identity"])
        if verify:
            caches.require_finished(h5)
            screen.print(_verified(h5), soft_wrap=True)
    if statistics:
        screen.print(f"statistics kept: {', '.join(statistics)}", soft_wrap=True, markup=False, highlight=False)
    if found.provenance is None:
        screen.print("It has no provenance.", style="dim")
    else:
        screen.print(facts(_readable(found.provenance)))


def _progress(found: CacheState) -> str:
    if found.finished:
        return f"[green]finished[/], {found.rows:,} rows"
    total = found.provenance.dataset_rows if found.provenance else None
    so_far = f"{found.rows:,} rows" if total is None else f"{found.rows:,} of {total:,} rows ({found.rows / total:.0%})"
    return f"[yellow]not finished[/], {so_far} so far"


def _verified(h5: h5py.File) -> str:
    from ood_scores.features.storage.checksums import verify_rows
    from ood_scores.features.storage.layout import column_names
    from ood_scores.features.storage.reading import how_to_seal, is_sealed

    if verify_rows([h5[name] for name in column_names(h5)]) and is_sealed(h5):
        return "[green]verified[/]: every row is the one that was written"
    return f"[yellow]not verified[/]: {marked(how_to_seal(h5.filename))}"


def _arrays(h5: h5py.File, columns: list[str], head: list[str], rows: int) -> Table:
    table = Table("array", "shape", "type", header_style="dim")
    for name in columns:
        kind = h5[name].dtype
        text = f"text, {kind.itemsize} bytes" if kind.kind == "S" else str(kind)
        table.add_row(Text(name), " × ".join(f"{size:,}" for size in (rows, *h5[name].shape[1:])), text)
    for name in head:
        table.add_row(Text(name), " × ".join(f"{size:,}" for size in h5[name].shape), str(h5[name].dtype))
    return table


def _readable(provenance: Provenance) -> dict[str, str]:
    probes = {"probes": ", ".join(provenance.probe_texts)} if provenance.probes else {}
    left_out = {"left out": provenance.left_out} if provenance.skipped else {}
    return {
        "model": f"{provenance.model or provenance.architecture}, weights {provenance.weights_sha256[:16]}…",
        "head": provenance.head_modules or "none",
        **({"pooling": provenance.pool} if provenance.pool else {}),
        "data": f"{provenance.dataset}, first inputs {provenance.data_sha256[:16]}…",
        **left_out,
        **({"labels": provenance.label_order} if provenance.label_order else {}),
        "preprocessing": provenance.preprocessing or "unknown",
        **probes,
        "precision": provenance.precision,
        "device": f"{provenance.device}, {provenance.batch_size or '?'} images at a time",
        "created": provenance.created,
        "with": ", ".join(f"{package} {version}" for package, version in provenance.versions.items()),
    }
