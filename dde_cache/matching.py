"""A teacher's matching scores of candidates, in a folder of their own.

SCORES/candidates.zarr.zip     the file of candidates, byte for byte
SCORES/units/000000.zarr.zip   scores of `UNIT_SAMPLES` samples and their texts, written whole
SCORES/scores.json             written last: without it the folder was cut short

docs/format.md describes it. A mining round makes new candidates and scores, and leaves the cache of attention alone.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from dde_cache.assets import is_plain_file
from dde_cache.audit import Problem
from dde_cache.blocks import Blocks
from dde_cache.candidates import CANDIDATES as CANDIDATES
from dde_cache.candidates import INDEX as INDEX
from dde_cache.candidates import NONE, Candidates, changes, read_candidates
from dde_cache.errors import CacheError, bullet_list, first_line
from dde_cache.files import hash_file
from dde_cache.manifest import UNITS
from dde_cache.samples import Shard
from dde_cache.spec import MAX_JSON, Dtype, Line, Model, Sha256, TeacherIdentity, hash_json, indented_json, parse_json
from dde_cache.unit import SUFFIX
from dde_cache.verify import Findings, VerifyReport

UNIT_SAMPLES = 256
"""Samples whose scores are lost at most when the process is killed."""

Pairs = Sequence[tuple[int, int]]
"""Numbers of a text and of the sample whose picture it is beside."""

_DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


class ScoreUnit(Model):
    """One unit in the index."""

    name: str = Field(pattern=r"^[0-9]{6,12}\.zarr\.zip$")
    size: int = Field(ge=0, description="bytes")
    sha256: Sha256


class ScoreAttributes(Model):
    """Attributes of a unit's root group."""

    format_version: Literal[1]
    fingerprint: Sha256
    first: int = Field(ge=0, description="number of its first sample")
    samples: int = Field(ge=0)
    texts: int = Field(ge=0)


class ScoreIndex(Model):
    """`scores.json`: whose scores of which candidates. `sha256` is the hash of the rest in canonical form."""

    format_version: Literal[1]
    round: int = Field(ge=1)
    student: Sha256 = Field(description="that mined the candidates")
    candidates: Sha256 = Field(description="of their file")
    teacher: TeacherIdentity
    dtype: Dtype
    fingerprint: Sha256 = Field(description="of candidates, teacher and dtype: what the numbers are")
    samples: int
    texts: int
    source: Line = Field(description="the teacher's name; shown, never enforced")
    versions: dict[Line, Line]
    units: tuple[ScoreUnit, ...]
    sha256: str = ""

    def own_hash(self) -> str:
        """SHA-256 of the canonical form of everything but `sha256`."""
        return hash_json(self.model_dump(mode="json", exclude={"sha256"}))


class ScoreReport(Model):
    """What a call of `extract --candidates` did."""

    round: int
    pairs: int = Field(description="scored now")
    units: int
    units_kept: int = Field(description="that were there")
    bytes: int
    seconds: float


def fingerprint_of(candidates: str, teacher: TeacherIdentity, dtype: Dtype) -> str:
    """What scores are of: candidates by the hash of their file, teacher, dtype."""
    return hash_json({"candidates": candidates, "teacher": teacher.model_dump(mode="json"), "dtype": dtype})


def plan_units(found: Candidates) -> dict[str, range]:
    """The samples of each unit."""
    firsts = range(0, len(found.keys), UNIT_SAMPLES)
    return {
        f"{number:06d}{SUFFIX}": range(first, min(first + UNIT_SAMPLES, len(found.keys)))
        for number, first in enumerate(firsts)
    }


def pairs_of(found: Candidates, rows: range) -> Pairs:
    """Every pair that is scored for some samples, each once: texts beside their own pictures, and candidates."""
    pairs: dict[tuple[int, int], None] = {}
    for number in rows:
        texts = range(int(found.starts[number]), int(found.starts[number + 1]))
        for text in texts:
            pairs |= {(text, number): None}
            pairs |= {(text, int(other)): None for other in found.pictures[text] if other != NONE}
        pairs |= {(int(text), number): None for text in found.texts[number] if text != NONE}
    return list(pairs)


def read_unit(path: Path, found: Candidates) -> tuple[ScoreAttributes, dict[str, np.ndarray]]:
    """Attributes and arrays of a unit, every checksum and bound checked.

    Raises:
        CacheError: it is damaged, or no unit of scores of these candidates.
    """
    try:
        blocks = Blocks(path)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    try:
        attributes = ScoreAttributes.model_validate(blocks.metadata("")["attributes"])
        rows = plan_units(found).get(path.name)
        if rows is None or (attributes.first, attributes.samples) != (rows.start, len(rows)):
            raise ValueError("it is of other samples than its name says")
        first, last = int(found.starts[rows.start]), int(found.starts[rows.stop])
        top = found.attributes.top
        shapes = {"own": (last - first,), "pictures": (last - first, top), "texts": (len(rows), top)}
        arrays = {}
        for name, shape in shapes.items():
            layout = blocks.layout(name)
            if layout.shape != shape or layout.dtype != np.float32:
                raise ValueError(f"{name}: expected {list(shape)} of float32, got {list(layout.shape)}")
            arrays[name] = blocks.read(name, slice(None))
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{name}: expected finite numbers, got others")
        empty = {"pictures": found.pictures[first:last], "texts": found.texts[rows.start : rows.stop]}
        for name, table in empty.items():
            if arrays[name][table == NONE].any():
                raise ValueError(f"{name}: a score where there is no candidate")
        return attributes, arrays
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    finally:
        blocks.close()


