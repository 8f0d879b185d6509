"""A store of embeddings: vectors of pictures or of texts by key, of one student.

STORE/units/000000.zarr.zip   `UNIT_ROWS` rows each (stored_rows.py), written under a temporary name and renamed
STORE/store.json              written last: a store without it is being written, or was cut short
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
from jaxtyping import Float
from pydantic import Field, ValidationError

from dde_cache.assets import is_plain_file
from dde_cache.errors import CacheError, InputError, bullet_list, first_line
from dde_cache.files import hash_file
from dde_cache.manifest import UNITS, write_bytes
from dde_cache.spec import MAX_JSON, Line, Model, Sha256, hash_json, indented_json, parse_json
from dde_cache.stored_rows import Kind, StoredRows
from dde_cache.stream import CHUNK_PAIRS, Recent
from dde_cache.unit import SUFFIX

INDEX = "store.json"
UNIT_ROWS = 1024
"""Rows that are lost at most when a writing process is killed."""

_BUDGET = 512 * 2**20
"""Bytes of vectors that a reader of scattered rows keeps."""

_OPEN_UNITS = 64
"""Units that a reader keeps open."""


class EmbeddingUnit(Model):
    """One unit of a store in its index."""

    name: str = Field(pattern=r"^[0-9]{6,12}\.zarr\.zip$")
    rows: int = Field(ge=0)
    left_out: int = Field(ge=0)
    size: int = Field(ge=0, description="bytes")
    sha256: Sha256


class EmbeddingIndex(Model):
    """`store.json`: what a store holds. `sha256` is the hash of the rest in canonical form."""

    format_version: Literal[1]
    kind: Kind
    student: Sha256 = Field(
        description="fingerprint of the student: weights, configuration, tokenizer, image processor"
    )
    width: int = Field(ge=1, le=2**15)
    rows: int = Field(ge=0)
    left_out: int = Field(ge=0, description="pictures that could not be read and were left out on demand")
    source: Line = Field(description="where pictures or texts came from; shown, never enforced")
    versions: dict[Line, Line]
    units: tuple[EmbeddingUnit, ...]
    sha256: str = ""

    def own_hash(self) -> str:
        """SHA-256 of the canonical form of everything but `sha256`."""
        return hash_json(self.model_dump(mode="json", exclude={"sha256"}))


class EmbeddingStore:
    """A whole store, opened for reading.

    Args:
        folder: where it lies.

    Raises:
        CacheError: there is none, it was cut short, or its index is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._starts = np.cumsum([0, *(unit.rows for unit in self.index.units)])
        self._open: OrderedDict[int, StoredRows] = OrderedDict()
        self._checked: set[int] = set()
        self._chunks: Recent[tuple[int, int], np.ndarray] = Recent(self._chunk, lambda held: held.nbytes, _BUDGET)

    def __len__(self) -> int:
        return self.index.rows

    def check_student(self, fingerprint: str, name: str) -> None:
        """Refuse the vectors of another student.

        Args:
            fingerprint: of the student that they are to be used with.
            name: that student's, for the message.

        Raises:
            CacheError: they are of another, or it has changed since.
        """
        if self.index.student != fingerprint:
            raise CacheError(
                f"{self.folder}: expected vectors of the student in {name} (fingerprint {fingerprint[:12]}...), got "
                f"those of another, or of the same before it changed ({self.index.student[:12]}...); embed again with "
                "this one"
            )

    def unit(self, number: int) -> StoredRows:
        """Open a unit, after checking its bytes against the index once.

        Raises:
            CacheError: it is missing, damaged, or of another student or kind.
        """
        if number not in self._open:
            unit = self.index.units[number]
            self._open[number] = _opened(self.folder, self.index, unit, hashed=number in self._checked)
            self._checked.add(number)
            if len(self._open) > _OPEN_UNITS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def blocks(self) -> Iterator[tuple[int, Float[np.ndarray, "n w"]]]:
        """Every unit's vectors, with the number of their first row."""
        for number, start in enumerate(self._starts[:-1].tolist()):
            yield start, self.unit(number).vectors()

    def find(self, wanted: Collection[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        """Row numbers of those of the wanted (key, slot) pairs that are there."""
        found: dict[tuple[str, int], int] = {}
        for number, start in enumerate(self._starts[:-1].tolist()):
            entries = self.unit(number).entries()
            for row, place in enumerate(zip(entries.keys, entries.slots, strict=True), start):
                if place in wanted:
                    found.setdefault(place, row)
        return found

    def vectors(self, rows: Sequence[int]) -> Float[np.ndarray, "n w"]:
        """Scattered rows by number."""
        found = np.empty((len(rows), self.index.width), np.float32)
        for place, row in enumerate(rows):
            unit = int(np.searchsorted(self._starts, row, side="right")) - 1
            chunk, within = divmod(row - int(self._starts[unit]), CHUNK_PAIRS)
            found[place] = self._chunks((unit, chunk))[within]
        return found

    def entry(self, row: int) -> tuple[str, int, str]:
        """Key, slot and text of a row by its number."""
        unit = int(np.searchsorted(self._starts, row, side="right")) - 1
        entries, within = self.unit(unit).entries(), row - int(self._starts[unit])
        return entries.keys[within], entries.slots[within], entries.texts[within] if entries.texts else ""

    def _chunk(self, place: tuple[int, int]) -> np.ndarray:
        return self.unit(place[0]).vectors(slice(place[1] * CHUNK_PAIRS, (place[1] + 1) * CHUNK_PAIRS))


def _opened(folder: Path, index: EmbeddingIndex, unit: EmbeddingUnit, *, hashed: bool) -> StoredRows:
    path = folder / UNITS / unit.name
    again = "run the same `dde-cache embed` again"
    if not is_plain_file(path):
        raise CacheError(f"{path}: this unit of the store is missing; {again}")
    if not hashed and hash_file(path) != unit.sha256:
        raise CacheError(
            f"{path}: expected {unit.size:,} bytes with SHA-256 {unit.sha256[:12]}..., got {path.stat().st_size:,} "
            f"with another: the file is damaged; delete it and {again}"
        )
    rows = StoredRows(path)
    expected = (index.kind, index.student, index.width, unit.rows)
    attributes = rows.attributes
    if (attributes.kind, attributes.student, attributes.width, rows.rows) != expected:
        rows.close()
        raise CacheError(f"{path}: this unit belongs to another store; delete it and {again}")
    return rows


class Sealed(Protocol):
    """A model that holds the hash of the rest of itself."""

    @property
    def sha256(self) -> str:
        """As it was read."""

    def own_hash(self) -> str:
        """The hash that `sha256` should be."""

    @classmethod
    def model_validate(cls, obj: Any, /) -> Self:
        """As pydantic's."""


AnySealed = TypeVar("AnySealed", bound=Sealed)


def read_sealed(path: Path, model: type[AnySealed], what: str, remedy: str = "") -> AnySealed:
    """Read and check a JSON file with its own hash.

    Args:
        path: of the file.
        model: what it should be.
        what: the same in words.
        remedy: what to do where the hash is wrong.

    Raises:
        CacheError: it cannot be read, is something else, or was changed by hand.
    """
    try:
        if not is_plain_file(path) or path.stat().st_size > MAX_JSON:
            raise ValueError(f"expected a plain file of at most {MAX_JSON:,} bytes")
        found = model.model_validate(parse_json(path.read_bytes()))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))[:100]}: {one['msg'][:200]}" for one in error.errors()]
        raise CacheError(f"{path}: no {what}:{bullet_list(wrong)}") from error
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: cannot be read: {first_line(error)}") from error
    if found.own_hash() != found.sha256:
        raise CacheError(f"{path}: its content does not match its own SHA-256; it was changed or damaged{remedy}")
    return found


