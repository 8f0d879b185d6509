"""`dde-cache data import`: pictures and questions into WebDataset shards."""

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from dde_cache.errors import InputError
from dde_cache.importers.common import LEFT_OUT_NAME, Imported, Source, import_samples
from dde_cache.importers.easy_vqa import easy_vqa_source
from dde_cache.importers.emoji import emoji_source
from dde_cache.importers.jsonl import jsonl_source
from dde_cache.importers.karpathy import karpathy_source
from dde_cache.importers.nlvr import nlvr_source
from dde_cache.importers.nlvr2 import nlvr2_source
from dde_cache.importers.shapes import shapes_source
from dde_cache.importers.snli_ve import snli_ve_source
from dde_cache.importers.sort_of_clevr import sort_of_clevr_source
from dde_cache.importers.vqav2 import vqav2_source

from .console import console, errors, print_json, progress

app = typer.Typer(no_args_is_help=True)


class SourceName(StrEnum):
    """Where samples come from."""

    shapes = "shapes"
    sort_of_clevr = "sort-of-clevr"
    easy_vqa = "easy-vqa"
    nlvr = "nlvr"
    vqav2 = "vqav2"
    nlvr2 = "nlvr2"
    snli_ve = "snli-ve"
    karpathy = "karpathy"
    emoji = "emoji"
    jsonl = "jsonl"


_OPTIONS_OF = {
    SourceName.shapes: ("count", "grid", "cell", "texts", "kinds", "seed"),
    SourceName.sort_of_clevr: ("count", "seed"),
    SourceName.easy_vqa: (),
    SourceName.nlvr: ("from",),
    SourceName.vqav2: ("from", "images", "annotations"),
    SourceName.nlvr2: ("from", "images"),
    SourceName.snli_ve: ("from", "images"),
    SourceName.karpathy: ("from", "images"),
    SourceName.emoji: ("from",),
    SourceName.jsonl: ("from",),
}

_FROM = {
    SourceName.nlvr: "the folder or tar of NLVR",
    SourceName.vqav2: "the file of questions",
    SourceName.nlvr2: "the file of examples, such as dev.json",
    SourceName.snli_ve: "the file of examples, such as snli_ve_dev.jsonl",
    SourceName.karpathy: "dataset_flickr30k.json or dataset_coco.json",
    SourceName.emoji: "the folder of captions.jsonl",
    SourceName.jsonl: "the file of JSON lines",
}


@app.callback()
def group() -> None:
    """Turn pictures and questions into WebDataset shards."""


