"""What a unit stores, and its encoding by zarr: the members of its zip file. docs/format.md describes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float, Int
from zarr.codecs import BytesCodec, Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

from dde_cache.blocks import MAX_BYTES
from dde_cache.codec import EncodedAttention, EncodedSparse
from dde_cache.errors import CacheError
from dde_cache.layout import MAP_COLUMNS, PREDICTION_COLUMNS
from dde_cache.spec import WHOLE, UnitAttributes
from dde_cache.stream import CHUNK_PAIRS

_MAP_LEVEL = 9
"""Of zstd: a tenth smaller than 3, and still faster than any teacher; reading does not depend on it."""


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
    `maps` and both directions are None where only predictions are kept, `logits` where only maps are; views and passes
    of predictions are None where each is 0. `whole` holds the rows over the whole sequence, `t2w` and `i2w`; `further`
    the arrays of other groups by their whole names.
    """

    keys: Sequence[str]
    content: Int[np.ndarray, "n 32"]
    maps: MapColumns | None
    t2i: EncodedAttention | None
    i2t: EncodedAttention | None
    prediction_sample: Int[np.ndarray, " p"]
    prediction_text: Int[np.ndarray, " p"]
    logits: Float[np.ndarray, "p c"] | None
    prediction_view: Int[np.ndarray, " p"] | None = None
    prediction_pass: Int[np.ndarray, " p"] | None = None
    further: Mapping[str, np.ndarray] = field(default_factory=dict)
    whole: Mapping[str, EncodedAttention] = field(default_factory=dict)


def key_arrays(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys as UTF-8 bytes, one behind the other, and where each starts; the last offset is the number of bytes."""
    encoded = [key.encode() for key in keys]
    offsets = np.concatenate([[0], np.cumsum([len(key) for key in encoded])]).astype(np.uint64)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets


def unit_members(arrays: UnitArrays, attributes: UnitAttributes) -> Mapping[str, bytes]:
    """Encode a unit: the members of its zip file by name."""
    store = MemoryStore()
    root = zarr.create_group(store, zarr_format=3, attributes=attributes.model_dump(mode="json"))
    samples = root.create_group("samples")
    content, offsets = key_arrays(arrays.keys)
    _put(samples, "key_bytes", content, chunk=2**20)
    _put(samples, "key_offsets", offsets, 2**16)
    _put(samples, "content", arrays.content, 2**12)
    if arrays.maps is not None:
        _fill_maps(root.create_group("maps"), arrays.maps, {"t2i": arrays.t2i, "i2t": arrays.i2t})
    if arrays.logits is not None:
        predictions = root.create_group("predictions")
        zeros = np.zeros(len(arrays.prediction_text))
        columns = {
            "sample": arrays.prediction_sample,
            "text": arrays.prediction_text,
            "view": zeros if arrays.prediction_view is None else arrays.prediction_view,
            "pass": zeros if arrays.prediction_pass is None else arrays.prediction_pass,
        }
        for name, dtype in PREDICTION_COLUMNS.items():
            _put(predictions, name, columns[name].astype(dtype), 2**16)
        _put(predictions, "logits", arrays.logits.astype(np.float32), CHUNK_PAIRS)
    if arrays.whole:
        _put_attention(root.create_group(WHOLE), arrays.whole)
    for path, values in arrays.further.items():
        group, _, name = path.rpartition("/")
        # Short rows of a group that we know; of others nothing is known.
        _put(root.require_group(group), name, values, 2**16 if group in ("views", "partners") else CHUNK_PAIRS)
    return _members(store)


def table_members(arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]) -> Mapping[str, bytes]:
    """Encode one table as a group of its own: the members of its zip file by name. Wide rows lie in chunks of a unit's
    length, columns in long ones."""
    store = MemoryStore()
    root = zarr.create_group(store, zarr_format=3, attributes=dict(attributes))
    for name, values in arrays.items():
        _put(root, name, values, CHUNK_PAIRS if values.ndim > 1 else 2**20)
    return _members(store)


def _members(store: MemoryStore) -> Mapping[str, bytes]:
    return {name: value.to_bytes() for name, value in store._store_dict.items()}


def _fill_maps(maps: zarr.Group, table: MapColumns, directions: Mapping[str, EncodedAttention | None]) -> None:
    for name, dtype in MAP_COLUMNS.items():
        _put(maps, name, getattr(table, "passes" if name == "pass" else name).astype(dtype), 2**16)
    _put_attention(maps, {name: attention for name, attention in directions.items() if attention is not None})


def _put_attention(parent: zarr.Group, kinds: Mapping[str, EncodedAttention]) -> None:
    """Write attention rows, each kind in a group of its own."""
    for name_of_rows, attention in kinds.items():
        group = parent.create_group(name_of_rows)
        # Keys lie in their order and compress along it; slots fall, and compress slot by slot. The record stays the
        # first axis: one copy takes it out, for 1.3 % more bytes than slots before records.
        sparse = isinstance(attention, EncodedSparse)
        for name, part in attention.parts.items():
            values = part.numpy()
            if values.dtype.kind == "i":
                # torch has no comfortable unsigned types beyond 8 bits; positions are never negative.
                values = values.view(f"u{values.itemsize}")
            _put(group, name, values, CHUNK_PAIRS, slots_before=sparse and values.ndim == 4, level=_MAP_LEVEL)


def _put(
    group: zarr.Group, name: str, values: np.ndarray, chunk: int, slots_before: bool = False, level: int = 3
) -> None:
    """Write one array in chunks of `chunk` records, compressed with zstd and checked by crc32c.

    Raises:
        CacheError: a chunk would be larger than any reader takes.
    """
    if min(chunk, len(values)) * values[:1].nbytes > MAX_BYTES:
        raise CacheError(
            f"{name}: expected chunks of at most {MAX_BYTES:,} bytes, got {chunk} records of {values[:1].nbytes:,}; "
            "extract with --heads mean, or with a smaller --k"
        )
    order = (0, values.ndim - 1, *range(1, values.ndim - 1))
    group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(min(chunk, max(len(values), 1)), *(max(size, 1) for size in values.shape[1:])),
        filters=[TransposeCodec(order=order)] if slots_before else None,
        serializer=BytesCodec(),
        compressors=[ZstdCodec(level=level), Crc32cCodec()],
        fill_value=0,
        # Zarr leaves out a chunk of zeros by default, and then a lost chunk would look like zeros.
        config={"write_empty_chunks": True},
    )[...] = values