def read_index(folder: Path) -> EmbeddingIndex:
    """Read and check `store.json`.

    Raises:
        CacheError: it is missing, changed by hand, or of another version.
    """
    path = folder / INDEX
    if not path.exists():
        begun = (folder / UNITS).is_dir() and any((folder / UNITS).glob(f"*{SUFFIX}"))
        state = "it was cut short; run the same `dde-cache embed` again" if begun else "make one with `dde-cache embed`"
        raise CacheError(f"{folder}: expected a store of embeddings, but it has no {INDEX}: {state}")
    index = read_sealed(path, EmbeddingIndex, "index of a store of embeddings")
    if (index.rows, index.left_out) != tuple(
        sum(getattr(unit, name) for unit in index.units) for name in ("rows", "left_out")
    ):
        raise CacheError(f"{path}: its counts of rows do not add up")
    return index


def write_index(folder: Path, index: EmbeddingIndex) -> EmbeddingIndex:
    """Seal an index and write it, whole or not at all; return it with its hash."""
    sealed = index.model_copy(update={"sha256": index.own_hash()})
    write_bytes(folder / INDEX, indented_json(sealed.model_dump(mode="json")))
    return sealed


def check_place(folder: Path) -> None:
    """Refuse a folder that holds something else than a store, or the beginnings of one.

    Raises:
        InputError: it does.
    """
    ours = folder.is_dir() and all(
        path.name in (INDEX, UNITS) or (path.name.startswith(f".{INDEX}.") and path.suffix == ".partial")
        for path in folder.iterdir()
    )
    if folder.exists() and not ours:
        raise InputError(f"{folder}: expected a new or empty folder, or a store to continue; choose another --out")
