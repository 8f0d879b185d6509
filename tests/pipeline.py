"""Tiny shards, caches and runs; the command line in this process; and in a process that can be killed."""

import contextlib
import io
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import transformers
from conftest import SIZES, TEXTS, picture
from dde_cache.cli.app import main
from PIL import Image

from dde_cache.batches import PairDataset
from dde_cache.extract import ExtractConfig, extract
from dde_cache.images import EncodedImage
from dde_cache.samples import Sample, Text, open_shards
from dde_cache.store import Cache
from dde_cache.stream import PairTable
from dde_cache.write_shards import write_shards

# As in the program, where the environment says so before the import.
transformers.utils.logging.disable_progress_bar()

LABELS = ("no", "yes", "red")
KINDS = ("exists", "where", None)


def png(image: Image.Image) -> EncodedImage:
    stream = io.BytesIO()
    image.save(stream, "png")
    return EncodedImage(stream.getvalue(), "png")


def make_samples(count=8, seed=0, sizes=SIZES):
    """Samples of one to three texts on pictures of four sizes."""
    samples = []
    for number in range(count):
        width, height = sizes[(number * 3 + seed) % len(sizes)]
        asked = tuple(
            Text(
                text=TEXTS[(number + slot * 3) % len(TEXTS)],
                label=LABELS[(number + slot) % 3],
                kind=KINDS[(number + slot) % 3],
            )
            for slot in range(number % 3 + 1)
        )
        samples.append(Sample(f"key-{number:03d}", (png(picture(width, height, seed * 1000 + number)),), asked))
    return samples


def make_shards(folder, samples=None, size=3):
    """Write samples as shards of `size` samples, and open them."""
    write_shards(iter(samples or make_samples()), folder, source="test", split="train", shard_size=size, arguments={})
    return open_shards(folder)


def make_cache(shards, teacher_folder, out, **config):
    """Extract; the shards and the teacher are those of the fixtures."""
    extract(shards, str(teacher_folder), out, ExtractConfig(**({"batch_size": 4} | config)))
    return Cache(out)


def whole_batch(shards, preprocessor, labels, reader=None, full_text=False, pairs=None, **options):
    """Every pair, or some, as one batch."""
    table = PairTable.of(shards)
    dataset = PairDataset(shards, table, preprocessor, labels, reader, full_text=full_text, **options)
    return dataset.__getitems__(list(range(len(table))) if pairs is None else pairs)


def all_pairs(shards):
    table = PairTable.of(shards)
    return [table[number] for number in range(len(table))]


def changed(sample, **changes):
    return replace(sample, **changes)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Stderr without the wrapping of the terminal."""
        return " ".join(self.err.split())


def cli(*arguments) -> Outcome:
    """Run the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    # Each command is a program of its own: it must not see what an earlier one set.
    with (
        mock.patch.object(sys, "argv", ["dde-cache", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"COLUMNS": "80"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


class Child:
    """The command line in a forked process of its own session: it can be killed, interrupted, and short of disk."""

    def __init__(self, *arguments, folder: Path, largest_file=None, before=lambda: None):
        self._log = folder / f"log-{time.monotonic_ns()}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid:
            return
        code = 99
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            sys.argv = ["dde-cache", *map(str, arguments)]
            torch.set_num_threads(1)
            before()
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds=60) -> int:
        """Return the exit code, negative for the signal that ended it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"the command did not end within {seconds} s; it printed:\n{self.printed}")

    def send(self, number: int) -> None:
        """Send a signal to the whole group, as a terminal does."""
        os.killpg(self.pid, number)

    @property
    def printed(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    @property
    def message(self) -> str:
        return " ".join(self.printed.split())


def wait_for(condition, seconds=60):
    """Poll until something has happened."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not happen")
        time.sleep(0.005)


def killed_in(target, count, name=""):
    """A hook for a child: the `count`-th call of a function of `os` (for this file name) ends the process."""

    def install():
        original, calls = getattr(os, target), []

        def call(*arguments):
            if str(arguments[-1]).endswith(name):
                calls.append(arguments)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(os, target, call)

    return install
