"""A cache: a folder of units with a manifest, the teacher's assets and a card.

    NAME/manifest.json   identity, target specification, one row a unit
    NAME/assets/         processor and tokenizer, teacher configuration, labels in logit order
    NAME/units/          one file a shard
    NAME/README.md       the card

Every file is written under a temporary name and renamed. The manifest is derived: it can be made again from the units.
"""

import json
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dde_cache.errors import CacheError, InputError, bullet_list
from dde_cache.preprocess import Preprocessor
from dde_cache.spec import FORMAT_VERSION, Manifest, TargetSpec, UnitEntry, difference
from dde_cache.unit import SUFFIX, Unit, hash_file

MANIFEST = "manifest.json"
ASSETS = "assets"
UNITS = "units"
LABELS = "labels.json"
TEACHER_CONFIG = "config.json"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
        wrong = [
            f"{name}: missing"
            if not (folder / ASSETS / name).is_file()
            else f"{name}: changed since the cache was made"
            for name, digest in self.manifest.assets.items()
            if not (folder / ASSETS / name).is_file() or hash_file(folder / ASSETS / name) != digest
        ]
        if wrong:
            raise CacheError(f"{folder / ASSETS}: expected the files of the manifest, got:{bullet_list(wrong)}")

    @property
    def spec(self) -> TargetSpec:
        """What the numbers mean."""
        return self.manifest.spec

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """The teacher's answers in logit order, or None without a task head."""
        names = json.loads((self.folder / ASSETS / LABELS).read_text())
        return None if names is None else tuple(names)

    @cached_property
    def teacher_config(self) -> Mapping[str, Any]:
        """The teacher's configuration."""
        return json.loads((self.folder / ASSETS / TEACHER_CONFIG).read_text())

    def preprocessor(self) -> Preprocessor:
        """The teacher's processor and tokenizer, from the cache's own assets."""
        return Preprocessor.load(self.folder / ASSETS, self.spec.patch_size, self.spec.text_length)

    def unit(self, entry: UnitEntry) -> Unit:
        """Open a unit, after checking its bytes against the manifest (once for each opened cache).

        Raises:
            CacheError: it is missing, damaged, or of another teacher.
        """
        path = self.folder / UNITS / entry.name
        advice = "run `dde-cache extract` again with the same arguments to make it anew"
        if not path.is_file():
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
        unit = Unit(path)
        if unit.attributes.fingerprint != self.manifest.fingerprint:
            raise CacheError(
                f"unit {entry.name}: expected fingerprint {self.manifest.fingerprint[:12]}..., got "
                f"{unit.attributes.fingerprint[:12]}...: it was made by another teacher or with other options"
            )
        return unit


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        CacheError: it is missing, changed by hand, or of another format version.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CacheError(f"{path}: expected format version {FORMAT_VERSION}, got {version}; update dde-cache")
        manifest = Manifest.model_validate(content)
    except FileNotFoundError as error:
        raise CacheError(
            f"{folder}: expected a cache, but it has no {MANIFEST}; make one with `dde-cache extract`"
        ) from error
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        raise CacheError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if manifest.own_hash() != manifest.sha256:
        raise CacheError(f"{path}: its content does not match its own SHA-256; it was changed or damaged")
    if manifest.spec.fingerprint != manifest.fingerprint:
        raise CacheError(f"{path}: its fingerprint does not match its target specification")
    return manifest


class CacheWriter:
    """A cache that is being written: created, or continued where the same targets were begun.

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
        if (folder / MANIFEST).exists():
            found = read_manifest(folder)
            if found.fingerprint != spec.fingerprint:
                raise CacheError(
                    f"{folder}: holds a cache of other targets:{bullet_list(difference(spec, found.spec), 20)}\n"
                    "choose another --out, or the options that it was begun with"
                )
            self._manifest = found
            self._entries = {entry.name: entry for entry in found.units}
            (folder / UNITS).mkdir(exist_ok=True)
            return
        if folder.exists() and (not folder.is_dir() or not all(map(_is_ours, folder.iterdir()))):
            raise InputError(f"{folder}: expected a new or empty folder, or a cache to continue; choose another --out")
        (folder / UNITS).mkdir(parents=True, exist_ok=True)
        (folder / ASSETS).mkdir(exist_ok=True)
        for path in sorted(assets.iterdir()):
            shutil.copyfile(path, folder / ASSETS / path.name)
        hashes = {path.name: hash_file(path) for path in sorted((folder / ASSETS).iterdir())}
        self._manifest = Manifest(spec=spec, fingerprint=spec.fingerprint, assets=hashes).sealed()
        self._write()

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
        if entry is not None and entry.size == path.stat().st_size:
            return entry
        entry = describe_unit(path, self._manifest.fingerprint)
        self._entries[name] = entry
        return entry

    def add(self, entry: UnitEntry) -> None:
        """Record a finished unit in the manifest."""
        self._entries[entry.name] = entry
        self._write()

    def close(self) -> Manifest:
        """Write the manifest over every unit in the folder, also those of other writers, and return it."""
        for path in sorted((self.folder / UNITS).glob(f"[!.]*{SUFFIX}")):
            self.finished(path.name)
        self._write()
        return self._manifest

    def _write(self) -> None:
        units = tuple(self._entries[name] for name in sorted(self._entries))
        self._manifest = self._manifest.model_copy(update={"units": units}).sealed()
        write_text(self.folder / MANIFEST, self._manifest.model_dump_json(indent=2) + "\n")


def _is_ours(path: Path) -> bool:
    """Whether a cache that was cut short before its first manifest may hold this."""
    return path.name in (ASSETS, UNITS) or (path.name.startswith(f".{MANIFEST}.") and path.suffix == ".partial")


def describe_unit(path: Path, fingerprint: str) -> UnitEntry:
    """Make a manifest entry from a unit, after reading every array of it.

    Raises:
        CacheError: the unit is damaged or has another fingerprint.
    """
    unit = Unit(path)
    try:
        if unit.attributes.fingerprint != fingerprint:
            raise CacheError(
                f"{path}: expected fingerprint {fingerprint[:12]}..., got {unit.attributes.fingerprint[:12]}...: it "
                "was made by another teacher or with other options; move it elsewhere"
            )
        unit.check_readable()
        attributes = unit.attributes
    finally:
        unit.close()
    return UnitEntry(
        name=path.name,
        source=attributes.source,
        samples=attributes.samples,
        pairs=attributes.pairs,
        size=path.stat().st_size,
        sha256=hash_file(path),
    )
