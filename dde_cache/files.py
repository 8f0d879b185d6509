"""Files that appear under their names whole or not at all."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_EPOCH = (1980, 1, 1, 0, 0, 0)

ABANDONED_SECONDS = 3600.0
"""Without a change, before a file that nobody holds counts as left by a killed writer."""

_PARTIAL = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.partial")
"""Names that `partial_path` gives."""


def write_members(path: Path, members: Mapping[str, bytes], *, replace: bool = True) -> tuple[int, str]:
    """Write the members of a zip stored, sorted, with fixed times; flush it to disk; return its size and its SHA-256.

    Raises:
        OSError: the disk is full; nothing under `path` then.
        FileExistsError: without `replace`, another writer has put a file there in the meantime; it stays.
    """
    with partial_file(path) as (file, partial):
        _write_zip(file, members)
        file.flush()
        os.fsync(file.fileno())
        size, digest = partial.stat().st_size, hash_file(partial)
        if not place(partial, path, replace=replace):
            raise FileExistsError(errno.EEXIST, "another writer was first", str(path))
    return size, digest


@contextmanager
def partial_file(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a new temporary file beside `path`, which its writer holds until the end of the block, and is gone then.

    The kernel lets go of what a killed process held, so that others can tell whether a writer is alive.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            # Where a file system has no locks, nobody removes what is left there either.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file, partial
    finally:
        partial.unlink(missing_ok=True)


def remove_abandoned(folder: Path, after: float = ABANDONED_SECONDS) -> None:
    """Remove temporary files of `partial_file` that a killed writer left in a folder, and no other's.

    A file goes where nobody holds it and nothing was written to it for an hour: between the opening and the lock it is
    not held yet, and some network file systems do not show the locks of other machines.

    Args:
        folder: where to look.
        after: seconds without a change; 0 where a folder has one writer at a time.
    """
    for path in folder.glob(".*.partial"):
        if _PARTIAL.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            with suppress(OSError), open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime >= after:
                    path.unlink(missing_ok=True)


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
