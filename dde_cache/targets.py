"""Distillation targets of pairs, read from a cache and joined to shards by key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dde_cache.attention import Attention
from dde_cache.codec import EncodedAttention, blank, decode, fill, from_parts, part_names
from dde_cache.errors import CacheError, bullet_list
from dde_cache.samples import Sample, Shard
from dde_cache.spec import UnitEntry
from dde_cache.store import Cache
from dde_cache.stream import CHUNK_PAIRS, Pair, PairTable, Recent
from dde_cache.unit import Unit

OnMissing = Literal["error", "skip"]

CHUNK_BUDGET = 2**30
"""Bytes of decompressed chunks that one worker keeps; a shuffle window of the default size fits for ViLT-B/32."""


@dataclass(frozen=True)
class Join:
    """How shards and a cache fit: the pairs that have targets, and what is on one side only."""

    table: PairTable
    without_targets: tuple[str, ...]
    without_samples: tuple[str, ...]


def join(shards: Sequence[Shard], cache: Cache, on_missing: OnMissing) -> Join:
    """Match shards with units by file name, and their samples by key.

    A shard's targets may lie in several units of its file name, as merged caches have them: the key decides.

    Args:
        shards: samples to train on.
        cache: where their targets are.
        on_missing: `error` refuses samples without targets and targets without samples; `skip` leaves them out.

    Raises:
        CacheError: something is missing (`error`), or nothing fits at all.
    """
    entries = units_by_source(cache)
    pairs: list[list[tuple[str, int]]] = []
    no_targets: list[str] = []
    no_samples = [
        f"every key of unit {entry.name}"
        for source, some in entries.items()
        if source not in {shard.name for shard in shards}
        for entry in some
    ]
    taken: set[str] = set()
    homes: dict[str, dict[str, str]] = {}
    lazy = cache.streams and on_missing == "error" and len({shard.name for shard in shards}) == len(shards)
    for shard in shards:
        texts = {sample.key: len(sample.texts) for sample in shard}
        if shard.name not in homes:
            some = entries.get(shard.name, [])
            homes[shard.name] = _taken_on_trust(some, texts, lazy) or _keys_of(cache, some)
        held = homes[shard.name]
        if not held:
            no_targets.append(f"every key of shard {shard.name} (the cache has no unit of it)")
        else:
            no_targets += [f"{key} in shard {shard.name}" for key in texts if key not in held]
        taken |= held.keys() & texts.keys()
        pairs.append([(key, slot) for key, count in texts.items() if key in held for slot in range(count)])
    for held in homes.values():
        no_samples += [f"{key} in unit {name}" for key, name in sorted(held.items()) if key not in taken]
    found = Join(PairTable(pairs), tuple(no_targets), tuple(no_samples))
    if not len(found.table):
        raise CacheError(
            f"{cache.name}: expected targets of these shards, but no key is on both sides: the cache was made from "
            f"another data set, by the shards:{bullet_list(list(entries), 3)}\npass the cache of these shards, or "
            "extract from them"
        )
    if on_missing == "error" and (no_targets or no_samples):
        raise CacheError(
            f"{cache.name}: shards and cache do not hold the same samples."
            + (f"\nwithout targets ({len(no_targets)}):{bullet_list(no_targets)}" if no_targets else "")
            + (f"\ntargets without samples ({len(no_samples)}):{bullet_list(no_samples)}" if no_samples else "")
            + "\nrun `dde-cache extract` on these shards, or pass --on-missing skip to use what both have"
        )
    return found


def units_by_source(cache: Cache) -> Mapping[str, Sequence[UnitEntry]]:
    """The units of each shard's file name: one, or several where caches of shards of one name were merged."""
    units: dict[str, list[UnitEntry]] = {}
    for entry in cache.manifest.units:
        units.setdefault(entry.source, []).append(entry)
    return units


def _taken_on_trust(entries: Sequence[UnitEntry], texts: Mapping[str, int], lazy: bool) -> dict[str, str] | None:
    """The keys of a shard's only unit without opening it, or None where it has to be opened.

    A cache behind a URL would be fetched whole before the first step: there, where nothing may be missing, a unit with
    as many samples and pairs as its shard is taken to have the same keys, until it is opened and each is looked up.
    """
    if not lazy or len(entries) != 1 or (entries[0].samples, entries[0].pairs) != (len(texts), sum(texts.values())):
        return None
    return dict.fromkeys(texts, entries[0].name)


def _keys_of(cache: Cache, entries: Sequence[UnitEntry]) -> dict[str, str]:
    """Every key of some units, with the unit's name."""
    keys: dict[str, str] = {}
    for entry in entries:
        unit = cache.unit(entry)
        keys |= dict.fromkeys(unit.keys, entry.name)
        unit.close()
    return keys


