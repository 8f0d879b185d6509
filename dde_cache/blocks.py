"""The members of a unit's zip and the chunks of its arrays, read without zarr-python and without trust.

Zarr-python takes about a millisecond a chunk beside decompression, copies element by element what lies slots first,
reads a lost chunk as fill values, and allocates what metadata claims. docs/format.md allows one make of array: chunked
along the first axis, bytes behind zstd and crc32c, perhaps transposed, uncompressed members of a zip. So a chunk is
one read, one checksum and one zstd frame, decompressed where it stays; whatever claims more than `MAX_BYTES`, or is of
another make, is refused before memory is taken for it. There is no other way to the bytes of a unit.
`benchmarks/reading.py` measures it.
"""

import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import decompress  # type: ignore[import-untyped]

from dde_cache.spec import parse_json

MAX_BYTES = 2**30
"""Of one decompressed chunk, and of one read."""

MAX_DIRECTORY = 16 * 2**20
"""Bytes of the zip's table of contents: about 200,000 members."""

MAX_METADATA = 2**20
"""Bytes of one `zarr.json`."""

Allocate = Callable[[int], np.ndarray]
"""Makes memory of so many bytes: an array of uint8."""

_TYPES = frozenset({"int8", "uint8", "uint16", "uint32", "uint64", "int16", "int32", "float16", "float32"})
_CHECKSUM_BYTES = 4
_LOCAL_HEADER_BYTES = 30
_END_BYTES = 22
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
_MAX_AXIS = 2**40


