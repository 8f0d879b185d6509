"""A cache behind a URL, opened as any other: each unit is fetched and checked when it is first asked for.

Units are kept in a local folder that any number of processes and runs share:

    CACHE_DIR/manifests/SHA256/    manifest and assets, by the manifest's hash
    CACHE_DIR/units/               units by name and SHA-256; the least recently used go first
    CACHE_DIR/locks/

A file is there under its own name only when it is whole and has the bytes of its manifest.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dde_cache.errors import CacheError, InputError
from dde_cache.fetch import fetch_identity, fetch_unit, settle
from dde_cache.files import hash_file
from dde_cache.remote import Remote, is_url, local_path
from dde_cache.spec import UnitEntry
from dde_cache.store import Cache
from dde_cache.unit import SUFFIX, Unit

DEFAULT_LIMIT = 20 * 10**9
"""Bytes of units that are kept where nothing else is said."""

_UNITS_OF_SIZE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_NAME_LENGTH = 40


def default_cache_dir() -> Path:
    """`DDE_CACHE_DIR`, or `dde-cache` in the user's cache folder."""
    named = os.environ.get("DDE_CACHE_DIR")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dde-cache"


def parse_size(text: str) -> int:
    """Bytes of a size such as `20GB`, `500 MB` or `1000000`.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found:
        raise InputError(f"expected a size such as 20GB or 500MB, got {text!r}")
    return int(float(found[1]) * _UNITS_OF_SIZE[found[2]])


def open_cache(place: str, cache_dir: Path | None = None, limit: int | None = None) -> Cache:
    """Open a cache: a folder, or `s3://`, `https://` or `hf://`, whose units are then fetched when they are needed.

    Args:
        place: path or URL.
        cache_dir: where fetched units are kept; by default `default_cache_dir()`.
        limit: bytes of units that are kept there; by default 20 GB.

    Raises:
        CacheError: there is no cache, it is damaged, or it cannot be reached.
        InputError: no such kind of URL, or a package is missing.
    """
    if not is_url(place):
        return Cache(local_path(place))
    return StreamedCache(Remote(place), cache_dir or default_cache_dir(), DEFAULT_LIMIT if limit is None else limit)


class StreamedCache(Cache):
    """A cache behind a URL. See `open_cache`."""

    streams = True

    def __init__(self, remote: Remote, cache_dir: Path, limit: int) -> None:
        self._remote = remote
        self._kept = KeptUnits(cache_dir, limit)
        super().__init__(_identity(remote, cache_dir / "manifests"))
        largest = max((entry.size for entry in self.manifest.units), default=1)
        self.open_units = max(1, min(self.open_units, limit // max(largest, 1)))

    @property
    def name(self) -> str:
        """Its URL."""
        return self._remote.url

    def unit_path(self, entry: UnitEntry) -> Path:
        """Where a unit lies once it is fetched."""
        return self._kept.path(entry)

    def unit(self, entry: UnitEntry) -> Unit:
        """Open a unit; where it is not on this machine yet, or damaged here, it is fetched first.

        Raises:
            CacheError: it cannot be fetched, has other bytes than the manifest says, or is of another teacher.
        """
        if entry.name not in self._checked:
            self._kept.drop_damaged(entry)
        with self._kept.holding(entry, self._remote):
            self._checked.add(entry.name)
            return super().unit(entry)


def _identity(remote: Remote, folder: Path) -> Path:
    """Fetch manifest and assets into a folder of their own below `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder))
    try:
        final = folder / fetch_identity(remote, scratch).sha256
        with FileLock(folder / ".lock"):
            try:
                Cache(final)
            except CacheError:
                # Not there yet, or damaged since.
                shutil.rmtree(final, ignore_errors=True)
                os.replace(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


class KeptUnits:
    """Units on this machine, the least recently used removed beyond a limit; any number of processes may share them.

    One lock a unit lets one process fetch it while the others wait; one short lock on the folder keeps a unit from
    being removed between the look and the opening. (An open unit may be removed: who has it open reads on.)
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if limit < 1:
            raise InputError(f"expected a --cache-limit of at least 1 byte, got {limit}")
        self._units, self._locks, self._limit = folder / "units", folder / "locks", limit
        for each in (self._units, self._locks):
            each.mkdir(parents=True, exist_ok=True)

    def path(self, entry: UnitEntry) -> Path:
        """Where a unit is kept. The name from the manifest is checked there and only helps to read messages."""
        return self._units / f"{entry.name.removesuffix(SUFFIX)[:_NAME_LENGTH]}-{entry.sha256}{SUFFIX}"

    def drop_damaged(self, entry: UnitEntry) -> None:
        """Remove a unit that has changed on this machine since it was fetched."""
        path = self.path(entry)
        try:
            damaged = hash_file(path) != entry.sha256
        except FileNotFoundError:
            return
        if damaged:
            path.unlink(missing_ok=True)

    @contextmanager
    def holding(self, entry: UnitEntry, remote: Remote) -> Iterator[None]:
        """Have a unit on this machine, and keep it from being removed meanwhile.

        Raises:
            CacheError: it cannot be fetched.
        """
        path = self.path(entry)
        with self._folder_lock():
            if path.exists():
                os.utime(path)
                yield
                return
        with FileLock(self._locks / f"{entry.sha256}.lock"):
            part = path.with_name(f".{path.name}.part")
            if not path.exists():
                with self._folder_lock():
                    self._remove(entry.size, path)
                fetch_unit(remote, entry, part)
            with self._folder_lock():
                # Another process may have fetched it before us; should it be gone again, our next turn fetches it.
                if part.exists():
                    settle(part, path)
                if path.exists():
                    os.utime(path)
                    self._remove(0, path)
                    yield
                    return
        with self.holding(entry, remote):
            yield

    def _folder_lock(self) -> FileLock:
        return FileLock(self._locks / "folder.lock")

    def _remove(self, wanted: int, keep: Path) -> None:
        """Remove what was least recently used until `wanted` more bytes are within the limit."""
        held = []
        for path in self._units.iterdir():
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            held.append((found.st_mtime_ns, found.st_size, path))
        total = wanted + sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total <= self._limit:
                return
            if path != keep and path.name != f".{keep.name}.part" and self._unlink(path):
                total -= size

    def _unlink(self, path: Path) -> bool:
        """Remove a unit, or the part of one that nobody is fetching."""
        if not path.name.endswith(".part"):
            path.unlink(missing_ok=True)
            return True
        digest = path.name.removesuffix(f"{SUFFIX}.part")[-64:]
        try:
            with FileLock(self._locks / f"{digest}.lock", timeout=0):
                path.unlink(missing_ok=True)
        except Timeout:
            return False
        return True
