"""Fetch what a cache is made of, and check it: manifest and assets, units."""

import os
from pathlib import Path

from dde_cache.errors import CacheError
from dde_cache.files import hash_file
from dde_cache.remote import STALE, Advance, Remote
from dde_cache.spec import MAX_JSON, Manifest, UnitEntry
from dde_cache.store import ASSETS, MANIFEST, UNITS, parse_manifest

ASSETS_LIMIT = 100
"""How many assets a stranger's manifest may make us fetch."""


def fetch_identity(remote: Remote, folder: Path) -> Manifest:
    """Fetch manifest and assets into an empty folder, and check them.

    Raises:
        CacheError: there is no cache, or what is there is damaged or would leave the folder.
    """
    content = remote.read(MANIFEST, MAX_JSON)
    if content is None:
        raise CacheError(
            f"{remote.url}: expected a cache, but it has no {MANIFEST}: check the URL; an unfinished push has none "
            "until it is run to the end"
        )
    manifest = parse_manifest(content, f"{remote.url}/{MANIFEST}")
    (folder / ASSETS).mkdir()
    (folder / MANIFEST).write_bytes(content)
    if len(manifest.assets) > ASSETS_LIMIT:
        raise CacheError(f"{remote.url}: expected at most {ASSETS_LIMIT} assets, got {len(manifest.assets)}")
    for name, digest in manifest.assets.items():
        asset = remote.read(f"{ASSETS}/{name}", MAX_JSON)
        if asset is None:
            raise CacheError(f"{remote.url}/{ASSETS}/{name}: expected a file, found none; {STALE}")
        (folder / ASSETS / name).write_bytes(asset)
        if hash_file(folder / ASSETS / name) != digest:
            raise CacheError(f"{remote.url}/{ASSETS}/{name}: expected SHA-256 {digest[:12]}..., got another; {STALE}")
    return manifest


def settle(part: Path, path: Path) -> None:
    """Give a whole file its own name, after it is flushed to disk."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def fetch_unit(remote: Remote, entry: UnitEntry, part: Path, advance: Advance = lambda count: None) -> None:
    """Fetch a unit into `part`, going on with what is there of it; afterwards its bytes are those of the manifest.

    Raises:
        CacheError: it cannot be had whole; wrong bytes are removed.
    """
    resumed = part.exists()
    remote.fetch(f"{UNITS}/{entry.name}", part, entry.size, advance)
    got = hash_file(part)
    if got == entry.sha256:
        return
    part.unlink()
    if resumed:
        # The first piece may be older than the unit that lies there now.
        advance(-entry.size)
        fetch_unit(remote, entry, part, advance)
        return
    raise CacheError(
        f"unit {entry.name} of {remote.url}: expected {entry.size:,} bytes with SHA-256 {entry.sha256[:12]}..., got "
        f"{got[:12]}...; it was not used: {STALE}"
    )
