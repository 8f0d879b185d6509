"""`dde-cache subset`."""

from pathlib import Path
from typing import get_args

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.errors import InputError
from dde_cache.store import Cache
from dde_cache.subset import Selection, SubsetReport, read_keys
from dde_cache.subset import Table as CacheTable
from dde_cache.subset import subset as run_subset

from .console import console, print_json, working
from .extract import layer_numbers


def subset(
    cache: Path = typer.Argument(help="Folder of the cache."),
    out: Path = typer.Option(..., help="Folder of the part; new or empty."),
    units: list[str] = typer.Option([], help="Unit or shard name, with * and ?; may be given again."),
    keys: list[Path] = typer.Option([], help="Text file of sample keys, one a line; may be given again."),
    layers: str | None = typer.Option(None, help="Blocks, 0-based, with commas."),
    fields: str | None = typer.Option(
        None, help="Of maps, predictions, whole, hidden, pooled: what to keep, with commas."
    ),
    link: bool = typer.Option(False, "--link", help="Hard-link units that are kept whole."),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Write a part of CACHE as a cache of its own."""
    selection = Selection(
        units=tuple(units) or None,
        keys=read_keys(keys) if keys else None,
        layers=layer_numbers(layers),
        fields=_tables(fields),
    )
    if selection == Selection():
        raise InputError("expected --units, --keys, --layers or --fields, got none: the whole cache would be copied")
    with working("subset"):
        report = run_subset(Cache(cache), out, selection, link=link)
    if json:
        print_json(report)
    else:
        console.print(_report_table(report, out))


def _tables(text: str | None) -> tuple[CacheTable, ...] | None:
    if text is None:
        return None
    known: dict[str, CacheTable] = {name: name for name in get_args(CacheTable)}
    unknown = [name for name in text.split(",") if name not in known]
    if unknown:
        raise InputError(f"expected --fields of {', '.join(known)}, with commas, got {text!r}")
    return tuple(known[name] for name in text.split(","))


def _report_table(report: SubsetReport, out: Path) -> Table:
    table = Table(title=escape(f"part in {out}"), show_header=False)
    rows = {
        "fingerprint": f"{report.fingerprint[:16]} ({'changed' if report.changes else 'the same'})",
        "changes": "\n".join(report.changes) or "-",
        "contents": f"{report.pairs:,} pairs of {report.samples:,} samples in {report.units:,} units",
        "units as they were": f"{report.copied:,}",
        "units left out": f"{report.left_out:,}",
        "size": f"{report.bytes / 1e6:,.1f} of {report.bytes_before / 1e6:,.1f} MB",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table
