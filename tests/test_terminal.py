"""What every command has in common on a terminal, in a pipe and in a script; and `dde-cache doctor`."""

import ast
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dde_cache.cli.app import COMMANDS
from packaging.requirements import Requirement
from pipeline import Child, cli, make_cache, make_samples, make_shards

from dde_cache.doctor import examine, find_package

CLI = Path(__file__).parent.parent / "cli"
GROUPS = {"data": "import", "teacher": "train"}
COMMAND = str(Path(sys.executable).with_name("dde-cache"))
QUICK = ("--steps", 2, "--batch-size", 4, "--set", "workers=0")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    make_shards(folder, make_samples(6))
    return folder


@pytest.fixture(scope="module")
def cache(shards, teacher_folder, tmp_path_factory):
    from dde_cache.samples import open_shards

    return make_cache(open_shards(shards), teacher_folder, tmp_path_factory.mktemp("cache") / "cache", k=2).folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_and_speak_json(name):
    words = (name, GROUPS[name]) if name in GROUPS else (name,)
    done = cli(*words, "--help")
    assert done.code == 0
    assert "--quiet" in done.out
    # What prints nothing but JSON lines needs no option for them.
    assert "--json" in done.out or "JSON lines" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())


def commands_of(shards, cache, teacher, folder):
    """Commands that end well, each with what its JSON has."""
    return [
        (("data", "import", "shapes", "--count", 4, "--out", folder / "shapes"), {"samples": 4, "pairs": 24}),
        (("extract", shards, "--teacher", teacher, "--out", folder / "cache"), {"units": 2}),
        (("inspect", cache), {"pairs": 12}),
        (("verify", cache), {"sound": True}),
        (("repair", cache), {"bad": []}),
        (("merge", cache, cache, "--out", folder / "merged"), {"units": 2}),
        (("subset", cache, "--fields", "maps", "--out", folder / "part"), {"units": 2}),
        (("push", cache, folder / "pushed"), {"units": 2}),
        (("pull", cache, "--out", folder / "pulled"), {"units": 2}),
        (("train", shards, "--targets", cache, "--out", folder / "run", *QUICK), {"steps": 2}),
        (("eval", folder / "run", shards), {"metrics": {}}),
        (("view", cache, shards, "--out", folder / "view.html"), {"order": "kept mass"}),
        (("report", folder / "run", "--out", folder / "report.html"), {"scores": {}}),
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_piped_output_is_plain_and_quiet_is_silent(shards, cache, teacher_folder, tmp_path, quiet):
    for words, _ in commands_of(shards, cache, teacher_folder, tmp_path):
        done = cli(*words, *(("--quiet",) if quiet else ()))
        assert done.code == 0, (words, done.err)
        assert "\x1b" not in done.out + done.err
        if quiet:
            assert done.out == "", words
            warned = "warning: the card still says" in done.err
            assert done.err == "" or (words[0] == "push" and warned), words
        else:
            assert done.out
            # A path alone on its line is as long as it is.
            lines = [line for line in done.out.splitlines() if str(tmp_path) not in line]
            assert all(len(line) <= 80 for line in lines), done.out


def test_notes_are_silent_when_quiet(shards, cache, teacher_folder, tmp_path):
    """What commands say beside their results: what a run takes of another, what is not as published, maps of towers."""
    run, other, towers, growing = (tmp_path / name for name in ("run", "other", "towers", "cache"))
    assert cli("train", shards, "--targets", cache, "--out", run, *QUICK).code == 0
    commands = {
        "new: classifier": ("train", shards, "--targets", cache, "--init", run, "--out", other, *QUICK),
        "not as published": ("train", shards, "--targets", cache, "--preset", "dide-soft", "--init", teacher_folder,
                             "--out", towers, *QUICK),
        "pairs are in finished units": ("extract", shards, "--teacher", teacher_folder, "--out", growing),
    }  # fmt: skip
    assert cli("extract", shards, "--teacher", teacher_folder, "--out", growing).code == 0
    for said, words in commands.items():
        for quiet in ((), ("--quiet",)):
            for left in (other, towers):
                shutil.rmtree(left, ignore_errors=True)
            for unit in sorted((growing / "units").iterdir())[1:]:
                unit.unlink()
            done = cli(*words, *quiet)
            assert done.code == 0, done.err
            assert (said in done.message) == (not quiet), words
            assert done.err == "" or not quiet, words


def test_no_command_speaks_on_stderr_but_through_notes_and_warnings():
    """`note` is silent when quiet. What ends a command is said by `app`, and by `data`, which keeps nothing then."""
    for path in sorted(CLI.glob("*.py")):
        if path.stem not in ("console", "app", "data"):
            text = path.read_text()
            taken = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level == 1]
            assert "errors" not in {name.name for node in taken for name in node.names}, path.name
            assert "stderr" not in text, path.name


