"""Distillation targets of pairs, read from a cache by key."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dde_cache.attention import Attention
from dde_cache.blocks import Allocate
from dde_cache.chunks import Chunks, in_threads
from dde_cache.codec import EncodedAttention, blank, decode, fill, from_parts, part_names
from dde_cache.errors import CacheError, PixelDrift, PixelDriftWarning
from dde_cache.join import join, units_by_source
from dde_cache.layout import DIRECTIONS
from dde_cache.lookup import ONLY, ChunkPlace, Members, OpenUnit, Table, text_number
from dde_cache.mirror import mirror_maps
from dde_cache.partners import Partner
from dde_cache.samples import Sample, Shard, Text
from dde_cache.spec import HIDDEN, POOLED, Rows
from dde_cache.store import Cache
from dde_cache.stream import CHUNK_PAIRS, Pair, Recent
from dde_cache.views import is_spot_checked

Batch = dict[str, Tensor]

Pixels = Literal["every", "spot"]
"""Every sample, or one in a hundred (`views.is_spot_checked`)."""


class CacheTargets:
    """Targets of some layers of a cache, by pair. Holds no open file when it is sent to a worker process.

    Args:
        cache: where the targets are.
        shards: the shards that pair numbers refer to.
        layer: which of the cache's layers; or several, in the order of their numbers in the batch.
        attention: whether to read maps.
        rows: which attention rows.
        hidden: whether to read hidden states.
        pooled: whether to read pooled states.
        padded_queries: whether to read padded query rows, which the cache must then have.
        pixels: of which samples the pixels of a view are compared with what the teacher saw.
        allow_drift: warn about other pixels, once a process, instead of refusing them.
        passes: numbers of the passes that are read, in `spec.passes`; predictions are those of pass 0.
        logits: whether to read predictions, where the cache has them.
    """

    def __init__(
        self,
        cache: Cache,
        shards: Sequence[Shard],
        layer: int | Sequence[int],
        *,
        attention: bool = True,
        rows: Sequence[Rows] = DIRECTIONS,
        hidden: bool = False,
        pooled: bool = False,
        padded_queries: bool = False,
        pixels: Pixels = "spot",
        allow_drift: bool = False,
        passes: Sequence[int] = (0,),
        logits: bool = True,
    ) -> None:
        self._reads_logits = logits and cache.spec.classes is not None
        self._passes = tuple(passes)
        self._cache, self._layers = cache, (layer,) if isinstance(layer, int) else tuple(layer)
        self._kinds = tuple(rows) if attention else ()
        wanted = {HIDDEN: hidden, POOLED: pooled}
        self._states_of = [one for one in cache.spec.states if wanted[one.group]]
        self._reads_records = hidden or pooled or bool(self._kinds)
        self._pixels, self._allow_drift, self._warned = pixels, allow_drift, False
        self._padded_queries = padded_queries
        self._entries = {entry.name: entry for entry in cache.manifest.units}
        self._sources = [shard.name for shard in shards]
        named = units_by_source(cache)
        self._names = [[entry.name for entry in named.get(source, ())] for source in self._sources]
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_units": None, "_maps": None, "_logits": None, "_states": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._units = Recent(self._open_unit, lambda _unit: 1, self._cache.open_units)
        self._maps: Chunks[ChunkPlace, EncodedAttention] = Chunks(self._read_maps, self._rows("record"))
        self._states: Chunks[ChunkPlace, np.ndarray] = Chunks(self._read_states, self._rows("record"))
        self._logits: Chunks[ChunkPlace, np.ndarray] = Chunks(self._read_logits, self._rows("prediction"))

    def _open_unit(self, name: str) -> OpenUnit:
        layers = self._layers if self._reads_records else ()
        return OpenUnit.of(self._cache.unit(self._entries[name]), layers, self._passes)

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
        held, stored = self._content(shard, sample.key)
        if stored != sample.content_hash():
            raise CacheError(
                f"sample {sample.key!r} of shard {self._sources[shard]}: its picture or texts are not those that the "
                f"teacher saw (content {sample.content_hash().hex()[:12]}..., expected {stored.hex()[:12]}...): the "
                f"targets belong to another version of the data; delete unit {held.unit.path.name} (or choose another "
                "--out) and extract again from these shards"
            )

    def _content(self, shard: int, key: str) -> tuple[OpenUnit, bytes]:
        """The unit that knows a sample, and its content: its own, or as the partner of another.

        Raises:
            CacheError: no unit of the shard's file name knows it.
        """
        for name in self._names[shard]:
            held = self._units(name)
            if key in held.sample:
                return held, held.unit.content[held.sample[key]].tobytes()
        for name in self._names[shard]:
            held = self._units(name)
            if key in held.lent:
                return held, held.lent[key]
        held = self._units(self._home(shard, key))
        return held, held.unit.content[held.number(key)].tobytes()

    def partner(self, pair: Pair, _text: Text) -> Partner:
        """The sample whose picture the teacher saw beside a pair's text.

        Raises:
            CacheError: the unit does not say.
        """
        held = self._units(self._home(pair.shard, pair.key))
        sample = held.number(pair.key)
        for number in self._passes:
            found = held.partner.get((sample, pair.text, pair.view, number))
            if found is not None:
                return found
        raise CacheError(
            f"{held.unit.path}: expected the partner of text {pair.text} of sample {pair.key!r} in view {pair.view}, "
            "found none; run `dde-cache verify`"
        )

    def check_pixels(self, shard: int, key: str, view: int, levels: Callable[[], Sequence[np.ndarray]]) -> None:
        """Compare the pixels of a view with what the teacher saw, where its sample is among those that are checked.

        Raises:
            PixelDrift: they are others, and that is not allowed.
        """
        if not (self._pixels == "every" or is_spot_checked(key)):
            return
        held, _content = self._content(shard, key)
        # Of a partner that was cut away its content is known, but not its pixels.
        if held.hashes is None or key not in held.sample:
            return
        try:
            held.hashes.check(held.number(key), key, view, levels())
        except PixelDrift as drift:
            if not self._allow_drift:
                raise
            if not self._warned:
                warnings.warn(str(drift), PixelDriftWarning, stacklevel=2)
            self._warned = True

    def _read_maps(self, place: ChunkPlace, allocate: Allocate) -> EncodedAttention:
        return self._units(place.unit).unit.attention(cast(Rows, place.table), place.rows, allocate)

    def _read_states(self, place: ChunkPlace, allocate: Allocate) -> np.ndarray:
        return self._units(place.unit).unit.states(place.table, place.rows, allocate)

    def _read_logits(self, place: ChunkPlace, allocate: Allocate) -> np.ndarray:
        return self._units(place.unit).unit.logits(place.rows, allocate)

    def _rows(self, table: Table) -> Callable[[ChunkPlace], int]:
        return lambda place: self._units(place.unit).rows(table, place.chunk)

    def _members(self, pairs: Sequence[Pair], table: Table, layer: int = ONLY, image: int = 0) -> Sequence[Members]:
        """Group pairs by the chunk in which their rows of a table lie; of maps, those of one layer and image slot."""
        members: dict[tuple[str, int], Members] = {}
        opened: dict[str, tuple[OpenUnit, Mapping[tuple[int, int], Mapping[int, int]]]] = {}
        for number, pair in enumerate(pairs):
            name = self._home(pair.shard, pair.key)
            if name not in opened:
                held = self._units(name)
                opened[name] = held, getattr(held, table)
            unit, rows = opened[name]
            number_of_text = text_number(unit.number(pair.key), pair.text, pair.view, image)
            row = rows.get((pair.pass_number, layer), {}).get(number_of_text)
            if row is None:
                raise CacheError(
                    f"unit of shard {self._sources[pair.shard]}: expected a target for text {pair.text} of sample "
                    f"{pair.key!r} in view {pair.view}, pass {pair.pass_number}, found none"
                )
            place = (name, row // CHUNK_PAIRS)
            if place not in members:
                members[place] = Members(*place, [], [])
            members[place].numbers.append(number)
            members[place].rows.append(row % CHUNK_PAIRS)
        return list(members.values())

    def targets(self, pairs: Sequence[Pair]) -> Batch:
        """Read the targets of a batch, still encoded; one row a pair.

        Returns:
            `logits` [b, c] where the cache has predictions and all pairs are of pass 0; with attention also
            `token_ids` [b, t] (0 where padded), `grid` [b, 2], and for both directions `weight` [b, h, q, k], or of
            sparse weights `index`, `weight` [b, h, q, s] and `tail` [b, h, q]. Key axes are as long as the query axes
            of the other direction, without the padded image row; those of rows over the whole sequence as long as the
            longest of the batch. Hidden states are `hidden/text` [b, t, w] and `hidden/image` [b, v, w], pooled ones
            `pooled/text` and `pooled/image` [b, w]; of int8 with `_scale` beside them, without w. For the names of
            other image slots and layers see `slot_name`.

        Raises:
            CacheError: a unit is damaged, or lacks one of the pairs.
        """
        named = {name for pair in pairs for name in self._names[pair.shard]}
        if not self._cache.streams:
            # Most of a unit's opening is its hash. What is behind a URL is fetched one by one, when it is opened.
            in_threads(self._cache.check, [self._entries[name] for name in named if name not in self._units])
        batch: dict[str, Tensor] = {}
        if self._reads_logits and not any(pair.pass_number for pair in pairs):
            batch["logits"] = torch.from_numpy(self._gather_logits(pairs, self._cache.spec.classes or 0))
        if not self._reads_records:
            return batch
        mirrored = [row for row, pair in enumerate(pairs) if pair.mirrored]
        for image in range(self._cache.spec.images):
            for place in range(len(self._layers)):
                batch |= self._gather_maps(pairs, image, place)
        return mirror_maps(batch, mirrored) if mirrored else batch

    def _gather_logits(self, pairs: Sequence[Pair], classes: int) -> Float[np.ndarray, "b c"]:
        wanted = {some.place("logits"): some for some in self._members(pairs, "prediction")}
        logits = np.empty((len(pairs), classes), np.float32)
        for place, chunk in self._logits.load(wanted).items():
            logits[wanted[place].numbers] = chunk[wanted[place].rows]
        self._logits.taken({place: len(some.rows) for place, some in wanted.items()})
        return logits

    def _gather_maps(self, pairs: Sequence[Pair], image: int, number: int) -> Batch:
        """Tokens, grids, attention rows and hidden states of a batch, of one image slot and layer (by its number)."""
        members = self._members(pairs, "record", self._layers[number], image)
        text, grid = np.empty(len(pairs), np.int64), np.empty((len(pairs), 2), np.int64)
        ids = np.zeros((len(pairs), self._cache.spec.text_length), np.int64)
        for some in members:
            columns = self._units(some.unit).unit.maps
            rows = some.chunk * CHUNK_PAIRS + np.array(some.rows)
            text[some.numbers], grid[some.numbers] = columns.text_tokens[rows], columns.grid[rows]
            ids[some.numbers, : columns.token_ids.shape[1]] = columns.token_ids[rows]
        batch = {"token_ids": torch.from_numpy(ids[:, : text.max()]), slot_name("grid", image): torch.from_numpy(grid)}
        every = self._padded_queries
        texts = self._cache.spec.text_length if every else int(text.max())
        images = int(grid.prod(-1).max()) + 1
        axes = {"t2i": (texts, images), "i2t": (images + int(every), texts)}
        together = int((text + grid.prod(-1)).max()) + 1
        axes |= {"t2w": (texts, together), "i2w": (images + int(every), together)}
        wanted = {some.place(direction): some for direction in self._kinds for some in members}
        chunks = self._maps.load(wanted)
        for direction in self._kinds:
            queries, keys = axes[direction]
            held = [chunks[some.place(direction)] for some in members]
            # Copied record by record, cut or padded to so many rows and, where every key is kept, keys.
            gathered = blank(held, len(pairs), queries, keys)
            for some, chunk in zip(members, held, strict=True):
                fill(gathered, some.numbers, chunk, some.rows)
            batch |= {f"{slot_name(direction, image, number)}.{name}": part for name, part in gathered.parts.items()}
        self._maps.taken({place: len(some.rows) for place, some in wanted.items()})
        for kind in self._states_of:
            for name in kind.arrays:
                length = int(text.max()) if "/text" in name else images
                states = self._gather_states(name, members, length if kind.per_token else None)
                batch[slot_name(name, image, number)] = states
        return batch

    def _gather_states(self, name: str, members: Sequence[Members], length: int | None) -> Tensor:
        """Hidden or pooled states (or scales) of a batch as they are stored; `length` cuts or pads the tokens."""
        wanted = {some.place(name): some for some in members}
        loaded = self._states.load(wanted)
        first = next(iter(loaded.values()))
        each = first.shape[1:] if length is None else (length, *first.shape[2:])
        gathered = np.zeros((sum(len(some.rows) for some in members), *each), first.dtype)
        for place, chunk in loaded.items():
            if length is None:
                gathered[wanted[place].numbers] = chunk[wanted[place].rows]
                continue
            shared = min(length, chunk.shape[1])
            gathered[wanted[place].numbers, :shared] = chunk[wanted[place].rows, :shared]
        self._states.taken({place: len(some.rows) for place, some in wanted.items()})
        return torch.from_numpy(gathered)


def slot_name(target: str, image: int, layer: int = 0) -> str:
    """The name of a target of an image slot, and of a layer by its number: the first of either has none (`t2i1@1`)."""
    return f"{target}{image or ''}" + (f"@{layer}" if layer else "")


def decoded(
    batch: Mapping[str, Tensor], direction: str, steps: int | None, image: int = 0, layer: int = 0
) -> Attention:
    """Decode one direction of a batch's targets, on whatever device they are: whole rows, or sparse ones.

    Args:
        batch: with the targets under `target.`.
        direction: `t2i`, `i2t`, `t2w` or `i2w`.
        steps: of the cache's specification.
        image: slot of the image.
        layer: number of the layer among those that were read.
    """
    parts = {name: batch[f"target.{slot_name(direction, image, layer)}.{name}"] for name in part_names(steps)}
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
