"""`dde-cache extract`."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dde_cache.configs import resolve_config
from dde_cache.errors import InputError
from dde_cache.extract import ExtractConfig, ExtractProgress, ExtractSummary, plan_extraction
from dde_cache.extract import extract as run_extract
from dde_cache.identity import STEPS
from dde_cache.plan import SAMPLE, ExtractPlan
from dde_cache.samples import Shard, open_shards
from dde_cache.scoring import ScoreConfig
from dde_cache.scoring import score as run_score
from dde_cache.spec import UnitEntry
from dde_cache.views import DEFAULT_RECIPE, RECIPES

from .console import console, note, print_json, progress, working

MAX_K = 32
"""Most keys of a row under `--mass` alone."""


def extract(
    shards: str = typer.Argument(help="Folder, tar or brace pattern of shards."),
    teacher: str = typer.Option(..., help="Checkpoint of a fusion encoder: folder, hub id, or `sample`."),
    out: Path = typer.Option(..., help="Folder of the cache; an unfinished one is continued."),
    config: Path | None = typer.Option(None, help="YAML file of settings (docs/cli.md lists them)."),
    candidates: Path | None = typer.Option(
        None, help="Score these instead (a file of `mine`) with the teacher's matching head."
    ),
    k: str | None = typer.Option(None, help="Keep the K strongest keys a row, or `all`, as log8. Default: sqrt8."),
    mass: float | None = typer.Option(None, help="Keep the keys of this share of a row's mass, for example 0.98."),
    max_k: int | None = typer.Option(None, help="With --mass: the most keys a row keeps. Default 32."),
    weights: str | None = typer.Option(
        None, help="sqrt8 (every key), log8, float16 or float32. Default sqrt8; with --k or --mass, log8."
    ),
    sqrt_steps: int | None = typer.Option(None, help=f"sqrt8: levels of a weight's square root. Default {STEPS}."),
    targets: str | None = typer.Option(
        None,
        help="cross (attention over the other modality), perhaps whole, hidden, pooled, with commas. Default cross.",
    ),
    states: str | None = typer.Option(None, help="Codec of hidden and pooled states: float16 (default) or int8."),
    layers: str | None = typer.Option(None, help="Blocks, 0-based, with commas. Default: the last."),
    predictions: bool | None = typer.Option(
        None, "--predictions/--no-predictions", help="Keep the teacher's logits, where it has a head. Default: keep."
    ),
    heads: str | None = typer.Option(None, help="all or mean. Default all."),
    queries: str | None = typer.Option(
        None, help="valid, or all (the published recipe's padded rows too). Default valid."
    ),
    dtype: str | None = typer.Option(
        None, help="float32, bfloat16 or float16: in which the teacher runs. Default float32."
    ),
    views: int | None = typer.Option(None, help="Augmented views of each sample. Default 1."),
    view_recipe: str | None = typer.Option(
        None, help=f"How views are drawn: {', '.join(RECIPES)}. Default with --views: {DEFAULT_RECIPE}."
    ),
    passes: str | None = typer.Option(
        None, help="matched, and masked or negative beside it, with commas; one forward pass each. Default matched."
    ),
    batch_size: int | None = typer.Option(None, help="Pairs a forward pass. Default 64."),
    workers: int | None = typer.Option(None, help="Processes that read ahead. Default 0."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, ... Default cpu."),
    plan: bool = typer.Option(False, "--plan", help="Only predict size and time, from a random sample."),
    sample: int | None = typer.Option(
        None, min=1, help=f"With --plan: pairs that are encoded for it. Default {SAMPLE}."
    ),
    disk_check: bool = typer.Option(
        True, "--disk-check/--no-disk-check", help="Refuse to begin what the disk cannot hold."
    ),
    json: bool = typer.Option(False, "--json", help="Print the summary as JSON."),
) -> None:
    """Run the teacher once over SHARDS and write its attention and logits, one unit a shard."""
    given = dict(locals())
    if candidates is not None:
        _refuse_others(given)
        _score(open_shards(shards), teacher, out, candidates, ScoreConfig(**_chosen(dtype, batch_size, device)), json)
        return
    if sample is not None and not plan:
        raise InputError("expected --sample together with --plan, which encodes a sample alone")
    if k is not None and (mass is not None or max_k is not None):
        raise InputError("expected --k, or --mass with --max-k, got both: the first fixes the keys of a row")
    if max_k is not None and mass is None:
        raise InputError("expected --mass together with --max-k; for the same number of keys in each row use --k")
    settings = resolve_config(
        ExtractConfig,
        config,
        assignments=("k=null",) if k == "all" else (),
        k=_kept(k) if mass is None else max_k or MAX_K,
        mass=mass,
        targets=None if targets is None else tuple(one.strip() for one in targets.split(",")),
        states=states,
        layers=layer_numbers(layers),
        weights=weights,
        steps=sqrt_steps,
        predictions=predictions,
        heads=heads,
        queries=queries,
        dtype=dtype,
        views=views,
        view=view_recipe,
        passes=tuple(name.strip() for name in passes.split(",")) if passes is not None else None,
        batch_size=batch_size,
        workers=workers,
        device=device,
    )
    opened = open_shards(shards)
    if plan:
        with working("plan"):
            planned = plan_extraction(opened, teacher, out, settings, sample or SAMPLE)
        if json:
            print_json(planned)
        else:
            console.print(_plan_table(planned, out))
        return
    with progress("{task.fields[rate]} pairs/s", "kept {task.fields[kept]}", "{task.fields[size]}") as bar:
        summary = run_extract(opened, teacher, out, settings, _watch(bar), check_disk=disk_check)
    if json:
        print_json(summary)
    else:
        console.print(_summary_table(summary, out))


_SCORING = (
    "shards", "teacher", "out", "candidates", "dtype", "batch_size", "device", "json", "quiet", "plan",
    "disk_check",
)  # fmt: skip
"""Options that mean something with `--candidates`, and those that have defaults."""


def _refuse_others(values: Mapping[str, Any]) -> None:
    """Refuse options that would have no effect on scores."""
    given = [name for name, value in values.items() if value is not None and name not in _SCORING]
    given += [name for name, default in (("plan", False), ("disk_check", True)) if values[name] != default]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"expected --candidates without {named}, which mean nothing to scores")


def _chosen(dtype: str | None, batch_size: int | None, device: str | None) -> dict[str, Any]:
    """What was given of the settings of scores, checked."""
    options = {"dtype": dtype, "batch_size": batch_size, "device": device}
    given = {name: value for name, value in options.items() if value is not None}
    resolve_config(ExtractConfig, **given)
    return given


def _score(
    shards: Sequence[Shard], teacher: str, out: Path, candidates: Path, config: ScoreConfig, as_json: bool
) -> None:
    with progress() as bar:
        task = bar.add_task("score", total=None)
        report = run_score(
            shards,
            teacher,
            candidates,
            out,
            config,
            advance=lambda pairs: bar.update(task, advance=pairs),
            start=lambda pairs: bar.update(task, total=pairs),
        )
    if as_json:
        print_json(report)
        return
    console.print(
        f"round {report.round}: {report.pairs:,} pairs scored in {report.seconds:.1f} s, {report.units:,} units "
        f"({report.units_kept:,} were there) in {escape(str(out))}, {report.bytes / 1e6:,.1f} MB",
        highlight=False,
    )


def _watch(bar: Progress) -> ExtractProgress:
    """Draw an extraction's progress."""
    task = bar.add_task("prepare", total=None, rate="-", kept="-", size="-")
    sizes = {"bytes": 0, "pairs": 0}
    begin = time.perf_counter()

    def start(pairs: int, finished: int, grid: str) -> None:
        bar.update(task, total=pairs, description="extract")
        note(f"pictures {grid}")
        if finished:
            note(f"{finished:,} pairs are in finished units and are skipped")

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


