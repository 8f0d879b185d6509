"""A part of a cache as a cache of its own: by units, keys, layers or tables.

A unit of which everything is kept is copied. Any other is written anew from its encoded arrays: rows are dropped and
padding that nothing needs is cut off, but no value is decoded.
"""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from pydantic import Field

from dde_cache.codec import EncodedAttention
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.layout import VIEW_COLUMNS, known_groups
from dde_cache.partners import cut_partners
from dde_cache.spec import (
    HIDDEN,
    POOLED,
    WHOLE,
    Model,
    Provenance,
    TargetSpec,
    UnitAttributes,
    UnitEntry,
    difference,
    hash_json,
    hash_keys,
)
from dde_cache.staging import StagedCache, check_free
from dde_cache.store import Cache
from dde_cache.unit import SUFFIX, MapColumns, Unit, UnitArrays

Table = Literal["maps", "predictions", "whole", "hidden", "pooled"]


class Selection(Model):
    """What to keep; None keeps all."""

    units: tuple[str, ...] | None = Field(default=None, description="unit or shard names, * and ? as in file names")
    keys: frozenset[str] | None = None
    layers: tuple[int, ...] | None = Field(default=None, description="0-based blocks of the teacher")
    fields: tuple[Table, ...] | None = None


class SubsetReport(Model):
    """What `dde-cache subset` did."""

    fingerprint: str
    changes: tuple[str, ...] = Field(description="fields of the specification that changed; none: same fingerprint")
    units: int
    copied: int = Field(description="units taken as they were")
    left_out: int = Field(description="units of which nothing was kept")
    samples: int
    pairs: int
    bytes: int
    bytes_before: int


def subset(cache: Cache, out: Path, selection: Selection, *, link: bool = False) -> SubsetReport:
    """Write a part of a cache.

    Args:
        cache: where it comes from.
        out: where it goes; new or empty.
        selection: what to keep.
        link: hard-link units that are kept whole, rather than copying them.

    Raises:
        InputError: the selection names what the cache does not hold (all of it is listed), or keeps nothing.
        CacheError: a unit is damaged, or holds groups that cannot be cut.
    """
    check_free(out)
    entries = _chosen(cache, selection)
    spec = _spec(cache, selection)
    kept = _kept_keys(cache, entries, selection.keys)
    whole = spec == cache.spec
    plan = [[entry.sha256, hash_json(sorted(keys))] for entry, keys in kept]
    staged = StagedCache(out, spec, cache, plan)
    copied, provenance = 0, Provenance()
    for entry, keys in kept:
        unit = cache.unit(entry)
        provenance = unit.attributes.provenance
        if whole and len(keys) == entry.samples:
            staged.take(cache, entry, entry.name, link=link)
            copied += 1
        else:
            staged.write(entry.name, *cut_unit(unit, keys, spec))
        unit.close()
    manifest = staged.finish(provenance)
    return SubsetReport(
        fingerprint=manifest.fingerprint,
        changes=tuple(difference(cache.spec, spec)),
        units=len(manifest.units),
        copied=copied,
        left_out=len(cache.manifest.units) - len(manifest.units),
        samples=sum(entry.samples for entry in manifest.units),
        pairs=sum(entry.pairs for entry in manifest.units),
        bytes=sum(entry.size for entry in manifest.units),
        bytes_before=sum(entry.size for entry in cache.manifest.units),
    )


def read_keys(files: Sequence[Path]) -> frozenset[str]:
    """Read sample keys, one a line, from text files.

    Raises:
        InputError: a file cannot be read, or holds none.
    """
    keys: set[str] = set()
    for file in files:
        try:
            lines = {line.strip() for line in file.read_text(encoding="utf-8").splitlines()} - {""}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{file}: expected a text file of keys, one a line, but it cannot be read: {error}"
            ) from error
        if not lines:
            raise InputError(f"{file}: expected keys, one a line, found none")
        keys |= lines
    return frozenset(keys)


