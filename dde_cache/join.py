"""Which pairs of some shards have targets in a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dde_cache.errors import CacheError, bullet_list
from dde_cache.samples import Shard
from dde_cache.spec import UnitEntry, hash_keys
from dde_cache.store import Cache
from dde_cache.stream import PairTable, ShardPairs

OnMissing = Literal["error", "skip"]


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
    pairs: list[ShardPairs] = []
    no_targets: list[str] = []
    no_samples = [
        f"every key of unit {entry.name}"
        for source, some in entries.items()
        if source not in {shard.name for shard in shards}
        for entry in some
    ]
    taken: set[str] = set()
    homes: dict[str, dict[str, str]] = {}
    for shard in shards:
        texts = {sample.key: len(sample.texts) for sample in shard}
        if shard.name not in homes:
            some = entries.get(shard.name, [])
            homes[shard.name] = _known(cache, some, texts) or _keys_of(cache, some)
        held = homes[shard.name]
        if not held:
            no_targets.append(f"every key of shard {shard.name} (the cache has no unit of it)")
        else:
            no_targets += [f"{key} in shard {shard.name}" for key in texts if key not in held]
        taken |= held.keys() & texts.keys()
        pairs.append(
            ShardPairs.of([(key, slot) for key, count in texts.items() if key in held for slot in range(count)])
        )
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


def _known(cache: Cache, entries: Sequence[UnitEntry], texts: Mapping[str, int]) -> dict[str, str] | None:
    """The keys of a shard's only unit by their hash in the manifest, or None where the unit has to be opened.

    A cache behind a URL would otherwise be fetched whole before the first step. Units at hand are opened, so that a
    damaged one stops a run before it begins.
    """
    if not cache.streams or len(entries) != 1 or entries[0].keys != hash_keys(texts):
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
