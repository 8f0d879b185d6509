"""`dde-cache push` and `dde-cache pull`."""

from pathlib import Path

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dde_cache.share import TransferReport, Watch
from dde_cache.share import pull as run_pull
from dde_cache.share import push as run_push
from dde_cache.spec import UnitEntry

from .console import byte_progress, console, print_json, warn


def push(
    cache: Path = typer.Argument(help="Folder of the cache."),
    url: str = typer.Argument(help="Where it goes: a path, s3://BUCKET/FOLDER, or hf://datasets/OWNER/NAME."),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Send CACHE to URL, or add its units to the cache of the same targets that is there."""
    with byte_progress("{task.fields[units]}") as bar:
        report = run_push(cache, url, _watch(bar, "push"))
    _show(report, json)
    if report.to_fill_in:
        warn(
            escape(f"the card still says `fill in` ({', '.join(report.to_fill_in)}): fill in {cache}/README.md and ")
            + "push again, so that others know what they may do with it"
        )


def pull(
    url: str = typer.Argument(help="Where the cache is: s3://, https://, hf://datasets/OWNER/NAME, or a path."),
    out: Path = typer.Option(..., help="Folder for it; an unfinished pull there goes on."),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Fetch the cache at URL whole, each unit checked, or what is missing of it."""
    with byte_progress("{task.fields[units]}") as bar:
        report = run_pull(url, out, _watch(bar, "pull"))
    _show(report, json)


def _watch(bar: Progress, name: str) -> Watch:
    task = bar.add_task(name, total=None, units="")
    done = {"units": 0, "of": 0}

    def start(total: int, units: int) -> None:
        done["of"] = units
        bar.update(task, total=total, units=f"0/{units} units")

    def unit(_entry: UnitEntry) -> None:
        done["units"] += 1
        bar.update(task, units=f"{done['units']}/{done['of']} units")

    return Watch(start, unit, lambda count: bar.update(task, advance=count))


def _show(report: TransferReport, json: bool) -> None:
    if json:
        print_json(report)
        return
    table = Table(title=escape(report.target), show_header=False)
    rows = {
        "from": report.source,
        "fingerprint": report.fingerprint[:16],
        "units": f"{report.units:,} ({report.total_bytes / 1e6:,.1f} MB)",
        "transferred": f"{report.transferred:,} ({report.bytes / 1e6:,.1f} MB) in {report.seconds:.1f} s",
        "there already": f"{report.kept:,}",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    console.print(table)
