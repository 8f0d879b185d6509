"""One unit of a store of embeddings: vectors of pictures or texts with their keys, as a Zarr v3 group in a zip.

One row a picture or text: `vectors` [n, w] float32 (as the pooler gives them, not normalised), `slot` [n] uint16 (image
or text slot under its key), `content` [n, 32] uint8 (SHA-256 of the picture's bytes or the text's UTF-8), and as UTF-8
with offsets `key_bytes`, `key_offsets`, and for texts `text_bytes`, `text_offsets`. A store may come from anybody:
files are read by `blocks.py`, and what they claim is checked.
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from pydantic import Field

from dde_cache.arrays import table_members
from dde_cache.blocks import Blocks
from dde_cache.errors import CacheError, first_line
from dde_cache.files import write_members
from dde_cache.spec import Model, Sha256

Kind = Literal["image", "text"]

_HASH_BYTES = 32
_DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


class EmbeddingAttributes(Model):
    """Attributes of a unit's root group."""

    format_version: Literal[1]
    kind: Kind
    student: Sha256
    width: int = Field(ge=1, le=2**15)
    left_out: int = Field(ge=0)


@dataclass(frozen=True)
class Entries:
    """Rows of a store without their vectors; `texts` is empty for pictures."""

    keys: Sequence[str]
    slots: Sequence[int]
    content: UInt8[np.ndarray, "n 32"]
    texts: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.keys)


def write_rows(
    path: Path, entries: Entries, vectors: Float[np.ndarray, "n w"], attributes: EmbeddingAttributes
) -> None:
    """Write a unit, whole or not at all.

    Raises:
        OSError: the disk is full; nothing under `path` then.
    """
    arrays: dict[str, np.ndarray] = {
        "vectors": np.asarray(vectors, np.float32),
        "slot": np.asarray(entries.slots, np.uint16),
        "content": entries.content,
        **_columns("key", entries.keys),
    }
    if attributes.kind == "text":
        arrays |= _columns("text", entries.texts)
    write_members(path, table_members(arrays, attributes.model_dump(mode="json")))


def _columns(name: str, words: Sequence[str]) -> dict[str, np.ndarray]:
    encoded = [word.encode() for word in words]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.uint64)
    return {f"{name}_bytes": np.frombuffer(b"".join(encoded), np.uint8), f"{name}_offsets": offsets}


class StoredRows:
    """A unit, opened for reading.

    Raises:
        CacheError: it is damaged, or no unit of a store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._blocks = Blocks(path)
        except _DAMAGE as error:
            raise self._damaged(error) from error
        try:
            self.attributes = EmbeddingAttributes.model_validate(self._blocks.metadata("")["attributes"])
            shape = self._blocks.layout("vectors").shape
            if len(shape) != 2 or shape[1] != self.attributes.width:
                raise ValueError(f"expected vectors of {self.attributes.width} numbers, got shape {list(shape)}")
        except _DAMAGE as error:
            self._blocks.close()
            raise self._damaged(error) from error
        self.rows = shape[0]

    def entries(self) -> Entries:
        """Keys, slots, hashes and texts.

        Raises:
            CacheError: they are damaged.
        """
        texts = self._strings("text") if self.attributes.kind == "text" else ()
        slots = self._array("slot", (self.rows,), np.uint16)
        content = self._array("content", (self.rows, _HASH_BYTES), np.uint8)
        return Entries(self._strings("key"), slots.tolist(), content, texts)

    def vectors(self, rows: slice = slice(None)) -> Float[np.ndarray, "n w"]:
        """Some vectors.

        Raises:
            CacheError: they are damaged.
        """
        count = len(range(*rows.indices(self.rows)))
        found = self._array("vectors", (count, self.attributes.width), np.float32, rows)
        if not np.isfinite(found).all():
            raise self._damaged("a vector has numbers that are not finite")
        return found

    def _array(self, name: str, shape: tuple[int, ...], dtype: Any, rows: slice = slice(None)) -> np.ndarray:
        try:
            found = self._blocks.read(name, rows)
        except _DAMAGE as error:
            raise self._damaged(error) from error
        if found.shape != shape or found.dtype != dtype:
            raise self._damaged(f"{name}: expected {list(shape)} of {np.dtype(dtype)}, got {list(found.shape)}")
        return found

    def _strings(self, name: str) -> list[str]:
        offsets = self._array(f"{name}_offsets", (self.rows + 1,), np.uint64)
        try:
            content = self._blocks.read(f"{name}_bytes", slice(None)).tobytes()
            if offsets[0] != 0 or offsets[-1] != len(content) or (offsets[1:] < offsets[:-1]).any():
                raise ValueError(f"{name}_offsets do not cut {name}_bytes")
            places = offsets.tolist()
            return [content[start:end].decode() for start, end in pairwise(places)]
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception | str) -> CacheError:
        what = error if isinstance(error, str) else first_line(error)
        return CacheError(
            f"{self.path}: this unit of a store of embeddings is damaged ({what}); delete it and run the same "
            "`dde-cache embed` again"
        )

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()
