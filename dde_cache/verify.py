"""Recipe: judge a cache. Everything that is wrong is found in one go, grouped, and counted."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from dde_cache.assets import ASSETS, asset_problems, is_plain_file
from dde_cache.audit import KINDS, Kind, Problem, audit
from dde_cache.card import card_problem
from dde_cache.errors import CacheError, InputError
from dde_cache.files import hash_file
from dde_cache.partners import read_partners
from dde_cache.recompute import Recomputed, recompute
from dde_cache.samples import Shard
from dde_cache.spec import Manifest, Model, UnitEntry, indented_json, parse_json
from dde_cache.store import MANIFEST, UNITS, Cache, read_manifest
from dde_cache.unit import SUFFIX, Unit

EXAMPLES = 5
"""Findings of one kind that are shown; the others are counted."""


class Finding(Model):
    """One kind of thing that is wrong."""

    kind: Kind
    meaning: str
    count: int = Field(description="files, rows, records or keys")
    examples: tuple[str, ...] = Field(description="the first of them, with file and place")


class VerifyReport(Model):
    """The verdict on a cache."""

    cache: str
    sound: bool
    checked: Literal["fast", "full"] = Field(
        description="fast: manifest, assets, card, keys, and each unit's name, size, counts, identity and make of "
        "arrays; full: also every hash, checksum and bound"
    )
    fingerprint: str | None = Field(description="null where the manifest cannot be read")
    units: int = Field(description="that the manifest lists")
    sound_units: int = Field(description="of those, without a finding")
    samples: int
    pairs: int
    bytes: int
    against: int | None = Field(description="samples of the given shards, compared by key and content")
    recomputed: Recomputed | None = Field(description="what the given teacher gives now")
    findings: tuple[Finding, ...]


@dataclass
class VerifyProgress:
    """What callers may want to show."""

    start: Callable[[int], None] = lambda total: None
    unit: Callable[[str, int], None] = lambda name, size: None
    stage: Callable[[str], None] = lambda name: None


@dataclass
class Findings:
    """Problems, grouped by kind as they come."""

    counts: dict[Kind, int] = field(default_factory=dict)
    examples: dict[Kind, list[str]] = field(default_factory=dict)

    def add(self, problem: Problem, where: str = "") -> None:
        """Count a problem, and keep it as an example where there are few."""
        self.counts[problem.kind] = self.counts.get(problem.kind, 0) + problem.count
        shown = self.examples.setdefault(problem.kind, [])
        if len(shown) < EXAMPLES:
            times = f" ({problem.count:,} times)" if problem.count > 1 else ""
            shown.append((f"{where}: " if where else "") + problem.message[:400] + times)

    def grouped(self) -> tuple[Finding, ...]:
        """The findings in the order of `KINDS`."""
        return tuple(
            Finding(kind=kind, meaning=meaning, count=self.counts[kind], examples=tuple(self.examples[kind]))
            for kind, meaning in KINDS.items()
            if kind in self.counts
        )


def verify(
    folder: Path,
    *,
    fast: bool = False,
    against: Sequence[Shard] | None = None,
    teacher: str | None = None,
    sample: int = 64,
    device: str = "cpu",
    progress: VerifyProgress | None = None,
) -> VerifyReport:
    """Check a cache and give a verdict. Nothing is written.

    Args:
        folder: the cache.
        fast: leave out what needs every byte of every unit.
        against: shards that it should hold the targets of, by key and content.
        teacher: recompute the targets of some pairs with this teacher; needs `against`.
        sample: how many pairs.
        device: where the teacher runs.
        progress: hooks to show what happens.

    Raises:
        InputError: `teacher` without `against`, or there is no such folder.
        TeacherError: the teacher cannot be loaded.
    """
    progress = progress or VerifyProgress()
    if teacher is not None and against is None:
        raise InputError("expected --against SHARDS together with --teacher: it runs on their pictures and texts")
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a cache, found none")
    findings = Findings()
    manifest = check_manifest(folder, findings.add)
    entries = manifest.units if manifest is not None else ()
    there = unit_files(folder)
    listed = {entry.name for entry in entries}
    for name in there:
        if name not in listed and manifest is not None:
            advice = "run `dde-cache repair` (or `extract`, where it was cut short)"
            findings.add(Problem("unlisted", f"{name!r:.120}: {advice if name.endswith(SUFFIX) else 'remove it'}"))
    work: list[tuple[str, UnitEntry | None]] = [(entry.name, entry) for entry in entries]
    if manifest is None:
        work = [(name, None) for name in there if name.endswith(SUFFIX)]
    progress.start(sum(_size(folder / UNITS / name) for name, _ in work))
    keys = _Keys(findings)
    sound = 0
    for name, entry in work:
        path = folder / UNITS / name
        bad = False
        for problem in check_unit(path, entry, None if manifest is None else manifest.fingerprint, fast=fast):
            findings.add(problem, name)
            bad = True
        sound += not bad
        keys.add(path)
        progress.unit(name, _size(path))
    keys.close(folder)
    recomputed = None
    if against is not None and manifest is not None:
        progress.stage("shards")
        for problem in compare_shards(folder, manifest, against):
            findings.add(problem)
        if teacher is not None:
            progress.stage("teacher")
            recomputed = _recompute(folder, against, teacher, sample, device, findings)
    found = findings.grouped()
    return VerifyReport(
        cache=str(folder),
        sound=not found,
        checked="fast" if fast else "full",
        fingerprint=None if manifest is None else manifest.fingerprint,
        units=len(entries),
        sound_units=sound if manifest is not None else 0,
        samples=sum(entry.samples for entry in entries),
        pairs=sum(entry.pairs for entry in entries),
        bytes=sum(entry.size for entry in entries),
        against=None if against is None else sum(len(shard) for shard in against),
        recomputed=recomputed,
        findings=found,
    )


def _size(path: Path) -> int:
    return path.stat().st_size if is_plain_file(path) else 0


def unit_files(folder: Path) -> list[str]:
    """The names in `units/` that a reader sees: hidden ones are unfinished, or were put aside."""
    units = folder / UNITS
    return sorted(path.name for path in units.iterdir() if not path.name.startswith(".")) if units.is_dir() else []


def check_manifest(folder: Path, add: Callable[[Problem], None]) -> Manifest | None:
    """Check manifest, assets and card; None where the manifest cannot be read."""
    try:
        manifest = read_manifest(folder)
    except CacheError as error:
        add(Problem("manifest", str(error)[:400]))
        return None
    content = (folder / MANIFEST).read_bytes()
    if content != indented_json(parse_json(content)):
        add(Problem("manifest", f"{MANIFEST}: its text is not laid out as it was written"))
    for problem in asset_problems(folder, manifest):
        add(Problem("assets", f"{ASSETS}/{problem}"))
    card = card_problem(folder, manifest)
    if card is not None:
        add(Problem("card", card))
    return manifest


def check_unit(path: Path, entry: UnitEntry | None, fingerprint: str | None, *, fast: bool) -> Iterator[Problem]:
    """Find everything that is wrong with a unit: against its row in the manifest, and inside.

    Args:
        path: the file.
        entry: its row; None where there is none to compare with.
        fingerprint: of the cache; None where it is not known.
        fast: leave out hash, checksums and bounds.
    """
    if not is_plain_file(path):
        yield Problem("missing", "no such file")
        return
    if entry is not None and path.stat().st_size != entry.size:
        yield Problem("bytes", f"expected {entry.size:,} bytes, got {path.stat().st_size:,}")
    elif entry is not None and not fast and hash_file(path) != entry.sha256:
        yield Problem("bytes", f"expected SHA-256 {entry.sha256[:12]}..., got another")
    try:
        unit = Unit(path)
    except CacheError as error:
        yield Problem("unreadable", str(error).removeprefix(f"{path}: ")[:400])
        return
    try:
        attributes = unit.attributes
        if fingerprint is not None and attributes.fingerprint != fingerprint:
            got = attributes.fingerprint
            yield Problem("identity", f"expected fingerprint {fingerprint[:12]}..., got {got[:12]}...")
        if entry is not None:
            wrong = [
                f"{name}: expected {getattr(entry, name)}, got {getattr(attributes, name)}"
                for name in ("source", "samples", "pairs", "keys")
                if getattr(entry, name) != getattr(attributes, name)
            ]
            if wrong:
                yield Problem("counts", "; ".join(wrong))
        if not fast:
            yield from audit(unit)
    finally:
        unit.close()


class _Keys:
    """Eight bytes of hash of every key of the cache, to find those that are in two units."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._paths: list[Path] = []
        self._hashes: list[np.ndarray] = []

    def add(self, path: Path) -> None:
        """Take the keys of a unit, where they can be read; where not, that is a finding already."""
        for key_list in _keys_of(path):
            hashed = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in set(key_list))
            self._paths.append(path)
            self._hashes.append(np.frombuffer(hashed, np.uint64))

    def close(self, folder: Path) -> None:
        """Report the keys that were there twice."""
        every = np.sort(np.concatenate([*self._hashes, np.empty(0, np.uint64)]))
        twice = np.unique(every[1:][every[1:] == every[:-1]])
        if not len(twice):
            return
        places: dict[str, list[str]] = {}
        for path, hashes in zip(self._paths, self._hashes, strict=True):
            if not np.isin(hashes, twice[:EXAMPLES]).any():
                continue
            for key in next(_keys_of(path), []):
                number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
                if number in twice[:EXAMPLES]:
                    places.setdefault(key, []).append(path.name)
        shown = [f"{key!r:.120} in {', '.join(names[:4])}" for key, names in sorted(places.items())]
        for number, line in enumerate(shown):
            self._findings.add(Problem("duplicates", line, len(twice) - len(shown) + 1 if number == 0 else 1))


