"""One immutable unit of a cache: the targets of one shard as a Zarr v3 group in a zip file.

The zip is written by us, members stored and sorted, times fixed: the same arrays give the same bytes. Zarr's own
`ZipStore` reads it. The arrays are described in docs/format.md.
"""

import hashlib
import itertools
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float, Int
from pydantic import ValidationError
from zarr.codecs import BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore, ZipStore

from dde_cache.blocks import Blocks
from dde_cache.codec import EncodedAttention, from_numpy
from dde_cache.errors import CacheError
from dde_cache.spec import FORMAT_VERSION, UnitAttributes
from dde_cache.stream import CHUNK_PAIRS

SUFFIX = ".zarr.zip"
DIRECTIONS = ("t2i", "i2t")
KNOWN_GROUPS = frozenset({"samples", "maps", "predictions"})

_EPOCH = (1980, 1, 1, 0, 0, 0)

# What zarr, zipfile and the codecs raise on damaged bytes.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class MapColumns:
    """What identifies the records of the `maps` table, one entry a record."""

    sample: Int[np.ndarray, " r"]
    text: Int[np.ndarray, " r"]
    image: Int[np.ndarray, " r"]
    view: Int[np.ndarray, " r"]
    passes: Int[np.ndarray, " r"]
    layer: Int[np.ndarray, " r"]
    text_tokens: Int[np.ndarray, " r"]
    token_ids: Int[np.ndarray, "r t"]
    grid: Int[np.ndarray, "r 2"]

    @property
    def image_tokens(self) -> Int[np.ndarray, " r"]:
        """Valid image tokens, CLS included."""
        return self.grid.astype(np.int64).prod(-1) + 1


@dataclass(frozen=True)
class UnitArrays:
    """Everything that a unit stores.

    Records are sorted by (sample, text, view, pass, image, layer). Query axes are padded to the unit's longest record.
    """

    keys: Sequence[str]
    content: Int[np.ndarray, "n 32"]
    maps: MapColumns
    t2i: EncodedAttention
    i2t: EncodedAttention
    prediction_sample: Int[np.ndarray, " p"]
    prediction_text: Int[np.ndarray, " p"]
    logits: Float[np.ndarray, "p c"] | None


