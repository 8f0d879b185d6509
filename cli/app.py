"""`dde-cache`: one file a command."""

import errno
import importlib
import os
import warnings
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from dde_cache import __version__
from dde_cache.errors import DdeCacheError

from .console import console, errors, quietly

COMMANDS = {
    "data": "Turn pictures and questions into WebDataset shards.",
    "teacher": "Train a fusion teacher of your own.",
    "extract": "Run the teacher once over shards and keep what it saw.",
    "inspect": "Show what is in a cache.",
    "verify": "Judge a cache: every hash, checksum and bound.",
    "repair": "Put bad units aside, or extract them again; make a lost manifest again.",
    "merge": "Put caches of the same targets together.",
    "subset": "Write a part of a cache as a cache of its own.",
    "push": "Send a cache to where others can read it.",
    "pull": "Fetch a cache that somebody shares.",
    "train": "Train a dual encoder, with targets streamed from a cache.",
    "eval": "Accuracy of a student or a teacher by kind of question.",
    "mine": "List hard negatives for a teacher to score.",
    "embed": "Encode pictures or texts once, into a store of vectors.",
    "predict": "Answer questions about stored pictures.",
    "search": "Find stored pictures for a text, or texts for a picture.",
    "index": "Index a store's vectors for an approximate search, and measure it.",
    "export": "Write a student as ONNX files.",
    "view": "Write a page that shows attention over pictures.",
    "report": "Write a page that shows runs side by side.",
    "study": "Train students that differ in one thing, and say what that shows.",
    "doctor": "Say what is installed here, and whether it works.",
    "demo": "The whole road with the sample teacher, and one table.",
}

_FILES = {"push": "share", "pull": "share"}
"""Commands that share a file."""

_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


class Commands(TyperGroup):
    """The commands, each imported when it is called: torch and transformers take seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Name the commands in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return what the help page needs of a command."""
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Import the command that was asked for."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command and _load(str(name)), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command: exit code 1 on a user's error, 130 on Ctrl-C."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            errors.print("[bold yellow]stopped.[/] Finished parts are kept; run the same command again to go on.")
            errors.print("(A training run goes on with --resume.)", highlight=False)
            raise typer.Exit(130) from stop
        except DdeCacheError as error:
            # A path that is wrapped in its middle cannot be copied: the terminal breaks lines, not we.
            errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno not in _DISK + _PLACE:
                raise
            what = escape(str(error.filename or "the output"))
            advice = "make room (or choose another --out)" if error.errno in _DISK else "choose another path"
            errors.print(
                f"[bold red]error:[/] expected to write {what}, got {escape(str(error.strerror))}; {advice} and run "
                "the same command again",
                highlight=False,
            )
            raise typer.Exit(1) from error


def _load(name: str) -> Any:
    """Import the file of a command (`eval_` and the like: its function or its own Typer application)."""
    module = importlib.import_module(f".{_FILES.get(name, name)}", __package__)
    if hasattr(module, "app"):
        for command in module.app.registered_commands:
            command.callback = quietly(command.callback)
        return typer.main.get_command(module.app)
    single = typer.Typer(add_completion=False)
    single.command(name)(quietly(getattr(module, name, None) or getattr(module, f"{name}_")))
    return typer.main.get_command(single)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Extract a fusion teacher's cross-modal attention once; distil dual encoders from the cache."""
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    console.quiet = False
    # Hugging Face's own bars would be drawn into ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Our own messages say what is wrong with a checkpoint; its report on every load does not.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate)\b.*")
    app()
