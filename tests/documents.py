"""Pages as their readers use them: blocks of code, what is a command in them, and how it is run.

Commands run in the order of the page, `dde-cache` in this process. A block whose first line is a comment `# needs ...`
wants what is not here (a server, GPUs, hours); a command with a word in capitals wants a reader who fills it in. Such
commands are held against the command line's parser. Installing (`pip`, `make`) is what `.ci/run` does.
"""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import typer
from accelerate.state import AcceleratorState
from dde_cache.cli.app import app
from dde_cache.cli.reference import SETTINGS
from pipeline import Outcome, cli

ROOT = Path(__file__).parent.parent
INSTALLERS = ("pip", "make")
PROGRAMS = ("dde-cache", "torchrun", "python", "printf", "cp", "rm", "tail", *INSTALLERS, "export")


@dataclass(frozen=True)
class Block:
    """A block of code, and the paragraph before it."""

    language: str
    before: str
    text: str

    @property
    def needs(self) -> str | None:
        """What the block says that it needs and that a test has not."""
        found = re.match(r"# needs (.+)", self.text)
        return found and found[1]

    @property
    def file(self) -> str | None:
        """The name under which the page wants the block saved: "..., in `questions.jsonl`:"."""
        names = re.findall(r"`([\w-]+\.(?:py|jsonl?|yaml))`", self.before)
        return (
            names[-1] if self.language in ("json", "yaml", "python") and names and self.before.endswith(":") else None
        )

    @property
    def program(self) -> bool:
        """Whether it is Python to be run."""
        return self.file is None and (
            self.language == "python" or (not self.language and re.match(r"(from|import) ", self.text) is not None)
        )

    @property
    def commands(self) -> list[str]:
        """The command lines, continued ones joined; of other blocks none."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        is_shell = self.language in ("", "sh", "bash", "console") and lines and lines[0].split()[0] in PROGRAMS
        return lines if is_shell else []


def blocks(page: Path) -> list[Block]:
    """Fenced and indented blocks of code, in their order."""
    found, before, lines = [], "", [*page.read_text().splitlines(), ""]
    number = 0
    while number < len(lines):
        line = lines[number]
        begins = number == 0 or not lines[number - 1].strip() or lines[number - 1].startswith("#")
        fence = re.match(r" *```(\w*)$", line)
        if fence:
            end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
            found.append(Block(fence[1] or "", before, "\n".join(lines[number + 1 : end])))
            number = end + 1
        elif begins and line.startswith("    "):
            end = number
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            text = "\n".join(one[4:] for one in lines[number:end]).strip("\n")
            found.append(Block("", before, re.sub(r"^  ", "", text, flags=re.M) if text.startswith("  ") else text))
            number = end
        else:
            before = (
                "" if line.startswith("#") else f"{'' if begins else before + ' '}{line}".strip() if line else before
            )
            number += 1
    return found


def runs(block: Block, command: str) -> bool:
    """Whether a test runs a command, or only parses it."""
    words = words_of(command)
    return block.needs is None and words[0] not in INSTALLERS and not any(map(_to_fill_in, words))


def _to_fill_in(word: str) -> bool:
    return re.fullmatch(r"[A-Z][A-Z_]+|[A-Z]", word) is not None


def words_of(command: str) -> list[str]:
    """The words of a command, without its comment."""
    return shlex.split(command, comments=True)


def parse(command: str) -> None:
    """Hold a command against the parser of what it calls, and its settings against the names that there are."""
    words = words_of(command)
    if words[0] == "torchrun":
        words = words[words.index("dde-cache") :]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets), command
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in words for one in re.findall(r"dde-cache\[(.*)\]", word) for name in one.split(",")]
        assert set(named) <= set(extras), command
    if words[0] == "python":
        assert (ROOT / words[1]).is_file(), command
    if words[0] != "dde-cache":
        return
    one = typer.main.get_command(app)
    context = one.make_context("dde-cache", ["doctor"], resilient_parsing=True)
    name, rest = "", words[1:]
    if rest[:1] == ["--version"]:
        return
    while hasattr(one, "resolve_command"):
        word, one, rest = one.resolve_command(context, rest)
        name = f"{name} {word}".strip()
    one.make_context(name, list(rest), parent=context)
    fields = {field for model in SETTINGS.get(name, ()) for field in model.model_fields}
    given = [re.split(r"[=.]", after)[0] for before, after in pairwise(rest) if before == "--set"]
    assert set(given) <= fields, command


@dataclass(frozen=True)
class Step:
    """A command or a program of a page, and how it ended."""

    command: str
    outcome: Outcome


def play(page: Path, folder: Path) -> list[Step]:
    """Do in a folder what a page says: save its files, then run its commands and programs.

    A command must end as the page says: with 0, or as in a comment `# exit code 1`.
    """
    found = blocks(page)
    with contextlib.chdir(folder):
        for block in found:
            if block.file:
                Path(block.file).write_text(block.text + "\n")
        return list(_steps(found))


def _steps(found: list[Block]) -> Iterator[Step]:
    names: dict[str, object] = {}
    for block in found:
        for command in block.commands:
            parse(command) if words_of(command)[0] != "python" else None
            if not runs(block, command):
                continue
            outcome = _run(command)
            expected = re.search(r"# .*exit code (\d)", command)
            assert outcome.code == int(expected[1] if expected else 0), f"{command}\n{outcome.out}{outcome.err}"
            yield Step(command, outcome)
        if block.program:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(block.text, names)
            yield Step(block.text, Outcome(0, out.getvalue(), ""))


def _run(command: str) -> Outcome:
    words = words_of(command)
    if words[0] == "dde-cache":
        AcceleratorState._reset_state(reset_partial_state=True)  # a program of its own may ask for another precision
        return cli(*words[1:])
    if words[0] == "python":
        words[0] = sys.executable
    done = subprocess.run(words, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


def anchors(page: Path) -> set[str]:
    """The anchors of a page: its own, and those that repository pages make of headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found = set(re.findall(r'<a id="([^"]+)">', text))
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        same = sum(one == slug or re.fullmatch(re.escape(slug) + r"-\d+", one) is not None for one in found)
        found.add(f"{slug}-{same}" if same else slug)
    return found
