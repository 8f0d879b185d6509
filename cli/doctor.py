"""`dde-cache doctor`."""

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.doctor import DoctorReport, examine

from .console import console, print_json, working


def doctor(json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Say what is installed here, which devices there are, and whether the toolchain works; exit code 1 where not."""
    with working("look at this installation"):
        report = examine()
    if json:
        print_json(report)
    else:
        _show(report)
    if not report.healthy:
        raise typer.Exit(1)


def _show(report: DoctorReport) -> None:
    console.print(f"dde-cache {report.version}, Python {report.python}, {report.platform}", highlight=False)
    bad = [one for one in report.packages if not one.fits]
    console.print(_needed_table(report))
    console.print(_feature_table(report))
    console.print(_device_table(report))
    table = Table(title="toolchain: a tiny cache in a temporary folder", show_header=False)
    for check in report.checks:
        table.add_row(check.name, "works" if check.problem is None else escape(check.problem))
    console.print(table)
    verdict = "[bold green]healthy[/]" if report.healthy else "[bold red]not healthy[/]"
    advice = "; pip install -U " + " ".join(f"'{one.name}{one.wanted}'" for one in bad) if bad else ""
    console.print(verdict + escape(advice), highlight=False)


def _needed_table(report: DoctorReport) -> Table:
    table = Table(title="packages", show_header=False)
    for one in report.packages:
        wanted = "" if one.fits else f"  WRONG: expected {one.wanted or 'any version'}"
        table.add_row(one.name, escape((one.version or "missing") + wanted))
    return table


def _feature_table(report: DoctorReport) -> Table:
    table = Table(title="what else there is")
    table.add_column("for")
    table.add_column("is here")
    table.add_column("if not, install", overflow="fold")
    for one in report.features:
        table.add_row(escape(one.use), "yes" if one.installed else "no", escape("" if one.installed else one.install))
    return table


def _device_table(report: DoctorReport) -> Table:
    table = Table(title="devices")
    for name in ("device", "what it is", "precision"):
        table.add_column(name)
    for one in report.devices:
        table.add_row(one.name, escape(one.about), ", ".join(one.precisions))
    return table
