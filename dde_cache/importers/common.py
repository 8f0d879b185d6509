"""What every import does: check each sample, list every problem, write whole shards or nothing.

A source yields `Found`: the parts of one sample and what the source itself saw wrong with it. `import_samples` adds
its own checks (keys, texts, labels), writes the good ones into a hidden folder beside the target and renames it at
the end, so that an interrupted, refused or full-disk import leaves nothing that looks like a data set.
"""

import errno
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dde_cache.errors import InputError, bullet_list
from dde_cache.interrupt import FinishStep
from dde_cache.samples import (
    INDEX_NAME,
    EncodedImage,
    Sample,
    ShardsIndex,
    Text,
    check_key,
    read_index,
)
from dde_cache.write_shards import write_index, write_shards

LEFT_OUT_NAME = "left-out.jsonl"
_OURS = re.compile(r"\d{6,}\.tar|shards\.json|left-out\.jsonl")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a source: what kind of thing, where, and what exactly."""

    kind: str
    where: str
    detail: str


@dataclass(frozen=True)
class Found:
    """One sample as its source gives it; with problems, some of its parts may be missing."""

    where: str
    key: str
    images: tuple[EncodedImage, ...] = ()
    texts: tuple[Text, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Source:
    """One split of a source, ready to be read once; `arguments` are what its content follows from."""

    name: str
    split: str
    arguments: Mapping[str, Any]
    total: int | None
    found: Iterable[Found]


@dataclass(frozen=True)
class Imported:
    """What an import did: the index that it wrote (or found, with `already`) and what it left out.

    `answers` counts texts by kind and label, both None where a text has none.
    """

    folder: Path
    index: ShardsIndex
    already: bool = False
    problems: tuple[Problem, ...] = ()
    answers: Mapping[tuple[str | None, str | None], int] = field(default_factory=dict)


def import_samples(
    source: Source,
    folder: Path,
    *,
    shard_size: int = 1000,
    labels: Collection[str] | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Imported:
    """Check everything that `source` finds and write it as shards into `folder`.

    `labels` are the only labels allowed. `skip_bad` leaves out samples with problems and lists them in
    `left-out.jsonl`. `overwrite` replaces a folder of shards. `progress` is called with the samples read so far.

    Raises:
        InputError: something is wrong with the source (all of it is listed), the folder is taken, or the disk is full.
        KeyboardInterrupt: after Ctrl-C, between two samples; nothing is left.
    """
    if shard_size < 1:
        raise InputError(f"expected --shard-size of at least 1, got {shard_size}")
    allowed = None if labels is None else sorted(labels)
    arguments = {**source.arguments, "labels": allowed, "shard_size": shard_size, "skip_bad": skip_bad}
    finished = _finished(source, folder, arguments, overwrite)
    if finished is not None:
        return Imported(folder, finished, already=True)
    with _replacing(folder) as partial, FinishStep() as interrupt:

        def seen(number: int) -> None:
            if progress is not None:
                progress(number)
            # Anywhere else Ctrl-C might fall into a bar that holds a lock, and wait for ever.
            interrupt.check()

        checks = _Checks(None if labels is None else frozenset(labels), skip_bad, seen)
        index = write_shards(
            checks.good(source.found),
            partial,
            source=source.name,
            split=source.split,
            shard_size=shard_size,
            arguments=arguments,
        )
        if checks.problems and not skip_bad:
            raise InputError(_summary(source, checks))
        if not index.shards:
            left = f"; all {checks.read} were left out:{_by_kind(checks.problems)}" if checks.read else ""
            raise InputError(f"{source.name}, split {source.split}: expected samples, found none{left}")
        if checks.problems:
            lines = (json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in checks.problems)
            (partial / LEFT_OUT_NAME).write_text("".join(lines), encoding="utf-8")
            index = index.model_copy(update={"left_out": checks.left_out})
            write_index(partial, index)
    return Imported(folder, index, problems=tuple(checks.problems), answers=dict(checks.answers))


class _Checks:
    """The checks that look across samples, and the problems that they and the source found."""

    def __init__(self, labels: frozenset[str] | None, skip_bad: bool, seen: Callable[[int], None]) -> None:
        self._labels = labels
        self._skip_bad = skip_bad
        self._seen = seen
        self._first: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.answers: Counter[tuple[str | None, str | None]] = Counter()
        self.read = 0
        self.left_out = 0

    def good(self, found: Iterable[Found]) -> Iterator[Sample]:
        """Pass on the good samples; after the first bad one, unless bad ones are skipped, only look for more."""
        for one in found:
            self.read += 1
            problems = [*one.problems, *self._check(one)]
            if problems:
                self.problems += problems
                self.left_out += 1
            else:
                self.answers.update((text.kind, text.label) for text in one.texts)
            if not problems and (self._skip_bad or not self.problems):
                yield Sample(one.key, one.images, one.texts, one.meta)
            self._seen(self.read)

    def _check(self, one: Found) -> Iterator[Problem]:
        bad_key = check_key(one.key)
        if bad_key is not None:
            yield Problem("bad key", one.where, bad_key)
        elif one.key in self._first:
            yield Problem("duplicate key", one.where, f"{one.key!r} is also the key of {self._first[one.key]}")
        self._first.setdefault(one.key, one.where)
        if not one.problems and not (1 <= len(one.images) <= 2 and one.texts):
            detail = f"expected one or two images and some texts, got {len(one.images)} and {len(one.texts)}"
            yield Problem("incomplete sample", one.where, detail)
        if any(not text.text.strip() for text in one.texts):
            yield Problem("empty text", one.where, "a text holds only white space")
        if self._labels is not None:
            unknown = sorted({text.label for text in one.texts if text.label is not None} - self._labels)
            if unknown:
                yield Problem("unknown label", one.where, ", ".join(map(repr, unknown)))


def _summary(source: Source, checks: _Checks) -> str:
    one = len(checks.problems) == 1
    return (
        f"{source.name}, split {source.split}: {checks.left_out} of {checks.read} samples cannot be used; nothing was "
        f"written. Put {'it' if one else 'them'} right, or pass --skip-bad to leave {'it' if one else 'them'} out."
        f"{_by_kind(checks.problems)}"
    )


def _by_kind(problems: list[Problem]) -> str:
    text = ""
    for kind, count in Counter(problem.kind for problem in problems).most_common():
        of_kind = [f"{problem.where}: {problem.detail}" for problem in problems if problem.kind == kind]
        text += f"\n{kind}: {count}{bullet_list(of_kind, shown=3)}"
    return text


def _finished(source: Source, folder: Path, arguments: Mapping[str, Any], overwrite: bool) -> ShardsIndex | None:
    """Return the index of the same import where it is there already; refuse a folder that is taken otherwise."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: expected a folder, found a file")
    if folder.resolve() == Path.cwd() or folder.is_mount():
        raise InputError(f"--out {folder}: cannot be replaced as a whole; name a folder inside it")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not names:
        return None
    others = [name for name in names if not _OURS.fullmatch(name)]
    if INDEX_NAME not in names or others:
        found = bullet_list(others or names)
        raise InputError(f"--out {folder}: expected a new or empty folder, but these are no shards of ours:{found}")
    if overwrite:
        return None
    index = read_index(folder)
    same = (index.source, index.split, index.arguments) == (
        source.name,
        source.split,
        json.loads(json.dumps(arguments)),
    )
    if same and all((folder / entry.name).is_file() for entry in index.shards):
        return index
    state = "this import, but tars are missing" if same else f"another import ({index.source}, split {index.split})"
    raise InputError(f"--out {folder}: holds {state}; choose another folder, or pass --overwrite to replace it")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder` that takes its place at the end, or vanishes if anything goes wrong."""
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.importing-{os.getpid()}")
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"--out {folder}: the disk is full; nothing was kept. Free some space and rerun"
            ) from error
        raise InputError(f"--out {folder}: cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_image(read: Callable[[], bytes], where: str, name: str) -> EncodedImage | Problem:
    """Read an image and see that it decodes, or say why not."""
    try:
        return EncodedImage.parse(read())
    except (FileNotFoundError, KeyError):
        return Problem("missing image", where, f"{name!r} does not exist")
    except OSError as error:
        return Problem("unreadable image", where, f"{name!r}: {error.strerror or error}")
    except InputError as error:
        return Problem("unreadable image", where, f"{name!r}: {error}")


def found_samples(samples: Iterable[Sample]) -> Iterator[Found]:
    """Wrap samples that are whole by construction."""
    for sample in samples:
        yield Found(sample.key, sample.key, sample.images, sample.texts, sample.meta)


def with_image(found: Found, image: EncodedImage | Problem) -> Found:
    """Add an image, or the problem that it turned out to be."""
    if isinstance(image, Problem):
        return replace(found, problems=(*found.problems, image))
    return replace(found, images=(*found.images, image))
