"""`dde-cache mine`."""

from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.candidates import MAX_TOP
from dde_cache.mine import mine as run_mine
from dde_cache.samples import open_shards

from .console import console, print_json, progress


def mine(
    run: str = typer.Argument(help="A run of `train --task retrieval`, or of pre-training."),
    shards: str = typer.Argument(help="Folder, tar or brace pattern of shards."),
    out: Path = typer.Option(..., help="File of candidates; a new one for each round."),
    top: int = typer.Option(8, min=1, max=MAX_TOP, help="Candidates of each text and each picture."),
    batch_size: int = typer.Option(32, min=1, help="Pictures or texts a forward pass."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """List for each text the pictures, and for each picture the texts, that the student takes for right and are not."""
    opened = open_shards(shards)
    with progress() as bar:
        task = bar.add_task("mine", total=sum(len(shard.keys) for shard in opened))
        report = run_mine(
            run,
            opened,
            out,
            top=top,
            batch_size=batch_size,
            device=device,
            advance=lambda count: bar.update(task, advance=count),
        )
    if json:
        print_json(report)
        return
    console.print(
        f"round {report.round}: {report.top} candidates each of {report.texts:,} texts and {report.samples:,} pictures "
        f"in {escape(str(out))} ({report.bytes / 1e6:,.1f} MB)",
        highlight=False,
    )
