"""What is in a cache, in numbers, and one pair's strongest links."""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from dde_cache.codec import dense_rows
from dde_cache.errors import CacheError
from dde_cache.spec import Direction, Model, Provenance, TargetSpec
from dde_cache.store import Cache
from dde_cache.stream import CHUNK_PAIRS
from dde_cache.unit import MapColumns, Unit

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95)


class KeptMass(Model):
    """Distribution of the kept mass over valid query rows and heads."""

    mean: float
    quantiles: dict[str, float] = Field(description="share of rows -> kept mass that so many rows stay below")


class CacheSummary(Model):
    """What `dde-cache inspect` shows."""

    fingerprint: str
    spec: TargetSpec
    provenance: Provenance
    labels: tuple[str, ...] | None
    units: int
    read_units: int = Field(description="units whose rows were read, for kept mass, tokens, dense size and provenance")
    samples: int
    pairs: int
    bytes: int
    bytes_a_pair: float
    dense_bytes_a_pair: float = Field(
        description="dense float16 maps of the valid tokens, layers, heads, views and passes that are kept"
    )
    kept_mass: dict[str, KeptMass] = Field(description="by direction; empty where every key is kept, as sqrt8 does")
    text_tokens: tuple[int, int] | None = Field(description="shortest and longest text; null without maps")
    image_tokens: tuple[int, int] | None = Field(
        description="smallest and largest picture, CLS included; null without maps"
    )


class Link(Model):
    """An image token (`CLS`, or a patch by row and column from 1) and its weight, averaged over the heads."""

    image_token: str
    weight: float


class WordLinks(Model):
    """One text token and the image tokens that it attends to most."""

    word: str
    links: tuple[Link, ...]


class PairLinks(Model):
    """One pair's strongest links, word by word."""

    key: str
    text: int
    layer: int
    words: tuple[WordLinks, ...]
    logits: dict[str, float] | None


def summarise(cache: Cache, units: int | None = None) -> CacheSummary:
    """Read a cache and count.

    Args:
        cache: what is read.
        units: how many units to read, from the first on; None: all. Size and counts are those of the manifest.

    Raises:
        CacheError: the cache is empty, or a unit is damaged.
    """
    if not cache.manifest.units:
        raise CacheError(f"{cache.name}: has no finished units yet; run `dde-cache extract` to the end")
    # Kept mass is counted in 1,000 steps, so that memory does not grow with the cache.
    counts = {direction: np.zeros(1001, np.int64) for direction in cache.spec.directions}
    dense = 0
    text: list[int] = []
    image: list[int] = []
    provenance = Provenance()
    read = cache.manifest.units[:units]
    for entry in read:
        unit = cache.unit(entry)
        provenance = unit.attributes.provenance
        if not unit.has_maps:
            unit.close()
            continue
        maps = unit.maps
        for direction in cache.spec.directions:
            if cache.spec.weights != "sqrt8":
                counts[direction] += count_masses(unit, direction)
        dense += _dense_bytes(maps, cache.spec)
        if len(maps.sample):
            text += [int(maps.text_tokens.min()), int(maps.text_tokens.max())]
            image += [int(maps.image_tokens.min()), int(maps.image_tokens.max())]
        unit.close()
    pairs = sum(entry.pairs for entry in cache.manifest.units)
    size = sum(entry.size for entry in cache.manifest.units)
    if not pairs or (cache.spec.layers and not text):
        raise CacheError(f"{cache.folder}: expected maps of pairs, but its units hold none")
    return CacheSummary(
        fingerprint=cache.manifest.fingerprint,
        spec=cache.spec,
        provenance=provenance,
        labels=cache.labels,
        units=len(cache.manifest.units),
        read_units=len(read),
        samples=sum(entry.samples for entry in cache.manifest.units),
        pairs=pairs,
        bytes=size,
        bytes_a_pair=size / pairs,
        dense_bytes_a_pair=dense / max(sum(entry.pairs for entry in read), 1),
        kept_mass={direction: _distribution(counted) for direction, counted in counts.items() if counted.any()},
        text_tokens=(min(text), max(text)) if text else None,
        image_tokens=(min(image), max(image)) if image else None,
    )


def _dense_bytes(maps: MapColumns, spec: TargetSpec) -> int:
    """Bytes of a unit's attention rows and hidden states in float16, uncompressed."""
    words, patches = maps.text_tokens, maps.image_tokens
    keys = {"t2i": patches, "i2t": words}
    rows = sum(
        int(((words if name in ("t2i", "t2w") else patches) * keys.get(name, words + patches)).sum())
        for name in spec.rows
    )
    states = (spec.hidden_width or 0) * int((words + patches).sum()) + (spec.pooled_width or 0) * 2 * len(words)
    return 2 * (spec.stored_heads * rows + states)


