"""Recipe: encode pictures or texts once, into a store of embeddings.

Unit after unit of `UNIT_ROWS` rows is written whole, and the store's index at the end. So a process that was killed is
continued by the same call: units that are there are checked against what is to be encoded (keys, and the hash of every
picture and text) and kept. Memory is that of one unit and one batch.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dde_cache.drift import versions
from dde_cache.embeddings import (
    INDEX,
    UNIT_ROWS,
    EmbeddingIndex,
    EmbeddingUnit,
    check_place,
    read_index,
    write_index,
)
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.files import hash_file, remove_abandoned
from dde_cache.images import EncodedImage
from dde_cache.inference import Student
from dde_cache.manifest import UNITS
from dde_cache.pictures import Pictures
from dde_cache.preprocess import Preprocessor
from dde_cache.questions import Question
from dde_cache.spec import Model
from dde_cache.stored_rows import EmbeddingAttributes, Entries, Kind, StoredRows, write_rows
from dde_cache.unit import SUFFIX


class EmbedReport(Model):
    """What a call of `embed` did."""

    kind: Kind
    student: str
    rows: int
    units: int
    units_kept: int
    left_out: int
    texts_cut: int
    bytes: int
    seconds: float


class Texts:
    """Texts to encode, by number.

    Raises:
        InputError: two of them have the same key and slot; all are listed.
    """

    kind: Kind = "text"

    def __init__(self, questions: Sequence[Question], name: str) -> None:
        self.name = name
        self._questions = questions
        seen: set[tuple[str, int]] = set()
        twice = []
        for one in questions:
            twice += [repr(one.key)] if (one.key, one.slot) in seen else []
            seen.add((one.key, one.slot))
        if twice:
            raise InputError(
                f"{name}: expected each key once, but {len(twice)} come again; put all texts of a key into its `texts`:"
                f"{bullet_list(twice, 20)}"
            )

    def __len__(self) -> int:
        return len(self._questions)

    def place(self, number: int) -> tuple[str, int]:
        """Key and text slot."""
        return self._questions[number].key, self._questions[number].slot

    def read(self, number: int) -> bytes:
        """The text in UTF-8."""
        return self._questions[number].text.encode()

    def encode(
        self,
        student: Student,
        numbers: Sequence[int],
        batch_size: int,
        problems: list[str],
        done: Callable[[int], None],
    ) -> "Encoded":
        """Encode some texts."""
        texts = [self._questions[number].text for number in numbers]
        vectors = student.encode_texts(texts, batch_size=batch_size)
        done(len(numbers))
        return Encoded(list(numbers), [hashlib.sha256(text.encode()).digest() for text in texts], vectors, texts)


class Images:
    """Pictures to encode, by number."""

    kind: Kind = "image"

    def __init__(self, pictures: Pictures) -> None:
        self.name = pictures.name
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def place(self, number: int) -> tuple[str, int]:
        """Key and image slot."""
        return self._pictures.place(number)

    def read(self, number: int) -> bytes:
        """A picture's encoded bytes."""
        return self._pictures.read(number)

    def encode(
        self,
        student: Student,
        numbers: Sequence[int],
        batch_size: int,
        problems: list[str],
        done: Callable[[int], None],
    ) -> "Encoded":
        """Encode those that can be read; the others go into `problems`."""
        kept: list[int] = []
        hashes: list[bytes] = []
        vectors = [torch.empty(0, student.width)]
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            pixels: dict[int, np.ndarray] = {}
            for number in chosen:
                try:
                    content = self.read(number)
                    pixels[number] = student.pixels(EncodedImage(content, ""))
                    hashes.append(hashlib.sha256(content).digest())
                except InputError as error:
                    problems.append(f"{self.place(number)[0]}: {error}")
            kept += pixels
            batch = torch.empty(len(pixels), student.width)
            slots = [self.place(number)[1] for number in pixels]
            for slot in sorted(set(slots)):
                rows = [row for row, own in enumerate(slots) if own == slot]
                batch[rows] = student.encode_pixels([list(pixels.values())[row] for row in rows], slot)
            vectors.append(batch)
            done(len(chosen))
        return Encoded(kept, hashes, torch.cat(vectors), [])


class Encoded:
    """Rows by number with the hashes of their content, their vectors, and their texts."""

    def __init__(self, numbers: list[int], hashes: list[bytes], vectors: Tensor, texts: list[str]) -> None:
        self.numbers, self.hashes, self.vectors, self.texts = numbers, hashes, vectors, texts


Rows = Images | Texts


