"""What is in a cache, in numbers, and one pair's strongest links."""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from dde_cache.attention import densify
from dde_cache.codec import decode
from dde_cache.errors import CacheError
from dde_cache.spec import Model, Provenance, TargetSpec
from dde_cache.store import Cache
from dde_cache.unit import DIRECTIONS, Unit

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
    samples: int
    pairs: int
    bytes: int
    bytes_a_pair: float
    dense_bytes_a_pair: float = Field(
        description="dense float16 maps of the valid tokens, layers and heads that are kept"
    )
    kept_mass: dict[str, KeptMass]
    text_tokens: tuple[int, int] = Field(description="shortest and longest text")
    image_tokens: tuple[int, int] = Field(description="smallest and largest picture, CLS included")


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


def summarise(cache: Cache) -> CacheSummary:
    """Read every unit of a cache and count.

    Raises:
        CacheError: the cache is empty, or a unit is damaged.
    """
    if not cache.manifest.units:
        raise CacheError(f"{cache.folder}: has no finished units yet; run `dde-cache extract` to the end")
    # Kept mass is counted in 1,000 steps, so that memory does not grow with the cache.
    counts = {direction: np.zeros(1001, np.int64) for direction in DIRECTIONS}
    dense = 0
    text: list[int] = []
    image: list[int] = []
    provenance = Provenance()
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        maps = unit.maps
        tokens = {"t2i": maps.text_tokens, "i2t": maps.image_tokens}
        for direction in DIRECTIONS:
            tail = unit.array(f"maps/{direction}/tail").astype(np.float64)
            valid = np.arange(tail.shape[2])[None] < tokens[direction][:, None]
            kept = 1 - tail.transpose(0, 2, 1)[valid]
            counts[direction] += np.bincount((kept * 1000).round().astype(np.int64).ravel(), minlength=1001)[:1001]
        dense += int((maps.text_tokens * maps.image_tokens).sum()) * 2 * 2 * cache.spec.stored_heads
        text += [int(maps.text_tokens.min()), int(maps.text_tokens.max())]
        image += [int(maps.image_tokens.min()), int(maps.image_tokens.max())]
        provenance = unit.attributes.provenance
        unit.close()
    pairs = sum(entry.pairs for entry in cache.manifest.units)
    size = sum(entry.size for entry in cache.manifest.units)
    return CacheSummary(
        fingerprint=cache.manifest.fingerprint,
        spec=cache.spec,
        provenance=provenance,
        labels=cache.labels,
        units=len(cache.manifest.units),
        samples=sum(entry.samples for entry in cache.manifest.units),
        pairs=pairs,
        bytes=size,
        bytes_a_pair=size / pairs,
        dense_bytes_a_pair=dense / pairs,
        kept_mass={direction: _distribution(counted) for direction, counted in counts.items()},
        text_tokens=(min(text), max(text)),
        image_tokens=(min(image), max(image)),
    )


def _distribution(counted: np.ndarray) -> KeptMass:
    steps = np.arange(1001) / 1000
    below = np.cumsum(counted) / counted.sum()
    return KeptMass(
        mean=float((steps * counted).sum() / counted.sum()),
        quantiles={f"{share:g}": float(steps[np.searchsorted(below, share)]) for share in QUANTILES},
    )


def pair_links(cache: Cache, key: str, text: int = 0, top: int = 3) -> PairLinks:
    """Find a pair and list its strongest word-to-patch links of the last stored layer.

    Raises:
        CacheError: the cache has no such key or text.
    """
    for entry in cache.manifest.units:
        unit = cache.unit(entry)
        if key in unit.keys:
            return _links(cache, unit, key, text, top)
        unit.close()
    raise CacheError(
        f"{cache.folder}: expected a sample with key {key!r}, found none in {len(cache.manifest.units)} units"
    )


def _links(cache: Cache, unit: Unit, key: str, text: int, top: int) -> PairLinks:
    maps = unit.maps
    sample = unit.keys.index(key)
    layer = cache.spec.layers[-1]
    chosen = (maps.sample == sample) & (maps.text == text) & (maps.layer == layer) & (maps.image == 0)
    rows = np.flatnonzero(chosen)
    if not len(rows):
        raise CacheError(f"{cache.folder}: sample {key!r} has no text {text}")
    row = int(rows[0])
    tokens = int(maps.text_tokens[row])
    sparse = decode(unit.attention("t2i", slice(row, row + 1)))
    grid = tuple(int(side) for side in maps.grid[row])
    words = cache.preprocessor().processor.tokenizer.convert_ids_to_tokens(maps.token_ids[row, :tokens].tolist())
    keys = grid[0] * grid[1] + 1
    dense = densify(sparse, keys)[0].mean(0)
    found = []
    for place, word in enumerate(words):
        weight, position = dense[place].topk(min(top, keys))
        links = [
            Link(image_token=_name(number, grid[1]), weight=value)
            for value, number in zip(weight.tolist(), position.tolist(), strict=True)
            if value > 0
        ]
        found.append(WordLinks(word=word, links=tuple(links)))
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
    row = int(np.flatnonzero((columns[0] == sample) & (columns[1] == text))[0])
    logits = unit.array("predictions/logits", slice(row, row + 1))[0]
    best = np.argsort(-logits)[:5]
    return {cache.labels[number]: float(logits[number]) for number in best}
