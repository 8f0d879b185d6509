"""Samples in WebDataset shards: the one schema that every importer writes and every command reads.

A sample is what a tar holds under one key: one or two images and one or more texts. The members are

    KEY.image0.png     the first image, encoded (png, jpg, jpeg or webp)
    KEY.image1.png     the second image, where there is one
    KEY.json           {"texts": [{"text": ..., "label": ..., "answers": [...], "kind": ..., "meta": {...}}],
                        "meta": {...}}

and a folder of shards carries `shards.json`, the index that says what is inside.
"""

import hashlib
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dde_cache.canonical import hash_json
from dde_cache.errors import InputError, bullet_list
from dde_cache.images import IMAGE_FORMATS
from dde_cache.images import EncodedImage as EncodedImage
from dde_cache.tars import list_members

INDEX_NAME = "shards.json"
_KEY = re.compile(r"[^./\\\s]+(/[^./\\\s]+)*")


class Text(BaseModel):
    """One text of a sample, with its label where there is one, and the kind of question that it asks.

    `answers` are those of several annotators, one each and as they wrote them (VQAv2 has ten).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = Field(min_length=1)
    label: str | None = None
    answers: tuple[str, ...] = ()
    kind: str | None = None
    meta: dict[str, Any] = Field(default_factory=dict)


class SampleRecord(BaseModel):
    """The `KEY.json` member of a sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    texts: tuple[Text, ...] = Field(min_length=1)
    meta: dict[str, Any] = Field(default_factory=dict)


class ShardEntry(BaseModel):
    """One tar of a folder of shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    samples: int
    pairs: int


class ShardsIndex(BaseModel):
    """`shards.json`: what a folder of shards holds and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    source: str
    split: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    labels: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    left_out: int = 0
    shards: tuple[ShardEntry, ...] = ()


