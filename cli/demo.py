"""`dde-cache demo`."""

import time
from collections.abc import Callable
from pathlib import Path

import typer
from rich.table import Table

from dde_cache.configs import resolve_config
from dde_cache.demo import DemoConfig, DemoReport
from dde_cache.demo import demo as run_demo
from dde_cache.scores import EvaluationReport

from .console import console, print_json, progress


def demo(
    out: Path = typer.Option(Path("demo-out"), help="New or empty folder for data, cache and students."),
    set_: list[str] = typer.Option([], "--set", help="One setting as name=value: pictures, test_pictures, steps, ..."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Data, extraction with the sample teacher, three students, one table. Under ten minutes on two cores."""
    config = resolve_config(DemoConfig, None, set_)
    start = time.perf_counter()
    with progress() as bar:

        def stage(name: str, total: int) -> Callable[[int], None]:
            task = bar.add_task(name, total=total)
            return lambda done: bar.update(task, completed=done)

        report = run_demo(out, config, stage)
    if json:
        print_json(report)
        return
    console.print(_accuracy_table(report))
    console.print(_cost_table(report, time.perf_counter() - start))
    console.print(report.conclusion, highlight=False)


def _accuracy_table(report: DemoReport) -> Table:
    kinds = list(report.teacher.kinds)
    table = Table(title=f"accuracy on {report.teacher.overall.pairs:,} test questions")
    table.add_column("model")
    for kind in [*kinds, "all"]:
        table.add_column(kind, justify="right")

    def row(name: str, score: EvaluationReport) -> None:
        values = [score.kinds[kind].accuracy for kind in kinds] + [score.overall.accuracy]
        table.add_row(name, *(f"{value:.3f}" for value in values))

    frequent = [report.teacher.kinds[kind].frequent_answer_to_question for kind in kinds]
    overall = report.teacher.overall.frequent_answer_to_question
    table.add_row("most frequent answer to the question", *(f"{value:.3f}" for value in [*frequent, overall]))
    for name, student in report.students.items():
        row(f"student, {name}", student.score)
    row("teacher", report.teacher)
    return table


def _cost_table(report: DemoReport, seconds: float) -> Table:
    table = Table(title="cost", show_header=False)
    extraction = report.extraction
    table.add_row("extraction", f"{extraction.pairs / extraction.seconds:,.0f} pairs/s")
    table.add_row("cache", f"{extraction.bytes_a_pair:,.0f} bytes a pair, kept mass {extraction.kept_mass:.3f}")
    for name, student in report.students.items():
        run = student.run
        wait = run.wait_seconds / run.seconds
        table.add_row(
            f"training, {name}", f"{run.seconds / run.steps * 1000:.0f} ms a step, {wait:.1%} of it data wait"
        )
    table.add_row("everything", f"{seconds / 60:.1f} minutes")
    return table
