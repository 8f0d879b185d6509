"""Every checksum and every bound of one unit. Reads a chunk at a time and goes on after a finding.

A unit is judged by what it says of itself: its specification, its counts, its tables. What a cache's manifest says of
it is compared in `verify.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dde_cache.bounds import inconsistent, inconsistent_states, unsafe, unsafe_states
from dde_cache.errors import CacheError
from dde_cache.layout import GROUP_OF_ROWS, HIDDEN_ARRAYS, PARTNER_COLUMNS, VIEW_COLUMNS, array_names, known_groups
from dde_cache.partners import read_partners
from dde_cache.passes import NEGATIVE
from dde_cache.spec import Rows, States, hash_keys
from dde_cache.stream import CHUNK_PAIRS
from dde_cache.unit import MapColumns, Unit

Kind = Literal[
    "manifest", "assets", "card", "missing", "unlisted", "bytes", "unreadable", "identity", "counts", "checksum",
    "members", "keys", "records", "tokens", "index", "rows", "logits", "duplicates", "shards", "content", "teacher",
    "targets",
]  # fmt: skip
"""What is wrong: what is read first comes first."""

KINDS: dict[Kind, str] = {
    "manifest": "manifest.json is missing, changed or damaged",
    "assets": "files in assets/ are missing, changed or not listed",
    "card": "README.md is not the card that was sealed",
    "missing": "units of the manifest that are not there",
    "unlisted": "files in units/ that the manifest does not list",
    "bytes": "units with another size or SHA-256 than the manifest says",
    "unreadable": "units that cannot be opened, or whose arrays are not allowed",
    "identity": "units of another teacher, or with other options",
    "counts": "units with other counts or another shard than they should have",
    "checksum": "arrays with damaged or missing chunks",
    "members": "members of a unit's zip that do not belong there",
    "keys": "sample keys that cannot be read, are no text, or stand twice in a unit",
    "records": "records out of order, twice, incomplete, or of no sample",
    "tokens": "token counts, token ids or grids outside their bounds",
    "index": "positions, weights, codes or tails outside their bounds",
    "rows": "rows that contradict themselves",
    "logits": "logits that are not finite",
    "duplicates": "keys that are in two units",
    "shards": "keys that only the shards or only the cache has",
    "content": "samples that are not those that the teacher saw",
    "teacher": "the teacher given is not the one of the cache",
    "targets": "targets that the teacher does not give again",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong: what kind, where and how, and how many rows, records or files it concerns."""

    kind: Kind
    message: str
    count: int = 1


def audit(unit: Unit) -> Iterator[Problem]:
    """Find everything that is wrong inside a unit.

    Args:
        unit: opened, so that its attributes and the make of its arrays hold already.
    """
    yield from _members(unit)
    yield from _read(_samples, unit, "keys")
    if "maps" in unit.attributes.groups:
        yield from _read(_maps, unit, "checksum")
    if unit.has_logits:
        yield from _read(_predictions, unit, "checksum")
    if "views" in unit.attributes.groups:
        yield from _read(_views, unit, "checksum")
    if unit.has_partners or NEGATIVE in unit.attributes.spec.passes:
        yield from _read(_partners, unit, "checksum")


def _read(check: Callable[[Unit], Iterator[Problem]], unit: Unit, kind: Kind) -> Iterator[Problem]:
    """A table whose columns cannot be read is one finding; its other columns say no more."""
    try:
        yield from check(unit)
    except CacheError as error:
        yield Problem(kind, _short(error, unit))


def _short(error: CacheError, unit: Unit) -> str:
    text = str(error).removeprefix(f"{unit.path}: ").split("; delete the unit")[0]
    return text[:300]


def _members(unit: Unit) -> Iterator[Problem]:
    """Checksums of the zip, and members that no array has. Groups that are not required may hold anything."""
    blocks, optional = unit.blocks, set(unit.attributes.groups) - known_groups(unit.attributes.spec)
    expected = {"zarr.json"}
    for name in array_names(unit.attributes):
        parts = name.split("/")
        expected |= {f"{'/'.join(parts[:depth])}/zarr.json" for depth in range(1, len(parts) + 1)}
        expected |= {blocks.chunk_name(name, number) for number in range(blocks.layout(name).chunks)}
    extra = [name for name in sorted(blocks.names - expected) if name.split("/")[0] not in optional]
    if extra:
        yield Problem("members", f"{extra[0]} belongs to no array", len(extra))
    damaged = [
        f"{folder}/zarr.json: expected a group"
        for folder in sorted({name.rpartition("/")[0] for name in array_names(unit.attributes)})
        if not _is_group(unit, folder)
    ]
    for name in sorted(blocks.names):
        try:
            blocks.member(name)
        except (ValueError, OSError) as error:
            damaged.append(str(error))
    if damaged:
        yield Problem("checksum", damaged[0][:300], len(damaged))
    missing = sorted(expected - blocks.names)
    if missing:
        yield Problem("checksum", f"{missing[0]} is missing", len(missing))


