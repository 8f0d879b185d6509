"""A cache: a folder of units with a manifest, the teacher's assets and a card.

    NAME/manifest.json   identity, target specification, one row a unit
    NAME/assets/         processor and tokenizer, teacher configuration, labels in logit order
    NAME/units/          one file a shard
    NAME/README.md       the card

Every file is written under a temporary name and renamed. The manifest is derived: it can be made again from the units.
A cache may come from anybody: names, sizes and JSON are checked before they are used (docs/security.md).
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from dde_cache.assets import ASSETS as ASSETS
from dde_cache.assets import asset_problems, is_plain_file, load_preprocessor, read_config, read_labels
from dde_cache.audit import audit
from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.files import hash_file, remove_abandoned
from dde_cache.manifest import MANIFEST as MANIFEST
from dde_cache.manifest import UNITS as UNITS
from dde_cache.manifest import folder_problems as folder_problems
from dde_cache.manifest import parse_manifest as parse_manifest
from dde_cache.manifest import read_manifest as read_manifest
from dde_cache.manifest import write_bytes as write_bytes
from dde_cache.manifest import write_manifest as write_manifest
from dde_cache.manifest import write_text as write_text
from dde_cache.preprocess import Preprocessor
from dde_cache.spec import FORMAT_VERSION, Manifest, TargetSpec, UnitEntry, difference
from dde_cache.unit import SUFFIX, Unit


class Cache:
    """A finished or growing cache, opened for reading.

    Args:
        folder: where it lies.

    Raises:
        CacheError: there is no cache, or its manifest or assets are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._checked: set[str] = set()
        wrong = asset_problems(folder, self.manifest)
        if wrong:
            raise CacheError(f"{folder / ASSETS}: expected the files of the manifest, got:{bullet_list(wrong)}")

    @property
    def spec(self) -> TargetSpec:
        """What the numbers mean."""
        return self.manifest.spec

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """The teacher's answers in logit order, or None without a task head."""
        return read_labels(self.folder / ASSETS, self.spec)

    @cached_property
    def teacher_config(self) -> Mapping[str, Any]:
        """The teacher's configuration."""
        return read_config(self.folder / ASSETS, self.spec)

    def preprocessor(self) -> Preprocessor:
        """The teacher's processor and tokenizer, from the cache's own assets."""
        return load_preprocessor(self.folder / ASSETS, self.spec)

    open_units = 64
    """Units that one process keeps open."""

    streams = False
    """Whether opening a unit may fetch it first."""

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return str(self.folder)

    def unit_path(self, entry: UnitEntry) -> Path:
        """Where a unit lies."""
        return self.folder / UNITS / entry.name

    def unit(self, entry: UnitEntry) -> Unit:
        """Open a unit, after checking its bytes against the manifest (once for each opened cache).

        Raises:
            CacheError: it is missing, damaged, or of another teacher.
        """
        self.check(entry)
        unit = Unit(self.unit_path(entry))
        if unit.attributes.fingerprint != self.manifest.fingerprint:
            unit.close()
            raise CacheError(
                f"unit {entry.name}: expected fingerprint {self.manifest.fingerprint[:12]}..., got "
                f"{unit.attributes.fingerprint[:12]}...: it was made by another teacher or with other options"
            )
        return unit

    def check(self, entry: UnitEntry) -> None:
        """Compare a unit's bytes with the manifest, unless that was done before. Threads may do so at the same time.

        Raises:
            CacheError: it is missing or damaged.
        """
        path = self.unit_path(entry)
        advice = "run `dde-cache extract` again with the same arguments to make it anew"
        if not is_plain_file(path):
            raise CacheError(f"unit {entry.name} (shard {entry.source}): missing from {path.parent}; {advice}")
        if entry.name not in self._checked:
            got = hash_file(path)
            if got != entry.sha256:
                raise CacheError(
                    f"unit {entry.name} (shard {entry.source}): expected {entry.size} bytes with SHA-256 "
                    f"{entry.sha256[:12]}..., got {path.stat().st_size} bytes with {got[:12]}...: the file is damaged; "
                    f"delete it and {advice}"
                )
            self._checked.add(entry.name)


