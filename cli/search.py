"""`dde-cache search`."""

from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.embeddings import EmbeddingStore
from dde_cache.errors import InputError
from dde_cache.index import VectorIndex, search_index
from dde_cache.inference import Student
from dde_cache.search import Hit, SearchReport
from dde_cache.search import search as run_search

from .console import console, note, print_json, progress, warn, working


def search(
    run: str = typer.Argument(help="A run of `train`."),
    text: str | None = typer.Argument(None, help="A question or caption, for a store of pictures."),
    store: Path = typer.Option(..., help="Store made by `embed`."),
    image: Path | None = typer.Option(None, help="A picture, for a store of texts, instead of a text."),
    top: int = typer.Option(10, min=1, help="How many to show."),
    answer: str | None = typer.Option(
        None, help="Of a student that answers: rank by the probability of this answer to the question."
    ),
    index: Path | None = typer.Option(
        None, help="Folder made by `index`, by you: score what it proposes, not every row. Approximate."
    ),
    device: str = typer.Option("cpu", help="cpu, cuda, cuda:1, ..."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """The stored pictures that suit a text best, or the texts that suit a picture; every row is scored, or with --index
    those that it proposes."""
    if (text is None) == (image is None):
        raise InputError(f"expected a text or --image, got {'neither' if text is None else 'both'}")
    if text is not None and not text.strip():
        raise InputError("expected a text, got only white space")
    if index is not None and answer is not None:
        raise InputError("expected --index or --answer, got both: an index knows cosines, no probabilities of answers")
    opened = EmbeddingStore(store)
    student = Student.from_pretrained(run, device)
    query = image or str(text)
    hits = _every_row(student, opened, query, top, answer) if index is None else _by(index, student, opened, query, top)
    if json:
        print_json(SearchReport(hits=tuple(hits)))
    else:
        name = f"probability of {answer!r}" if answer is not None else "cosine"
        console.print(_table(hits, escape(f"{text or image} in {store}"), escape(name)))


def _every_row(student: Student, store: EmbeddingStore, query: str | Path, top: int, answer: str | None) -> list[Hit]:
    with progress() as bar:
        task = bar.add_task("search", total=len(store), visible=False)
        return run_search(
            student,
            store,
            query,
            top=top,
            answer=answer,
            advance=lambda rows: bar.update(task, advance=rows, visible=True),
        )


def _by(folder: Path, student: Student, store: EmbeddingStore, query: str | Path, top: int) -> list[Hit]:
    with working("read the index"):
        index = VectorIndex.open(folder, store)
    recall = index.record.recall
    note(f"approximate: this index found {recall.value:.3f} of the best {recall.at} when it was built")
    hits = search_index(student, index, query, top=top)
    if len(hits) < min(top, len(store)):
        warn(f"this index proposed only {len(hits):,} rows; build one that looks longer, or leave --index out")
    return hits


def _table(hits: list[Hit], title: str, score: str) -> Table:
    table = Table(title=title)
    table.add_column("", justify="right")
    table.add_column(score, justify="right")
    table.add_column("key", overflow="fold")
    texts = any(hit.text for hit in hits)
    if texts:
        table.add_column("text", overflow="fold")
    for hit in hits:
        row = [str(hit.rank), f"{hit.score:.4f}", _shown(hit.key)]
        table.add_row(*row, *([_shown(hit.text)] if texts else []))
    return table


def _shown(text: str) -> str:
    """A store may be a stranger's: nothing of it steers the terminal."""
    return escape("".join(letter if letter.isprintable() else "\ufffd" for letter in text))
