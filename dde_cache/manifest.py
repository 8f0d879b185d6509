"""`manifest.json`: read, checked and written; and how any file is written whole or not at all."""

import os
from pathlib import Path

from pydantic import ValidationError

from dde_cache.assets import ASSETS, is_plain_file
from dde_cache.candidates import no_cache
from dde_cache.errors import CacheError, bullet_list, first_line
from dde_cache.files import partial_file, place
from dde_cache.spec import FORMAT_VERSION, MAX_JSON, Manifest, hash_json, indented_json, parse_json

MANIFEST = "manifest.json"
UNITS = "units"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, *, replace: bool = True) -> bool:
    """Write a file whole or not at all; without `replace`, return False where there is one already."""
    with partial_file(path) as (file, partial):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return place(partial, path, replace=replace)


def folder_problems(folder: Path) -> list[str]:
    """Folders of a cache that are links: what is written or moved there would go elsewhere."""
    return [
        f"{folder / name}: expected a folder, got a symbolic link; put the files themselves there"
        for name in (ASSETS, UNITS)
        if (folder / name).is_symlink()
    ]


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        CacheError: it is missing, changed by hand, or of another format version.
    """
    path = folder / MANIFEST
    linked = folder_problems(folder)
    if linked:
        raise CacheError(linked[0])
    if not path.exists():
        raise CacheError(f"{folder}: expected a cache, but it has no {MANIFEST}; {no_cache(folder)}")
    try:
        if not is_plain_file(path) or path.stat().st_size > MAX_JSON:
            raise ValueError(f"expected a plain file of at most {MAX_JSON:,} bytes")
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: cannot be read: {error}") from error
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Check the text of a manifest; `where` it lies is for messages.

    Raises:
        CacheError: it was changed by hand, or is of another format version.
    """
    try:
        content = parse_json(text)
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise CacheError(
                f"{where}: expected format version {FORMAT_VERSION}, got {version!r:.50}; update dde-cache"
            )
        # Hashes are of the file as it is written, not as it is parsed: a field that a later version adds, with a value
        # for caches that lack it, changes neither.
        own = hash_json({name: value for name, value in content.items() if name != "sha256"})
        manifest = Manifest.model_validate(content)
        fingerprint = hash_json(content["spec"])
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, one['loc']))[:100]}: {one['msg'][:200]}" for one in error.errors()]
        raise CacheError(
            f"{where}: cannot be read, its fields are not those of format version {FORMAT_VERSION}:{bullet_list(wrong)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{where}: cannot be read: {first_line(error)}") from error
    if own != manifest.sha256:
        raise CacheError(f"{where}: its content does not match its own SHA-256; it was changed or damaged")
    if fingerprint != manifest.fingerprint:
        raise CacheError(f"{where}: its fingerprint does not match its target specification")
    return manifest


def write_manifest(folder: Path, manifest: Manifest, *, replace: bool = True) -> Manifest:
    """Seal a manifest and write it; return it with its hash. Without `replace`, one that is there stays."""
    sealed = manifest.sealed()
    write_bytes(folder / MANIFEST, indented_json(sealed.model_dump(mode="json")), replace=replace)
    return sealed
