"""Distillation targets of pairs, read from a cache and joined to shards by key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_cache.attention import SparseAttention
from dde_cache.codec import EncodedAttention, blank, decode, pad_to
from dde_cache.errors import CacheError, bullet_list
from dde_cache.samples import Sample, Shard
from dde_cache.store import Cache
from dde_cache.stream import CHUNK_PAIRS, Pair, PairTable, Recent
from dde_cache.unit import DIRECTIONS, Unit

OnMissing = Literal["error", "skip"]

CHUNK_BUDGET = 512 * 2**20
"""Bytes of decompressed chunks that one worker keeps; a shuffle window of the default size fits for ViLT-B/32."""

OPEN_UNITS = 64
"""Units that one worker keeps open."""


@dataclass(frozen=True)
class Join:
    """How shards and a cache fit: the pairs that have targets, and what is on one side only."""

    table: PairTable
    without_targets: tuple[str, ...]
    without_samples: tuple[str, ...]


def join(shards: Sequence[Shard], cache: Cache, on_missing: OnMissing) -> Join:
    """Match shards with units by file name, and their samples by key.

    Args:
        shards: samples to train on.
        cache: where their targets are.
        on_missing: `error` refuses samples without targets and targets without samples; `skip` leaves them out.

    Raises:
        CacheError: something is missing (`error`), or nothing fits at all.
    """
    entries = {entry.source: entry for entry in cache.manifest.units}
    pairs: list[list[tuple[str, int]]] = []
    no_targets: list[str] = []
    no_samples = [
        f"every key of unit {entry.name}"
        for source, entry in entries.items()
        if source not in {shard.name for shard in shards}
    ]
    for shard in shards:
        entry = entries.get(shard.name)
        held: set[str] = set()
        if entry is None:
            no_targets.append(f"every key of shard {shard.name} (the cache has no unit of it)")
        else:
            unit = cache.unit(entry)
            held = set(unit.keys)
            unit.close()
        texts = {sample.key: len(sample.texts) for sample in shard}
        if entry is not None:
            no_targets += [f"{key} in shard {shard.name}" for key in texts if key not in held]
            no_samples += [f"{key} in unit {entry.name}" for key in sorted(held - texts.keys())]
        pairs.append([(key, slot) for key, count in texts.items() if key in held for slot in range(count)])
    found = Join(PairTable(pairs), tuple(no_targets), tuple(no_samples))
    if not len(found.table):
        raise CacheError(
            f"{cache.folder}: expected targets of these shards, but no key is on both sides: the cache was made from "
            f"another data set, by the shards:{bullet_list(list(entries), 3)}\npass the cache of these shards, or "
            "extract from them"
        )
    if on_missing == "error" and (no_targets or no_samples):
        raise CacheError(
            f"{cache.folder}: shards and cache do not hold the same samples."
            + (f"\nwithout targets ({len(no_targets)}):{bullet_list(no_targets)}" if no_targets else "")
            + (f"\ntargets without samples ({len(no_samples)}):{bullet_list(no_samples)}" if no_samples else "")
            + "\nrun `dde-cache extract` on these shards, or pass --on-missing skip to use what both have"
        )
    return found


@dataclass(frozen=True)
class _OpenUnit:
    """A unit with the tables by which pairs are found in it."""

    unit: Unit
    sample: Mapping[str, int]
    first_record: Mapping[tuple[int, int], int]
    prediction: Mapping[tuple[int, int], int]


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

    shard: int
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
        self._entries = {entry.source: entry for entry in cache.manifest.units}
        self._sources = [shard.name for shard in shards]
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_units": None, "_chunks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._units = Recent(self._open_unit, lambda _unit: 1, OPEN_UNITS)
        self._chunks = Recent(self._read_chunk, lambda chunk: chunk.nbytes, CHUNK_BUDGET)

    def _open_unit(self, shard: int) -> _OpenUnit:
        unit = self._cache.unit(self._entries[self._sources[shard]])
        maps = unit.maps
        chosen = (maps.layer == self._layer) & (maps.image == 0) & (maps.view == 0) & (maps.passes == 0)
        records = {(int(maps.sample[row]), int(maps.text[row])): int(row) for row in np.flatnonzero(chosen)}
        predictions: dict[tuple[int, int], int] = {}
        if unit.has_logits:
            columns = (unit.array(f"predictions/{name}").tolist() for name in ("sample", "text"))
            predictions = {place: row for row, place in enumerate(zip(*columns, strict=True))}
        samples = {key: number for number, key in enumerate(unit.keys)}
        return _OpenUnit(unit, samples, records, predictions)

    def check(self, shard: int, sample: Sample) -> None:
        """Compare a sample's content with what the teacher saw.

        Raises:
            CacheError: pictures or texts have changed since the extraction.
        """
        held = self._units(shard)
        stored = held.unit.content[held.sample[sample.key]].tobytes()
        if stored != sample.content_hash():
            raise CacheError(
                f"sample {sample.key!r} of shard {self._sources[shard]}: its picture or texts are not those that the "
                f"teacher saw (content {sample.content_hash().hex()[:12]}..., expected {stored.hex()[:12]}...): the "
                f"targets belong to another version of the data; delete unit {held.unit.path.name} (or choose another "
                "--out) and extract again from these shards"
            )

    def _read_chunk(self, place: tuple[int, str, int]) -> _Chunk:
        shard, table, chunk = place
        rows = slice(chunk * CHUNK_PAIRS, (chunk + 1) * CHUNK_PAIRS)
        unit = self._units(shard).unit
        if table == "logits":
            return _Chunk({}, unit.array("predictions/logits", rows))
        encoded = unit.attention(table, rows)
        keys = unit.maps.image_tokens if table == "t2i" else unit.maps.text_tokens
        _check_chunk(encoded, keys[rows], f"{unit.path}: {table}")
        return _Chunk({table: encoded}, np.empty((0, 0), np.float32))

    def _members(self, pairs: Sequence[Pair], table: Literal["first_record", "prediction"]) -> Sequence[_Members]:
        """Group pairs by the chunk in which their rows of a table lie."""
        units = {shard: self._units(shard) for shard in {pair.shard for pair in pairs}}
        members: dict[tuple[int, int], _Members] = {}
        for number, pair in enumerate(pairs):
            unit = units[pair.shard]
            row = getattr(unit, table).get((unit.sample[pair.key], pair.text))
            if row is None:
                raise CacheError(
                    f"unit of shard {self._sources[pair.shard]}: expected a target for text {pair.text} of sample "
                    f"{pair.key!r}, found none"
                )
            place = (pair.shard, row // CHUNK_PAIRS)
            if place not in members:
                members[place] = _Members(*place, [], [])
            members[place].numbers.append(number)
            members[place].rows.append(row % CHUNK_PAIRS)
        return list(members.values())

    def targets(self, pairs: Sequence[Pair]) -> Mapping[str, Tensor]:
        """Read the targets of a batch, still encoded; one row a pair.

        Returns:
            `logits` [b, c] where the cache has predictions; with attention also `token_ids` [b, t] (0 where padded),
            `grid` [b, 2], and for both directions `index`, `weight` [b, h, q, s] and `tail` [b, h, q].

        Raises:
            CacheError: a unit is damaged, or lacks one of the pairs.
        """
        batch: dict[str, Tensor] = {}
        if self._cache.labels is not None:
            logits = np.empty((len(pairs), len(self._cache.labels)), np.float32)
            for some in self._members(pairs, "prediction"):
                logits[some.numbers] = self._chunks((some.shard, "logits", some.chunk)).logits[some.rows]
            batch["logits"] = torch.from_numpy(logits)
        if not self._attention:
            return batch
        members = self._members(pairs, "first_record")
        text, grid = np.empty(len(pairs), np.int64), np.empty((len(pairs), 2), np.int64)
        ids = np.zeros((len(pairs), self._cache.spec.text_length), np.int64)
        for some in members:
            columns = self._units(some.shard).unit.maps
            rows = some.chunk * CHUNK_PAIRS + np.array(some.rows)
            text[some.numbers], grid[some.numbers] = columns.text_tokens[rows], columns.grid[rows]
            ids[some.numbers, : columns.token_ids.shape[1]] = columns.token_ids[rows]
        batch |= {"token_ids": torch.from_numpy(ids[:, : text.max()]), "grid": torch.from_numpy(grid)}
        every = self._padded_queries
        queries = {
            "t2i": self._cache.spec.text_length if every else int(text.max()),
            "i2t": int(grid.prod(-1).max()) + 1 + int(every),
        }
        for direction in DIRECTIONS:
            encoded = self._gather(members, len(pairs), direction, queries[direction])
            batch |= {
                f"{direction}.index": encoded.index,
                f"{direction}.weight": encoded.weight,
                f"{direction}.tail": encoded.tail,
            }
        return batch

    def _gather(self, members: Sequence[_Members], pairs: int, direction: str, queries: int) -> EncodedAttention:
        """Collect records from their chunks, one copy a record, cut or padded to `queries` rows."""
        chunks = [self._chunks((some.shard, direction, some.chunk)).maps[direction] for some in members]
        gathered = blank(chunks, pairs, queries)
        index, weight, tail = (part.numpy() for part in gathered.parts)
        for some, chunk in zip(members, chunks, strict=True):
            held = pad_to(chunk, chunk.index.shape[2], gathered.index.shape[3])
            high = min(queries, held.index.shape[2])
            held_index, held_weight, held_tail = (part.numpy()[:, :, :high] for part in held.parts)
            for number, row in zip(some.numbers, some.rows, strict=True):
                index[number, :, :high] = held_index[row]
                weight[number, :, :high] = held_weight[row]
                tail[number, :, :high] = held_tail[row]
        return gathered


def _check_chunk(encoded: EncodedAttention, keys: Int[np.ndarray, " r"], where: str) -> None:
    """Refuse positions outside the key axis of their record before they reach a gather, and impossible tails."""
    # Slots first, as they lie in memory.
    index, tail = encoded.index.permute(3, 0, 1, 2).flatten(2).numpy(), encoded.tail.numpy()
    if not index.size:
        return
    if (index.max(axis=(0, 2)) >= keys).any() or (index.dtype.kind == "i" and index.min() < 0):
        raise CacheError(f"{where}: expected key positions inside each record's tokens, got others; extract again")
    # Floats from 0 to 1, read as unsigned integers, keep their order; negative ones and NaN are then above 1.
    bits = f"u{tail.itemsize}"
    if tail.view(bits).max() > np.ones(1, tail.dtype).view(bits)[0]:
        raise CacheError(f"{where}: expected tail masses from 0 to 1, got others; extract again")


def decoded(batch: Mapping[str, Tensor], direction: str) -> SparseAttention:
    """Decode one direction of a batch's targets, on whatever device they are."""
    return decode(EncodedAttention(*(batch[f"target.{direction}.{part}"] for part in ("index", "weight", "tail"))))


def teacher_logits(cache: Cache, shards: Sequence[Shard]) -> Mapping[tuple[str, int], Tensor]:
    """The teacher's logits of some shards, by (key, text slot); samples are checked against what the teacher saw.

    Raises:
        CacheError: the cache has no logits, or shards and cache hold different samples.
    """
    if cache.labels is None:
        raise CacheError(f"{cache.folder}: expected the teacher's logits, but its teacher has no task head")
    table = join(shards, cache, "error").table
    reader = CacheTargets(cache, shards, cache.spec.layers[-1], attention=False)
    for number, shard in enumerate(shards):
        for sample in shard:
            reader.check(number, sample)
    pairs = [table[number] for number in range(len(table))]
    logits = reader.targets(pairs)["logits"]
    return {(pair.key, pair.text): row for pair, row in zip(pairs, logits, strict=True)}
