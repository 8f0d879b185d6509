"""`dde-cache view`."""

from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.errors import InputError
from dde_cache.gallery import Choice
from dde_cache.gallery import view as run_view
from dde_cache.samples import open_shards
from dde_cache.subset import read_keys

from .console import console, print_json, progress
from .places import CACHE_DIR, CACHE_LIMIT, opened


def view(
    cache: str = typer.Argument(help="Folder of the cache, or its URL (s3://, https://, hf://)."),
    shards: str = typer.Argument(help="The shards that it was made from."),
    out: Path = typer.Option(..., help="The HTML file to write."),
    run: Path | None = typer.Option(None, help="A run of `train`, whose student stands beside the teacher."),
    key: list[str] = typer.Option([], help="Show this sample; may be given again. Default: the worst pairs."),
    keys: list[Path] = typer.Option([], help="Text file of sample keys to show, one a line; may be given again."),
    count: int | None = typer.Option(None, min=1, help="How many of the worst pairs. Default 24."),
    among: int | None = typer.Option(
        None, min=1, help="Pairs, spread evenly over the shards, among which the worst are looked for. Default 2000."
    ),
    layer: int | None = typer.Option(None, help="Block of the teacher, 0-based. Default: the run's, or the last."),
    view_number: int = typer.Option(0, min=0, help="Which view of each sample."),
    device: str | None = typer.Option(None, help="Where the student runs. Default cpu."),
    cache_dir: Path | None = CACHE_DIR,
    cache_limit: str | None = CACHE_LIMIT,
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Write a page that shows the attention in CACHE over the pictures of SHARDS."""
    listed = (*key, *sorted(read_keys(keys) if keys else ()))
    if listed and (count, among) != (None, None):
        raise InputError("expected --count and --among without --key and --keys: every text of those samples is shown")
    if device is not None and run is None:
        raise InputError("expected --device together with --run: the teacher's attention is read, not computed")
    chosen = Choice(tuple(dict.fromkeys(listed)), count or 24, among or 2000, layer, view_number)
    found, samples = opened(cache, cache_dir, cache_limit), open_shards(shards)
    with progress() as bar:
        task = bar.add_task("view", total=None)
        report = run_view(
            found,
            samples,
            out,
            chosen,
            run=run,
            device=device or "cpu",
            advance=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json:
        print_json(report)
        return
    size = f"{report.bytes / 1e6:,.1f} MB"
    console.print(f"{report.pairs:,} pairs ({report.order}) of layer {report.layer}, {size}", highlight=False)
    if report.learnt is not None:
        console.print(escape(report.learnt), highlight=False)
    console.print(f"open {escape(report.out)} in a browser", highlight=False, soft_wrap=True)
