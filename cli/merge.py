"""`dde-cache merge`."""

from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.errors import InputError
from dde_cache.merge import MergeReport, OnOverlap
from dde_cache.merge import merge as run_merge
from dde_cache.samples import open_shards
from dde_cache.store import Cache

from .console import console, print_json, working


def merge(
    caches: list[Path] = typer.Argument(help="Folders of two or more caches; the first one wins."),
    out: Path = typer.Option(..., help="Folder of the merged cache; new or empty."),
    on_overlap: str = typer.Option("error", help="Keys that come twice: error, or first (from the first cache)."),
    shards: str | None = typer.Option(None, help="Report the samples of these shards that have no targets."),
    link: bool = typer.Option(False, "--link", help="Hard-link units instead of copying them."),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Put CACHES of the same targets together; units are copied as they are."""
    policies: dict[str, OnOverlap] = {"error": "error", "first": "first"}
    if on_overlap not in policies:
        raise InputError(f"expected --on-overlap error or first, got {on_overlap!r}")
    with working("merge"):
        report = run_merge(
            [Cache(folder) for folder in caches],
            out,
            on_overlap=policies[on_overlap],
            shards=None if shards is None else open_shards(shards),
            link=link,
        )
    if json:
        print_json(report)
        return
    console.print(_table(report, out))
    if report.overlaps:
        console.print(_overlap_table(report))
    if report.gaps:
        console.print(_gap_table(report))


def _table(report: MergeReport, out: Path) -> Table:
    table = Table(title=escape(f"merged into {out}"), show_header=False)
    missing = None if report.gaps is None else sum(len(gap.missing) for gap in report.gaps)
    rows = {
        "fingerprint": report.fingerprint[:16],
        "contents": f"{report.pairs:,} pairs of {report.samples:,} samples in {report.units:,} units",
        "size": f"{report.bytes / 1e6:,.1f} MB",
        "in several caches, taken once": f"{report.taken_once:,} units",
        "keys that came twice": f"{sum(len(one.duplicates) for one in report.overlaps):,} the same, "
        f"{sum(len(one.conflicts) for one in report.overlaps):,} with other content",
        "left out / written anew for it": f"{report.left_out:,} / {report.rewritten:,} units",
        "renamed": f"{len(report.renamed):,} units",
        "samples without targets": "not asked (--shards)" if missing is None else f"{missing:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _overlap_table(report: MergeReport) -> Table:
    table = Table(title="keys that came twice")
    for name in ("taken from", "not from", "same", "other", "for example"):
        table.add_column(name, overflow="fold", justify="right" if name in ("same", "other") else "left")
    for one in report.overlaps:
        keys = [*one.duplicates, *one.conflicts]
        places = [escape(f"{Path(place.cache).name}/{place.unit}") for place in (one.first, one.second)]
        table.add_row(*places, f"{len(one.duplicates):,}", f"{len(one.conflicts):,}", escape(keys[0]))
    return table


def _gap_table(report: MergeReport) -> Table:
    table = Table(title="samples without targets")
    for name in ("shard", "samples", "without", "elsewhere", "for example"):
        table.add_column(name, overflow="fold", justify="left" if name in ("shard", "for example") else "right")
    for gap in report.gaps or ():
        counts = (gap.samples, len(gap.missing), gap.elsewhere)
        table.add_row(escape(gap.shard), *(f"{count:,}" for count in counts), escape(gap.missing[0]))
    return table