def _chosen(cache: Cache, selection: Selection) -> list[UnitEntry]:
    entries = list(cache.manifest.units)
    if selection.units is None:
        return entries

    def named(entry: UnitEntry, pattern: str) -> bool:
        return any(fnmatch(name, pattern) for name in (entry.name, entry.name.removesuffix(SUFFIX), entry.source))

    unknown = [pattern for pattern in selection.units if not any(named(entry, pattern) for entry in entries)]
    if unknown:
        raise InputError(
            f"{cache.folder}: expected names of its {len(entries)} units, got:{bullet_list(unknown)}\n"
            f"it has:{bullet_list([entry.name for entry in entries])}"
        )
    return [entry for entry in entries if any(named(entry, pattern) for pattern in selection.units)]


def _spec(cache: Cache, selection: Selection) -> TargetSpec:
    """What the numbers of the part mean.

    Raises:
        InputError: layers or tables that the cache does not have.
    """
    spec = cache.spec
    there = {
        "maps": bool(spec.layers),
        "predictions": spec.classes is not None,
        WHOLE: spec.has_whole,
        **{group: any(one.group == group for one in spec.states) for group in (HIDDEN, POOLED)},
    }
    held = {name for name in there if there[name]}
    wrong = [
        f"layer {layer}: it has {list(spec.layers)}" for layer in selection.layers or () if layer not in spec.layers
    ]
    wrong += [f"{name}: it has {', '.join(sorted(held))}" for name in selection.fields or () if name not in held]
    if wrong:
        raise InputError(f"{cache.folder}: expected what the cache holds, got:{bullet_list(wrong, 20)}")
    tables = held if selection.fields is None else set(selection.fields)
    if tables & {WHOLE, HIDDEN, POOLED} and "maps" not in tables:
        raise InputError(
            f"{cache.folder}: expected maps together with {WHOLE}, {HIDDEN} and {POOLED}, whose records lie beside them"
        )
    layers = tuple(sorted(selection.layers)) if selection.layers else spec.layers
    return spec.model_copy(
        update={
            "layers": layers if "maps" in tables else (),
            "classes": spec.classes if "predictions" in tables else None,
            "groups": {name: spec.groups[name] for name in spec.groups if name not in held - tables},
        }
    )


def _kept_keys(
    cache: Cache, entries: Sequence[UnitEntry], wanted: Collection[str] | None
) -> list[tuple[UnitEntry, list[str]]]:
    """The units of which something is kept, and the keys to keep of each.

    Raises:
        InputError: keys that no chosen unit holds.
    """
    kept = []
    found: set[str] = set()
    for entry in entries:
        unit = cache.unit(entry)
        keys = [key for key in unit.keys if wanted is None or key in wanted]
        unit.close()
        found.update(keys if wanted is not None else ())
        if keys:
            kept.append((entry, keys))
    unknown = sorted(set(wanted or ()) - found)
    if unknown:
        raise InputError(
            f"{cache.folder}: expected keys of its samples, got {len(unknown)} others:{bullet_list(unknown)}"
        )
    if not kept:
        raise InputError(f"{cache.folder}: the selection keeps nothing")
    return kept


