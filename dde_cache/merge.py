"""Several caches of the same targets as one: units are copied or hard-linked, never encoded again.

Samples are told apart by key. A unit that two caches hold byte for byte is taken once; any other key that comes twice
is an overlap, and is reported with its places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.samples import Shard
from dde_cache.spec import Manifest, Model, Provenance, UnitEntry, difference, hash_json
from dde_cache.staging import StagedCache, check_free
from dde_cache.store import Cache
from dde_cache.subset import cut_unit
from dde_cache.unit import SUFFIX

OnOverlap = Literal["error", "first"]

_HASH_CHARACTERS = 8
_SHOWN = 3


class Place(Model):
    """A unit of one of the caches."""

    cache: str
    unit: str


class Overlap(Model):
    """Keys that two units hold."""

    first: Place
    second: Place
    duplicates: tuple[str, ...] = Field(description="keys with the same pictures and texts in both")
    conflicts: tuple[str, ...] = Field(description="keys with other pictures or texts")


class Gap(Model):
    """Samples of a shard that training would find no targets for."""

    shard: str
    samples: int = Field(description="in the shard")
    missing: tuple[str, ...] = Field(description="keys without targets under this shard's file name")
    elsewhere: int = Field(description="of these, keys that have targets under another file name")


class MergeReport(Model):
    """What `dde-cache merge` did."""

    fingerprint: str
    caches: tuple[str, ...]
    units: int
    samples: int
    pairs: int
    bytes: int
    taken_once: int = Field(description="units that came twice, byte for byte")
    left_out: int = Field(description="units whose every key another unit holds")
    rewritten: int = Field(description="units written anew, without keys that another unit holds")
    renamed: dict[str, str] = Field(description="new name of a unit -> its name in its own cache")
    overlaps: tuple[Overlap, ...]
    gaps: tuple[Gap, ...] | None = Field(description="against the shards that were given; null: none were given")


@dataclass
class _Taken:
    """A unit that goes into the merged cache, and the keys that it brings."""

    cache: Cache
    entry: UnitEntry
    keys: list[str]
    provenance: Provenance
    name: str = ""

    @property
    def whole(self) -> bool:
        return len(self.keys) == self.entry.samples


@dataclass
class _Plan:
    """What goes into the merged cache, and what was found on the way."""

    units: list[_Taken] = field(default_factory=list)
    owner: dict[str, _Taken] = field(default_factory=dict)
    overlaps: list[Overlap] = field(default_factory=list)
    taken_once: int = 0
    left_out: int = 0


def merge(
    caches: Sequence[Cache],
    out: Path,
    *,
    on_overlap: OnOverlap = "error",
    shards: Sequence[Shard] | None = None,
    link: bool = False,
) -> MergeReport:
    """Put caches together. The result is there whole, or not at all; the same call goes on after an interruption.

    Args:
        caches: two or more, of one specification and with equal assets.
        out: where the result goes; new or empty.
        on_overlap: `error` refuses keys that come twice; `first` takes them from the cache that is named first.
        shards: samples that the result is compared with, for the gaps.
        link: hard-link units instead of copying them.

    Raises:
        InputError: fewer than two caches, or `out` is taken.
        CacheError: the caches differ in specification or assets, or overlap (`error`); or a unit is damaged. Nothing
            is written then.
    """
    if len(caches) < 2:
        raise InputError(f"expected two or more caches, got {len(caches)}")
    check_free(out)
    _check_identity(caches)
    plan = _plan(caches)
    if plan.overlaps and on_overlap == "error":
        raise CacheError(_overlap_message(plan.overlaps))
    gaps = None if shards is None else tuple(_gaps(shards, plan.owner))
    renamed = _name(plan.units)
    request = [[taken.entry.sha256, taken.name, hash_json(taken.keys)] for taken in plan.units]
    staged = StagedCache(out, caches[0].spec, caches[0], request)
    for taken in plan.units:
        if taken.whole:
            staged.take(taken.cache, taken.entry, taken.name, link=link)
            continue
        unit = taken.cache.unit(taken.entry)
        staged.write(taken.name, *cut_unit(unit, taken.keys, caches[0].spec))
        unit.close()
    manifest = staged.finish(_provenance(plan.units))
    return _report(manifest, caches, plan, renamed, gaps)


def _check_identity(caches: Sequence[Cache]) -> None:
    """Refuse caches whose numbers mean something else than those of the first; every difference is listed."""
    first, problems = caches[0], []
    for other in caches[1:]:
        lines = difference(first.spec, other.spec)
        names = sorted(first.manifest.assets.keys() | other.manifest.assets.keys())
        for name in names:
            hashes = [cache.manifest.assets.get(name) for cache in (first, other)]
            if hashes[0] != hashes[1]:
                state = (
                    "missing there" if hashes[1] is None else "only there" if hashes[0] is None else "another content"
                )
                lines.append(f"assets/{name}: {state}")
        problems += [f"{other.folder}: {line}" for line in lines]
    if problems:
        raise CacheError(
            f"expected caches of the targets of {first.folder}, but they differ:{bullet_list(problems, 20)}\nonly "
            "caches of one teacher and one set of options can be merged; extract the others again with the same ones"
        )


def _plan(caches: Sequence[Cache]) -> _Plan:
    """Read the keys of every unit and decide which units bring which of them."""
    plan = _Plan()
    seen: set[str] = set()
    for cache in caches:
        for entry in cache.manifest.units:
            if entry.sha256 in seen:
                plan.taken_once += 1
                continue
            seen.add(entry.sha256)
            unit = cache.unit(entry)
            rows = {key: row for row, key in enumerate(unit.keys)}
            shared = [key for key in rows if key in plan.owner]
            content = {key: unit.content[rows[key]].tobytes() for key in shared}
            unit.close()
            fresh = [key for key in rows if key not in plan.owner]
            taken = _Taken(cache, entry, fresh, unit.attributes.provenance)
            plan.overlaps += _overlaps(taken, content, plan.owner)
            plan.owner |= dict.fromkeys(taken.keys, taken)
            if taken.keys:
                plan.units.append(taken)
            else:
                plan.left_out += 1
    return plan


def _overlaps(second: _Taken, content: Mapping[str, bytes], owner: Mapping[str, _Taken]) -> list[Overlap]:
    """Compare the samples that a unit shares with units before it."""
    by_unit: dict[int, list[str]] = {}
    for key in content:
        by_unit.setdefault(id(owner[key]), []).append(key)
    found = []
    for keys in by_unit.values():
        first = owner[keys[0]]
        unit = first.cache.unit(first.entry)
        rows = {key: row for row, key in enumerate(unit.keys)}
        same = {key for key in keys if unit.content[rows[key]].tobytes() == content[key]}
        unit.close()
        found.append(
            Overlap(
                first=Place(cache=str(first.cache.folder), unit=first.entry.name),
                second=Place(cache=str(second.cache.folder), unit=second.entry.name),
                duplicates=tuple(key for key in keys if key in same),
                conflicts=tuple(key for key in keys if key not in same),
            )
        )
    return found


def _overlap_message(overlaps: Sequence[Overlap]) -> str:
    duplicates, conflicts = (sum(len(getattr(one, name)) for one in overlaps) for name in ("duplicates", "conflicts"))
    lines = []
    for one in overlaps:
        for what, keys in (("the same samples", one.duplicates), ("other pictures or texts", one.conflicts)):
            if keys:
                some = ", ".join(keys[:_SHOWN]) + (", ..." if len(keys) > _SHOWN else "")
                where = f"{one.first.cache}, unit {one.first.unit} and {one.second.cache}, unit {one.second.unit}"
                lines.append(f"{where}: {len(keys)} keys with {what} ({some})")
    return (
        f"expected each key in one cache, but {duplicates + conflicts} come twice ({duplicates} duplicates, "
        f"{conflicts} conflicts):{bullet_list(lines, 10)}\npass --on-overlap first to take them from the cache that is "
        "named first, or leave them out with `dde-cache subset`"
    )


def _name(units: Sequence[_Taken]) -> dict[str, str]:
    """Name the units: as in their own cache, with some of their SHA-256 behind where the name is taken."""
    names: set[str] = set()
    renamed = {}
    for taken in units:
        taken.name = taken.entry.name
        if taken.name in names:
            stem = taken.name.removesuffix(SUFFIX)
            taken.name = f"{stem}-{taken.entry.sha256[:_HASH_CHARACTERS]}{SUFFIX}"
            renamed[taken.name] = taken.entry.name
        names.add(taken.name)
    return renamed


def _gaps(shards: Sequence[Shard], owner: Mapping[str, _Taken]) -> list[Gap]:
    gaps = []
    for shard in shards:
        missing = [key for key in shard.keys if key not in owner or owner[key].entry.source != shard.name]
        if missing:
            elsewhere = sum(key in owner for key in missing)
            gaps.append(Gap(shard=str(shard.path), samples=len(shard), missing=tuple(missing), elsewhere=elsewhere))
    return gaps


def _provenance(units: Sequence[_Taken]) -> Provenance:
    """For the card: how the first unit came to be, and the shards of all."""
    if not units:
        return Provenance()
    names = ", ".join(dict.fromkeys(taken.provenance.shards for taken in units))
    return units[0].provenance.model_copy(update={"shards": names})


def _report(
    manifest: Manifest,
    caches: Sequence[Cache],
    plan: _Plan,
    renamed: dict[str, str],
    gaps: tuple[Gap, ...] | None,
) -> MergeReport:
    return MergeReport(
        fingerprint=manifest.fingerprint,
        caches=tuple(str(cache.folder) for cache in caches),
        units=len(manifest.units),
        samples=sum(entry.samples for entry in manifest.units),
        pairs=sum(entry.pairs for entry in manifest.units),
        bytes=sum(entry.size for entry in manifest.units),
        taken_once=plan.taken_once,
        left_out=plan.left_out,
        rewritten=sum(not taken.whole for taken in plan.units),
        renamed=renamed,
        overlaps=tuple(plan.overlaps),
        gaps=gaps,
    )
