"""`dde-cache repair`."""

from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.repair import RepairReport
from dde_cache.repair import repair as run_repair
from dde_cache.samples import open_shards

from .console import byte_progress, console, print_json
from .verify import show, watch


def repair(
    cache: Path = typer.Argument(help="Folder of the cache."),
    drop: bool = typer.Option(False, "--drop", help="Leave bad and missing units out."),
    shards: str | None = typer.Option(None, help="Extract them again from these shards, with --teacher."),
    teacher: str | None = typer.Option(None, help="The cache's teacher: folder, hub id, or `sample`."),
    accept_card: bool = typer.Option(False, "--accept-card", help="Seal README.md as it is now."),
    device: str = typer.Option("cpu", help="Where the teacher runs."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check every unit of CACHE; put the bad ones aside, or extract them again; write the manifest."""
    opened = None if shards is None else open_shards(shards)
    with byte_progress("{task.fields[name]}") as bar:
        report = run_repair(
            cache,
            drop=drop,
            shards=opened,
            teacher=teacher,
            accept_card=accept_card,
            device=device,
            progress=watch(bar),
        )
    if json:
        print_json(report)
    else:
        _show(report)
    if not report.after.sound:
        raise typer.Exit(1)


def _show(report: RepairReport) -> None:
    for bad in report.bad:
        console.print(escape(f"bad: {bad.name}: {'; '.join(bad.problems[:2])}"), highlight=False)
    for name in report.set_aside:
        console.print(escape(f"put aside: {name} (delete it when nobody needs it)"), highlight=False)
    for name in report.extracted:
        console.print(escape(f"extracted again: {name}"), highlight=False)
    for name in report.assets:
        console.print(escape(f"written again: assets/{name}"), highlight=False)
    console.print(f"sound units: {report.kept:,}; manifest {report.manifest}; card {report.card}", highlight=False)
    show(report.after)