def _keys_of(path: Path) -> Iterator[list[str]]:
    """The keys of a unit, or nothing where it cannot be read."""
    try:
        unit = Unit(path)
    except CacheError:
        return
    try:
        yield unit.keys
    except CacheError:
        return
    finally:
        unit.close()


def compare_shards(folder: Path, manifest: Manifest, shards: Sequence[Shard]) -> Iterator[Problem]:
    """Compare keys, numbers of texts and content of a cache with shards."""
    owner = {key: shard for shard in shards for key in shard.keys}
    seen: set[str] = set()
    for entry in manifest.units:
        try:
            unit = Unit(folder / UNITS / entry.name)
        except CacheError:
            continue  # a finding of its own
        try:
            texts = _texts(unit)
            for number, key in enumerate(unit.keys):
                if key not in owner:
                    yield Problem("shards", f"{entry.name}: {key!r} is in no shard")
                    continue
                seen.add(key)
                sample = owner[key].read(key)
                if sample.content_hash() != unit.content[number].tobytes():
                    yield Problem("content", f"{entry.name}: {key!r} of shard {owner[key].name} has other content")
                elif len(sample.texts) != texts[number]:
                    yield Problem("shards", f"{entry.name}: {key!r}: {texts[number]} of {len(sample.texts)} texts")
            yield from _compare_partners(unit, entry.name, owner)
        except CacheError:
            continue
        finally:
            unit.close()
    missing = [key for key in owner if key not in seen]
    if missing:
        yield Problem("shards", f"{missing[0]!r} of shard {owner[missing[0]].name} has no targets", len(missing))


