"""What every command shows on the terminal: tables on stdout, progress and errors on stderr.

`--quiet`, which every command has, leaves errors, warnings and JSON. So no command writes to stderr itself: it calls
`note`, which is silent then, or `warn`.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, get_type_hints

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()
errors = Console(stderr=True)


def quietly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option --quiet."""
    if "quiet" in inspect.signature(command).parameters:
        return command

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool, **options: Any) -> Any:
        console.quiet = quiet
        return command(*arguments, **options)

    option = typer.Option(False, "--quiet", help="No tables, notes and progress; errors, warnings and JSON stay.")
    added = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool)
    signature = inspect.signature(command)
    # Typer reads options from here.
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    run.__annotations__ = {**get_type_hints(command), "quiet": bool}
    return run


def note(text: str) -> None:
    """Say on stderr what is neither a warning nor asked for; with --quiet, nothing."""
    if not console.quiet:
        errors.print(text, highlight=False)


def warn(text: str) -> None:
    """Say on stderr what may make a result another than was meant, also with --quiet."""
    errors.print(f"[yellow]warning:[/] {text}", highlight=False)


class _Bars(Progress):
    """Bars that leave nothing in a log where an error came before their first step."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self.console.is_terminal:
            for task in self.tasks:
                self.update(task.id, visible=bool(task.completed))
        super().__exit__(kind, error, trace)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something goes on whose length is not known, and for how long."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    shown = errors.is_terminal and not console.quiet
    with Progress(*columns, console=errors, transient=True, disable=not shown) as bar:
        bar.add_task(what, total=None)
        yield


def progress(*columns: str) -> Progress:
    """A progress bar on stderr, with text columns such as `{task.fields[rate]}` at its end."""
    return _progress(MofNCompleteColumn(), *columns)


def byte_progress(*columns: str) -> Progress:
    """The same, counting bytes."""
    return _progress(DownloadColumn(), *columns)


def _progress(counter: ProgressColumn, *columns: str) -> Progress:
    return _Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        counter,
        *(TextColumn(column) for column in columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
        disable=console.quiet,
    )


def print_json(value: BaseModel | dict[str, Any]) -> None:
    """Print for programs: plain JSON on stdout, no colour, no wrapping."""
    text = value.model_dump_json(indent=2) if isinstance(value, BaseModel) else json.dumps(value, indent=2)
    print(text)
