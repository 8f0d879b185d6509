"""Push a cache to where others can read it, and pull one from there.

Both only ever add: a cache of another fingerprint is never replaced, and units of the same fingerprint are merged by
manifest. Units go first and the manifest last, so that a manifest never names a unit that is not there.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout
from pydantic import Field

from dde_cache.card import CARD, CARD_LIMIT, seal_card, signed_card, to_fill_in
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.fetch import fetch_identity, fetch_unit, settle
from dde_cache.files import hash_file
from dde_cache.hub import HubTarget
from dde_cache.objects import RECEIPTS, ObjectTarget
from dde_cache.remote import Advance, Remote, is_url, local_path
from dde_cache.spec import MAX_JSON, Manifest, Model, Provenance, UnitEntry, difference, indented_json
from dde_cache.store import (
    ASSETS,
    MANIFEST,
    UNITS,
    Cache,
    parse_manifest,
    read_manifest,
    write_bytes,
    write_manifest,
    write_text,
)
from dde_cache.unit import Unit

PULLING = ".pulling.json"
_PARTS = (ASSETS, UNITS, CARD, MANIFEST, PULLING, RECEIPTS)


class TransferReport(Model):
    """What `dde-cache push` and `dde-cache pull` did."""

    source: str
    target: str
    fingerprint: str
    units: int = Field(description="in the target's manifest now")
    transferred: int = Field(description="units that were sent or fetched now")
    kept: int = Field(description="units that were there already")
    bytes: int = Field(description="of the units that were sent or fetched now")
    total_bytes: int = Field(description="of all units in the target's manifest")
    seconds: float
    to_fill_in: tuple[str, ...] = Field(description="lines of the card that its maker has not filled in")


@dataclass
class Watch:
    """What callers may want to show."""

    start: Callable[[int, int], None] = lambda total, units: None
    unit: Callable[[UnitEntry], None] = lambda entry: None
    advance: Advance = lambda count: None


def merged(base: Manifest | None, more: Manifest, where: str) -> Manifest:
    """The manifest of a cache (`base`, at `where`) to which the units of another are added.

    Raises:
        CacheError: they are of other targets, or have other units or assets of the same name; all are listed.
    """
    if base is None:
        return more
    if base.fingerprint != more.fingerprint:
        raise CacheError(
            f"{where}: holds a cache of other targets:{bullet_list(difference(more.spec, base.spec), 20)}\n"
            "it is never replaced: choose another place"
        )
    units = {entry.name: entry for entry in base.units}
    names = sorted(base.assets.keys() | more.assets.keys())
    wrong = [f"assets/{name}: another content" for name in names if base.assets.get(name) != more.assets.get(name)]
    for entry in more.units:
        there = units.setdefault(entry.name, entry)
        if there.sha256 != entry.sha256:
            wrong.append(f"unit {entry.name}: there {there.sha256[:12]}..., here {entry.sha256[:12]}...")
    if wrong:
        raise CacheError(
            f"{where}: has other files of the same name, which are never replaced:{bullet_list(wrong, 20)}\n"
            "choose another place, or put both together with `dde-cache merge` and push the result there"
        )
    return base.model_copy(update={"units": tuple(units[name] for name in sorted(units))}).sealed()


class Target(Protocol):
    """Where a cache is pushed to."""

    url: str

    def names(self) -> Sequence[str]:
        """What lies in the folder itself."""

    def read(self, name: str, limit: int) -> bytes | None:
        """A small file, or None where it is not there."""

    def held(self, manifest: Manifest) -> set[str]:
        """Names of the units of a manifest that are there with its bytes, as far as that is known for certain."""

    def send(self, entry: UnitEntry, path: Path, advance: Advance) -> None:
        """Send a unit."""

    def finish(self, files: Mapping[str, bytes]) -> bool:
        """Send small files by relative name, in their order, the manifest last; False where another push came first."""


def push(folder: Path, url: str, watch: Watch | None = None) -> TransferReport:
    """Send a cache to a path, `s3://` or `hf://`, or add its units to the cache of the same targets that is there.

    Raises:
        CacheError: the cache is damaged (nothing is sent then), the place holds something else, or cannot be reached.
        InputError: a place that cannot be written.
    """
    watch, begin = watch or Watch(), time.perf_counter()
    if not is_url(url):
        return pull(str(folder), local_path(url), watch)
    cache = Cache(folder)
    ours = cache.manifest
    provenance = _provenance(cache)
    target: Target = HubTarget(url) if url.startswith("hf://") else ObjectTarget(url)
    there = _manifest_of(target)
    merged(there, ours, target.url)
    _check_place(target.url, target.names())
    held = target.held(ours)
    todo = [entry for entry in ours.units if entry.name not in held]
    _check_units(cache, todo)
    watch.start(sum(entry.size for entry in todo), len(todo))
    for entry in todo:
        target.send(entry, cache.unit_path(entry), watch.advance)
        watch.unit(entry)
    goal, card = _publish(cache, target, provenance, bool(todo))
    return _report(str(folder), target.url, goal, todo, ours, card, begin)


def _publish(cache: Cache, target: Target, provenance: Provenance, sent: bool) -> tuple[Manifest, str]:
    """Send assets, card and manifest, until the manifest that is there names every unit of ours.

    Another push may have changed the manifest since we read it; what it added is kept.
    """
    for _ in range(5):
        there = _manifest_of(target)
        goal = merged(there, cache.manifest, target.url)
        old = target.read(CARD, CARD_LIMIT)
        card = _card(old, cache.folder / CARD, goal, provenance, target.url)
        goal = goal.model_copy(update={"card": hashlib.sha256(card.encode()).hexdigest()}).sealed()
        files = {} if there is not None else _assets(cache)
        files |= {CARD: card.encode(), MANIFEST: indented_json(goal.model_dump(mode="json"))}
        if (sent or there != goal or old != files[CARD]) and not target.finish(files):
            continue
        now = _manifest_of(target)
        if now is not None and set(cache.manifest.units) <= set(now.units):
            return now, card
    raise CacheError(f"{target.url}: another push is writing its manifest all the time; run the same command later")


def _assets(cache: Cache) -> dict[str, bytes]:
    return {f"{ASSETS}/{name}": (cache.folder / ASSETS / name).read_bytes() for name in cache.manifest.assets}


def _manifest_of(target: Target) -> Manifest | None:
    content = target.read(MANIFEST, MAX_JSON)
    return None if content is None else parse_manifest(content, f"{target.url}/{MANIFEST}")


def _check_place(where: str, names: Iterable[str]) -> None:
    """Refuse a place that holds something else."""
    others = [name for name in names if name not in _PARTS and not name.startswith(".")]
    if others:
        raise InputError(
            f"{where}: expected an empty place, or a cache, but it also holds:{bullet_list(others)}\nchoose another"
        )


def _check_units(cache: Cache, entries: Sequence[UnitEntry]) -> None:
    """Refuse to send units that are not those of the manifest; all are listed."""
    wrong = []
    for entry in entries:
        path = cache.unit_path(entry)
        if not path.is_file():
            wrong.append(f"{entry.name}: missing")
        elif hash_file(path) != entry.sha256:
            wrong.append(f"{entry.name}: its bytes are not those of the manifest")
    if wrong:
        raise CacheError(
            f"{cache.name}: expected whole units, got:{bullet_list(wrong, 20)}\nnothing was sent; delete them and run "
            "`dde-cache extract` again with the same arguments"
        )


def _provenance(cache: Cache) -> Provenance:
    """How the first unit came to be, for the card."""
    if not cache.manifest.units:
        raise CacheError(f"{cache.name}: has no finished units yet; run `dde-cache extract` to the end")
    unit = Unit(cache.unit_path(cache.manifest.units[0]))
    unit.close()
    return unit.attributes.provenance


def _card(there: bytes | None, ours: Path, manifest: Manifest, provenance: Provenance, place: str) -> str:
    texts = [None if there is None else there.decode(errors="replace"), ours.read_text() if ours.is_file() else None]
    return signed_card(texts, manifest, provenance, place)


def pull(place: str, out: Path, watch: Watch | None = None) -> TransferReport:
    """Fetch a whole cache into a folder, or what is missing there. A pull that was cut goes on where it was.

    Args:
        place: URL or path.
        out: a new or empty folder, an unfinished pull, or a cache of the same targets, to which units are added.
        watch: hooks to show what happens.

    Raises:
        CacheError: what is there is damaged or of other targets than `out`, cannot be reached, or has no room.
        InputError: `out` holds something else.
    """
    watch, begin = watch or Watch(), time.perf_counter()
    source = Remote(str(local_path(place)) if not is_url(place) else place)
    if not is_url(place):
        Cache(local_path(place))
    with tempfile.TemporaryDirectory() as scratch:
        theirs = fetch_identity(source, Path(scratch))
        goal = _check_out(out, theirs)
        (out / UNITS).mkdir(parents=True, exist_ok=True)
        lock = out / UNITS / ".pull.lock"
        try:
            with FileLock(lock, timeout=0):
                write_text(out / PULLING, theirs.model_dump_json())
                if not (out / MANIFEST).exists():
                    (out / ASSETS).mkdir(exist_ok=True)
                    for name in theirs.assets:
                        shutil.copyfile(Path(scratch) / ASSETS / name, out / ASSETS / name)
                todo = _fetch_units(source, theirs, out / UNITS, watch)
                card = _finish(source, goal, out, not (out / MANIFEST).exists())
                for part in (out / UNITS).glob(".*.part"):
                    part.unlink()  # of units that the manifest there no longer has
                lock.unlink()
        except Timeout as error:
            raise CacheError(f"{out}: another pull is writing here; wait for it, or choose another --out") from error
    return _report(source.url, str(out), goal, todo, theirs, card, begin)


def _check_out(out: Path, theirs: Manifest) -> Manifest:
    """Refuse a folder that holds something else; return the manifest that it will have."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: expected a folder, got a file; choose another --out")
    names = [path.name for path in out.iterdir()] if out.exists() else []
    if MANIFEST in names:
        return merged(read_manifest(out), theirs, str(out))
    if names and PULLING not in names:
        raise InputError(f"{out}: expected a new or empty folder, an unfinished pull, or a cache; choose another --out")
    if names:
        merged(parse_manifest((out / PULLING).read_bytes(), str(out / PULLING)), theirs, str(out))
    return theirs