@dataclass(frozen=True)
class _OpenUnit:
    """A unit with the tables by which pairs are found in it."""

    unit: Unit
    sample: Mapping[str, int]
    first_record: Mapping[tuple[int, int], int]
    prediction: Mapping[tuple[int, int], int]

    def number(self, key: str) -> int:
        """Where a sample is in the unit."""
        if key not in self.sample:
            raise CacheError(
                f"unit of shard {self.unit.attributes.source}: expected sample {key!r} of that shard, but the unit has "
                "no such key: the cache was made from other shards of that name; pass the cache of these shards"
            )
        return self.sample[key]


@dataclass(frozen=True)
class _Chunk:
    """A decompressed chunk of one table."""

    maps: Mapping[str, EncodedAttention]
    logits: Float[np.ndarray, "r c"]

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.maps.values()) + self.logits.nbytes


@dataclass(frozen=True)
class _Members:
    """The pairs of a batch that lie in one chunk of a unit: their numbers in the batch, and their rows in the chunk."""

    unit: str
    chunk: int
    numbers: list[int]
    rows: list[int]


class CacheTargets:
    """Targets of one layer of a cache, by pair. Holds no open file when it is sent to a worker process.

    Args:
        cache: where the targets are.
        shards: the shards that pair numbers refer to.
        layer: which of the cache's layers.
        attention: whether to read maps.
        padded_queries: whether to read padded query rows, which the cache must then have.
    """

    def __init__(
        self,
        cache: Cache,
        shards: Sequence[Shard],
        layer: int,
        *,
        attention: bool = True,
        padded_queries: bool = False,
    ) -> None:
        self._cache, self._layer = cache, layer
        self._attention, self._padded_queries = attention, padded_queries
        self._entries = {entry.name: entry for entry in cache.manifest.units}
        self._sources = [shard.name for shard in shards]
        named = units_by_source(cache)
        self._names = [[entry.name for entry in named.get(source, ())] for source in self._sources]
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_units": None, "_chunks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._units = Recent(self._open_unit, lambda _unit: 1, self._cache.open_units)
        self._chunks = Recent(self._read_chunk, lambda chunk: chunk.nbytes, CHUNK_BUDGET)

    def _open_unit(self, name: str) -> _OpenUnit:
        unit = self._cache.unit(self._entries[name])
        records: dict[tuple[int, int], int] = {}
        if self._attention:
            maps = unit.maps
            chosen = (maps.layer == self._layer) & (maps.image == 0) & (maps.view == 0) & (maps.passes == 0)
            records = {(int(maps.sample[row]), int(maps.text[row])): int(row) for row in np.flatnonzero(chosen)}
        predictions: dict[tuple[int, int], int] = {}
        if unit.has_logits:
            columns = (unit.array(f"predictions/{name}").tolist() for name in ("sample", "text", "view", "pass"))
            rows = enumerate(zip(*columns, strict=True))
            predictions = {(sample, text): row for row, (sample, text, *first) in rows if first == [0, 0]}
        samples = {key: number for number, key in enumerate(unit.keys)}
        return _OpenUnit(unit, samples, records, predictions)

    def _home(self, shard: int, key: str) -> str:
        """Name the unit that holds a key: one of those of the shard's file name.

        Raises:
            CacheError: none does.
        """
        names = self._names[shard]
        if len(names) == 1:
            return names[0]
        for name in names:
            if key in self._units(name).sample:
                return name
        raise CacheError(f"shard {self._sources[shard]}: expected a unit with sample {key!r}, found none")

    def check(self, shard: int, sample: Sample) -> None:
        """Compare a sample's content with what the teacher saw.

        Raises:
            CacheError: pictures or texts have changed since the extraction.
        """
        held = self._units(self._home(shard, sample.key))
        stored = held.unit.content[held.number(sample.key)].tobytes()
        if stored != sample.content_hash():
            raise CacheError(
                f"sample {sample.key!r} of shard {self._sources[shard]}: its picture or texts are not those that the "
                f"teacher saw (content {sample.content_hash().hex()[:12]}..., expected {stored.hex()[:12]}...): the "
                f"targets belong to another version of the data; delete unit {held.unit.path.name} (or choose another "
                "--out) and extract again from these shards"
            )

    def _read_chunk(self, place: tuple[str, str, int]) -> _Chunk:
        name, table, chunk = place
        rows = slice(chunk * CHUNK_PAIRS, (chunk + 1) * CHUNK_PAIRS)
        unit = self._units(name).unit
        if table == "logits":
            return _Chunk({}, unit.logits(rows))
        return _Chunk({table: unit.attention(table, rows)}, np.empty((0, 0), np.float32))

    def _members(self, pairs: Sequence[Pair], table: Literal["first_record", "prediction"]) -> Sequence[_Members]:
        """Group pairs by the chunk in which their rows of a table lie."""
        members: dict[tuple[str, int], _Members] = {}
        for number, pair in enumerate(pairs):
            name = self._home(pair.shard, pair.key)
            unit = self._units(name)
            row = getattr(unit, table).get((unit.number(pair.key), pair.text))
            if row is None:
                raise CacheError(
                    f"unit of shard {self._sources[pair.shard]}: expected a target for text {pair.text} of sample "
                    f"{pair.key!r}, found none"
                )
            place = (name, row // CHUNK_PAIRS)
            if place not in members:
                members[place] = _Members(*place, [], [])
            members[place].numbers.append(number)
            members[place].rows.append(row % CHUNK_PAIRS)
        return list(members.values())

    def targets(self, pairs: Sequence[Pair]) -> Mapping[str, Tensor]:
        """Read the targets of a batch, still encoded; one row a pair.

        Returns:
            `logits` [b, c] where the cache has predictions; with attention also `token_ids` [b, t] (0 where padded),
            `grid` [b, 2], and for both directions `weight` [b, h, q, k], or of sparse weights `index`, `weight`
            [b, h, q, s] and `tail` [b, h, q]. Key axes are as long as the query axes of the other direction, without
            the padded image row.

        Raises:
            CacheError: a unit is damaged, or lacks one of the pairs.
        """
        batch: dict[str, Tensor] = {}
        if self._cache.spec.classes is not None:
            logits = np.empty((len(pairs), self._cache.spec.classes), np.float32)
            for some in self._members(pairs, "prediction"):
                logits[some.numbers] = self._chunks((some.unit, "logits", some.chunk)).logits[some.rows]
            batch["logits"] = torch.from_numpy(logits)
        if not self._attention:
            return batch
        members = self._members(pairs, "first_record")
        text, grid = np.empty(len(pairs), np.int64), np.empty((len(pairs), 2), np.int64)
        ids = np.zeros((len(pairs), self._cache.spec.text_length), np.int64)
        for some in members:
            columns = self._units(some.unit).unit.maps
            rows = some.chunk * CHUNK_PAIRS + np.array(some.rows)
            text[some.numbers], grid[some.numbers] = columns.text_tokens[rows], columns.grid[rows]
            ids[some.numbers, : columns.token_ids.shape[1]] = columns.token_ids[rows]
        batch |= {"token_ids": torch.from_numpy(ids[:, : text.max()]), "grid": torch.from_numpy(grid)}
        every = self._padded_queries
        texts = self._cache.spec.text_length if every else int(text.max())
        images = int(grid.prod(-1).max()) + 1
        for direction, queries, keys in (("t2i", texts, images), ("i2t", images + int(every), texts)):
            encoded = self._gather(members, len(pairs), direction, queries, keys)
            batch |= {f"{direction}.{name}": part for name, part in encoded.parts.items()}
        return batch

    def _gather(
        self, members: Sequence[_Members], pairs: int, direction: str, queries: int, keys: int
    ) -> EncodedAttention:
        """Collect records from their chunks, cut or padded to so many rows and, where every key is kept, keys."""
        chunks = [self._chunks((some.unit, direction, some.chunk)).maps[direction] for some in members]
        gathered = blank(chunks, pairs, queries, keys)
        for some, chunk in zip(members, chunks, strict=True):
            fill(gathered, some.numbers, chunk, some.rows)
        return gathered


def decoded(batch: Mapping[str, Tensor], direction: str, steps: int | None) -> Attention:
    """Decode one direction of a batch's targets, on whatever device they are: whole rows, or sparse ones.

    Args:
        batch: with the targets under `target.`.
        direction: `t2i` or `i2t`.
        steps: of the cache's specification.
    """
    parts = {name: batch[f"target.{direction}.{name}"] for name in part_names(steps)}
    return decode(from_parts(parts, steps))


def teacher_logits(cache: Cache, shards: Sequence[Shard]) -> Mapping[tuple[str, int], Tensor]:
    """The teacher's logits of some shards, by (key, text slot); samples are checked against what the teacher saw.

    Raises:
        CacheError: the cache has no logits, or shards and cache hold different samples.
    """
    if cache.spec.classes is None:
        raise CacheError(f"{cache.name}: expected the teacher's logits, but the cache has no predictions")
    table = join(shards, cache, "error").table
    reader = CacheTargets(cache, shards, layer=0, attention=False)
    for number, shard in enumerate(shards):
        for sample in shard:
            reader.check(number, sample)
    pairs = [table[number] for number in range(len(table))]
    logits = reader.targets(pairs)["logits"]
    return {(pair.key, pair.text): row for pair, row in zip(pairs, logits, strict=True)}
