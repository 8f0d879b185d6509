"""`dde-cache index`."""

from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.embeddings import EmbeddingStore
from dde_cache.index import IndexRecord
from dde_cache.indexing import build_index

from .console import console, print_json, progress


def index(
    store: Path = typer.Argument(help="Store made by `embed`, of a student of `--task retrieval`."),
    out: Path = typer.Option(..., help="New folder for the index."),
    factory: str | None = typer.Option(
        None, help="FAISS's words for the kind of index, for example HNSW32; without it, one by the number of rows."
    ),
    parameters: str | None = typer.Option(
        None, help="FAISS's words for how long it looks, for example nprobe=64; kept in the index."
    ),
    queries: Path | None = typer.Option(
        None, metavar="STORE", help="Measure with these vectors, for example of texts; without it, with rows of STORE."
    ),
    json: bool = typer.Option(False, "--json", help="Print the record as JSON."),
) -> None:
    """Index a store's vectors for an approximate search, and measure what that misses."""
    opened = EmbeddingStore(store)
    asked = EmbeddingStore(queries) if queries else None
    with progress() as bar:
        task = bar.add_task("index", total=len(opened), visible=False)
        record = build_index(
            opened,
            out,
            factory=factory,
            parameters=parameters,
            queries=asked,
            advance=lambda stage, rows: bar.update(task, description=stage, advance=rows, visible=True),
        )
    if json:
        print_json(record)
    else:
        console.print(_table(record, store, out))


def _table(record: IndexRecord, store: Path, out: Path) -> Table:
    table = Table(title=escape(f"index of {store} in {out}"), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("vectors", f"{record.rows:,} of {record.kind}s, width {record.width}")
    table.add_row("kind", escape(f"{record.factory} {record.parameters}"))
    table.add_row(f"recall@{record.recall.at}", f"{record.recall.value:.3f} of the exact search's rows")
    rows = f"rows of {record.recall.source}" if record.recall.source else "rows of the store, each without itself"
    table.add_row("measured with", escape(f"{record.recall.queries:,} {rows}"))
    table.add_row("size", f"{record.size / 1e6:,.1f} MB")
    table.add_row("time", f"{record.seconds:,.1f} s")
    return table