def test_json_is_all_that_is_printed(shards, cache, teacher_folder, tmp_path):
    for words, expected in commands_of(shards, cache, teacher_folder, tmp_path):
        for quiet in ((), ("--quiet",)):
            # A second run into the same folder would be refused, or have nothing to do.
            if quiet and "--out" in words and words[0] not in ("view", "report", "eval"):
                continue
            found = json.loads(cli(*words, "--json", *quiet).out)
            assert {name: found[name] for name in expected} == expected, words


def test_errors_are_said_when_quiet(tmp_path):
    done = cli("inspect", tmp_path / "nothing", "--quiet")
    assert done.code == 1
    assert done.message.startswith("error: ")
    # What one command was told does not hold for the next.
    assert cli("doctor", "--help").out


def test_a_refusal_leaves_no_bar_in_a_log(shards, tmp_path):
    done = cli("extract", shards, "--teacher", tmp_path / "nobody", "--out", tmp_path / "cache")
    assert done.code == 1
    assert done.message.startswith("error: ")


def on_a_terminal(*arguments):
    """What a command writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            written += part
    os.close(ours)
    assert process.wait(timeout=10) == 0, written
    return written.decode()


def test_a_terminal_sees_progress_and_colour_from_the_first_moment(shards, cache, teacher_folder, tmp_path):
    shown = on_a_terminal("extract", shards, "--teacher", teacher_folder, "--out", tmp_path / "cache")
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert plain.index("prepare") < plain.index("extract")
    assert "12/12" in plain
    assert "merge" in on_a_terminal("merge", cache, cache, "--out", tmp_path / "merged")


# --- doctor


def test_doctor_finds_this_installation_healthy():
    report = examine()
    assert report.healthy, report
    assert all(one.fits for one in report.packages)
    names = {one.name for one in report.packages}
    assert {"torch", "zarr", "transformers", "numpy"} <= names
    features = {one.extra: one for one in report.features}
    assert {"s3", "http", "hf", "tensorboard", "report"} <= features.keys()
    assert not {"test", "dev"} & features.keys()
    assert features["report"].installed
    assert features["report"].install == "pip install 'dde-cache[report]'"
    assert features["http"].packages[0].name == "fsspec with aiohttp"
    assert report.devices[0].name == "cpu"
    assert len(report.checks) == 5


def test_doctor_prints_a_verdict():
    done = cli("doctor")
    assert done.code == 0, done.out
    assert done.out.splitlines()[-1] == "healthy"
    assert all(len(line) <= 80 for line in done.out.splitlines())


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [("numpy", True), ("numpy<1", False), ("no-such-package-here>=1", False), ("fsspec[http]", True)],
)
def test_packages_are_looked_for(wanted, fits):
    assert find_package(Requirement(wanted)).fits is fits


def test_an_extra_of_a_package_that_lacks_its_parts_does_not_fit():
    found = find_package(Requirement("fsspec[dropbox]"))
    assert found.version is not None
    assert not found.fits
    assert "dropbox" in found.name


def test_doctor_says_which_step_fails(tmp_path):
    child = Child("doctor", folder=tmp_path, largest_file=20_000)
    assert child.wait() == 1
    assert "File too large" in child.message
    assert child.printed.splitlines()[-1] == "not healthy"
