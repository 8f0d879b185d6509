"""`dde-cache`: one file a command."""

import errno
import sys
import warnings

import transformers
import typer
from rich.markup import escape

from dde_cache import __version__
from dde_cache.errors import DdeCacheError

from . import data, teacher
from .console import errors
from .eval import eval_
from .extract import extract
from .inspect import inspect
from .train import train

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Cross-modal attention targets."
)
app.add_typer(data.app, name="data", help="Turn pictures and questions into WebDataset shards.")
app.add_typer(teacher.app, name="teacher", help="Train a fusion teacher of your own.")
app.command()(extract)
app.command()(inspect)
app.command()(train)
app.command(name="eval")(eval_)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Extract a fusion teacher's cross-modal attention once; distil dual encoders from the cache."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line: 0 on success, 1 on a user's error, 130 on Ctrl-C."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate)\b.*")
    try:
        app()
    except DdeCacheError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("[bold yellow]stopped.[/] Finished parts are kept; run the same command again to go on.")
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        errors.print(
            f"[bold red]error:[/] expected to write {escape(str(error.filename or 'the output'))}, got "
            f"{escape(str(error.strerror))}; make room (or choose another --out) and run the same command again",
            highlight=False,
        )
        sys.exit(1)
