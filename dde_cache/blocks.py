"""Chunks of the arrays of a unit, read without zarr-python, which costs more than half of a training epoch's reading.

Zarr-python takes about a millisecond a chunk beside decompression, copies element by element what lies slots first,
and reads a lost chunk as fill values. The arrays that `unit.write_unit` makes are simple: chunked along the first axis,
bytes behind zstd and crc32c, perhaps transposed, uncompressed members of a zip. So a chunk is one read, one checksum
and one zstd frame, decompressed where it stays. Arrays of any other make are for zarr-python.
`benchmarks/reading.py` measures it.
"""

import json
import math
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import decompress  # type: ignore[import-untyped]

_TYPES = frozenset({"uint8", "uint16", "uint32", "uint64", "int16", "int32", "float16", "float32"})
_CHECKSUM_BYTES = 4
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class _Layout:
    """What an array's metadata says; `order` is the order of the axes on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    records: int
    order: tuple[int, ...]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decompressed chunk."""
        return math.prod((self.records, *self.shape[1:])) * self.dtype.itemsize

    def blank(self, records: int) -> np.ndarray:
        """Memory for some records, in the order on disk and seen in the array's own order."""
        shape = (records, *self.shape[1:])
        return np.empty([shape[axis] for axis in self.order], self.dtype).transpose(np.argsort(self.order))


class Blocks:
    """The arrays of a unit that can be read directly.

    Args:
        path: the zip file.

    Raises:
        OSError, zipfile.BadZipFile: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._layouts: dict[str, _Layout | None] = {}
        with zipfile.ZipFile(path) as archive:
            self._members = {member.filename: member for member in archive.infolist()}
        self._file = open(path, "rb")  # noqa: SIM115
        self._size = os.fstat(self._file.fileno()).st_size

    def read(self, name: str, rows: slice) -> np.ndarray | None:
        """Read rows of an array, or return None where it is not of our make.

        Raises:
            KeyError: a chunk is missing.
            ValueError: a checksum does not hold, or a chunk has another size than its metadata says.
            OSError: the file cannot be read.
        """
        if name not in self._layouts:
            self._layouts[name] = _parse(json.loads(self._metadata(f"{name}/zarr.json")))
        layout = self._layouts[name]
        start, stop, step = rows.indices(layout.shape[0] if layout else 0)
        if layout is None or step != 1 or start >= stop:
            return None
        size = layout.records
        numbers = range(start // size, -(-stop // size))
        if len(numbers) == 1:
            return self._chunk(name, layout, numbers[0])[start - numbers[0] * size : stop - numbers[0] * size]
        read = layout.blank(stop - start)
        for number in numbers:
            first, last = max(start, number * size), min(stop, (number + 1) * size)
            chunk = self._chunk(name, layout, number)
            read[first - start : last - start] = chunk[first - number * size : last - number * size]
        return read

    def _chunk(self, name: str, layout: _Layout, number: int) -> np.ndarray:
        block = self._member(f"{name}/c/{number}" + "/0" * (len(layout.shape) - 1))
        frame, checksum = block[:-_CHECKSUM_BYTES], block[-_CHECKSUM_BYTES:]
        if google_crc32c.value(frame).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
            raise ValueError(f"the checksum of chunk {number} does not hold")
        if _content_bytes(frame) != layout.chunk_bytes:
            raise ValueError(f"chunk {number}: expected {layout.chunk_bytes} bytes, got {_content_bytes(frame)}")
        chunk = layout.blank(layout.records)
        decompress(frame, chunk.transpose(layout.order))
        return chunk

    def _metadata(self, name: str) -> bytes:
        content = self._member(name)
        if zlib.crc32(content) != self._members[name].CRC:
            raise ValueError(f"{name}: the checksum does not hold")
        return content

    def _member(self, name: str) -> bytes:
        """The bytes of a stored zip member. `pread` leaves alone the position that forked processes share."""
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{name}: expected a stored member, got a compressed one")
        header = os.pread(self._file.fileno(), _LOCAL_HEADER_BYTES, member.header_offset)
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = member.header_offset + _LOCAL_HEADER_BYTES + skip
        if start + member.file_size > self._size:
            raise ValueError(f"{name}: expected {member.file_size} bytes, but the file ends before")
        content = os.pread(self._file.fileno(), member.file_size, start)
        if len(content) != member.file_size:
            raise ValueError(f"{name}: expected {member.file_size} bytes, got {len(content)}")
        return content

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _parse(metadata: dict[str, Any]) -> _Layout | None:
    """Read an array's metadata; None where the array is not of our make."""
    shape, chunks = metadata.get("shape", ()), metadata["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = [dict(codec) for codec in metadata["codecs"]]
    order = tuple(range(len(shape)))
    if codecs[0]["name"] == "transpose":
        order = tuple(codecs.pop(0)["configuration"]["order"])
    keys = metadata["chunk_key_encoding"]
    ours = (
        [codec["name"] for codec in codecs] == ["bytes", "zstd", "crc32c"]
        and codecs[0].get("configuration", {}).get("endian", "little") == "little"
        and metadata["chunk_grid"]["name"] == "regular"
        and keys["name"] == "default"
        and keys.get("configuration", {}).get("separator", "/") == "/"
        and metadata["data_type"] in _TYPES
        and sorted(order) == list(range(len(shape)))
        and len(shape) > 0
        and list(chunks[1:]) == [max(size, 1) for size in shape[1:]] == list(shape[1:])
    )
    if not ours:
        return None
    return _Layout(tuple(shape), np.dtype(metadata["data_type"]).newbyteorder("<"), chunks[0], order)


def _content_bytes(frame: bytes) -> int | None:
    """Decompressed size that a zstd frame states (RFC 8878, 3.1.1.1), so that no more than that is believed."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 6:
        return None
    flags = frame[4]
    single = flags >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0) if width else None
