"""A cache that appears whole or not at all: it is put together beside its place, and renamed when it is finished.

An interrupted attempt stays as `.NAME.partial`. The same call goes on from there; a call that puts together something
else begins anew.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dde_cache.card import write_card
from dde_cache.errors import CacheError, InputError
from dde_cache.files import hash_file, partial_path, place
from dde_cache.spec import FORMAT_VERSION, Manifest, Provenance, TargetSpec, UnitAttributes, UnitEntry, hash_json
from dde_cache.store import ASSETS, UNITS, Cache, describe_unit, write_bytes, write_manifest
from dde_cache.unit import UnitArrays, write_unit

PLAN = "plan.json"


class StagedCache:
    """A cache in the making.

    Args:
        out: where it will be: nothing yet, or an empty folder.
        spec: what its numbers mean.
        like: a cache with the assets that it gets.
        plan: what it will hold, as JSON; what an attempt at the same plan has left is used.

    Raises:
        InputError: `out` is taken.
    """

    def __init__(self, out: Path, spec: TargetSpec, like: Cache, plan: Any) -> None:
        self.out = Path(os.path.abspath(out))
        self._folder = self.out.with_name(f".{self.out.name}.partial")
        self._spec, self._like = spec, like
        self._entries: list[UnitEntry] = []
        check_free(out)
        digest = hash_json([spec.fingerprint, dict(like.manifest.assets), plan])
        marker = self._folder / PLAN
        if not marker.is_file() or marker.read_text() != json.dumps(digest):
            shutil.rmtree(self._folder, ignore_errors=True)
        (self._folder / UNITS).mkdir(parents=True, exist_ok=True)
        (self._folder / ASSETS).mkdir(exist_ok=True)
        for name in like.manifest.assets:
            write_bytes(self._folder / ASSETS / name, (like.folder / ASSETS / name).read_bytes())
        write_bytes(marker, json.dumps(digest).encode())

    def take(self, cache: Cache, entry: UnitEntry, name: str, *, link: bool) -> None:
        """Take a unit as it is, as a copy or as a hard link.

        Raises:
            CacheError: the copy does not have the SHA-256 of the manifest.
            InputError: the file system cannot link the two places.
        """
        source, target = cache.folder / UNITS / entry.name, self._folder / UNITS / name
        if not target.is_file() or hash_file(target) != entry.sha256:
            partial = partial_path(target)
            try:
                if link:
                    _link(source, partial)
                else:
                    _copy(source, partial)
                if hash_file(partial) != entry.sha256:
                    raise CacheError(f"{source}: expected SHA-256 {entry.sha256[:12]}..., the copy has another one")
                place(partial, target, replace=True)
            finally:
                partial.unlink(missing_ok=True)
        self._entries.append(entry.model_copy(update={"name": name}))

    def write(self, name: str, arrays: UnitArrays, attributes: UnitAttributes) -> None:
        """Write a unit anew."""
        path = self._folder / UNITS / name
        if not path.is_file():
            write_unit(path, arrays, attributes)
        self._entries.append(describe_unit(path, self._spec.fingerprint))

    def finish(self, provenance: Provenance) -> Manifest:
        """Write manifest and card, and give the cache its name.

        Raises:
            InputError: something has been put there in the meantime.
        """
        units = tuple(sorted(self._entries, key=lambda entry: entry.name))
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            spec=self._spec,
            fingerprint=self._spec.fingerprint,
            assets=self._like.manifest.assets,
            units=units,
        )
        for left in self._folder.rglob("*.partial"):
            left.unlink(missing_ok=True)
        manifest = write_card(self._folder, write_manifest(self._folder, manifest), provenance)
        (self._folder / PLAN).unlink(missing_ok=True)
        check_free(self.out)
        os.rename(self._folder, self.out)
        return manifest


def check_free(out: Path) -> None:
    """Refuse a place that is taken.

    Raises:
        InputError: there is a file, or a folder with something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: expected a new or empty folder; choose another --out")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(
            f"{source}: cannot be hard-linked to {target.parent} ({error.strerror}); leave out --link to copy it"
        ) from error


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as written:
        shutil.copyfileobj(read, written, 2**20)
        written.flush()
        os.fsync(written.fileno())