def _damaged(path: Path, error: Exception) -> CacheError:
    first = first_line(error)[:300]
    return CacheError(f"{path}: this unit of scores is damaged ({first}); {_again(path)}")


def _again(unit: Path) -> str:
    """How a bad unit of scores is made again: its neighbours are kept."""
    folder = unit.parent.parent
    return (
        f"delete it and run `dde-cache extract SHARDS --teacher TEACHER --candidates {folder / CANDIDATES} --out "
        f"{folder}`, which scores again what is missing"
    )


class Scores:
    """A whole folder of scores with its candidates, in memory (8 bytes a candidate).

    Args:
        folder: where it lies.

    Raises:
        CacheError: there are none, they were cut short, or anything of them is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.candidates = read_candidates(self.folder / CANDIDATES)
        wrong = _disagreements(self.index, self.candidates)
        parts = []
        for unit in self.index.units:
            try:
                parts.append(_checked(self.folder / UNITS / unit.name, unit, self.index, self.candidates))
            except CacheError as error:
                wrong.append(str(error))
        if wrong:
            raise CacheError(f"{folder}: these scores cannot be used:{bullet_list(wrong)}")
        top = self.candidates.attributes.top
        self.own = np.concatenate([np.empty(0, np.float32), *(part["own"] for part in parts)])
        self.pictures, self.texts = (
            np.concatenate([np.empty((0, top), np.float32), *(part[name] for part in parts)])
            for name in ("pictures", "texts")
        )

    @property
    def source(self) -> str:
        """What a resumed run must share with its beginning."""
        return f"round {self.index.round} {self.index.fingerprint}"


def read_index(folder: Path) -> ScoreIndex:
    """Read and check `scores.json`.

    Raises:
        CacheError: it is missing, or not what was written.
    """
    path = folder / INDEX
    if not path.exists():
        raise CacheError(
            f"{folder}: expected scores of `dde-cache extract --candidates`, but it has no {INDEX}: run the same "
            "extract again where it was cut short"
        )
    try:
        if not is_plain_file(path) or path.stat().st_size > MAX_JSON:
            raise ValueError("expected a plain file")
        content = path.read_bytes()
        index = ScoreIndex.model_validate(parse_json(content))
        if index.own_hash() != index.sha256 or indented_json(index.model_dump(mode="json")) != content:
            raise ValueError("its content does not match its own SHA-256")
    except (OSError, ValueError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
        raise CacheError(f"{path}: changed or damaged: {first}; run the same extract again") from error
    return index


def _disagreements(index: ScoreIndex, found: Candidates) -> list[str]:
    """Where the index does not belong to the candidates beside it."""
    expected = {
        "candidates": found.sha256,
        "round": found.attributes.round,
        "student": found.attributes.student,
        "samples": len(found.keys),
        "texts": len(found.sample),
        "fingerprint": fingerprint_of(found.sha256, index.teacher, index.dtype),
    }
    lines = [
        f"{INDEX}: {name} is not that of {CANDIDATES}"
        for name, value in expected.items()
        if getattr(index, name) != value
    ]
    if [unit.name for unit in index.units] != list(plan_units(found)):
        lines.append(f"{INDEX}: its units are not those of {CANDIDATES}")
    return lines


def _checked(path: Path, unit: ScoreUnit, index: ScoreIndex, found: Candidates) -> dict[str, np.ndarray]:
    if not is_plain_file(path):
        raise CacheError(f"{path}: this unit of scores is missing, or no plain file; {_again(path)}")
    if hash_file(path) != unit.sha256:
        raise CacheError(f"{path}: not the bytes that {INDEX} lists; {_again(path)}")
    attributes, arrays = read_unit(path, found)
    if attributes.fingerprint != index.fingerprint:
        raise CacheError(f"{path}: scores of another teacher or of other candidates")
    return arrays


def verify_scores(folder: Path, against: Sequence[Shard] | None = None) -> VerifyReport:
    """Check every hash, checksum and bound of a folder of scores. Nothing is written.

    Args:
        folder: the scores.
        against: shards that should be those that were mined, by key and content.
    """
    findings = Findings()
    index = found = None
    try:
        index = read_index(folder)
    except CacheError as error:
        findings.add(Problem("manifest", str(error)))
    try:
        found = read_candidates(folder / CANDIDATES)
    except CacheError as error:
        findings.add(Problem("unreadable", str(error)))
    sound = 0
    if index is not None and found is not None:
        for line in _disagreements(index, found):
            findings.add(Problem("counts", line))
        for unit in index.units:
            try:
                _checked(folder / UNITS / unit.name, unit, index, found)
                sound += 1
            except CacheError as error:
                findings.add(Problem("bytes", str(error)))
        listed = {unit.name for unit in index.units}
        for path in sorted((folder / UNITS).iterdir() if (folder / UNITS).is_dir() else ()):
            if path.name not in listed:
                findings.add(Problem("unlisted", path.name))
    if found is not None and against is not None:
        for line in changes(found, against):
            findings.add(Problem("content", line))
    grouped = findings.grouped()
    return VerifyReport(
        cache=str(folder),
        sound=not grouped,
        checked="full",
        fingerprint=None if index is None else index.fingerprint,
        units=0 if index is None else len(index.units),
        sound_units=sound,
        samples=0 if found is None else len(found.keys),
        pairs=0 if found is None else sum(len(pairs_of(found, rows)) for rows in plan_units(found).values()),
        bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        against=None if against is None or found is None else len(found.keys),
        recomputed=None,
        findings=grouped,
    )