def cut_unit(unit: Unit, keys: Collection[str], spec: TargetSpec) -> tuple[UnitArrays, UnitAttributes]:
    """Keep some samples of a unit, and of their records what a specification names.

    Args:
        unit: where they come from.
        keys: samples to keep; they stay in their order.
        spec: that of the unit, perhaps with fewer layers, without layers (no maps) or without classes (no predictions).

    Raises:
        CacheError: the unit is damaged, or has groups that this version does not know.
    """
    unknown = sorted(unit.attributes.groups.keys() - known_groups(unit.attributes.spec))
    if unknown:
        raise CacheError(f"{unit.path}: has {', '.join(unknown)}, which this version cannot cut; update dde-cache")
    wanted = set(keys)
    numbers = np.array([number for number, key in enumerate(unit.keys) if key in wanted], np.int64)
    place = np.full(len(unit.keys), -1)
    place[numbers] = np.arange(len(numbers))
    maps, directions = _cut_maps(unit, place, spec) if spec.layers else (None, {})
    columns = {name: np.empty(0, np.int64) for name in ("sample", "text", "view", "pass")}
    logits = None
    if spec.classes is not None:
        columns = {name: unit.array(f"predictions/{name}") for name in columns}
        rows = place[columns["sample"]] >= 0
        columns = {name: column[rows] for name, column in columns.items()}
        columns["sample"] = place[columns["sample"]]
        logits = unit.array("predictions/logits")[rows]
    arrays = UnitArrays(
        keys=[unit.keys[number] for number in numbers],
        content=unit.content[numbers],
        maps=maps,
        t2i=directions.get("t2i"),
        i2t=directions.get("i2t"),
        prediction_sample=columns["sample"],
        prediction_text=columns["text"],
        logits=logits,
        prediction_view=columns["view"],
        prediction_pass=columns["pass"],
        further=(_cut_views(unit, place) if "views" in unit.attributes.groups else {})
        | (cut_partners(unit, place) if unit.has_partners else {})
        | (_cut_states(unit, place, spec) if spec.states else {}),
        whole={name: rows for name, rows in directions.items() if name in ("t2w", "i2w")},
    )
    held = (
        {"samples", "views", "partners"}
        | ({"maps"} if maps is not None else set())
        | ({"predictions"} if logits is not None else set())
        | ({WHOLE} if spec.has_whole else set())
        | {one.group for one in spec.states}
    )
    pairs = zip(maps.sample, maps.text, strict=True) if maps else zip(columns["sample"], columns["text"], strict=True)
    attributes = unit.attributes.model_copy(
        update={
            "spec": spec,
            "fingerprint": spec.fingerprint,
            "samples": len(numbers),
            "pairs": len(set(pairs)),
            "keys": hash_keys(arrays.keys),
            "groups": {name: group for name, group in unit.attributes.groups.items() if name in held},
        }
    )
    return arrays, attributes


def _cut_views(unit: Unit, place: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
    """Keep the pixel hashes of some samples."""
    arrays = {f"views/{name}": unit.array(f"views/{name}") for name in (*VIEW_COLUMNS, "pixels")}
    numbers = arrays["views/sample"].astype(np.int64)
    if len(numbers) and numbers.max() >= len(place):
        raise CacheError(f"{unit.path}: views/sample is damaged; delete the unit and run `dde-cache extract` again")
    kept = {name: values[place[numbers] >= 0] for name, values in arrays.items()}
    return kept | {"views/sample": place[kept["views/sample"].astype(np.int64)].astype(np.uint32)}


def _cut_maps(
    unit: Unit, place: Int[np.ndarray, " n"], spec: TargetSpec
) -> tuple[MapColumns, Mapping[str, EncodedAttention]]:
    """Keep the records of some samples and layers, padded to the longest of them."""
    held = unit.maps
    rows = _kept_records(held, place, spec)
    maps = MapColumns(*(getattr(held, name)[rows] for name in MapColumns.__dataclass_fields__))
    longest, largest = (int(tokens.max(initial=0)) for tokens in (maps.text_tokens, maps.image_tokens))
    maps = MapColumns(
        **{
            name: getattr(maps, name) for name in MapColumns.__dataclass_fields__ if name not in ("sample", "token_ids")
        },
        sample=place[maps.sample],
        token_ids=maps.token_ids[:, :longest],
    )
    padded, chosen = spec.queries == "all", torch.from_numpy(rows)
    texts, images = (spec.text_length, largest + 1) if padded else (longest, largest)
    together = int((maps.text_tokens + maps.image_tokens).max(initial=0))
    axes = {"t2i": (texts, largest), "i2t": (images, longest), "t2w": (texts, together), "i2w": (images, together)}
    return maps, {name: unit.attention(name).records(chosen).cut(*axes[name]) for name in spec.rows}


def _kept_records(maps: MapColumns, place: Int[np.ndarray, " n"], spec: TargetSpec) -> Int[np.ndarray, " r"]:
    return np.flatnonzero((place[maps.sample] >= 0) & np.isin(maps.layer, spec.layers))


def _cut_states(unit: Unit, place: Int[np.ndarray, " n"], spec: TargetSpec) -> dict[str, np.ndarray]:
    """Keep the hidden and pooled states of some samples and layers."""
    rows = _kept_records(unit.maps, place, spec)
    text, image = unit.maps.text_tokens[rows].max(initial=0), unit.maps.image_tokens[rows].max(initial=0)
    cut = {}
    for kind in spec.states:
        for name in kind.arrays:
            kept = unit.states(name)[rows]
            cut[name] = kept[:, : text if "/text" in name else image] if kind.per_token else kept
    return cut