@dataclass(frozen=True)
class Layout:
    """What an array's metadata says; `records` is the length of a chunk, `order` the order of the axes on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    records: int
    order: tuple[int, ...]

    @property
    def record_bytes(self) -> int:
        """Bytes of one decompressed record."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def chunks(self) -> int:
        """How many chunks there are; none where an axis is empty."""
        return -(-self.shape[0] // self.records) if all(self.shape) else 0

    def blank(self, records: int, allocate: Allocate | None = None) -> np.ndarray:
        """Memory for some records, in the order on disk and seen in the array's own order."""
        shape = (records, *self.shape[1:])
        on_disk = [shape[axis] for axis in self.order]
        memory = allocate(records * self.record_bytes) if allocate else np.empty(records * self.record_bytes, np.uint8)
        return memory.view(self.dtype).reshape(on_disk).transpose(np.argsort(self.order))


class Blocks:
    """The members of a unit.

    Args:
        path: the zip file.

    Raises:
        OSError, zipfile.BadZipFile, ValueError: it is no zip of plain, stored members.
    """

    def __init__(self, path: Path) -> None:
        self._layouts: dict[str, Layout] = {}
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("expected a plain file")
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._check_directory_size()
            with zipfile.ZipFile(self._file) as archive:
                members = archive.infolist()
            self._members = {member.filename: member for member in members}
            _check_members(members, self._size)
        except BaseException:
            self._file.close()
            raise

    @property
    def names(self) -> frozenset[str]:
        """The names of all members."""
        return frozenset(self._members)

    @property
    def arrays(self) -> Iterator[str]:
        """The names of the members' folders that hold arrays of our groups or others."""
        for name in sorted(self._members):
            folder, _, file = name.rpartition("/")
            if file == "zarr.json" and folder and self.metadata(folder).get("node_type") == "array":
                yield folder

    def metadata(self, name: str) -> dict[str, Any]:
        """The parsed `zarr.json` of an array or group; of the root where the name is empty.

        Raises:
            KeyError: there is none.
            ValueError: its checksum does not hold, or it is no JSON object.
        """
        member = f"{name}/zarr.json" if name else "zarr.json"
        content = self.member(member, MAX_METADATA)
        metadata = parse_json(content, MAX_METADATA)
        if not isinstance(metadata, dict) or metadata.get("zarr_format") != 3:
            raise ValueError(f"{member}: expected metadata of Zarr version 3")
        return metadata

    def layout(self, name: str) -> Layout:
        """What the metadata of an array says.

        Raises:
            KeyError: there is no such array.
            ValueError: it is of another make than docs/format.md allows, or its chunks are too large.
        """
        if name not in self._layouts:
            try:
                self._layouts[name] = _parse(self.metadata(name))
            except (TypeError, AttributeError, LookupError) as error:
                if name and f"{name}/zarr.json" not in self._members:
                    raise
                raise ValueError(f"its metadata lacks something, or has it in another form: {error}") from error
            chunks = self._layouts[name].chunks
            if chunks > len(self._members):
                # Rows that no chunk holds cost nothing to claim, and much to whoever takes memory for them.
                del self._layouts[name]
                raise ValueError(f"its shape and chunks say {chunks:,} chunks, but the zip has fewer members")
        return self._layouts[name]

    def read(self, name: str, rows: slice, allocate: Allocate | None = None) -> np.ndarray:
        """Read rows of an array, into memory of `allocate` where it is given.

        Raises:
            KeyError: the array or a chunk is missing.
            ValueError: a checksum does not hold, a chunk has another size than its metadata says, or the rows take more
                than `MAX_BYTES`.
            OSError: the file cannot be read.
        """
        layout = self.layout(name)
        start, stop, step = rows.indices(layout.shape[0])
        if step != 1:
            raise ValueError("expected rows in a row")
        count = max(stop - start, 0)
        if count * layout.record_bytes > MAX_BYTES:
            raise ValueError(f"expected reads of at most {MAX_BYTES:,} bytes, got {count * layout.record_bytes:,}")
        if not count or not layout.chunks:
            return layout.blank(count, allocate)
        size = layout.records
        numbers = range(start // size, -(-stop // size))
        if len(numbers) == 1:
            chunk = self._chunk(name, layout, numbers[0], allocate)
            return chunk[start - numbers[0] * size : stop - numbers[0] * size]
        read = layout.blank(count, allocate)
        for number in numbers:
            first, last = max(start, number * size), min(stop, (number + 1) * size)
            chunk = self._chunk(name, layout, number)
            read[first - start : last - start] = chunk[first - number * size : last - number * size]
        return read

    def member(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """The bytes of a member, with the zip's own checksum checked.

        Raises:
            KeyError: there is none.
            ValueError: it is larger than `limit`, or its checksum does not hold.
        """
        content = self._member(name, limit)
        if zlib.crc32(content) != self._members[name].CRC:
            raise ValueError(f"{name}: the checksum does not hold")
        return content

    def chunk_name(self, name: str, number: int) -> str:
        """The member that holds a chunk of an array."""
        return f"{name}/c/{number}" + "/0" * (len(self.layout(name).shape) - 1)

    def _chunk(self, name: str, layout: Layout, number: int, allocate: Allocate | None = None) -> np.ndarray:
        member = self.chunk_name(name, number)
        # Two reads rather than one and a copy.
        frame = self._member(member, self._size, slice(-_CHECKSUM_BYTES))
        checksum = self._member(member, self._size, slice(-_CHECKSUM_BYTES, None))
        if google_crc32c.value(frame).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
            raise ValueError(f"the checksum of chunk {number} does not hold")
        expected = layout.records * layout.record_bytes
        if _content_bytes(frame) != expected:
            raise ValueError(f"chunk {number}: expected {expected} bytes, got {_content_bytes(frame)}")
        chunk = layout.blank(layout.records, allocate)
        decompress(frame, chunk.transpose(layout.order))
        return chunk

    def _member(self, name: str, limit: int, part: slice = slice(None)) -> bytes:
        """The bytes of a member, or a part of them. `pread` leaves alone the position that forked processes share."""
        member = self._members[name]
        if member.file_size > limit:
            raise ValueError(f"{name}: expected at most {limit:,} bytes, got {member.file_size:,}")
        header = os.pread(self._file.fileno(), _LOCAL_HEADER_BYTES + len(name), member.header_offset)
        if header[:4] != b"PK\3\4" or header[_LOCAL_HEADER_BYTES:] != name.encode():
            raise ValueError(f"{name}: the zip's table of contents leads elsewhere")
        skip = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = member.header_offset + _LOCAL_HEADER_BYTES + skip
        if start + member.file_size > self._size:
            raise ValueError(f"{name}: expected {member.file_size} bytes, but the file ends before")
        first, last, _ = part.indices(member.file_size)
        content = os.pread(self._file.fileno(), last - first, start + first)
        if len(content) != last - first:
            raise ValueError(f"{name}: expected {last - first} bytes, got {len(content)}")
        return content

    def _check_directory_size(self) -> None:
        """Refuse a table of contents that would take much memory to parse."""
        descriptor = self._file.fileno()
        end = os.pread(descriptor, _END_BYTES, max(self._size - _END_BYTES, 0))
        if end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
            raise ValueError("expected a zip without a comment at its end; the file is cut short or no zip")
        size = int.from_bytes(end[12:16], "little")
        locator = os.pread(descriptor, 20, max(self._size - _END_BYTES - 20, 0))
        if locator[:4] == b"PK\6\7":
            # As zipfile does, the record is looked for where it lies in a file without gaps.
            record = os.pread(descriptor, 56, max(self._size - _END_BYTES - 20 - 56, 0))
            size = max(size if size != 2**32 - 1 else 0, int.from_bytes(record[40:48], "little"))
        if size > MAX_DIRECTORY:
            raise ValueError(f"expected a table of contents of at most {MAX_DIRECTORY:,} bytes, got {size:,}")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse names that lead elsewhere, members twice, links, and members that are more than their bytes in the file.

    Raises:
        ValueError: the first of them.
    """
    seen: set[str] = set()
    for member in members:
        name = member.filename
        if len(name) > 500 or not _NAME.fullmatch(name):
            raise ValueError(f"member {name[:100]!r}: expected a plain relative name")
        if name in seen:
            raise ValueError(f"member {name!r} is there twice")
        seen.add(name)
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"{name}: expected a stored member, got a compressed one")
        if member.flag_bits & 1:
            raise ValueError(f"{name}: expected a plain member, got an encrypted one")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ValueError(f"{name}: expected a plain member, got a link or something else")
    total = sum(member.file_size + _LOCAL_HEADER_BYTES + len(member.filename) for member in members)
    if total > size:
        raise ValueError(f"its members claim {total:,} bytes in a file of {size:,}: some lie over each other")


def _parse(metadata: dict[str, Any]) -> Layout:
    """Read an array's metadata; a ValueError says what is of another make."""
    grid, keys = metadata["chunk_grid"], metadata["chunk_key_encoding"]
    shape, chunks = tuple(metadata["shape"]), tuple(grid["configuration"]["chunk_shape"])
    codecs = [dict(codec) for codec in metadata["codecs"]]
    order = tuple(range(len(shape)))
    if codecs[0]["name"] == "transpose":
        order = tuple(codecs.pop(0)["configuration"]["order"])
    whole = all(type(size) is int and 0 <= size <= _MAX_AXIS for size in (*shape, *chunks))
    wrong = [
        name
        for name, right in {
            "node_type": metadata.get("node_type") == "array",
            "shape": whole and 0 < len(shape) <= 4,
            "chunk_grid": whole
            and grid["name"] == "regular"
            and chunks[0] > 0
            and chunks[1:] == tuple(max(size, 1) for size in shape[1:]),
            "chunk_key_encoding": keys["name"] == "default"
            and keys.get("configuration", {}).get("separator", "/") == "/",
            "data_type": isinstance(metadata["data_type"], str) and metadata["data_type"] in _TYPES,
            "codecs": [codec["name"] for codec in codecs] == ["bytes", "zstd", "crc32c"]
            and codecs[0].get("configuration", {}).get("endian", "little") == "little"
            and all(type(axis) is int for axis in order)
            and sorted(order) == list(range(len(shape))),
            "fill_value": "fill_value" in metadata,
            "storage_transformers": not metadata.get("storage_transformers"),
        }.items()
        if not right
    ]
    if wrong:
        raise ValueError(f"its {' and '.join(wrong)} are not of the make that docs/format.md allows")
    layout = Layout(shape, np.dtype(metadata["data_type"]).newbyteorder("<"), chunks[0], order)
    if layout.records * layout.record_bytes > MAX_BYTES:
        raise ValueError(
            f"expected chunks of at most {MAX_BYTES:,} bytes, got {layout.records * layout.record_bytes:,}: refused"
        )
    return layout


def _content_bytes(frame: bytes) -> int | None:
    """Decompressed size that a zstd frame states (RFC 8878, 3.1.1.1), so that no more than that is believed."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 6:
        return None
    flags = frame[4]
    single = flags >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0) if width else None