def embed(
    student: Student,
    rows: Rows,
    out: Path,
    *,
    batch_size: int = 32,
    skip_bad: bool = False,
    unit_rows: int = UNIT_ROWS,
    advance: Callable[[int], None] = lambda rows: None,
) -> EmbedReport:
    """Encode everything of `rows` into the store `out`, or go on where an earlier call was cut short.

    Args:
        student: whose vectors.
        rows: pictures or texts.
        out: new, empty, or a store of the same student and rows.
        batch_size: pictures or texts a forward pass.
        skip_bad: leave out pictures that cannot be read; otherwise all of them are listed and the store stays
            unfinished.
        unit_rows: rows a unit, which are lost at most when the process is killed; the same in every call.
        advance: called with the number of rows done.

    Raises:
        InputError: pictures that cannot be read; `out` holds something else.
        CacheError: `out` holds vectors of another student, or of other pictures or texts; or it is damaged.
    """
    start = time.monotonic()
    firsts = enumerate(range(0, len(rows), unit_rows))
    plan = {f"{number:06d}{SUFFIX}": range(first, min(first + unit_rows, len(rows))) for number, first in firsts}
    kept = _begin(student, rows, out, plan.keys())
    problems: list[str] = []
    for name, numbers in plan.items():
        if name in kept:
            problems += _check_kept(out / UNITS / name, rows, numbers, skip_bad=skip_bad)
            advance(len(numbers))
            continue
        bad: list[str] = []
        encoded = rows.encode(student, numbers, batch_size, bad, advance)
        if bad and not skip_bad:
            problems += bad
            continue
        _write(out / UNITS / name, student, rows, encoded, len(bad))
    if problems:
        raise InputError(
            f"{len(problems)} of {len(rows)} pictures cannot be used; {out} is not finished. Put them right and run "
            f"the same command again, or pass --skip-bad to leave them out:{bullet_list(problems, 20)}"
        )
    index = _index(student, rows, out, list(plan))
    if not index.rows:
        raise InputError(f"{rows.name}: expected pictures that can be read, got {index.left_out} that cannot")
    texts = [rows.read(number).decode() for number in range(len(rows))] if rows.kind == "text" else []
    remove_abandoned(out / UNITS, after=0)
    write_index(out, index)
    return EmbedReport(
        kind=rows.kind,
        student=student.fingerprint,
        rows=index.rows,
        units=len(plan),
        units_kept=len(kept),
        left_out=index.left_out,
        texts_cut=_cut(texts, student.preprocessor) if texts else 0,
        bytes=sum(unit.size for unit in index.units),
        seconds=time.monotonic() - start,
    )


def _cut(texts: Sequence[str], preprocessor: Preprocessor) -> int:
    return sum(length > preprocessor.text_length for length in preprocessor.lengths(texts))


def _begin(student: Student, rows: Rows, out: Path, planned: Collection[str]) -> set[str]:
    """Make the folder, or name the units that it has already.

    Raises:
        InputError, CacheError: it holds something else.
    """
    check_place(out)
    (out / UNITS).mkdir(parents=True, exist_ok=True)
    if (out / INDEX).exists():
        read_index(out)
    there = sorted(path.name for path in (out / UNITS).glob(f"[!.]*{SUFFIX}"))
    for name in there:
        unit = StoredRows(out / UNITS / name)
        unit.close()
        found = unit.attributes
        if found.student != student.fingerprint:
            raise CacheError(
                f"{out}: begun with another student, or with this one before it changed: expected fingerprint "
                f"{student.fingerprint[:12]}... ({student.name}), got {found.student[:12]}...; choose another --out"
            )
        if found.kind != rows.kind or name not in planned:
            what = (
                f"vectors of {found.kind}s" if found.kind != rows.kind else f"more than the {len(rows)} rows to encode"
            )
            raise CacheError(f"{out}: holds {what}; choose another --out")
    return set(there)


def _check_kept(path: Path, rows: Rows, numbers: Sequence[int], *, skip_bad: bool) -> list[str]:
    """Compare a unit that is there with what is to be encoded; return what it leaves out, if that is not wanted.

    Raises:
        CacheError: it is damaged, or has other pictures or texts.
    """
    unit = StoredRows(path)
    try:
        entries = unit.entries()
        unit.vectors()
    finally:
        unit.close()
    stored = {
        place: content.tobytes()
        for place, content in zip(zip(entries.keys, entries.slots, strict=True), entries.content, strict=True)
    }
    absent, changed = [], []
    for number in numbers:
        expected = stored.pop(rows.place(number), None)
        if expected is None:
            absent.append(rows.place(number)[0])
        elif hashlib.sha256(rows.read(number)).digest() != expected:
            changed.append(f"{rows.place(number)[0]}: changed since")
    changed += [f"{key}: no longer there" for key, _ in stored]
    if changed or len(absent) != unit.attributes.left_out:
        news = [f"{key}: new" for key in absent] if len(absent) != unit.attributes.left_out else []
        raise CacheError(
            f"{path}: expected the {rows.kind}s of {rows.name}, got others; choose another --out, or delete this unit:"
            f"{bullet_list(changed + news, 20)}"
        )
    return [] if skip_bad else [f"{key}: left out by an earlier call with --skip-bad" for key in absent]


def _write(path: Path, student: Student, rows: Rows, encoded: Encoded, left_out: int) -> None:
    places = [rows.place(number) for number in encoded.numbers]
    content = np.frombuffer(b"".join(encoded.hashes), np.uint8).reshape(-1, 32)
    write_rows(
        path,
        Entries([key for key, _ in places], [slot for _, slot in places], content, encoded.texts),
        encoded.vectors.numpy(),
        EmbeddingAttributes(
            format_version=1, kind=rows.kind, student=student.fingerprint, width=student.width, left_out=left_out
        ),
    )


def _index(student: Student, rows: Rows, out: Path, names: Sequence[str]) -> EmbeddingIndex:
    units = []
    for name in names:
        path = out / UNITS / name
        unit = StoredRows(path)
        unit.close()
        counts = {"rows": unit.rows, "left_out": unit.attributes.left_out}
        units.append(EmbeddingUnit(name=name, **counts, size=path.stat().st_size, sha256=hash_file(path)))
    return EmbeddingIndex(
        format_version=1,
        kind=rows.kind,
        student=student.fingerprint,
        width=student.width,
        rows=sum(unit.rows for unit in units),
        left_out=sum(unit.left_out for unit in units),
        source=rows.name,
        versions=versions(),
        units=tuple(units),
    )
