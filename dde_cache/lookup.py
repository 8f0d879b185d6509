"""Where the targets of a pair lie in a unit: the rows of its tables by pass, layer, sample, text, view and image."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np

from dde_cache.drift import PixelHashes
from dde_cache.errors import CacheError
from dde_cache.layout import PREDICTION_COLUMNS
from dde_cache.partners import Partner, Place, read_partners
from dde_cache.stream import CHUNK_PAIRS
from dde_cache.unit import Unit

Table = Literal["record", "prediction"]

ONLY = 0
"""The layer of predictions, which have none."""


@dataclass(frozen=True)
class OpenUnit:
    """A unit with the tables by which pairs are found in it."""

    unit: Unit
    sample: Mapping[str, int]
    record: Mapping[tuple[int, int], Mapping[int, int]]  # of each (pass, layer) that is read
    prediction: Mapping[tuple[int, int], Mapping[int, int]]
    partner: Mapping[Place, Partner]
    views: int
    hashes: PixelHashes | None

    @classmethod
    def of(cls, unit: Unit, layers: Sequence[int], passes: Sequence[int]) -> "OpenUnit":
        """Read the tables of a unit.

        Args:
            unit: opened.
            layers: whose records are read; none: the maps table is not.
            passes: which are read; predictions are those of pass 0.

        Raises:
            CacheError: a table is damaged.
        """
        records: dict[tuple[int, int], Mapping[int, int]] = {}
        if layers:
            maps = unit.maps
            columns = (maps.sample, maps.text, maps.view, maps.image)
            for number, layer in product(passes, layers):
                records[number, layer] = _row_of_text(*columns, (maps.layer == layer) & (maps.passes == number))
        predictions: dict[tuple[int, int], Mapping[int, int]] = {}
        if unit.has_logits:
            sample, text, view, column = (unit.array(f"predictions/{name}") for name in PREDICTION_COLUMNS)
            predictions[0, ONLY] = _row_of_text(sample, text, view, np.zeros_like(text), column == 0)
        samples = {key: number for number, key in enumerate(unit.keys)}
        partners = read_partners(unit) if unit.has_partners and tuple(passes) != (0,) else {}
        hashes = PixelHashes(unit) if unit.has_pixel_hashes else None
        return cls(unit, samples, records, predictions, partners, unit.attributes.spec.views, hashes)

    def rows(self, table: Table, chunk: int) -> int:
        """How many rows of a chunk an epoch takes.

        Of several views it takes one, and which is not known here: then the budget alone decides how long it stays.
        """
        return self._counts[table].get(chunk, 0) if self.views == 1 else sys.maxsize

    @cached_property
    def _counts(self) -> Mapping[str, Mapping[int, int]]:
        tables = {"record": self.record, "prediction": self.prediction}
        return {
            name: Counter(row // CHUNK_PAIRS for rows in table.values() for row in rows.values())
            for name, table in tables.items()
        }

    @cached_property
    def lent(self) -> Mapping[str, bytes]:
        """Content hash of each sample whose picture a pass shows, by key."""
        return {one.key: one.content for one in self.partner.values()}

    def number(self, key: str) -> int:
        """Where a sample is in the unit."""
        if key not in self.sample:
            raise CacheError(
                f"unit of shard {self.unit.attributes.source}: expected sample {key!r} of that shard, but the unit has "
                "no such key: the cache was made from other shards of that name; pass the cache of these shards"
            )
        return self.sample[key]


class ChunkPlace(NamedTuple):
    """Where a chunk lies: unit, the kind of its rows (`t2i`, ..., `hidden/text`, `logits`), and its number."""

    unit: str
    table: str
    chunk: int

    @property
    def rows(self) -> slice:
        """The rows of the chunk."""
        return slice(self.chunk * CHUNK_PAIRS, (self.chunk + 1) * CHUNK_PAIRS)


@dataclass(frozen=True)
class Members:
    """The pairs of a batch that lie in one chunk of a unit: their numbers in the batch, and their rows in the chunk."""

    unit: str
    chunk: int
    numbers: list[int]
    rows: list[int]

    def place(self, table: str) -> ChunkPlace:
        """The chunk of these rows in one of the tables."""
        return ChunkPlace(self.unit, table, self.chunk)


def _row_of_text(
    sample: np.ndarray, text: np.ndarray, view: np.ndarray, image: np.ndarray, chosen: np.ndarray
) -> Mapping[int, int]:
    """The row of each text in each view with each image among those that are chosen, by `text_number`."""
    rows = np.flatnonzero(chosen)
    numbers = text_number(*(column[rows].astype(np.int64) for column in (sample, text, view, image)))
    return dict(zip(numbers.tolist(), rows.tolist(), strict=True))


def text_number(sample: Any, text: Any, view: Any, image: Any = 0) -> Any:
    """One number for sample (24 bits), text slot and view (16 bits each) and image slot (1 bit): half a million tuples
    are slow to keep."""
    return sample << 33 | text << 17 | view << 1 | image
