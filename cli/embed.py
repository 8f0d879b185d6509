"""`dde-cache embed`."""

from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.embed import EmbedReport, Images, Texts
from dde_cache.embed import embed as run_embed
from dde_cache.errors import InputError
from dde_cache.inference import Student
from dde_cache.pictures import open_pictures
from dde_cache.questions import read_questions

from .console import console, print_json, progress


def embed(
    run: str = typer.Argument(help="A run of `train`: its folder."),
    out: Path = typer.Option(..., help="Folder of the store; new, empty, or one that was cut short."),
    images: str | None = typer.Option(None, metavar="DIR|SHARDS", help="Folder of pictures, or shards."),
    texts: str | None = typer.Option(None, metavar="FILE|SHARDS", help="JSON lines with `text`, or shards."),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out pictures that cannot be read."),
    batch_size: int = typer.Option(32, min=1, help="Pictures or texts a forward pass."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Encode pictures or texts once, and keep their vectors with the student's fingerprint."""
    if (images is None) == (texts is None):
        raise InputError(f"expected --images or --texts, got {'neither' if images is None else 'both'}")
    if skip_bad and texts is not None:
        raise InputError("expected --skip-bad with --images alone: every text can be read")
    student = Student.from_pretrained(run, device)
    rows = (
        Texts(read_questions(texts), Path(texts).name) if texts else Images(open_pictures(str(images), student.images))
    )
    with progress() as bar:
        task = bar.add_task("embed", total=len(rows), visible=False)
        report = run_embed(
            student,
            rows,
            out,
            batch_size=batch_size,
            skip_bad=skip_bad,
            advance=lambda count: bar.update(task, advance=count, visible=True),
        )
    if json:
        print_json(report)
    else:
        console.print(_table(report, out))


def _table(report: EmbedReport, out: Path) -> Table:
    table = Table(title=escape(f"{report.kind}s in {out}"), show_header=False)
    table.add_row("student", report.student[:16])
    table.add_row("vectors", f"{report.rows:,} in {report.units:,} units ({report.units_kept:,} were there)")
    if report.left_out:
        table.add_row("left out", f"{report.left_out:,} that cannot be read")
    if report.texts_cut:
        table.add_row("cut", f"{report.texts_cut:,} texts longer than the student reads")
    table.add_row("size", f"{report.bytes / 1e6:,.1f} MB")
    table.add_row("time", f"{report.seconds:,.1f} s")
    return table
