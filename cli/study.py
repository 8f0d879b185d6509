"""`dde-cache study`."""

from collections.abc import Callable
from pathlib import Path

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from dde_cache.cells import FAMILIES, chosen, ordered
from dde_cache.claims import SkippedRun, StudyReport, points
from dde_cache.errors import InputError
from dde_cache.outcomes import finished
from dde_cache.study import run_study
from dde_cache.study_folder import CONFIG, read_study
from dde_cache.study_report import REPORT, TABLE, placed, skipped_line, sum_up, write_plots
from dde_cache.testbeds import TESTBEDS, study_config

from .console import console, note, print_json, progress


def study(
    out: Path = typer.Option(..., help="Folder of the study; the same call goes on where it was stopped."),
    testbed: str | None = typer.Option(None, help=f"{', '.join(TESTBEDS)}. Default: shapes."),
    config: Path | None = typer.Option(None, help="YAML file of settings; a study's own study.yaml repeats it."),
    set_: list[str] = typer.Option([], "--set", help="One setting as name=value, as train.steps=300."),
    families: str | None = typer.Option(None, help=f"Cells, with commas: {','.join(FAMILIES)}. Default: all."),
    cell: list[str] = typer.Option([], help="One cell by its name, beside those of --families, or alone; repeatable."),
    seeds: int | None = typer.Option(None, min=1, help="Runs of each cell. Default 5."),
    budget: float | None = typer.Option(None, min=0, help="Minutes; what does not fit is skipped, and named."),
    report_only: bool = typer.Option(False, "--report-only", help="Train nothing; sum up what is finished."),
    json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Train students that differ in one thing, with several seeds, and say what that shows."""
    runs = ordered(chosen(None if families is None else families.split(","), cell), seeds or 5)
    begun = (out / CONFIG).is_file()
    given = (testbed, config) != (None, None) or set_
    if report_only and (given or cell or (families, seeds, budget) != (None, None, None)):
        raise InputError("expected --report-only alone: it sums up everything that is finished in --out")
    settings = read_study(out) if report_only or (begun and not given) else study_config(config, set_, testbed)
    skipped: tuple[SkippedRun, ...] = ()
    if not report_only:
        with progress() as bar:
            whole = bar.add_task("study", total=len(runs))

            def stage(name: str, total: int) -> Callable[[int], None]:
                task = bar.add_task(name, total=total or None)

                def done(steps: int) -> None:
                    bar.update(task, completed=steps, visible=steps != total)
                    bar.update(whole, completed=sum(finished(out, run) for run in runs))

                return done

            skipped = run_study(out, settings, runs, stage, budget=budget)
            bar.update(whole, completed=sum(finished(out, run) for run in runs))
    report = sum_up(out, settings, skipped)
    try:
        plots = write_plots(out, report)
    except InputError as error:
        plots = ()
        note(f"no plots: {error}")
    if json:
        print_json(report)
        return
    _show(report)
    note(f"in {out}: {', '.join([TABLE, REPORT, *plots])}")


def _show(report: StudyReport) -> None:
    groups = list(report.teacher_groups)
    table = Table(
        title=f"{report.testbed}: {report.questions:,} questions about {report.pictures:,} pictures",
        box=SIMPLE_HEAD,
        show_edge=False,
        # With the longest names and differences this fills 80 columns.
        padding=0,
        caption="A cell stands below the one that its difference is to.",
        caption_justify="left",
    )
    table.add_column("cell", no_wrap=True)
    for name in ("n", "accuracy", *groups, "bytes", "difference, 95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    apart = [_share(report.teacher_groups[name]) for name in groups]
    table.add_row("teacher", "", _share(report.teacher) + " " * 5, *apart, "", "")
    for depth, row in placed(report.rows):
        deviation = " " * 5 if row.deviation is None else f"±{_share(row.deviation)}"
        table.add_row(
            " " * depth + row.cell,
            str(row.seeds),
            _share(row.accuracy) + deviation,
            *(_share(row.groups[name]) for name in groups),
            "" if row.bytes_a_pair is None else f"{row.bytes_a_pair:,.0f}",
            "" if row.difference is None else points(row.difference),
        )
    console.print(table)
    console.print()
    for claim in (one for one in report.claims if one.measured):
        colour = {"established": "green", "refuted": "red"}.get(claim.verdict, "yellow")
        console.print(f"[{colour}]{claim.verdict}[/]: {claim.claim}: {escape(claim.because)}", highlight=False)
    unknown = [claim.claim for claim in report.claims if not claim.measured]
    if unknown:
        console.print(f"no runs of both sides yet: {'; '.join(unknown)}", highlight=False, markup=False)
    if report.codes > 1:
        console.print(f"[yellow]made by {report.codes} states of the code:[/] where it changed, seeds differ by more")
    if report.proves_nothing:
        console.print("[yellow]this set proves nothing:[/] a plain dual encoder is as good as the teacher")
    if report.skipped:
        console.print(skipped_line(report), highlight=False, markup=False)


def _share(value: float) -> str:
    """Three digits behind the point, and none before it but a one."""
    return f"{value:.3f}".removeprefix("0")
