"""What every command shows on the terminal: tables on stdout, progress and errors on stderr."""

import json
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()
errors = Console(stderr=True)


def progress(*columns: str) -> Progress:
    """A progress bar on stderr, with text columns such as `{task.fields[rate]}` at its end."""
    return _progress(MofNCompleteColumn(), *columns)


def byte_progress(*columns: str) -> Progress:
    """The same, counting bytes."""
    return _progress(DownloadColumn(), *columns)


def _progress(counter: ProgressColumn, *columns: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        counter,
        *(TextColumn(column) for column in columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=errors,
    )


def bytes_progress(*columns: str) -> Progress:
    """A progress bar on stderr that counts bytes, with text columns at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        *(TextColumn(column) for column in columns),
        TimeRemainingColumn(),
        console=errors,
    )


def print_json(value: BaseModel | dict[str, Any]) -> None:
    """Print for programs: plain JSON on stdout, no colour, no wrapping."""
    text = value.model_dump_json(indent=2) if isinstance(value, BaseModel) else json.dumps(value, indent=2)
    print(text)
