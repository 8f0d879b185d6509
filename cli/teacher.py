"""`dde-cache teacher train`."""

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.configs import resolve_config
from dde_cache.fit import Progress as FitProgress
from dde_cache.ranks import Ranks
from dde_cache.samples import open_shards
from dde_cache.teach import TeachConfig, train_teacher

from .console import console, print_json, progress
from .tables import score_table

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Train a fusion teacher of your own."""


@app.command()
def train(
    shards: str = typer.Argument(help="Folder, tar or brace pattern of labelled training shards."),
    out: Path = typer.Option(..., help="Folder of the teacher."),
    valid: str | None = typer.Option(None, help="Shards that choose the best checkpoint."),
    init: str | None = typer.Option(None, help="ViLT checkpoint to fine-tune; without it, random weights."),
    task_name: str | None = typer.Option(
        None, "--task", help="classification, vqa, nlvr2, entailment, or module:Class of your own."
    ),
    config: Path | None = typer.Option(None, help="YAML file of settings (docs/cli.md lists them)."),
    set_: list[str] = typer.Option([], "--set", help="One setting as name=value, such as layers=3; may be repeated."),
    steps: int | None = typer.Option(None, help="Optimizer steps. Default 1000."),
    batch_size: int | None = typer.Option(None, help="Pairs a step. Default 128."),
    learning_rate: float | None = typer.Option(None, help="Highest rate, after the warm-up. Default 0.0005."),
    precision: str | None = typer.Option(None, help="no (float32), bf16 or fp16. Default no."),
    seed: int | None = typer.Option(None, help="Of weights, order and dropout. Default 0."),
    resume: bool = typer.Option(False, "--resume", help="Go on from the newest checkpoint in --out."),
    json: bool = typer.Option(False, "--json", help="Print the score as JSON."),
) -> None:
    """Train or fine-tune a ViLT with a task head, and save it with processor, tokenizer and card."""
    settings = resolve_config(
        TeachConfig,
        config,
        set_,
        task=task_name,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
        seed=seed,
    )
    training, held_out = open_shards(shards), open_shards(valid) if valid else []
    ranks = Ranks()
    bar = progress("loss {task.fields[loss]}", "valid {task.fields[valid]}")
    bar.disable = bar.disable or not ranks.first
    with bar:
        task = bar.add_task("prepare", total=None, loss="-", valid="-")

        def step(number: int, record: Mapping[str, float]) -> None:
            bar.update(task, completed=number, loss=f"{record['loss']:.3f}")

        def valid_accuracy(number: int, accuracy: float) -> None:
            bar.update(task, completed=number, valid=f"{accuracy:.3f}")

        taught = train_teacher(
            training,
            out,
            settings,
            init=init,
            valid=held_out,
            resume=resume,
            source=shards,
            progress=FitProgress(
                step, valid_accuracy, lambda total: bar.update(task, total=total, description="teacher")
            ),
        )
    if not ranks.first:
        return
    if json:
        print_json({"out": str(out), "score": None if taught.score is None else taught.score.model_dump()})
        return
    if taught.score is not None:
        console.print(score_table(taught.score, escape(f"{out} on {valid}")))
    console.print(f"teacher saved in {out}", highlight=False)