def write_unit(path: Path, arrays: UnitArrays, attributes: UnitAttributes) -> tuple[int, str]:
    """Write a unit under a temporary name, flush it to disk, rename it; return its size in bytes and its SHA-256.

    Raises:
        OSError: the disk is full; nothing under `path` then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            _write_zip(file, _fill(arrays, attributes))
            file.flush()
            os.fsync(file.fileno())
        size, digest = partial.stat().st_size, hash_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return size, digest


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(arrays: UnitArrays, attributes: UnitAttributes) -> Mapping[str, bytes]:
    store = MemoryStore()
    root = zarr.create_group(store, zarr_format=3, attributes=attributes.model_dump(mode="json"))
    encoded = [key.encode() for key in arrays.keys]
    samples = root.create_group("samples")
    _put(samples, "key_bytes", np.frombuffer(b"".join(encoded), dtype=np.uint8), chunk=2**20)
    _put(
        samples, "key_offsets", np.concatenate([[0], np.cumsum([len(key) for key in encoded])]).astype(np.uint64), 2**16
    )
    _put(samples, "content", arrays.content, 2**12)
    maps = root.create_group("maps")
    columns = {
        "sample": (arrays.maps.sample, np.uint32),
        "text": (arrays.maps.text, np.uint16),
        "image": (arrays.maps.image, np.uint8),
        "view": (arrays.maps.view, np.uint16),
        "pass": (arrays.maps.passes, np.uint8),
        "layer": (arrays.maps.layer, np.uint16),
        "text_tokens": (arrays.maps.text_tokens, np.uint16),
        "token_ids": (arrays.maps.token_ids, np.uint32),
        "grid": (arrays.maps.grid, np.uint16),
    }
    for name, (column, dtype) in columns.items():
        _put(maps, name, column.astype(dtype), 2**16)
    for direction in DIRECTIONS:
        attention: EncodedAttention = getattr(arrays, direction)
        group = maps.create_group(direction)
        index = attention.index.numpy()
        # torch has no comfortable 16-bit unsigned type; positions are never negative.
        index = (
            index.view(np.uint16)
            if index.dtype == np.int16
            else index.view(np.uint32)
            if index.itemsize == 4
            else index
        )
        _put(group, "index", index, CHUNK_PAIRS, slots_first=True)
        _put(group, "weight", attention.weight.numpy(), CHUNK_PAIRS, slots_first=True)
        _put(group, "tail", attention.tail.numpy(), CHUNK_PAIRS)
    if arrays.logits is not None:
        predictions = root.create_group("predictions")
        _put(predictions, "sample", arrays.prediction_sample.astype(np.uint32), 2**16)
        _put(predictions, "text", arrays.prediction_text.astype(np.uint16), 2**16)
        for name, dtype in (("view", np.uint16), ("pass", np.uint8)):
            _put(predictions, name, np.zeros(len(arrays.prediction_text), dtype), 2**16)
        _put(predictions, "logits", arrays.logits.astype(np.float32), CHUNK_PAIRS)
    return {name: value.to_bytes() for name, value in store._store_dict.items()}


def _put(group: zarr.Group, name: str, values: np.ndarray, chunk: int, slots_first: bool = False) -> None:
    """Write one array in chunks of `chunk` records, compressed with zstd and checked by crc32c."""
    order = (values.ndim - 1, *range(values.ndim - 1))
    group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(min(chunk, max(len(values), 1)), *(max(size, 1) for size in values.shape[1:])),
        filters=[TransposeCodec(order=order)] if slots_first else None,
        serializer=BytesCodec(),
        compressors=[ZstdCodec(level=3), Crc32cCodec()],
        fill_value=0,
        # Zarr leaves out a chunk of zeros by default, and then a lost chunk would look like zeros.
        config={"write_empty_chunks": True},
    )[...] = values


def _write_zip(file: Any, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), members[name])


class Unit:
    """A unit, opened for reading.

    Args:
        path: the zip file.

    Raises:
        CacheError: it is no unit that this version reads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._store = ZipStore(path, mode="r")
            self._root = zarr.open_group(self._store, mode="r", zarr_format=3)
            self._blocks = Blocks(path)
            self.attributes = UnitAttributes.model_validate(dict(self._root.attrs))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CacheError(
                f"{path}: expected a unit of format version {FORMAT_VERSION}, got {place}: {first['msg']}; a newer "
                "dde-cache may read it"
            ) from error
        except _DAMAGE as error:
            raise CacheError(
                f"{path}: the unit cannot be opened ({error}); delete the file and run `dde-cache extract` again"
            ) from error
        unknown = [
            name for name, group in self.attributes.groups.items() if group.required and name not in KNOWN_GROUPS
        ]
        if unknown:
            raise CacheError(f"{path}: requires {', '.join(unknown)}, unknown to this version; update dde-cache")

    def array(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Read rows of an array, for example `maps/t2i/index`.

        Raises:
            CacheError: it is missing, or a checksum does not hold.
        """
        try:
            read = self._blocks.read(name, rows)
            if read is not None:
                return read
            array = self._root[name]
            if not isinstance(array, zarr.Array):
                raise ValueError("expected an array, got a group")
            return np.asarray(array[rows])
        except _DAMAGE as error:
            raise self._damaged(name, error) from error

    @cached_property
    def keys(self) -> list[str]:
        """Sample keys, in the order of the shard."""
        offsets = self.array("samples/key_offsets").astype(np.int64)
        text = self.array("samples/key_bytes").tobytes()
        return [text[start:stop].decode() for start, stop in itertools.pairwise(offsets)]

    @cached_property
    def content(self) -> np.ndarray:
        """Content hash of each sample [n, 32]."""
        return self.array("samples/content")

    @cached_property
    def maps(self) -> MapColumns:
        """Columns of the maps table."""
        names = ("sample", "text", "image", "view", "pass", "layer", "text_tokens", "token_ids", "grid")
        return MapColumns(*(self.array(f"maps/{name}").astype(np.int64) for name in names))

    @property
    def has_logits(self) -> bool:
        """Whether there is a predictions table."""
        return "predictions" in self.attributes.groups

    def attention(self, direction: str, rows: slice = slice(None)) -> EncodedAttention:
        """Encoded `t2i` or `i2t` attention of some records."""
        index, weight, tail = (self.array(f"maps/{direction}/{name}", rows) for name in ("index", "weight", "tail"))
        if index.dtype != np.uint8:
            index = index.view(f"i{index.itemsize}")
        return from_numpy(index, weight, tail)

    def check_readable(self) -> None:
        """Read every array once.

        Raises:
            CacheError: a checksum does not hold.
        """
        try:
            names = [name for name, member in self._root.members(max_depth=None) if isinstance(member, zarr.Array)]
        except _DAMAGE as error:
            raise self._damaged("its metadata", error) from error
        for name in names:
            self.array(name)

    def _damaged(self, what: str, error: Exception) -> CacheError:
        return CacheError(
            f"{self.path}: {what} is damaged ({error}); delete the unit and run `dde-cache extract` again"
        )

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()
        self._store.close()
