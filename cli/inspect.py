"""`dde-cache inspect`."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.spec import TargetSpec
from dde_cache.summary import CacheSummary, PairLinks, pair_links, summarise

from .console import console, print_json, working
from .places import CACHE_DIR, CACHE_LIMIT, opened


def inspect(
    cache: str = typer.Argument(help="Folder of the cache, or its URL (s3://, https://, hf://)."),
    key: str | None = typer.Option(None, help="Show one sample's strongest word-to-patch links."),
    text: int = typer.Option(0, help="Text slot of that sample."),
    top: int = typer.Option(3, min=1, help="Links a word."),
    units: int | None = typer.Option(None, min=1, help="Units whose rows are read. Default: all; of a URL, one."),
    cache_dir: Path | None = CACHE_DIR,
    cache_limit: str | None = CACHE_LIMIT,
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show what is in CACHE: identity, targets, counts, kept mass, size."""
    found = opened(cache, cache_dir, cache_limit)
    if key is not None:
        with working("look for the key"):
            links = pair_links(found, key, text, top)
        if json:
            print_json(links)
        else:
            console.print(_links_table(links))
        return
    with working("read the units"):
        summary = summarise(found, units or (1 if found.streams else None))
    if json:
        print_json(summary)
        return
    console.print(_identity_table(summary, cache))
    if summary.kept_mass:
        console.print(_mass_table(summary))
    if summary.read_units < summary.units:
        console.print(f"(kept mass, tokens and dense size: of {summary.read_units} of {summary.units} units)")


def _identity_table(summary: CacheSummary, cache: str) -> Table:
    spec = summary.spec
    table = Table(title=escape(cache), show_header=False)
    labels = "none" if summary.labels is None else f"{len(summary.labels)} answers ({_first(summary.labels)})"
    steps = "" if spec.steps is None else f" of {spec.steps} steps"
    rows = {
        "fingerprint": summary.fingerprint[:16],
        "teacher": f"{spec.teacher.family}, weights {spec.teacher.weights[:12]}, {spec.dtype}",
        "maps": f"layers {', '.join(map(str, spec.layers))} of {spec.teacher_layers}; {spec.stored_heads} heads"
        + (" (mean)" if spec.heads == "mean" else "")
        if spec.layers
        else "none",
        "beside them": _further(spec),
        "views": f"{spec.views} ({spec.view}); passes: {', '.join(spec.passes)}",
        "kept": f"{spec.kept}, {spec.weights} weights{steps}, {spec.queries} rows",
        "logits": "none" if spec.classes is None else labels,
        "contents": f"{summary.pairs:,} pairs of {summary.samples:,} samples in {summary.units:,} units",
        "text tokens": f"{_range(summary.text_tokens)} (cut at {spec.text_length})",
        "image tokens": f"{_range(summary.image_tokens)} (patch {spec.patch_size} px, CLS)",
        "size": f"{summary.bytes / 1e6:,.1f} MB, {summary.bytes_a_pair:,.0f} bytes a pair",
        "dense float16": f"{summary.dense_bytes_a_pair:,.0f} bytes a pair, "
        f"{summary.dense_bytes_a_pair / summary.bytes_a_pair:.1f} times as much",
        "made with": ", ".join(f"{name} {version}" for name, version in summary.provenance.versions.items()),
        "made on": f"{summary.provenance.device}, batches of {summary.provenance.batch_size}",
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _further(spec: TargetSpec) -> str:
    found = ["rows over the whole sequence"] if spec.has_whole else []
    found += [
        f"{one.group} states of width {one.width}" + (", int8" if one.codec == "int8" else "") for one in spec.states
    ]
    return ", ".join(found) or "none"


def _range(ends: tuple[int, int] | None) -> str:
    return "-" if ends is None else f"{ends[0]} to {ends[1]}"


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