class CacheWriter:
    """A cache that is being written: created, or continued where the same targets were begun.

    Several writers, on one machine or on many, may share a folder: no file that is there is written a second time,
    except the manifest, and `close` writes that until it lists every unit in the folder. No writer waits for another.
    Temporary files of writers that were killed are removed (`files.remove_abandoned`).

    Args:
        folder: where it goes; new, empty, or a cache of the same specification.
        spec: what the numbers will mean.
        assets: files of the teacher by name, as a folder to copy from.

    Raises:
        CacheError: the folder holds a cache of other targets; the differences are listed.
        InputError: the folder holds something else.
    """

    def __init__(self, folder: Path, spec: TargetSpec, assets: Path) -> None:
        self.folder = folder
        self._entries: dict[str, UnitEntry] = {}
        found = manifest_to_continue(folder, spec)
        while found is None:
            self._create(spec, assets)
            found = manifest_to_continue(folder, spec)
        self._manifest = found
        self._entries = {entry.name: entry for entry in found.units}
        (folder / UNITS).mkdir(exist_ok=True)
        for part in (folder, folder / ASSETS, folder / UNITS):
            remove_abandoned(part)

    def _create(self, spec: TargetSpec, assets: Path) -> None:
        folder = self.folder
        (folder / UNITS).mkdir(parents=True, exist_ok=True)
        (folder / ASSETS).mkdir(exist_ok=True)
        for path in sorted(assets.iterdir()):
            write_bytes(folder / ASSETS / path.name, path.read_bytes(), replace=False)
        hashes = {path.name: hash_file(path) for path in sorted(assets.iterdir())}
        other = [name for name, digest in hashes.items() if hash_file(folder / ASSETS / name) != digest]
        if other:
            raise CacheError(
                f"{folder / ASSETS}: holds assets of other targets, left by an extraction that was cut short:"
                f"{bullet_list(other)}\ndelete {folder}, or choose another --out"
            )
        write_manifest(
            folder,
            Manifest(format_version=FORMAT_VERSION, spec=spec, fingerprint=spec.fingerprint, assets=hashes),
            replace=False,
        )

    @property
    def assets(self) -> Mapping[str, str]:
        """SHA-256 of each file in assets/."""
        return self._manifest.assets

    def unit_path(self, name: str) -> Path:
        """Where a unit goes."""
        return self.folder / UNITS / name

    def finished(self, name: str) -> UnitEntry | None:
        """The entry of a unit that is there whole, or None.

        Raises:
            CacheError: a file of that name is there, but it is damaged or belongs to other targets.
        """
        path = self.unit_path(name)
        if not path.is_file():
            self._entries.pop(name, None)
            return None
        entry = self._entries.get(name)
        if entry is not None:
            if entry.size != path.stat().st_size:
                raise CacheError(
                    f"{path}: expected {entry.size} bytes, as the manifest says, got {path.stat().st_size}: the unit "
                    "is damaged or was swapped; delete it and run `dde-cache extract` again, or see `dde-cache verify`"
                )
            return entry
        self._entries[name] = self.described(name)
        return self._entries[name]

    def described(self, name: str) -> UnitEntry:
        """Make the entry of a unit that is there, after reading all of it.

        Raises:
            CacheError: it is damaged or belongs to other targets.
        """
        return describe_unit(self.unit_path(name), self._manifest.fingerprint)

    def add(self, entry: UnitEntry) -> None:
        """Record a finished unit in the manifest, beside those that other writers have recorded there."""
        others = {other.name: other for other in read_manifest(self.folder).units}
        self._entries = others | self._entries | {entry.name: entry}
        self._write()

    def close(self) -> Manifest:
        """Write the manifest over every unit in the folder, also those of other writers, and return it.

        Another writer may finish a unit, or write what it knew a moment ago, between our look and our writing. So we
        look again until the manifest lists all that is there; whoever writes last does the same.
        """
        while True:
            for name in self.present():
                self.finished(name)
            self._write()
            self._manifest = read_manifest(self.folder)
            if self.present() <= {entry.name for entry in self._manifest.units}:
                return self._manifest

    def present(self) -> set[str]:
        """File names of the units that are there, whoever wrote them."""
        return {path.name for path in (self.folder / UNITS).glob(f"[!.]*{SUFFIX}")}

    def _write(self) -> None:
        units = tuple(self._entries[name] for name in sorted(self._entries))
        self._manifest = write_manifest(self.folder, self._manifest.model_copy(update={"units": units}))


def manifest_to_continue(folder: Path, spec: TargetSpec) -> Manifest | None:
    """The manifest of a cache that was begun here, or None where one can be begun.

    Raises:
        CacheError: the folder holds a cache of other targets; the differences are listed.
        InputError: the folder holds something else.
    """
    foreign = folder.exists() and (not folder.is_dir() or not all(map(_is_ours, folder.iterdir())))
    # Looked for last: another writer may begin the cache at this moment.
    if (folder / MANIFEST).exists():
        found = read_manifest(folder)
        if found.fingerprint != spec.fingerprint:
            raise CacheError(
                f"{folder}: holds a cache of other targets:{bullet_list(difference(spec, found.spec), 20)}\n"
                "choose another --out, or the options that it was begun with"
            )
        return found
    if foreign:
        raise InputError(f"{folder}: expected a new or empty folder, or a cache to continue; choose another --out")
    return None


def _is_ours(path: Path) -> bool:
    """Whether a cache that was cut short before its first manifest may hold this."""
    return path.name in (ASSETS, UNITS) or (path.name.startswith(f".{MANIFEST}.") and path.suffix == ".partial")


def describe_unit(path: Path, fingerprint: str) -> UnitEntry:
    """Make a manifest entry from a unit, after checking every checksum and every bound of it.

    Raises:
        CacheError: the unit is damaged or has another fingerprint.
    """
    unit = Unit(path)
    try:
        attributes = unit.attributes
        if attributes.fingerprint != fingerprint:
            raise CacheError(
                f"{path}: expected fingerprint {fingerprint[:12]}..., got {attributes.fingerprint[:12]}...: it "
                "was made by another teacher or with other options; move it elsewhere"
            )
        problems = [problem.message for problem in audit(unit)]
        if problems:
            raise CacheError(
                f"{path}: the unit is damaged; delete it and run `dde-cache extract` again:{bullet_list(problems)}"
            )
    finally:
        unit.close()
    return attributes.entry(path.name, path.stat().st_size, hash_file(path))
