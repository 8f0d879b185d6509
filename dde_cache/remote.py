"""The files of a cache behind a URL, by relative name: `s3://`, `https://`, `hf://`, or a local path, through fsspec.

Nothing that comes from there is believed: names are checked before they become paths, sizes are bounded, and a unit is
fetched under another name and renamed by the caller once its SHA-256 is that of the manifest.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from dde_cache.errors import CacheError, InputError
from dde_cache.network import not_there, pause, status, troubles

EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http", "hf": "hf"}
"""The extra that brings what a kind of URL needs."""

BLOCK = 8 * 2**20
"""Bytes asked for at once; after a cut connection, less."""

SMALLEST_BLOCK = 64 * 2**10
_CONDITIONAL = ("s3", "s3a")
"""Where a file can be replaced on condition that it is still the one we know."""

_CHANGED = (409, 412)
"""HTTP statuses of a condition that does not hold."""

STALE = "the manifest there and its units do not belong together; tell whoever shares it, and try again later"

Advance = Callable[[int], None]
"""Called with a number of bytes."""

Value = TypeVar("Value")


def is_url(place: str) -> bool:
    """Whether a place is behind a URL; `file://` is a local path."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """The path of a place that is no URL."""
    return Path(place.removeprefix("file://"))


class Remote:
    """A cache behind a URL. Holds no connection, so that it can be sent to worker processes.

    Args:
        url: where `manifest.json` lies in. Credentials are those of fsspec's file systems (AWS_*, HF_TOKEN, ...).

    Raises:
        InputError: no such kind of URL, or what it needs is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.scheme = url.split("://")[0] if "://" in url else "file"
        if self.scheme in ("http", "https") and re.search("[?#]", url):
            raise InputError(f"{url}: expected the URL of a folder, without ? and #: file names are put behind it")
        self._place()

    def _place(self) -> tuple[Any, str]:
        """The file system (one for each process: fsspec keeps them) and the folder in it."""
        try:
            return fsspec.core.url_to_fs(self.url, **_options(self.scheme))
        except ImportError as error:
            extra = EXTRAS.get(self.scheme)
            advice = f"pip install 'dde-cache[{extra}]'" if extra else str(error)
            raise InputError(f"{self.url}: {self.scheme}:// needs a package that is not installed; {advice}") from error
        except ValueError as error:
            raise InputError(
                f"{self.url}: expected a local path, s3://, https:// or hf://datasets/OWNER/NAME, got {error}"
            ) from error

    def read(self, name: str, limit: int) -> bytes | None:
        """A small file, or None where it is not there.

        Raises:
            CacheError: it is larger than `limit` bytes, or cannot be reached.
        """
        download = _Download(self, name)
        content = b""
        try:
            self._place()[0].invalidate_cache()
            while block := download.read(len(content), BLOCK):
                content += block
                if len(content) > limit:
                    raise CacheError(f"{self.url}/{name}: expected at most {limit:,} bytes, got more; it is not used")
        except FileNotFoundError:
            return None
        finally:
            download.close()
        return content

    def fetch(self, name: str, part: Path, size: int, advance: Advance) -> None:
        """Fetch a file of known size into `part`, behind what is there of it.

        A cut connection is opened again at the byte where it was cut; a server that cannot do that sends the file
        from its beginning, and what we have is skipped.

        Raises:
            CacheError: it is not there, cannot be reached, or there is no room for it.
        """
        have = part.stat().st_size if part.exists() else 0
        if have > size:
            part.unlink()
            have = 0
        free = shutil.disk_usage(part.parent).free
        if free < size - have:
            raise CacheError(
                f"{part.parent}: expected room for {size - have:,} bytes of {name}, got {free:,}; make room and run "
                "the same command again"
            )
        advance(have)
        download = _Download(self, name)
        try:
            with open(part, "ab") as file:
                while have < size:
                    block = download.read(have, size - have)
                    if not block:
                        raise CacheError(f"{self.url}/{name}: expected {size:,} bytes, got {have:,}; {STALE}")
                    _write(file, block)
                    have += len(block)
                    advance(len(block))
        except FileNotFoundError as error:
            raise CacheError(f"{self.url}/{name}: expected a file, found none; {STALE}") from error
        finally:
            download.close()

    def put(self, path: Path, name: str, advance: Advance = lambda count: None) -> None:
        """Send a file.

        Raises:
            CacheError: it cannot be sent.
        """
        callback = _Callback(advance)
        self.tried(f"{self.url}/{name}", lambda fs, root: fs.put_file(str(path), f"{root}/{name}", callback=callback))

    def write(self, name: str, content: bytes) -> None:
        """Send a small file.

        Raises:
            CacheError: it cannot be sent.
        """
        self.tried(f"{self.url}/{name}", lambda fs, root: fs.pipe_file(f"{root}/{name}", content))

    def tag(self, name: str) -> str | None:
        """What an S3 object is known by while its bytes are the same (its ETag); None elsewhere, or without one."""
        if self.scheme not in _CONDITIONAL:
            return None

        def found(fs: Any, root: str) -> str:
            fs.invalidate_cache()
            return str(fs.info(f"{root}/{name}")["ETag"])

        try:
            return self.tried(f"{self.url}/{name}", found, missing=True)
        except FileNotFoundError:
            return None

    def replace(self, name: str, content: bytes, tag: str | None) -> bool:
        """Send a small file, on S3 only where the one that is there still has the given tag (None: is not there).

        Raises:
            CacheError: it cannot be sent.
        """
        condition: dict[str, str] = {}
        if self.scheme in _CONDITIONAL:
            condition = {"mode": "create"} if tag is None else {"IfMatch": tag}

        def send(fs: Any, root: str) -> bool:
            try:
                fs.pipe_file(f"{root}/{name}", content, **condition)
            except OSError as error:
                if status(error) in _CHANGED:
                    return False
                raise
            return True

        return self.tried(f"{self.url}/{name}", send)

    def names(self, folder: str = "") -> tuple[str, ...]:
        """What lies in a folder, sorted; nothing where there is none."""

        def listed(fs: Any, root: str) -> list[str]:
            fs.invalidate_cache()
            return fs.ls(f"{root}/{folder}".rstrip("/"), detail=False)

        try:
            paths = self.tried(self.url, listed, missing=True)
        except FileNotFoundError:
            return ()
        return tuple(sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths))

    def checksum(self, name: str) -> str | None:
        """A value that changes when the bytes of a file change (on S3 from its ETag), or None where it is not there.

        What fsspec calls a checksum: no hash of ours, but as long as it is the same, the bytes are.
        """
        try:
            return self.tried(f"{self.url}/{name}", lambda fs, root: str(fs.checksum(f"{root}/{name}")), missing=True)
        except FileNotFoundError:
            return None

    def tried(self, what: str, action: Callable[[Any, str], Value], *, missing: bool = False) -> Value:
        """Do something with the file system, again after a pause where it fails.

        Raises:
            CacheError: it failed `TRIES` times, or access was refused.
            FileNotFoundError: with `missing`: it is not there.
        """
        failed = 0
        while True:
            try:
                return action(*self._place())
            except troubles() as error:
                if missing and not_there(error):
                    raise FileNotFoundError(what) from error
                failed += 1
                pause(what, error, failed)