@dataclass(frozen=True)
class Sample:
    """One or two images and one or more texts under one key."""

    key: str
    images: tuple[EncodedImage, ...]
    texts: tuple[Text, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def content_hash(self) -> bytes:
        """SHA-256 (32 bytes) of what a teacher sees of this sample: image bytes and texts, not labels or metadata."""
        digest = hashlib.sha256()
        for part in [image.content for image in self.images] + [text.text.encode() for text in self.texts]:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        digest.update(bytes([len(self.images)]))
        return digest.digest()

    def pictures_hash(self) -> bytes:
        """SHA-256 (32 bytes) of the pictures alone, in their order."""
        return hashlib.sha256(b"".join(hashlib.sha256(image.content).digest() for image in self.images)).digest()


def check_key(key: str) -> str | None:
    """Return why `key` cannot name a sample in a tar, or None where it can.

    WebDataset cuts a member's name at its first dot, so a key has no dots; slashes make folders.
    """
    if not _KEY.fullmatch(key) or not key.isprintable() or len(key.encode()) > 200:
        return f"key {key!r} must be 1 to 200 bytes, printable, without dots, spaces, backslashes or empty folders"
    return None


def shard_paths(shards: str | Path) -> list[Path]:
    """Expand a folder of shards, one tar, or a WebDataset brace pattern (`train-{000000..000009}.tar`) to sorted paths.

    Raises:
        InputError: nothing is there, the folder's import was cut short, or a tar of the pattern is missing.
    """
    text = str(shards)
    folder = Path(text)
    if folder.is_dir():
        index = folder / INDEX_NAME
        if index.is_file():
            names = [entry.name for entry in read_index(folder).shards]
            paths = [folder / name for name in names]
        else:
            if any(folder.glob("*.tar.partial")):
                raise InputError(f"{folder}: an import was cut short here; run `dde-cache data import` again")
            paths = sorted(folder.glob("*.tar"))
    else:
        paths = [Path(name) for name in braceexpand(text)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"expected shards at {text}, but these do not exist:{bullet_list(missing)}")
    if not paths:
        raise InputError(f"expected .tar shards in {text}, found none; make them with `dde-cache data import`")
    return paths


def read_index(folder: Path) -> ShardsIndex:
    """Read `shards.json` of a folder of shards.

    Raises:
        InputError: it is missing or not what this version writes.
    """
    path = folder / INDEX_NAME
    try:
        return ShardsIndex.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; a folder of shards is written by `dde-cache data import`") from error
    except ValidationError as error:
        raise InputError(f"{path}: not an index of shards: {error.errors()[0]['msg']}") from error


class Shard:
    """One tar of samples, opened for reading any sample by its key.

    Opening reads the tar's headers once; a sample is then two or three reads at known offsets. The object holds no
    open file, so it can be sent to worker processes.

    Raises:
        InputError: the tar is unreadable or a sample in it breaks the schema; the message names tar and key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found: dict[str, list[tuple[str, int, int]]] = {}
        try:
            for name, offset, size in list_members(path):
                key, _, suffix = self._split(name)
                found.setdefault(key, []).append((sys.intern(suffix), offset, size))
        except (tarfile.TarError, OSError, EOFError) as error:
            raise InputError(f"{path}: expected a tar of samples, but it cannot be read: {error}") from error
        # Numbers in arrays: as tuples they take three times the memory, in every process, for every sample there is.
        self._numbers = {key: number for number, key in enumerate(found)}
        self._first = np.cumsum([0, *map(len, found.values())])
        members = [member for some in found.values() for member in some]
        self._suffixes = [suffix for suffix, _, _ in members]
        self._places = np.array([place for _, *place in members], np.int64).reshape(-1, 2)

    @staticmethod
    def _split(name: str) -> tuple[str, str, str]:
        folder, slash, base = name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        return folder + slash + stem, dot, suffix.lower()

    @property
    def name(self) -> str:
        """The file's name, by which a unit of a cache refers to this shard."""
        return self.path.name

    @property
    def keys(self) -> Sequence[str]:
        """The sample keys in tar order."""
        return list(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def members_hash(self) -> str:
        """SHA-256 of every member's key, suffix and size, in tar order: other data has another one, short of files that
        differ and are all of equal size. No picture is read for it."""
        sizes, counts = self._places[:, 1].tolist(), np.diff(self._first).tolist()
        return hash_json([list(self._numbers), counts, self._suffixes, sizes])

    def read(self, key: str) -> Sample:
        """Read one sample by key.

        Raises:
            InputError: the shard has no such key, or the sample breaks the schema.
        """
        where = f"{self.path}, sample {key!r}"
        if key not in self._numbers:
            raise InputError(f"{where}: no such key; the tar holds {len(self)} others")
        images: dict[int, EncodedImage] = {}
        records: list[bytes] = []
        for suffix, content in self._contents(key, where):
            name, _, extension = suffix.rpartition(".")
            if suffix == "json":
                records.append(content)
            elif name in ("image0", "image1") and extension in IMAGE_FORMATS:
                if int(name[-1]) in images:
                    raise InputError(f"{where}: expected one {name}, found two")
                images[int(name[-1])] = EncodedImage(content, extension)
        if len(records) != 1:
            raise InputError(f"{where}: expected texts in one {key}.json, found {len(records)}; see docs/samples.md")
        if 0 not in images:
            raise InputError(f"{where}: expected an image as {key}.image0.png (or jpg, webp), found none")
        record = _parse_record(records[0], where)
        return Sample(key, tuple(images[slot] for slot in sorted(images)), record.texts, record.meta)

    def _contents(self, key: str, where: str) -> Iterator[tuple[str, bytes]]:
        number = self._numbers[key]
        members = slice(int(self._first[number]), int(self._first[number + 1]))
        try:
            with open(self.path, "rb") as file:
                for suffix, (offset, size) in zip(self._suffixes[members], self._places[members].tolist(), strict=True):
                    file.seek(offset)
                    content = file.read(size)
                    if len(content) != size:
                        raise InputError(f"{where}: the tar is cut short; import the data again")
                    yield suffix, content
        except OSError as error:
            raise InputError(f"{where}: cannot be read any more: {error}") from error

    def __iter__(self) -> Iterator[Sample]:
        for key in self._numbers:
            yield self.read(key)


def _parse_record(content: bytes, where: str) -> SampleRecord:
    try:
        return SampleRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the top"
        raise InputError(f"{where}: its json breaks the schema at {place}: {first['msg']}") from error


def open_shards(shards: str | Path) -> list[Shard]:
    """Open every shard of a folder, a tar or a brace pattern, refusing keys that occur twice.

    Raises:
        InputError: see `shard_paths` and `Shard`; or a tar holds another number of samples than its index says.
    """
    opened = [Shard(path) for path in shard_paths(shards)]
    _check_counts(Path(shards), opened)
    seen: dict[str, Path] = {}
    twice = []
    for shard in opened:
        for key in shard.keys:
            if key in seen:
                twice.append(f"{key!r} in {seen[key]} and {shard.path}")
            seen[key] = shard.path
    if twice:
        raise InputError(f"expected each key once, but {len(twice)} occur twice:{bullet_list(twice)}")
    if not seen:
        raise InputError(f"{shards}: expected samples, found none")
    empty = [shard.path for shard in opened if not len(shard)]
    if empty:
        raise InputError(f"{empty[0]}: expected samples, found none; leave the tar out")
    return opened


def _check_counts(folder: Path, opened: Sequence[Shard]) -> None:
    """A tar that was cut at a member's edge looks whole; only the index knows better."""
    if not (folder / INDEX_NAME).is_file():
        return
    wrong = [
        f"{shard.path}: {len(shard)} samples, expected {entry.samples}"
        for shard, entry in zip(opened, read_index(folder).shards, strict=True)
        if len(shard) != entry.samples
    ]
    if wrong:
        raise InputError(f"{folder}: tars that do not hold what {INDEX_NAME} says:{bullet_list(wrong)}")
