"""docs/cli.md: every command, option and setting, as the program itself knows them.

python -m dde_cache.cli.reference > docs/cli.md     (or `make cli-docs`)
"""

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dde_cache.demo import DemoConfig
from dde_cache.distill import TrainConfig
from dde_cache.extract import ExtractConfig
from dde_cache.pretraining import PretrainConfig
from dde_cache.teach import TeachConfig
from dde_cache.testbeds import StudyConfig

from .app import COMMANDS, app

SETTINGS: dict[str, tuple[type[BaseModel], ...]] = {
    "teacher train": (TeachConfig,),
    "extract": (ExtractConfig,),
    "train": (TrainConfig, PretrainConfig),
    "study": (StudyConfig,),
    "demo": (DemoConfig,),
}
"""What the files of --config, and --set, may say."""

_HEAD = """# Commands

`dde-cache COMMAND [OPTIONS]`; `dde-cache --version` prints the version. This
page is generated from the program (`make cli-docs`), and `dde-cache COMMAND
--help` says the same. Every command takes `--help`, and `--quiet`, which leaves
errors, warnings and JSON. Exit code 0: done; 1: an error, in words, or a
verdict that something is not sound; 2: an unknown command or option; 130:
stopped by Ctrl-C.
"""


def reference() -> str:
    """Return the page, in lines of at most 80 columns where no word is longer."""
    root = typer.main.get_command(app)
    context = root.make_context("dde-cache", ["doctor"], resilient_parsing=True)
    listed = [f"- [`{name}`](#dde-cache-{name}): {about}" for name, about in COMMANDS.items()]
    lines = [_HEAD, *map(_wrapped, listed), ""]
    for name in COMMANDS:
        _, command, _ = root.resolve_command(context, [name])  # type: ignore[attr-defined]
        for words, one in _leaves(f"dde-cache {name}", command):
            lines += _command(words, one, context)
    return "\n".join(lines).rstrip() + "\n"


def _leaves(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    """The command, and those below it."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from _leaves(f"{words} {name}", below)


def _command(words: str, command: Any, parent: Any) -> list[str]:
    """A section: usage, help, options, settings."""
    context = command.make_context(words, [], resilient_parsing=True, parent=parent)
    usage = " ".join(["   ", words, *command.collect_usage_pieces(context)])
    lines = [f"## {words}", "", usage, "", _wrapped(_plain(command.help or ""), ""), ""]
    if hasattr(command, "commands"):
        return lines
    records = [parameter.get_help_record(context) for parameter in command.params]
    lines += [_wrapped(f"- `{_unlisted(name)}`: {_plain(about)}") for name, about in filter(None, records)]
    way = "`--set NAME=VALUE`, or a line of `--config`" if "--config" in str(records) else "`--set NAME=VALUE`"
    way = way if "--set" in str(records) else "lines of `--config`"
    models = SETTINGS.get(words.removeprefix("dde-cache "), ())
    for number, model in enumerate(models):
        below = {} if number == 0 else models[0].model_fields
        lines += ["", f"Settings{' of `--stage pretrain`, beside them' if number else f' ({way})'}:", ""]
        lines += [
            _wrapped(_setting(name, field))
            for name, field in model.model_fields.items()
            if name not in below or field.default != below[name].default
        ]
    return [*lines, ""]


def _setting(name: str, field: Any) -> str:
    about = f": {field.description}" if field.description else ""
    default = field.default_factory() if field.default is PydanticUndefined else field.default
    if isinstance(default, BaseModel):
        return f"- `{name}.`{about}; its own settings, as `{name}.{next(iter(type(default).model_fields))}=...`"
    return f"- `{name}`{about}. Default `{json.dumps(default)}`"


def _unlisted(name: str) -> str:
    """An option as it is typed: what may be given again is given once each time."""
    name = re.sub(r"<list\[(\w+)\]>", lambda found: f"<{found[1].lower()}>", name)
    return name if len(name) < 70 else name.replace("|", " | ")  # a long choice may be broken


def _plain(text: str) -> str:
    """Help as Markdown: one line, `default:` and `required` in italics, nothing taken for markup."""
    text = " ".join(text.split()).replace("*", "\\*").replace("|", "\\|")
    return re.sub(r" *\[(default: .*?|required|x.*?|.*?<=x.*?)\]", r" *(\1)*", text)


def _wrapped(text: str, hanging: str = "  ") -> str:
    return textwrap.fill(text, 80, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    print(reference(), end="")
