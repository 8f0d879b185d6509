"""`dde-cache report`."""

from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.compare import (
    Judged,
    Run,
    check_shards,
    check_task,
    check_unique,
    judge,
    kept_masses,
    read_runs,
    why_unscored,
)
from dde_cache.samples import open_shards
from dde_cache.sheet import write_report
from dde_cache.store import Cache

from .console import console, print_json, progress
from .places import CACHE_DIR, CACHE_LIMIT, opened


def report(
    runs: list[Path] = typer.Argument(help="Folders of one or more runs of `train`."),
    out: Path = typer.Option(..., help="The HTML file to write."),
    shards: str | None = typer.Option(
        None, help="Labelled shards on which the students are scored. Default: each run's validation shards."
    ),
    targets: str | None = typer.Option(None, help="Cache (folder or URL) whose kept mass is shown."),
    task_name: str | None = typer.Option(None, "--task", help="module:Class of runs with a task of your own."),
    device: str = typer.Option("cpu", help="Where the students run."),
    cache_dir: Path | None = CACHE_DIR,
    cache_limit: str | None = CACHE_LIMIT,
    json: bool = typer.Option(False, "--json", help="Print what was scored as JSON."),
) -> None:
    """Write a page of RUNS side by side: curves, accuracy by kind, confusion, times, kept mass, settings."""
    check_unique(runs)
    found = read_runs(runs)
    check_task(found, task_name)
    kept = _kept(None if targets is None else opened(targets, cache_dir, cache_limit))
    judged = {run.name: _judged(run, shards, task_name, device) for run in found}
    size = write_report(out, found, judged, kept)
    if json:
        scores = {name: one.report.model_dump() for name, one in judged.items() if isinstance(one, Judged)}
        print_json({"out": str(out), "bytes": size, "runs": [str(run) for run in runs], "scores": scores})
        return
    for name, one in judged.items():
        if isinstance(one, str):
            console.print(escape(f"{name}: {one}"), highlight=False)
    console.print(f"{len(found):,} runs, {size / 1e6:,.1f} MB", highlight=False)
    console.print(f"open {escape(str(out))} in a browser", highlight=False, soft_wrap=True)


def _judged(run: Run, shards: str | None, task: str | None, device: str) -> Judged | str:
    """Score a run, or say why not."""
    why = why_unscored(run, task)
    if why is not None:
        return why
    place = shards or check_shards(run)
    if place is None:
        return "not scored: it names no validation shards that are here; pass --shards"
    samples = open_shards(place)
    with progress() as bar:
        total = sum(len(sample.texts) for shard in samples for sample in shard)
        line = bar.add_task(run.name, total=total)
        return judge(run, samples, task=task, device=device, advance=lambda pairs: bar.update(line, advance=pairs))


def _kept(cache: Cache | None) -> dict[str, list[int]] | str:
    """Count a cache's kept mass, or say why there is nothing to count."""
    if cache is None:
        return "Not asked: pass --targets CACHE."
    with progress() as bar:
        line = bar.add_task("kept mass", total=len(cache.manifest.units))
        counts = kept_masses(cache, advance=lambda units: bar.update(line, advance=units))
    return counts or f"{cache.name}: every key of every row is kept ({cache.spec.weights}), so that none is lost."
