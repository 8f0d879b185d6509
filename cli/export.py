"""`dde-cache export`."""

from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.errors import InputError
from dde_cache.export import ExportRecord
from dde_cache.export import export as run_export
from dde_cache.inference import Student

from .console import console, print_json, progress

FORMATS = ("onnx",)


def export(
    run: Path = typer.Argument(help="A run of `train`."),
    format_: str = typer.Option("onnx", "--format", help="Which files: onnx."),
    out: Path | None = typer.Option(None, help="New folder for the files; without it, RUN/onnx."),
    json: bool = typer.Option(False, "--json", help="Print the record as JSON."),
) -> None:
    """Write a student's towers and head as ONNX files, each checked against torch."""
    if format_ not in FORMATS:
        raise InputError(f"expected --format {' or '.join(FORMATS)}, got {format_!r}")
    folder = run / format_ if out is None else out
    with progress() as bar:
        task = bar.add_task("export", total=3, visible=False)
        names: list[str] = []

        def begin(name: str) -> None:
            bar.update(task, completed=len(names), description=f"export {name}", visible=True)
            names.append(name)

        record = run_export(Student.from_pretrained(run), folder, advance=begin)
        bar.update(task, completed=3, description="export")
    if json:
        print_json(record)
    else:
        console.print(_table(record, folder))


def _table(record: ExportRecord, out: Path) -> Table:
    table = Table(title=escape(f"{out}, opset {record.opset}"))
    for name in ("file", "inputs", "output"):
        table.add_column(name)
    table.add_column("MB", justify="right")
    table.add_column("off torch by", justify="right")
    for name, file in record.files.items():
        inputs = "\n".join(f"{one} {list(axes)}".replace("'", "") for one, axes in file.inputs.items())
        table.add_row(name, escape(inputs), file.output, f"{file.size / 1e6:,.1f}", f"{file.largest_difference:.1e}")
    return table
