"""``ood-scores inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ood_scores.cli.printing import answer, console, facts
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

    with caches.open_to_read(cache) as h5:
        state = caches.state(h5)
        if verify:
            caches.require_finished(h5)
        head = [name for name in ("head/weight", "head/bias") if name in h5]
        found = {
            "cache": str(cache),
            "bytes": cache.stat().st_size,
            "finished": state.finished,
            "rows": state.rows,
            "arrays": [
                *(_array(name, h5[name], state.rows) for name in column_names(h5)),
                *(_array(name, h5[name], len(h5[name])) for name in head),
            ],
            "statistics": statistics_store.names(cache, h5.attrs["identity"]),
            "provenance": state.provenance and asdict(state.provenance),
            "verified": _is_verified(h5) if verify else None,
        }
        answer(found, lambda: _show(found, state))


def _show(found: Mapping[str, Any], state: CacheState) -> None:
    from ood_scores.features.storage.reading import how_to_seal

    screen = console()
    cache = marked(found["cache"])
    screen.print(f"[bold]{cache}[/]  {found['bytes'] / 1e6:,.1f} MB  {_progress(state)}", soft_wrap=True)
    table = Table("array", "shape", "type", header_style="dim")
    for each in found["arrays"]:
        table.add_row(Text(each["array"]), " × ".join(f"{size:,}" for size in each["shape"]), each["type"])
    screen.print(table)
    if found["verified"]:
        screen.print("[green]verified[/]: every row is the one that was written", soft_wrap=True)
    elif found["verified"] is not None:
        screen.print(f"[yellow]not verified[/]: {marked(how_to_seal(found['cache']))}", soft_wrap=True)
    if found["statistics"]:
        screen.print(f"statistics kept: {', '.join(found['statistics'])}", soft_wrap=True, markup=False)
    if state.provenance is None:
        screen.print("It has no provenance.", style="dim")
    else:
        screen.print(facts(_readable(state.provenance)))


def _progress(found: CacheState) -> str:
    if found.finished:
        return f"[green]finished[/], {found.rows:,} rows"
    total = found.provenance.dataset_rows if found.provenance else None
    so_far = f"{found.rows:,} rows" if total is None else f"{found.rows:,} of {total:,} rows ({found.rows / total:.0%})"
    return f"[yellow]not finished[/], {so_far} so far"


def _is_verified(h5: h5py.File) -> bool:
    """Check the rows; return False if the cache has no checksums to compare them with."""
    from ood_scores.features.storage.checksums import verify_rows
    from ood_scores.features.storage.layout import column_names
    from ood_scores.features.storage.reading import is_sealed

    return verify_rows([h5[name] for name in column_names(h5)]) and is_sealed(h5)


def _array(name: str, values: h5py.Dataset, rows: int) -> dict[str, Any]:
    kind = values.dtype
    text = f"text, {kind.itemsize} bytes" if kind.kind == "S" else str(kind)
    return {"array": name, "shape": [rows, *values.shape[1:]], "type": text}


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