@app.command(name="import")
def import_(
    source: SourceName = typer.Argument(help="Where the samples come from."),
    out: Path = typer.Option(..., help="Folder for the shards of one split; new, empty, or ours."),
    split: str | None = typer.Option(
        None, help="train, valid, test; nlvr: dev, test, hidden; karpathy: train, val, test, restval; else any name."
    ),
    from_: Path | None = typer.Option(
        None, "--from", help="The published file, of nlvr and emoji the folder; jsonl: the file of lines."
    ),
    images: Path | None = typer.Option(None, help="vqav2, nlvr2, snli-ve, karpathy: pictures, a folder or a tar."),
    annotations: Path | None = typer.Option(None, help="vqav2: the file of answers; without it, no labels."),
    count: int | None = typer.Option(None, help="shapes, sort-of-clevr: pictures (1000)."),
    texts: int | None = typer.Option(None, help="shapes: questions a picture (6)."),
    kinds: str | None = typer.Option(None, help="shapes: kinds in turn, with commas (exists,row,neighbour)."),
    grid: int | None = typer.Option(None, help="shapes: cells a side (3)."),
    cell: int | None = typer.Option(None, help="shapes: pixels a cell (12)."),
    seed: int | None = typer.Option(None, help="shapes, sort-of-clevr: seed (0)."),
    shard_size: int = typer.Option(1000, help="Samples a tar."),
    labels: str | None = typer.Option(None, help="Labels allowed: a,b,c or a file with one a line."),
    skip_bad: bool = typer.Option(False, "--skip-bad", help=f"Leave bad samples out, list them in {LEFT_OUT_NAME}."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace shards that are in --out."),
    json: bool = typer.Option(False, "--json", help="Print the counts as JSON."),
) -> None:
    """Check every sample of SOURCE and write them as shards, or list all that is wrong and write nothing."""
    given = {"from": from_, "count": count, "grid": grid, "cell": cell, "texts": texts, "seed": seed}
    given |= {"images": images, "annotations": annotations}
    given["kinds"] = None if kinds is None else tuple(kinds.split(","))
    options = {name: value for name, value in given.items() if value is not None}
    found = _source(source, split, options)
    allowed = _labels(labels)
    try:
        with progress() as bar:
            task = bar.add_task(source.value, total=found.total)
            imported = import_samples(
                found,
                out,
                shard_size=shard_size,
                labels=allowed,
                skip_bad=skip_bad,
                overwrite=overwrite,
                progress=lambda number: bar.update(task, completed=number),
            )
    except KeyboardInterrupt as stop:
        errors.print("[bold yellow]stopped;[/] nothing was written. Run the same command again.")
        raise typer.Exit(130) from stop
    if json:
        print_json(_counts(imported))
    else:
        _show(imported)


def _counts(imported: Imported) -> dict[str, Any]:
    """What was written, for programs."""
    index = imported.index
    return {
        "out": str(imported.folder),
        "already": imported.already,
        "source": index.source,
        "split": index.split,
        "shards": len(index.shards),
        "samples": sum(entry.samples for entry in index.shards),
        "pairs": sum(entry.pairs for entry in index.shards),
        "left_out": index.left_out,
        "answers": [
            {"kind": kind, "label": label, "texts": count} for (kind, label), count in imported.answers.items()
        ],
    }


def _source(name: SourceName, split: str | None, options: dict[str, Any]) -> Source:
    wrong = [f"--{option}" for option in options if option not in _OPTIONS_OF[name]]
    if wrong:
        raise InputError(f"expected options of {name.value}, got {', '.join(wrong)}, which it does not have")
    if name is SourceName.shapes:
        return shapes_source(split or "train", options.pop("count", 1000), **options)
    if name is SourceName.sort_of_clevr:
        return sort_of_clevr_source(split or "train", options.pop("count", 1000), **options)
    if name is SourceName.easy_vqa:
        return easy_vqa_source(split or "train")
    if "from" not in options:
        raise InputError(f"{name.value} needs --from, {_FROM[name]}")
    if "images" in _OPTIONS_OF[name] and "images" not in options:
        raise InputError(f"{name.value} needs --images, a folder or an uncompressed tar of its pictures")
    return _published(name, split, options)


def _published(name: SourceName, split: str | None, options: dict[str, Any]) -> Source:
    """A source that reads files; they were asked for."""
    path, images = options["from"], options.get("images")
    if name is SourceName.vqav2:
        return vqav2_source(split, path, images, options.get("annotations"))
    if name is SourceName.nlvr2:
        return nlvr2_source(split, path, images)
    if name is SourceName.snli_ve:
        return snli_ve_source(split, path, images)
    if name is SourceName.karpathy:
        return karpathy_source(split or "train", path, images)
    if name is SourceName.emoji:
        return emoji_source(split or "train", path)
    if name is SourceName.jsonl:
        return jsonl_source(split or "train", path)
    if split is None:
        raise InputError("nlvr needs --split dev, test or hidden; train on hidden, validate on dev, report on test")
    return nlvr_source(split, path)


def _labels(given: str | None) -> list[str] | None:
    if given is None:
        return None
    path = Path(given)
    if "," not in given and path.is_file():
        try:
            names = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--labels {given}: expected a UTF-8 file with one label a line: {error}") from error
    else:
        names = given.split(",")
    labels = [name.strip() for name in names if name.strip()]
    if not labels:
        raise InputError(f"--labels {given}: expected at least one label")
    return labels


def _show(imported: Imported) -> None:
    index, folder = imported.index, imported.folder
    samples, pairs = (sum(getattr(entry, name) for entry in index.shards) for name in ("samples", "pairs"))
    where = escape(str(folder))
    if imported.already:
        console.print(f"{where} already holds this import ({samples:,} samples); --overwrite makes it again")
        return
    kinds: dict[str | None, Counter[str | None]] = {}
    for (kind, label), count in imported.answers.items():
        kinds.setdefault(kind, Counter())[label] = count
    table = Table(title=f"{escape(index.source)}, split {escape(index.split)}")
    table.add_column("kind")
    table.add_column("texts", justify="right")
    table.add_column("most frequent label")
    table.add_column("share", justify="right")
    for kind, counts in sorted(kinds.items(), key=lambda item: item[0] or ""):
        label, count = min(counts.items(), key=lambda item: (-item[1], item[0] or ""))
        name, shown = escape(kind or "-"), escape(label or "-")
        table.add_row(name, f"{counts.total():,}", shown, f"{count / counts.total():.1%}")
    console.print(table)
    megabytes = sum((folder / entry.name).stat().st_size for entry in index.shards) / 1e6
    shards = f"{len(index.shards):,} shard{'s' if len(index.shards) > 1 else ''}"
    console.print(f"{samples:,} samples, {pairs:,} pairs, {shards}, {megabytes:.1f} MB in {where}", highlight=False)
    if index.left_out:
        listed = escape(str(folder / LEFT_OUT_NAME))
        console.print(f"[yellow]{index.left_out:,} samples left out[/], listed in {listed}", highlight=False)