def _is_group(unit: Unit, folder: str) -> bool:
    try:
        return unit.blocks.metadata(folder).get("node_type") == "group"
    except (LookupError, ValueError, OSError):
        return False


def _samples(unit: Unit) -> Iterator[Problem]:
    keys = unit.keys
    if hash_keys(keys) != unit.attributes.keys:
        yield Problem("keys", "they do not have the hash that the attributes say")
    if len(set(keys)) != len(keys):
        seen: set[str] = set()
        twice = [key for key in keys if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        yield Problem("keys", f"{twice[0]!r} is there twice", len(twice))
    odd = [key for key in keys if not key.isprintable()]
    if odd:
        yield Problem("keys", f"{odd[0]!r} has characters that cannot be shown", len(odd))
    # The checksums of its chunks; any 32 bytes are a hash.
    for start in range(0, len(keys), 2**16):
        unit.array("samples/content", slice(start, start + 2**16))


def _maps(unit: Unit) -> Iterator[Problem]:
    maps = unit.maps
    yield from _order(unit, [maps.sample, maps.text, maps.view, maps.passes, maps.image, maps.layer], "maps")
    yield from _outside(unit, maps.view, maps.passes, maps.image, "maps")
    yield from _layers(unit, maps)
    if _pairs(maps.sample, maps.text) != unit.attributes.pairs:
        yield Problem("counts", f"expected maps of {unit.attributes.pairs} pairs, got {_pairs(maps.sample, maps.text)}")
    low = int(((maps.text_tokens < 1) | (maps.grid < 1).any(-1)).sum())
    if low:
        yield Problem("tokens", "expected at least one text token and one patch", low)
    padding = np.arange(maps.token_ids.shape[1])[None] >= maps.text_tokens[:, None]
    behind = int(((maps.token_ids != 0) & padding).any(-1).sum())
    if behind:
        yield Problem("tokens", "token ids behind the valid tokens", behind)
    for name in unit.attributes.spec.rows:
        yield from _attention(unit, maps, name)
    for kind in unit.attributes.spec.states:
        for side, tokens in zip(HIDDEN_ARRAYS, (maps.text_tokens, maps.image_tokens), strict=True):
            yield from _states(unit, kind, side, tokens)


def _order(unit: Unit, columns: list[np.ndarray], table: str) -> Iterator[Problem]:
    """Records rise strictly from one to the next, compared column by column, and belong to samples."""
    # 0 where a record equals the one before in all columns so far, otherwise the sign of the first difference.
    sign = np.zeros(max(len(columns[0]) - 1, 0), np.int64)
    for column in columns:
        sign = np.where(sign == 0, np.sign(np.diff(column.astype(np.int64))), sign)
    wrong = int((sign <= 0).sum())
    if wrong:
        yield Problem("records", f"{table}: records out of order or twice", wrong)
    outside = int((columns[0] >= unit.attributes.samples).sum())
    if outside:
        yield Problem("records", f"{table}: records of no sample", outside)


def _outside(unit: Unit, view: np.ndarray, passes: np.ndarray, image: np.ndarray, table: str) -> Iterator[Problem]:
    """Views, passes and images are numbers below those of the specification."""
    spec = unit.attributes.spec
    outside = int(((view >= spec.views) | (passes >= len(spec.passes)) | (image >= spec.images)).sum())
    if outside:
        yield Problem("records", f"{table}: of a view, pass or image that the specification does not have", outside)


def _layers(unit: Unit, maps: MapColumns) -> Iterator[Problem]:
    """Every map is there in every layer of the specification, for each image of its sample."""
    layers = np.array(unit.attributes.spec.layers)
    if len(maps.layer) % len(layers) or (maps.layer.reshape(-1, len(layers)) != layers).any():
        yield Problem("records", f"maps: expected layers {layers.tolist()} for every map")
        return
    first = slice(None, None, len(layers))
    if any(
        (column.reshape(-1, len(layers)) != column[first][:, None]).any()
        for column in (maps.sample, maps.text, maps.view, maps.passes, maps.image)
    ):
        yield Problem("records", "maps: expected all layers of a map together")


def _pairs(sample: np.ndarray, text: np.ndarray) -> int:
    """How many different pairs."""
    return len(np.unique(sample.astype(np.int64) << 16 | text.astype(np.int64)))


def _states(unit: Unit, kind: States, side: str, tokens: np.ndarray) -> Iterator[Problem]:
    """Hidden and pooled states are safe numbers, 0 behind the valid tokens, and agree with their scales; by chunks."""
    name, bad, behind, odd = f"{kind.group}/{side}", 0, 0, 0
    for start in range(0, len(tokens), CHUNK_PAIRS):
        rows = slice(start, start + CHUNK_PAIRS)
        try:
            parts = [unit.array(part, rows) for part in kind.arrays if part.removesuffix("_scale") == name]
        except CacheError as error:
            yield Problem("checksum", _short(error, unit))
            continue
        unsafe_rows = [unsafe_states(part).reshape(len(part), -1).any(-1) for part in parts]
        bad += int(np.any(unsafe_rows, axis=0).sum())
        if kind.per_token:
            padding = np.arange(parts[0].shape[1])[None] >= tokens[rows][:, None]
            behind += int((parts[0].view(f"u{parts[0].itemsize}").any(-1) & padding).any(-1).sum())
        if kind.codec == "int8":
            odd += int(inconsistent_states(*parts).reshape(len(parts[0]), -1).any(-1).sum())
    what = "not finite" if kind.codec == "float16" else "codes or scales outside their bounds"
    filled = "codes that do not fill their scale"
    for count, message in ((bad, what), (behind, "states behind the valid tokens"), (odd, filled)):
        if count:
            yield Problem("rows", f"{name}: {message}", count)


def _attention(unit: Unit, maps: MapColumns, direction: Rows) -> Iterator[Problem]:
    """All numbers of one direction, a chunk at a time."""
    spec = unit.attributes.spec
    filled, keys = unit.filled(direction)
    found: dict[tuple[Kind, str], int] = {}
    for start in range(0, len(maps.sample), CHUNK_PAIRS):
        rows = slice(start, start + CHUNK_PAIRS)
        try:
            parts = unit.parts(direction, rows)
        except CacheError as error:
            yield Problem("checksum", _short(error, unit))
            continue
        for problem in unsafe(parts, filled[rows], keys[rows], spec):
            found["index", problem] = found.get(("index", problem), 0) + 1
        # A NaN is a finding above already; here it only must not warn.
        with np.errstate(invalid="ignore", over="ignore"):
            for problem, count in inconsistent(parts, filled[rows], keys[rows], spec).items():
                found["rows", problem] = found.get(("rows", problem), 0) + count
    for (kind, problem), count in found.items():
        yield Problem(kind, f"{GROUP_OF_ROWS[direction]}/{direction}: {problem}", count)


def _predictions(unit: Unit) -> Iterator[Problem]:
    columns = [unit.array(f"predictions/{name}") for name in ("sample", "text", "view", "pass")]
    yield from _order(unit, columns, "predictions")
    yield from _outside(unit, columns[2], columns[3], np.zeros_like(columns[3]), "predictions")
    if _pairs(columns[0], columns[1]) != unit.attributes.pairs:
        yield Problem("counts", f"expected logits of {unit.attributes.pairs} pairs, got {_pairs(*columns[:2])}")
    infinite = 0
    for start in range(0, len(columns[0]), CHUNK_PAIRS):
        try:
            logits = unit.array("predictions/logits", slice(start, start + CHUNK_PAIRS))
        except CacheError as error:
            yield Problem("checksum", _short(error, unit))
            continue
        infinite += int((~np.isfinite(logits)).any(-1).sum())
    if infinite:
        yield Problem("logits", "predictions/logits: not finite", infinite)


def _views(unit: Unit) -> Iterator[Problem]:
    """Every picture of every sample in every view, once and in order; any eight bytes are a hash."""
    spec = unit.attributes.spec
    columns = [unit.array(f"views/{name}").astype(np.int64) for name in VIEW_COLUMNS]
    yield from _order(unit, columns, "views")
    yield from _outside(unit, columns[2], np.zeros_like(columns[2]), columns[1], "views")
    expected = unit.attributes.samples * spec.images * spec.views
    if len(columns[0]) != expected:
        yield Problem("records", f"views: expected {expected:,} rows, got {len(columns[0]):,}")
    unit.array("views/pixels")


def _partners(unit: Unit) -> Iterator[Problem]:
    """Every record of a pass that exchanges pictures has a partner, and no other: another sample, with its content."""
    if not unit.has_partners:
        yield Problem("records", "partners: expected whose pictures the negative pass shows, found none")
        return
    spec, keys = unit.attributes.spec, unit.keys
    columns = [unit.array(f"partners/{name}").astype(np.int64) for name in PARTNER_COLUMNS]
    yield from _order(unit, columns, "partners")
    yield from _outside(unit, columns[2], columns[3], np.zeros_like(columns[3]), "partners")
    partners, numbers = read_partners(unit), {key: number for number, key in enumerate(keys)}
    own = sum(place[0] < len(keys) and keys[place[0]] == one.key for place, one in partners.items())
    if own:
        yield Problem("records", "partners: a sample is its own partner", own)
    content = unit.content
    other = sum(one.key in numbers and content[numbers[one.key]].tobytes() != one.content for one in partners.values())
    if other:
        yield Problem("records", "partners: the content of a partner is not that of the sample with its key", other)
    if not unit.has_maps:
        return
    maps = unit.maps
    exchanging = {number for number, recipe in enumerate(spec.passes) if recipe == NEGATIVE}
    chosen = np.isin(maps.passes, sorted(exchanging | set(columns[3].tolist())))
    records = set(
        zip(*(column[chosen].tolist() for column in (maps.sample, maps.text, maps.view, maps.passes)), strict=True)
    )
    if records != set(partners):
        yield Problem(
            "records",
            "partners: expected one of every record of a pass that exchanges pictures, and no others",
            len(records ^ set(partners)),
        )
