"""`dde-cache eval`."""

from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.evaluate import evaluate, load_subject
from dde_cache.samples import open_shards

from .console import console, print_json, progress
from .places import CACHE_DIR, CACHE_LIMIT, opened
from .tables import score_table


def eval_(
    subject: str = typer.Argument(metavar="RUN|TEACHER", help="A run of `train`, or a teacher."),
    shards: str = typer.Argument(help="Labelled shards."),
    targets: str | None = typer.Option(
        None, help="Cache of these shards (folder or URL), for the agreement with the teacher."
    ),
    task_name: str | None = typer.Option(
        None, "--task", help="Of a teacher (classification), or module:Class of a run with a task of your own."
    ),
    baseline: str | None = typer.Option(None, help="Training shards of the baselines; a run keeps its own."),
    batch_size: int = typer.Option(256, min=1, help="Pairs a forward pass."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    cache_dir: Path | None = CACHE_DIR,
    cache_limit: str | None = CACHE_LIMIT,
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Accuracy overall and by kind of question, beside what needs no picture."""
    loaded = load_subject(subject, device, task_name)
    samples = open_shards(shards)
    with progress() as bar:
        task = bar.add_task("eval", total=sum(len(sample.texts) for shard in samples for sample in shard))
        found = evaluate(
            loaded,
            samples,
            cache=opened(targets, cache_dir, cache_limit) if targets else None,
            baseline_shards=open_shards(baseline) if baseline else (),
            batch_size=batch_size,
            advance=lambda pairs: bar.update(task, advance=pairs),
        )
    if json:
        print_json(found)
    else:
        console.print(score_table(found, escape(f"{subject} on {shards}")))
        for name, value in found.metrics.items():
            console.print(f"{escape(name)} {value:.3f}", highlight=False)