def _compare_partners(unit: Unit, name: str, owner: Mapping[str, Shard]) -> Iterator[Problem]:
    """Compare the samples whose pictures a pass shows with shards."""
    partners = set(read_partners(unit).values()) if unit.has_partners else set()
    for one in sorted(partners, key=lambda one: one.key):
        if one.key not in owner:
            yield Problem("shards", f"{name}: {one.key!r}, whose picture a pass shows, is in no shard")
        elif owner[one.key].read(one.key).content_hash() != one.content:
            yield Problem("content", f"{name}: {one.key!r}, whose picture a pass shows, has other content")


def _texts(unit: Unit) -> np.ndarray:
    """How many texts of each sample have targets."""
    if "maps" in unit.attributes.groups:
        sample, text = unit.maps.sample, unit.maps.text
    else:
        sample, text = (unit.array(f"predictions/{name}").astype(np.int64) for name in ("sample", "text"))
    pairs = np.unique(np.stack([sample, text]), axis=1)[0]
    return np.bincount(pairs[pairs < unit.attributes.samples], minlength=unit.attributes.samples)


def _recompute(
    folder: Path, shards: Sequence[Shard], teacher: str, sample: int, device: str, findings: Findings
) -> Recomputed | None:
    try:
        cache = Cache(folder)
    except CacheError:
        return None  # findings of their own
    recomputed, problems = recompute(cache, shards, teacher, sample, device)
    for problem in problems:
        findings.add(problem)
    return recomputed
