"""Candidates: for each text the pictures, and for each picture the texts, that a student finds hardest to tell from the
true ones (LoopITR, arXiv 2203.05465). One file a mining round; docs/format.md describes it, docs/mining.md what for.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int, UInt8
from pydantic import Field

from dde_cache.arrays import key_arrays, table_members
from dde_cache.blocks import Blocks
from dde_cache.errors import CacheError, InputError, bullet_list, first_line
from dde_cache.files import hash_file, write_members
from dde_cache.samples import Sample, Shard
from dde_cache.spec import Model, Sha256

NONE = 2**32 - 1
"""No candidate: there are fewer than `top`."""

MAX_TOP = 2**10

INDEX = "scores.json"
CANDIDATES = "candidates.zarr.zip"
"""Files of a folder of scores, which `matching` describes."""

_DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


class CandidateAttributes(Model):
    """Attributes of a file of candidates."""

    format_version: Literal[1]
    round: int = Field(ge=1, lt=2**31, description="1 where the student that mined had learned from no candidates")
    student: Sha256 = Field(description="fingerprint of the student that mined")
    top: int = Field(ge=1, le=MAX_TOP)
    samples: int = Field(ge=0, lt=2**32 - 1)
    texts: int = Field(ge=0, lt=2**32 - 1)


@dataclass(frozen=True)
class Candidates:
    """Candidates of some samples; numbers count samples and texts from 0, in the order of the shards.

    Attributes:
        attributes: round, student, sizes.
        keys: of the samples.
        content: hash of each sample's content [n, 32].
        sample, slot: of each text [t].
        pictures: for each text, samples whose pictures are its candidates [t, top]; `NONE` last.
        texts: for each sample, texts that are its picture's candidates [n, top].
        sha256: of the file.
    """

    attributes: CandidateAttributes
    keys: Sequence[str]
    content: UInt8[np.ndarray, "n 32"]
    sample: Int[np.ndarray, " t"]
    slot: Int[np.ndarray, " t"]
    pictures: Int[np.ndarray, "t k"]
    texts: Int[np.ndarray, "n k"]
    sha256: str = ""

    @cached_property
    def number(self) -> dict[str, int]:
        """Samples by key."""
        return {key: number for number, key in enumerate(self.keys)}

    @cached_property
    def starts(self) -> Int[np.ndarray, " n"]:
        """The first text of each sample, and the number of all texts."""
        return np.searchsorted(self.sample, np.arange(len(self.keys) + 1))

    @property
    def name(self) -> str:
        """Round and student, for messages."""
        return f"round {self.attributes.round}, mined by student {self.attributes.student[:12]}..."


def write_candidates(path: Path, found: Candidates) -> str:
    """Write a file of candidates, whole or not at all; return its SHA-256.

    Raises:
        OSError: the disk is full; nothing under `path` then.
        FileExistsError: something is there.
    """
    key_bytes, key_offsets = key_arrays(found.keys)
    arrays = {
        "key_bytes": key_bytes,
        "key_offsets": key_offsets,
        "content": found.content,
        "sample": found.sample.astype(np.uint32),
        "slot": found.slot.astype(np.uint16),
        "pictures": found.pictures.astype(np.uint32),
        "texts": found.texts.astype(np.uint32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_members(path, table_members(arrays, found.attributes.model_dump(mode="json")), replace=False)[1]


def read_candidates(path: Path) -> Candidates:
    """Read a file of candidates; every checksum and bound is checked.

    Raises:
        CacheError: it is no such file, or damaged.
    """
    try:
        blocks = Blocks(path)
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    try:
        return _read(blocks, hash_file(path))
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    finally:
        blocks.close()


def is_candidates(path: Path) -> bool:
    """Whether a file says that it holds candidates; the rest of it may be damaged."""
    if not path.is_file():
        return False
    try:
        blocks = Blocks(path)
    except _DAMAGE:
        return False
    try:
        CandidateAttributes.model_validate(blocks.metadata("")["attributes"])
        return True
    except _DAMAGE:
        return False
    finally:
        blocks.close()


def is_scores(folder: Path) -> bool:
    """Whether a folder holds scores, whole or cut short."""
    return (folder / INDEX).exists() or (folder / CANDIDATES).exists()


def no_cache(place: Path) -> str:
    """What lies where a cache was expected, and what reads it; or how a cache is made."""
    if is_candidates(place):
        return (
            "got a file of candidates of `dde-cache mine`; `dde-cache extract SHARDS --teacher TEACHER --candidates "
            f"{place} --out SCORES` has them scored"
        )
    if is_scores(place):
        return (
            "got scores of `dde-cache extract --candidates`; `dde-cache verify` judges them and says how bad "
            "ones are made again, `dde-cache train --candidates` learns from them"
        )
    return "make one with `dde-cache extract`, or run the `dde-cache pull` that began it to the end"


def _read(blocks: Blocks, digest: str) -> Candidates:
    attributes = CandidateAttributes.model_validate(blocks.metadata("")["attributes"])
    rows, texts, top = attributes.samples, attributes.texts, attributes.top

    def array(name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        layout = blocks.layout(name)
        if layout.shape != shape or layout.dtype != np.dtype(dtype):
            raise ValueError(f"{name}: expected {list(shape)} of {dtype}, got {list(layout.shape)}")
        return blocks.read(name, slice(None))

    offsets = array("key_offsets", (rows + 1,), "uint64")
    content = blocks.read("key_bytes", slice(None)).tobytes()
    if offsets[0] != 0 or offsets[-1] != len(content) or (offsets[1:] <= offsets[:-1]).any():
        raise ValueError("key_offsets do not cut key_bytes")
    keys = [content[start:stop].decode() for start, stop in pairwise(offsets.tolist())]
    if len(set(keys)) != len(keys) or not all(key.isprintable() for key in keys):
        raise ValueError("expected printable keys, each once")
    found = Candidates(
        attributes,
        keys,
        array("content", (rows, 32), "uint8"),
        array("sample", (texts,), "uint32").astype(np.int64),
        array("slot", (texts,), "uint16").astype(np.int64),
        array("pictures", (texts, top), "uint32").astype(np.int64),
        array("texts", (rows, top), "uint32").astype(np.int64),
        digest,
    )
    problems = _problems(found)
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _problems(found: Candidates) -> list[str]:
    """What contradicts itself, in words."""
    problems = []
    first = np.r_[True, np.diff(found.sample) != 0] if len(found.sample) else np.empty(0, bool)
    runs = np.where(first, 0, np.r_[0, found.slot[:-1] + 1]) if len(first) else found.slot
    if (found.slot != runs).any() or (np.unique(found.sample) != np.arange(len(found.keys))).any():
        problems.append("expected every sample's texts in their order")
    if len(found.sample) and (np.diff(found.sample) < 0).any():
        problems.append("expected texts sorted by sample")
    for name, table, most in (
        ("pictures", found.pictures, len(found.keys)),
        ("texts", found.texts, len(found.sample)),
    ):
        if ((table >= most) & (table != NONE)).any():
            problems.append(f"{name}: expected numbers below {most}, got others")
        rising = np.sort(table, axis=1)
        if ((rising[:, 1:] == rising[:, :-1]) & (rising[:, 1:] != NONE)).any():
            problems.append(f"{name}: a candidate comes twice")
        if ((table[:, :-1] == NONE) & (table[:, 1:] != NONE)).any():
            problems.append(f"{name}: a candidate behind an empty place")
    if not problems:
        own = (found.pictures == found.sample[:, None]).any()
        known = np.append(found.sample, NONE)
        theirs = known[np.minimum(found.texts, len(found.sample))] == np.arange(len(found.keys))[:, None]
        problems += ["a sample is its own candidate"] if own or theirs.any() else []
    return problems


def _damaged(path: Path, error: Exception) -> CacheError:
    first = first_line(error)[:300]
    return CacheError(f"{path}: expected candidates of `dde-cache mine`, but they cannot be read: {first}; mine again")


def changes(found: Candidates, shards: Sequence[Shard]) -> list[str]:
    """How shards differ from those that were mined, in words; every sample is read."""
    left, lines = dict(found.number), list[str]()
    for sample in samples_of(shards):
        number = left.pop(sample.key, None)
        if number is None:
            lines.append(f"{sample.key}: new")
        elif found.content[number].tobytes() != sample.content_hash():
            lines.append(f"{sample.key}: its picture or texts are others")
    return lines + [f"{key}: gone" for key in left]


def check_shards(found: Candidates, shards: Sequence[Shard], where: str) -> None:
    """Refuse shards that have changed since they were mined.

    Raises:
        InputError: they have.
    """
    lines = changes(found, shards)
    if lines:
        raise InputError(
            f"{where}: its candidates were mined in other shards than these: {len(lines)} samples differ:"
            f"{bullet_list(lines, 10)}\nmine again, with the shards as they are now"
        )


def samples_of(shards: Sequence[Shard]) -> Iterator[Sample]:
    """Every sample, shard by shard."""
    for shard in shards:
        yield from shard
