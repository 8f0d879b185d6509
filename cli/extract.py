"""`dde-cache extract`."""

import time
from pathlib import Path

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dde_cache.configs import resolve_config
from dde_cache.errors import InputError
from dde_cache.extract import ExtractConfig, ExtractProgress, ExtractSummary
from dde_cache.extract import extract as run_extract
from dde_cache.samples import open_shards
from dde_cache.spec import UnitEntry

from .console import console, errors, print_json, progress


def extract(
    shards: str = typer.Argument(help="Folder, tar or brace pattern of shards."),
    teacher: str = typer.Option(..., help="ViLT checkpoint: folder, hub id, or `sample`."),
    out: Path = typer.Option(..., help="Folder of the cache; an unfinished one is continued."),
    config: Path | None = typer.Option(None, help="YAML file of settings."),
    k: str | None = typer.Option(None, help="Kept keys a row, or `all`. Default 8."),
    weights: str | None = typer.Option(None, help="log8, float16 or float32. Default log8."),
    layers: str | None = typer.Option(None, help="Blocks, 0-based, with commas. Default: the last."),
    heads: str | None = typer.Option(None, help="all or mean. Default all."),
    queries: str | None = typer.Option(None, help="valid, or all (the published recipe's padded rows too)."),
    dtype: str | None = typer.Option(None, help="float32, bfloat16 or float16: in which the teacher runs."),
    batch_size: int | None = typer.Option(None, help="Pairs a forward pass. Default 64."),
    workers: int | None = typer.Option(None, help="Processes that read ahead. Default 0."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, ... Default cpu."),
    json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Run the teacher once over SHARDS and write its attention and logits, one unit a shard."""
    settings = resolve_config(
        ExtractConfig,
        config,
        k=_kept(k),
        layers=_numbers(layers),
        weights=weights,
        heads=heads,
        queries=queries,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    if k == "all":
        settings = settings.model_copy(update={"k": None})
    opened = open_shards(shards)
    with progress("{task.fields[rate]} pairs/s", "kept {task.fields[kept]}", "{task.fields[size]}") as bar:
        summary = run_extract(opened, teacher, out, settings, _watch(bar))
    if json:
        print_json(summary)
    else:
        console.print(_summary_table(summary, out))


def _watch(bar: Progress) -> ExtractProgress:
    """Draw an extraction's progress."""
    task = bar.add_task("extract", total=None, visible=False, rate="-", kept="-", size="-")
    sizes = {"bytes": 0, "pairs": 0}
    begin = time.perf_counter()

    def start(pairs: int, finished: int, grid: str) -> None:
        bar.update(task, total=pairs, visible=True)
        errors.print(f"pictures {grid}", highlight=False)
        if finished:
            errors.print(f"{finished:,} pairs are in finished units and are skipped", highlight=False)

    def batch(pairs: int, kept: float) -> None:
        done = bar.tasks[task].completed + pairs
        rate = done / (time.perf_counter() - begin)
        bar.update(task, completed=done, rate=f"{rate:,.0f}", kept=f"{kept:.3f}")

    def unit(entry: UnitEntry) -> None:
        sizes["bytes"] += entry.size
        sizes["pairs"] += entry.pairs
        bar.update(task, size=f"{sizes['bytes'] / sizes['pairs']:,.0f} B/pair")

    return ExtractProgress(start, batch, unit)


def _kept(k: str | None) -> int | None:
    if k is None or k == "all":
        return None
    try:
        return int(k)
    except ValueError as error:
        raise InputError(f"expected --k as a number or `all`, got {k!r}") from error


def _numbers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"expected --layers as numbers with commas, for example 10,11, got {text!r}") from error


def _summary_table(summary: ExtractSummary, out: Path) -> Table:
    table = Table(title=escape(f"targets in {out}"), show_header=False)
    rate = summary.pairs / summary.seconds
    rows = {
        "pairs extracted": f"{summary.pairs:,} in {summary.seconds:.1f} s ({rate:,.0f} pairs/s)",
        "pairs in finished units": f"{summary.skipped_pairs:,}",
        "units": f"{summary.units:,}",
        "kept mass": "-" if summary.kept_mass is None else f"{summary.kept_mass:.4f}",
        "bytes a pair": f"{summary.bytes_a_pair:,.0f}",
        "dense float16 / stored": "-" if summary.dense_ratio is None else f"{summary.dense_ratio:.1f}",
        "texts that were cut": f"{summary.cut_texts:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