def count_masses(unit: Unit, direction: Direction) -> np.ndarray:
    """How many valid rows keep how many thousandths of their mass; read a chunk at a time."""
    counted = np.zeros(1001, np.int64)
    maps = unit.maps
    tokens = maps.text_tokens if direction == "t2i" else maps.image_tokens
    for start in range(0, len(tokens), CHUNK_PAIRS):
        rows = slice(start, start + CHUNK_PAIRS)
        tail = unit.attention(direction, rows).parts["tail"].numpy().astype(np.float64)
        kept = np.where(tail < 0, -tail, 1 - tail)
        valid = np.arange(tail.shape[2])[None] < tokens[rows][:, None]
        kept = kept.transpose(0, 2, 1)[valid]
        counted += np.bincount((kept * 1000).round().astype(np.int64).ravel(), minlength=1001)[:1001]
    return counted


def _distribution(counted: np.ndarray) -> KeptMass:
    steps = np.arange(1001) / 1000
    below = np.cumsum(counted) / counted.sum()
    return KeptMass(
        mean=float((steps * counted).sum() / counted.sum()),
        quantiles={f"{share:g}": float(steps[np.searchsorted(below, share)]) for share in QUANTILES},
    )


def pair_links(cache: Cache, key: str, text: int = 0, top: int = 3) -> PairLinks:
    """Find a pair and list its strongest word-to-patch links of the last stored layer, in its first view, as the shard
    has it.

    Raises:
        CacheError: the cache has no such key or text.
    """
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        if key in unit.keys:
            return _links(cache, unit, key, text, top)
        unit.close()
    raise CacheError(
        f"{cache.name}: expected a sample with key {key!r}, found none in {len(cache.manifest.units)} units"
    )


def _links(cache: Cache, unit: Unit, key: str, text: int, top: int) -> PairLinks:
    if not unit.has_maps:
        raise CacheError(f"{cache.folder}: expected attention maps, but the cache keeps predictions alone")
    if "t2i" not in cache.spec.directions:
        raise CacheError(f"{cache.folder}: expected text-to-image maps, but the cache has i2t alone")
    maps = unit.maps
    sample = unit.keys.index(key)
    layer = cache.spec.layers[-1]
    chosen = (maps.sample == sample) & (maps.text == text) & (maps.layer == layer) & (maps.image == 0)
    chosen &= maps.passes == 0
    rows = np.flatnonzero(chosen)
    if not len(rows):
        raise CacheError(f"{cache.name}: sample {key!r} has no text {text}")
    row = int(rows[0])
    tokens = int(maps.text_tokens[row])
    grid = tuple(int(side) for side in maps.grid[row])
    words = cache.preprocessor().processor.tokenizer.convert_ids_to_tokens(maps.token_ids[row, :tokens].tolist())
    keys = grid[0] * grid[1] + 1
    dense = dense_rows(unit.attention("t2i", slice(row, row + 1)), keys)[0].mean(0)
    found = []
    for place, word in enumerate(words):
        weight, position = dense[place].topk(min(top, keys))
        links = [
            Link(image_token=_name(number, grid[1]), weight=value)
            for value, number in zip(weight.tolist(), position.tolist(), strict=True)
            if value > 0
        ]
        found.append(WordLinks(word=word or "[unknown]", links=tuple(links)))
    logits = _logits(cache, unit, sample, text)
    return PairLinks(key=key, text=text, layer=layer, words=tuple(found), logits=logits)


def _name(position: int, columns: int) -> str:
    if position == 0:
        return "CLS"
    row, column = divmod(position - 1, columns)
    return f"row {row + 1}, column {column + 1}"


def _logits(cache: Cache, unit: Unit, sample: int, text: int) -> Mapping[str, float] | None:
    if not unit.has_logits or cache.labels is None:
        return None
    columns = [unit.array(f"predictions/{name}") for name in ("sample", "text")]
    rows = np.flatnonzero((columns[0] == sample) & (columns[1] == text))
    if not len(rows):
        raise CacheError(f"{unit.path}: has no logits of text {text} of its sample {sample}")
    row = int(rows[0])
    logits = unit.logits(slice(row, row + 1))[0]
    best = np.argsort(-logits)[:5]
    return {cache.labels[number]: float(logits[number]) for number in best}
