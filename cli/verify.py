"""`dde-cache verify`."""

from collections.abc import Mapping
from pathlib import Path

import typer
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dde_cache.candidates import is_candidates, is_scores, no_cache
from dde_cache.errors import InputError
from dde_cache.matching import verify_scores
from dde_cache.samples import open_shards
from dde_cache.verify import VerifyProgress, VerifyReport
from dde_cache.verify import verify as run_verify

from .console import byte_progress, console, print_json


def verify(
    cache: Path = typer.Argument(help="Folder of the cache, or of scores of candidates."),
    fast: bool = typer.Option(False, "--fast", help="Leave out what reads every byte of every unit."),
    against: str | None = typer.Option(None, help="Shards to compare keys and contents with."),
    teacher: str | None = typer.Option(None, help="Recompute pairs of --against with this teacher."),
    sample: int | None = typer.Option(None, min=1, help="How many pairs --teacher recomputes. Default 64."),
    device: str | None = typer.Option(None, help="Where --teacher runs. Default cpu."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Judge CACHE: every hash, checksum and bound. Exit code 0 where it is sound, 1 where not."""
    _refuse_idle(cache, fast, teacher, {"--sample": sample, "--device": device})
    shards = None if against is None else open_shards(against)
    if is_scores(cache):
        _give(verify_scores(cache, shards), json)
        return
    with byte_progress("{task.fields[name]}") as bar:
        report = run_verify(
            cache,
            fast=fast,
            against=shards,
            teacher=teacher,
            sample=sample or 64,
            device=device or "cpu",
            progress=watch(bar),
        )
    _give(report, json)


def _refuse_idle(cache: Path, fast: bool, teacher: str | None, of_teacher: Mapping[str, int | str | None]) -> None:
    """Refuse what is no cache and no scores, and options that would have no effect."""
    if is_candidates(cache):
        raise InputError(f"{cache}: expected a cache, or scores of candidates; {no_cache(cache)}")
    given = [name for name, value in of_teacher.items() if value is not None]
    if is_scores(cache) and (teacher is not None or fast or given):
        given = ["--teacher"] * (teacher is not None) + ["--fast"] * fast + given
        raise InputError(
            f"{cache}: expected a cache with {' and '.join(given)}; scores of candidates are judged whole, and not "
            "recomputed"
        )
    if given and teacher is None:
        raise InputError(f"expected {' and '.join(given)} together with --teacher, which recomputes pairs")


def _give(report: VerifyReport, as_json: bool) -> None:
    if as_json:
        print_json(report)
    else:
        show(report)
    if not report.sound:
        raise typer.Exit(1)


def watch(bar: Progress) -> VerifyProgress:
    """Draw how many bytes are checked."""
    task = bar.add_task("verify", total=None, name="")

    def unit(name: str, size: int) -> None:
        bar.update(task, advance=size, name=name[:20])

    return VerifyProgress(
        start=lambda total: bar.update(task, total=total),
        unit=unit,
        stage=lambda name: bar.update(task, description=name, name=""),
    )


def show(report: VerifyReport) -> None:
    """Print the findings, then the verdict."""
    if report.findings:
        table = Table(title=escape(f"findings in {report.cache}"), show_lines=True)
        table.add_column("what")
        table.add_column("count", justify="right")
        table.add_column("where", overflow="fold")
        for finding in report.findings:
            more = len(finding.examples) < finding.count and len(finding.examples) > 1
            lines = [*finding.examples, *(["..."] if more else [])]
            table.add_row(finding.meaning, f"{finding.count:,}", escape("\n".join(lines)))
        console.print(table)
    known = f"{report.units:,} units, {report.pairs:,} pairs, {report.bytes / 1e6:,.1f} MB"
    looked = "every hash, checksum and bound" if report.checked == "full" else "names, sizes, counts, identity (--fast)"
    console.print(f"checked: {looked}; {known}", highlight=False)
    if report.against is not None:
        console.print(f"against: {report.against:,} samples by key and content", highlight=False)
    again = report.recomputed
    if again is not None:
        console.print(
            f"recomputed: {again.pairs:,} pairs; largest error of a weight {again.largest_weight_error:.5f} (tolerance "
            f"{again.tolerance:g} and the codec's)",
            highlight=False,
        )
    verdict = "[bold green]sound[/]" if report.sound else "[bold red]not sound[/]"
    console.print(f"{escape(report.cache)}: {verdict}", highlight=False)
