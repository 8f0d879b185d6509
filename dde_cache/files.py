"""Files that appear under their names whole or not at all."""

import errno
import hashlib
import os
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_members(path: Path, members: Mapping[str, bytes], *, replace: bool = True) -> tuple[int, str]:
    """Write the members of a zip stored, sorted, with fixed times; flush it to disk; return its size and its SHA-256.

    Raises:
        OSError: the disk is full; nothing under `path` then.
        FileExistsError: without `replace`, another writer has put a file there in the meantime; it stays.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            _write_zip(file, members)
            file.flush()
            os.fsync(file.fileno())
        size, digest = partial.stat().st_size, hash_file(partial)
        if not place(partial, path, replace=replace):
            raise FileExistsError(errno.EEXIST, "another writer was first", str(path))
    finally:
        partial.unlink(missing_ok=True)
    return size, digest


def partial_path(path: Path) -> Path:
    """A temporary name beside a file that no other writer has, on this machine or another."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")


def place(partial: Path, path: Path, *, replace: bool) -> bool:
    """Give a finished file its name; without `replace`, return False where the name is taken."""
    if not replace:
        try:
            os.link(partial, path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
    os.replace(partial, path)
    return True


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill; when it is filled it takes the place of `folder`, which stays as it is until then.

    One writer alone. A kill between the two renames leaves no `folder` but the old one beside it, as `.NAME.old`; the
    next call puts that back first.
    """
    partial, old = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "old"))
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_zip(file: Any, members: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), members[name])