def _fetch_units(source: Remote, theirs: Manifest, units: Path, watch: Watch) -> list[UnitEntry]:
    """Fetch the units that are not there whole."""
    todo = [entry for entry in theirs.units if not _whole(units / entry.name, entry)]
    parts = {entry.name: units / f".{entry.name}.{entry.sha256[:16]}.part" for entry in todo}
    needed = sum(entry.size for entry in todo) - sum(part.stat().st_size for part in parts.values() if part.exists())
    free = shutil.disk_usage(units).free
    if needed > free:
        raise CacheError(
            f"{units}: expected room for {needed:,} bytes, got {free:,}; make room or choose another --out"
        )
    watch.start(sum(entry.size for entry in todo), len(todo))
    for entry in todo:
        fetch_unit(source, entry, parts[entry.name], watch.advance)
        settle(parts[entry.name], units / entry.name)
        watch.unit(entry)
    return todo


def _whole(path: Path, entry: UnitEntry) -> bool:
    return path.is_file() and path.stat().st_size == entry.size and hash_file(path) == entry.sha256


def _finish(source: Remote, goal: Manifest, out: Path, fresh: bool) -> str:
    """Write the card and, last, the manifest. A new copy has both as they are there."""
    found = source.read(CARD, CARD_LIMIT)
    theirs = None if found is None else found.decode(errors="replace")
    if fresh and found is not None:
        write_bytes(out / CARD, found)
        write_manifest(out, goal)
        (out / PULLING).unlink()
        return theirs or ""
    local = out / CARD
    unit = Unit(out / UNITS / goal.units[0].name) if goal.units else None
    provenance = unit.attributes.provenance if unit else Provenance()
    card = signed_card([local.read_text(errors="replace") if local.is_file() else None, theirs], goal, provenance)
    write_text(local, card)
    seal_card(out, goal)
    (out / PULLING).unlink()
    return card


def _report(
    source: str, target: str, goal: Manifest, done: Sequence[UnitEntry], asked: Manifest, card: str, begin: float
) -> TransferReport:
    return TransferReport(
        source=source,
        target=target,
        fingerprint=goal.fingerprint,
        units=len(goal.units),
        transferred=len(done),
        kept=len(asked.units) - len(done),
        bytes=sum(entry.size for entry in done),
        total_bytes=sum(entry.size for entry in goal.units),
        seconds=round(time.perf_counter() - begin, 3),
        to_fill_in=tuple(to_fill_in(card)),
    )
