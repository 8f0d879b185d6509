"""One immutable unit of a cache: the targets of one shard as a Zarr v3 group in a zip file.

The zip is written by us, members stored and sorted, times fixed: the same arrays give the same bytes. Zarr's own
`ZipStore` reads it; we read through `blocks.py`, which trusts nothing. The arrays are described in docs/format.md.
"""

import itertools
import zipfile
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from pydantic import ValidationError

from dde_cache.arrays import MapColumns as MapColumns
from dde_cache.arrays import UnitArrays as UnitArrays
from dde_cache.arrays import unit_members
from dde_cache.blocks import Allocate, Blocks
from dde_cache.bounds import unsafe, unsafe_states
from dde_cache.codec import EncodedAttention, from_numpy, part_names
from dde_cache.errors import CacheError, bullet_list
from dde_cache.files import write_members
from dde_cache.layout import GROUP_OF_ROWS, MAP_COLUMNS, MAX_TOKENS, array_names, known_groups, layout_problems
from dde_cache.spec import FORMAT_VERSION, HIDDEN, Rows, UnitAttributes, hash_json

SUFFIX = ".zarr.zip"

# What zipfile, JSON and the codecs raise on damaged bytes.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)


def write_unit(path: Path, arrays: UnitArrays, attributes: UnitAttributes, *, replace: bool = True) -> tuple[int, str]:
    """Write a unit under a temporary name, flush it to disk, rename it; return its size in bytes and its SHA-256.

    Raises:
        OSError: the disk is full; nothing under `path` then.
        FileExistsError: without `replace`, another writer has put a unit there in the meantime; it stays.
    """
    return write_members(path, unit_members(arrays, attributes), replace=replace)


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
            self._blocks = Blocks(path)
        except _DAMAGE as error:
            raise CacheError(
                f"{path}: the unit cannot be opened ({error}); delete the file and run `dde-cache extract` again"
            ) from error
        try:
            self.attributes = self._read_attributes()
            problems = layout_problems(self._blocks, self.attributes)
            if problems:
                raise CacheError(
                    f"{path}: the unit's arrays are damaged, or not those that its specification allows:"
                    f"{bullet_list(problems)}"
                )
        except BaseException:
            self.close()
            raise

    def _read_attributes(self) -> UnitAttributes:
        try:
            root = self._blocks.metadata("")
            if root.get("node_type") != "group":
                raise ValueError("expected a group at the root")
            content = root["attributes"]
            attributes = UnitAttributes.model_validate(content)
            # As it is written, not as it is parsed: what a later version adds does not change the hash of what is here.
            if hash_json(content["spec"]) != attributes.fingerprint:
                raise ValueError("its fingerprint is not that of its specification")
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))[:100]
            raise CacheError(
                f"{self.path}: expected a unit of format version {FORMAT_VERSION}, got {place}: {first['msg']}; a "
                "newer dde-cache may read it"
            ) from error
        except _DAMAGE as error:
            raise self._damaged("its metadata", error) from error
        known = known_groups(attributes.spec)
        unknown = [name for name, group in attributes.groups.items() if group.required and name not in known]
        if unknown:
            raise CacheError(
                f"{self.path}: requires {', '.join(unknown)[:200]}, unknown to this version; update dde-cache"
            )
        return attributes

    @property
    def blocks(self) -> Blocks:
        """The members of the file."""
        return self._blocks

    def array(self, name: str, rows: slice = slice(None), allocate: Allocate | None = None) -> np.ndarray:
        """Read rows of an array, for example `maps/t2i/index`, into memory of `allocate` where it is given.

        Raises:
            CacheError: it is missing, or a checksum does not hold.
        """
        try:
            return self._blocks.read(name, rows, allocate)
        except _DAMAGE as error:
            raise self._damaged(name, error) from error

    def length(self, name: str) -> int:
        """How many records an array has."""
        try:
            return self._blocks.layout(name).shape[0]
        except _DAMAGE as error:
            raise self._damaged(name, error) from error

    @cached_property
    def keys(self) -> list[str]:
        """Sample keys, in the order of the shard.

        Raises:
            CacheError: the offsets do not cut the bytes, or a key is no UTF-8 or has control characters.
        """
        return self._keys_of("samples")

    @cached_property
    def partner_keys(self) -> list[str]:
        """Key of the sample whose picture each row of `partners` has.

        Raises:
            CacheError: as for `keys`.
        """
        return self._keys_of("partners")

    def _keys_of(self, group: str) -> list[str]:
        offsets = self.array(f"{group}/key_offsets")
        content = self.array(f"{group}/key_bytes")
        text = content.tobytes()
        # Every offset is compared as it is stored; a difference of unsigned numbers would wrap.
        if offsets[0] != 0 or offsets[-1] != len(text) or (offsets[1:] <= offsets[:-1]).any():
            raise self._damaged(f"{group}/key_offsets", "expected offsets that rise from 0 to the number of bytes")
        if ((content < 32) | (content == 127)).any():
            raise self._damaged(f"{group}/key_bytes", "expected keys without control characters")
        places = offsets.tolist()
        try:
            return [text[start:stop].decode() for start, stop in itertools.pairwise(places)]
        except UnicodeDecodeError as error:
            raise self._damaged(f"{group}/key_bytes", error) from error

    @cached_property
    def content(self) -> np.ndarray:
        """Content hash of each sample [n, 32]."""
        return self.array("samples/content")

    @cached_property
    def maps(self) -> MapColumns:
        """Columns of the maps table.

        Raises:
            CacheError: a record has more tokens than its maps have rows or, where every key is kept, keys.
        """
        maps = MapColumns(*(self.array(f"maps/{name}").astype(np.int64) for name in MAP_COLUMNS))
        if not len(maps.sample):
            return maps
        spec = self.attributes.spec
        both = maps.text_tokens + maps.image_tokens
        text, image, together = [maps.token_ids.shape[1]], [MAX_TOKENS], [2 * MAX_TOKENS]
        for name in spec.rows:
            queries, keys = self._axes(name)
            of_text = name in ("t2i", "t2w")
            (text if of_text else image).append(queries - int(spec.queries == "all" and not of_text))
            {"t2i": image, "i2t": text}.get(name, together).append(keys)
        if spec.hidden_width is not None:
            for array, lengths in (("text", text), ("image", image)):
                lengths.append(self._blocks.layout(f"{HIDDEN}/{array}").shape[1])
        for what, tokens, most in (
            ("text_tokens", maps.text_tokens, text),
            ("grid", maps.image_tokens, image),
            ("grid", both, together),
        ):
            if tokens.max() > min(most):
                raise self._damaged(f"maps/{what}", f"expected at most {min(most)} tokens, got {tokens.max()}")
        return maps

    def _axes(self, name: Rows) -> tuple[int, int]:
        """Query rows, and keys where every key is kept."""
        shape = self._blocks.layout(f"{GROUP_OF_ROWS[name]}/{name}/weight").shape
        return shape[2], 2 * MAX_TOKENS if self.attributes.spec.steps is None else shape[3]

    @property
    def has_maps(self) -> bool:
        """Whether there is a maps table."""
        return "maps" in self.attributes.groups

    @property
    def has_logits(self) -> bool:
        """Whether there is a predictions table."""
        return "predictions" in self.attributes.groups

    @property
    def has_pixel_hashes(self) -> bool:
        """Whether there is a hash of the pixels of each view."""
        return "views" in self.attributes.groups

    @property
    def has_partners(self) -> bool:
        """Whether it says whose pictures a pass exchanged."""
        return "partners" in self.attributes.groups

    def attention(
        self, direction: Rows, rows: slice = slice(None), allocate: Allocate | None = None
    ) -> EncodedAttention:
        """Encoded attention rows (`t2i`, ...) of some records, in memory of `allocate` where it is given.

        Raises:
            CacheError: a checksum does not hold, or a number is outside its bounds.
        """
        spec = self.attributes.spec
        parts = self.parts(direction, rows, allocate)
        filled, keys = self.filled(direction)
        problems = unsafe(parts, filled[rows], keys[rows], spec)
        if problems:
            raise self._damaged(f"{GROUP_OF_ROWS[direction]}/{direction}", "; ".join(problems))
        # torch has no comfortable unsigned types beyond 8 bits; positions are never that large.
        wide = {
            name: part.view(f"i{part.itemsize}") for name, part in parts.items() if part.dtype.str[1:] in ("u2", "u4")
        }
        return from_numpy({**parts, **wide}, spec.steps)

    def parts(
        self, direction: Rows, rows: slice = slice(None), allocate: Allocate | None = None
    ) -> Mapping[str, np.ndarray]:
        """The arrays of one direction as they are on disk, by name, unchecked.

        Raises:
            CacheError: a checksum does not hold.
        """
        names = part_names(self.attributes.spec.steps)
        folder = f"{GROUP_OF_ROWS[direction]}/{direction}"
        return {name: self.array(f"{folder}/{name}", rows, allocate) for name in names}

    def filled(self, direction: Rows) -> tuple[Int[np.ndarray, " r"], Int[np.ndarray, " r"]]:
        """How many query rows of each record are filled, and how many keys they have."""
        maps, spec = self.maps, self.attributes.spec
        keys = {"t2i": maps.image_tokens, "i2t": maps.text_tokens}
        together = maps.text_tokens + maps.image_tokens
        if direction in ("t2i", "t2w"):
            rows = np.full_like(maps.text_tokens, spec.text_length) if spec.queries == "all" else maps.text_tokens
        else:
            rows = maps.image_tokens + int(spec.queries == "all")
        return rows, keys.get(direction, together)

    def hidden(
        self, name: str, rows: slice = slice(None), allocate: Allocate | None = None
    ) -> Float[np.ndarray, "r n w"]:
        """Hidden states (`text` or `image`) of some records, in memory of `allocate` where it is given.

        Raises:
            CacheError: a checksum does not hold, or a number is not finite.
        """
        return self.states(f"{HIDDEN}/{name}", rows, allocate)

    def states(self, name: str, rows: slice = slice(None), allocate: Allocate | None = None) -> np.ndarray:
        """Hidden or pooled states of some records as they are stored (`hidden/text`, `pooled/image_scale`, ...).

        Raises:
            CacheError: a checksum does not hold, or a number is not finite or outside its bounds.
        """
        states = self.array(name, rows, allocate)
        if unsafe_states(states).any():
            raise self._damaged(name, "expected finite numbers, codes from -127 and scales from 0, got others")
        return states

    def vectors(self, group: str, side: str, rows: slice = slice(None)) -> Float[np.ndarray, "r *n w"]:
        """Hidden or pooled states of some records, decoded.

        Raises:
            CacheError: as for `states`.
        """
        name = f"{group}/{side}"
        stored = self.states(name, rows)
        if stored.dtype != np.int8:
            return stored.astype(np.float32)
        return stored.astype(np.float32) * self.states(f"{name}_scale", rows)[..., None]

    def logits(self, rows: slice = slice(None), allocate: Allocate | None = None) -> Float[np.ndarray, "p c"]:
        """The teacher's logits of some predictions, in memory of `allocate` where it is given.

        Raises:
            CacheError: a checksum does not hold, or a logit is not finite.
        """
        logits = self.array("predictions/logits", rows, allocate)
        if not np.isfinite(logits).all():
            raise self._damaged("predictions/logits", "expected finite numbers, got others")
        return logits

    def check_readable(self) -> None:
        """Read every array once, a chunk at a time.

        Raises:
            CacheError: a checksum does not hold.
        """
        for name in array_names(self.attributes):
            layout = self._blocks.layout(name)
            for number in range(layout.chunks):
                self.array(name, slice(number * layout.records, (number + 1) * layout.records))

    def _damaged(self, what: str, error: Exception | str) -> CacheError:
        return CacheError(
            f"{self.path}: {what} is damaged ({error}); delete the unit and run `dde-cache extract` again"
        )

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()
