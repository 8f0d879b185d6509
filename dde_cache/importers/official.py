"""What importers of published data sets share: their files as they are, and their pictures in a folder or a tar."""

import hashlib
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dde_cache.errors import InputError
from dde_cache.importers.common import Found, Problem, read_image, with_image
from dde_cache.samples import Text, check_key
from dde_cache.tars import list_members


class Pictures:
    """Pictures below a folder or in an uncompressed tar, found by the end of their path.

    Args:
        names: the paths of all files.
        read: reads one of them.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], bytes]) -> None:
        self._read = read
        self._paths: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            self._paths[name.rsplit("/", 1)[-1]].append(name)

    def read(self, name: str) -> bytes:
        """The bytes of a picture. `name` may begin with folders; they decide between files of one name.

        Raises:
            FileNotFoundError: there is none.
            InputError: there are several.
            OSError: it cannot be read.
        """
        found = self._paths.get(name.rsplit("/", 1)[-1], [])
        exact = [path for path in found if f"/{path}".endswith(f"/{name}")]
        chosen = exact or found
        if not chosen:
            raise FileNotFoundError(name)
        if len(chosen) > 1:
            raise InputError(f"expected one file, found {len(chosen)}: {', '.join(chosen[:3])}")
        return self._read(chosen[0])


def open_pictures(where: Path, option: str = "--images") -> Pictures:
    """List the pictures of a folder, at any depth, or of an uncompressed tar.

    Raises:
        InputError: it is neither.
    """
    if where.is_dir():
        paths = [
            Path(folder, name).relative_to(where).as_posix() for folder, _, names in os.walk(where) for name in names
        ]
        return Pictures(paths, lambda name: (where / name).read_bytes())
    try:
        members = {name.removeprefix("./"): (offset, size) for name, offset, size in list_members(where)}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{option} {where}: expected a folder of pictures or an uncompressed tar: {error}") from error

    def read(name: str) -> bytes:
        offset, size = members[name]
        with open(where, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return Pictures(list(members), read)


def read_official(path: Path, option: str) -> bytes:
    """Read a published file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{option} {path}: expected a file: {error.strerror}") from error


def read_object(path: Path, option: str, field: str) -> dict[str, Any]:
    """Read a published JSON object with a list under `field`.

    Raises:
        InputError: it is none.
    """
    try:
        content = json.loads(read_official(path, option))
    except ValueError as error:
        raise InputError(f"{option} {path}: expected JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(field), list):
        raise InputError(f"{option} {path}: expected a JSON object with a list of {field}")
    return content


def read_lines(path: Path, option: str) -> Iterator[tuple[str, dict[str, Any] | Problem]]:
    """Read a published file of JSON lines: where each object stands, and the object, or why it is none.

    Raises:
        InputError: the file cannot be read.
    """
    for number, line in enumerate(read_official(path, option).splitlines(), start=1):
        where = f"{path.name} line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            yield where, Problem("malformed line", where, f"expected JSON: {error}")
            continue
        if isinstance(fields, dict):
            yield where, fields
        else:
            yield where, Problem("malformed line", where, f"expected an object, got {line[:60]!r}")


def examples(groups: "Groups", path: Path, prefix: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The objects of a published file of JSON lines (`--from`), each with a name for its problems and where it stands.

    A line that is no object is a problem of `groups`.

    Raises:
        InputError: the file cannot be read.
    """
    for number, (where, example) in enumerate(read_lines(path, "--from")):
        name = f"{prefix}line-{number}"
        if isinstance(example, Problem):
            groups.fail(name, where, example.detail, example.kind)
        else:
            yield name, where, example


def digests(**paths: Path) -> dict[str, str]:
    """File names and SHA-256 of what an import follows from, by option."""
    found: dict[str, str] = {}
    for option, path in paths.items():
        found |= {option: path.name, f"{option}_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return found


def check_split(split: str) -> None:
    """Refuse a split that cannot be part of a key.

    Raises:
        InputError: it has dots, spaces or slashes.
    """
    if check_key(split) is not None or "/" in split:
        raise InputError(f"expected --split to be a name without dots, spaces or slashes, got {split!r}")


class Groups:
    """Texts that belong to the same pictures, in the order in which the pictures first appear."""

    def __init__(self, name: Callable[[str], str]) -> None:
        self._name = name
        self._texts: dict[str, list[Text]] = {}
        self._where: dict[str, str] = {}
        self._problems: defaultdict[str, list[Problem]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._where)

    def add(self, key: str, where: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Add a text with the fields that `make` gives; what it lacks becomes a problem of its sample."""
        self._where.setdefault(key, where)
        try:
            self._texts.setdefault(key, []).append(Text.model_validate(make()))
        except ValidationError as error:
            first = error.errors()[0]
            empty = first["type"] == "string_too_short"
            detail = f"{'.'.join(map(str, first['loc']))}: {'nothing in it' if empty else first['msg']}"
            self.fail(key, where, detail, "empty text" if empty else "malformed entry")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            missing = isinstance(error, KeyError)
            detail = f"missing field {error}" if missing else str(error)
            self.fail(key, where, detail)

    def fail(self, key: str, where: str, detail: str, kind: str = "malformed entry") -> None:
        """Add a problem to a sample."""
        self._where.setdefault(key, where)
        self._problems[key].append(Problem(kind, where, detail))

    def found(self, images: Callable[[str], Sequence[str]], pictures: Pictures) -> Iterator[Found]:
        """The samples, with their pictures."""
        for key, where in self._where.items():
            texts, problems = tuple(self._texts.get(key, ())), tuple(self._problems[key])
            one = Found(where, self._name(key), (), texts, {}, problems)
            for name in images(key) if texts else ():
                one = with_image(one, read_image(lambda name=name: pictures.read(name), where, name))  # type: ignore[misc]
            yield one