class _Download:
    """One file, read from any place, over a new connection where one is cut."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name = remote, name
        self._file: Any = None
        self._at = 0
        self._block, self._ranges, self._failed = BLOCK, True, 0

    def read(self, at: int, count: int) -> bytes:
        """Up to `count` bytes from byte `at`; none at the end of the file.

        Raises:
            FileNotFoundError: it is not there.
            CacheError: nothing came, `TRIES` times in a row.
        """
        while True:
            try:
                if self._file is None or self._at != at:
                    self._open(at)
                block: bytes = self._file.read(min(count, self._block))
            except troubles() as error:
                self.close()
                if not_there(error):
                    raise FileNotFoundError(self._name) from error
                self._failed += 1
                # A connection that is cut again and again still brings small pieces.
                self._block = max(self._block // 8, SMALLEST_BLOCK)
                pause(f"{self._remote.url}/{self._name}", error, self._failed)
                continue
            except ValueError as error:
                self.close()
                if not self._ranges:
                    raise CacheError(f"{self._remote.url}/{self._name}: the answer cannot be read ({error})") from error
                # fsspec's word for a server that does not serve ranges.
                self._ranges = False
                continue
            self._failed = 0
            self._at += len(block)
            return block[:count]

    def _open(self, at: int) -> None:
        self.close()
        fs, root = self._remote._place()
        block_size = self._block if self._ranges else 0
        self._file = fs.open(f"{root}/{self._name}", "rb", block_size=block_size, cache_type="none")
        self._at = 0
        if self._ranges:
            self._file.seek(at)
            self._at = at
        while self._at < at:
            skipped = self._file.read(min(at - self._at, BLOCK))
            if not skipped:
                raise EOFError(f"ended after {self._at:,} bytes")
            self._at += len(skipped)

    def close(self) -> None:
        """Close the connection."""
        if self._file is not None:
            self._file.close()
        self._file = None


class _Callback(fsspec.callbacks.Callback):
    """Bytes sent, as a file system reports them."""

    def __init__(self, advance: Advance) -> None:
        super().__init__()
        self._advance = advance

    def relative_update(self, inc: int = 1) -> None:
        self._advance(inc)


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in ("http", "https"):
        return {}
    import aiohttp

    # aiohttp allows five minutes for a whole file by default, however large.
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def _write(file: Any, block: bytes) -> None:
    try:
        file.write(block)
        file.flush()
    except OSError as error:
        raise CacheError(
            f"{file.name}: cannot be written ({error.strerror}); make room and run the same command again: what came "
            "until then is kept"
        ) from error
