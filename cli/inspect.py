"""`dde-cache inspect`."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.store import Cache
from dde_cache.summary import CacheSummary, PairLinks, pair_links, summarise

from .console import console, print_json


def inspect(
    cache: Path = typer.Argument(help="Folder of the cache."),
    key: str | None = typer.Option(None, help="Show one sample's strongest word-to-patch links."),
    text: int = typer.Option(0, help="Text slot of that sample."),
    top: int = typer.Option(3, min=1, help="Links a word."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show what is in CACHE: identity, targets, counts, kept mass, size."""
    opened = Cache(cache)
    if key is not None:
        links = pair_links(opened, key, text, top)
        if json:
            print_json(links)
        else:
            console.print(_links_table(links))
        return
    summary = summarise(opened)
    if json:
        print_json(summary)
        return
    console.print(_identity_table(summary, cache))
    console.print(_mass_table(summary))


def _identity_table(summary: CacheSummary, cache: Path) -> Table:
    spec = summary.spec
    table = Table(title=escape(str(cache)), show_header=False)
    labels = "none" if summary.labels is None else f"{len(summary.labels)} answers ({_first(summary.labels)})"
    rows = {
        "fingerprint": summary.fingerprint[:16],
        "teacher": f"{spec.teacher.family}, weights {spec.teacher.weights[:12]}, {spec.dtype}",
        "maps": f"layers {', '.join(map(str, spec.layers))} of {spec.teacher_layers}; {spec.stored_heads} heads"
        + (" (mean)" if spec.heads == "mean" else ""),
        "kept": f"{'all keys' if spec.k is None else f'top {spec.k}'}, {spec.weights} weights, {spec.queries} rows",
        "logits": labels,
        "contents": f"{summary.pairs:,} pairs of {summary.samples:,} samples in {summary.units:,} units",
        "text tokens": f"{summary.text_tokens[0]} to {summary.text_tokens[1]} (cut at {spec.text_length})",
        "image tokens": f"{summary.image_tokens[0]} to {summary.image_tokens[1]} (patch {spec.patch_size} px, CLS)",
        "size": f"{summary.bytes / 1e6:,.1f} MB, {summary.bytes_a_pair:,.0f} bytes a pair",
        "dense float16": f"{summary.dense_bytes_a_pair:,.0f} bytes a pair, "
        f"{summary.dense_bytes_a_pair / summary.bytes_a_pair:.1f} times as much",
        "made with": ", ".join(f"{name} {version}" for name, version in summary.provenance.versions.items()),
        "made on": f"{summary.provenance.device}, batches of {summary.provenance.batch_size}",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _first(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")


def _mass_table(summary: CacheSummary) -> Table:
    table = Table(title="kept mass of a row: share of rows below")
    table.add_column("direction")
    table.add_column("mean", justify="right")
    names = {"t2i": "text to image", "i2t": "image to text"}
    shares = list(next(iter(summary.kept_mass.values())).quantiles)
    for share in shares:
        table.add_column(f"{float(share):.0%}", justify="right")
    for direction, mass in summary.kept_mass.items():
        table.add_row(names[direction], f"{mass.mean:.3f}", *(f"{mass.quantiles[share]:.3f}" for share in shares))
    return table


def _links_table(links: PairLinks) -> Table:
    answer = ""
    if links.logits:
        answer = f"\nteacher: {max(links.logits, key=links.logits.__getitem__)}"
    table = Table(title=escape(f"{links.key}, text {links.text}, layer {links.layer}{answer}"))
    table.add_column("word")
    table.add_column("strongest image tokens (mean over heads)")
    for word in links.words:
        table.add_row(escape(word.word), "; ".join(f"{link.image_token} ({link.weight:.2f})" for link in word.links))
    return table