def layer_numbers(text: str | None) -> tuple[int, ...] | None:
    """Parse `--layers`: numbers with commas."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"expected --layers as numbers with commas, for example 10,11, got {text!r}") from error


def _plan_table(plan: ExtractPlan, out: Path) -> Table:
    table = Table(title=escape(f"extraction into {out}"), show_header=False)
    rows = {
        "pairs to extract": f"{plan.pairs:,} in {plan.units:,} units{_shown(plan.views, plan.passes)}",
        "pairs in finished units": f"{plan.finished_pairs:,}",
        "size": f"{plan.bytes / 1e6:,.1f} MB, {plan.bytes_a_pair:,.0f} bytes a pair",
        "time": f"{_duration(plan.seconds)} ({plan.pairs_a_second:,.1f} pairs/s)",
        "free on disk": f"{plan.free_bytes / 1e6:,.1f} MB: {'enough' if plan.fits else 'NOT ENOUGH'}",
        "from a sample of": f"{plan.sampled_pairs:,} pairs",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _shown(views: int, passes: int) -> str:
    return ("" if views == 1 else f", {views} views of each") + ("" if passes == 1 else f", {passes} passes of each")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _summary_table(summary: ExtractSummary, out: Path) -> Table:
    table = Table(title=escape(f"targets in {out}"), show_header=False)
    rate = summary.pairs / summary.seconds
    rows = {
        "pairs extracted": f"{summary.pairs:,}{_shown(summary.views, summary.passes)} in {summary.seconds:.1f} s "
        f"({rate:,.0f} pairs/s)",
        "pairs in finished units": f"{summary.skipped_pairs:,}",
        "units": f"{summary.units:,}",
        "kept mass": "-" if summary.kept_mass is None else f"{summary.kept_mass:.4f}",
        "bytes a pair": f"{summary.bytes_a_pair:,.0f}",
        "dense float16 / stored": "-" if summary.dense_ratio is None else f"{summary.dense_ratio:.1f}",
        "texts that were cut": f"{summary.cut_texts:,}",
    }
    if summary.cropped_pictures:
        rows["pictures that lost a margin"] = f"{summary.cropped_pictures:,}: the teacher's processor crops them"
    for name, value in rows.items():
        table.add_row(name, value)
    return table
