"""`dde-cache predict`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.markup import escape

from dde_cache.embeddings import EmbeddingStore
from dde_cache.inference import Student
from dde_cache.predict import Prediction, write_lines
from dde_cache.predict import predict as run_predict
from dde_cache.questions import read_questions

from .console import note, progress


def predict(
    run: str = typer.Argument(help="A run of `train`."),
    image_store: Path = typer.Option(..., help="Store of the pictures' vectors, made by `embed --images`."),
    questions: str = typer.Option(..., metavar="FILE|SHARDS", help="JSON lines with `text` and `image`, or shards."),
    out: Path | None = typer.Option(None, help="File for the answers; without it, they are printed."),
    top: int = typer.Option(5, min=1, help="Answers to give with their probabilities."),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
) -> None:
    """Answer questions about stored pictures: one JSON object a line, in the order of the questions."""
    store = EmbeddingStore(image_store)
    student = Student.from_pretrained(run, device)
    asked = read_questions(questions)
    answers = run_predict(student, store, asked, top=top)
    with progress() as bar:
        task = bar.add_task("predict", total=len(asked), visible=False)

        def counted() -> Iterator[Prediction]:
            for answer in answers:
                yield answer
                bar.update(task, advance=1, visible=True)

        if out is None:
            _print(counted())
        else:
            count = write_lines(out, counted())
    if out is not None:
        note(f"{count:,} answers in {escape(str(out))}")


def _print(answers: Iterator[Prediction]) -> None:
    try:
        for answer in answers:
            sys.stdout.write(answer.model_dump_json() + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads (`head`) has enough. What is left in the buffer must not be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
