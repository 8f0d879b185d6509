"""The `nlvr` source: NLVR v1.0 (Suhr et al., 2017) in its official folder layout, or a tar of it.

An example is one sentence with a picture of three boxes, in six pictures that differ in the boxes' order. Each
picture is a sample; `meta.example` is the same for all six, so that they can be kept together.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dde_cache.errors import InputError
from dde_cache.importers.common import Found, Problem, Source, read_image, with_image
from dde_cache.samples import Text
from dde_cache.tars import list_members

_IMAGE = re.compile(r"(?:\./)?(.*-(\d+-\d+)-(\d))\.png")
_PERMUTATIONS = 6
_SPLIT = re.compile(r"[a-z]+")


def nlvr_source(split: str, where: Path) -> Source:
    """Make the `nlvr` source of an import from a folder or a tar that holds SPLIT/SPLIT.json and SPLIT/images/.

    Raises:
        InputError: there is nothing to read there, or no such split.
    """
    if not _SPLIT.fullmatch(split):
        raise InputError(f"expected --split dev, test or hidden for nlvr, got {split!r}")
    names, read = _open(where)
    listing = f"{split}/{split}.json"
    if listing not in names:
        splits = sorted(match[1] for name in names if (match := re.fullmatch(r"([a-z]+)/\1\.json", name)))
        raise InputError(f"{where}: expected {listing}, found {', '.join(splits) if splits else 'no split'}")
    content = read(listing)
    images: dict[tuple[str, int], str] = {}
    for name in names:
        match = _IMAGE.fullmatch(name)
        if match and name.startswith(f"{split}/images/"):
            images[match[2], int(match[3])] = name
    lines = content.splitlines()
    arguments = {"from": where.name, "sha256": hashlib.sha256(content).hexdigest()}
    found = _find(split, lines, images, read)
    return Source("nlvr", split, arguments, len(lines) * _PERMUTATIONS, found)


def _open(where: Path) -> tuple[set[str], Callable[[str], bytes]]:
    """Return the names of the files below `where`, with slashes, and how to read one."""
    if where.is_dir():
        # The folder of the splits, or that of one split: names start at the split either way.
        root = where.parent if (where / f"{where.name}.json").is_file() else where
        paths = (path for path in where.rglob("*") if path.suffix in (".json", ".png"))
        return {path.relative_to(root).as_posix() for path in paths}, lambda name: (root / name).read_bytes()
    if not where.is_file():
        raise InputError(f"--from {where}: expected the folder of NLVR or a tar of it, found nothing")
    try:
        members = {name.removeprefix("./"): (offset, size) for name, offset, size in list_members(where)}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"--from {where}: expected a folder or an uncompressed tar: {error}") from error

    def read(name: str) -> bytes:
        offset, size = members[name]
        with open(where, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return set(members), read


def _find(
    split: str, lines: list[bytes], images: dict[tuple[str, int], str], read: Callable[[str], bytes]
) -> Iterator[Found]:
    for number, line in enumerate(lines, start=1):
        where = f"{split}.json line {number}"
        if not line.strip():
            continue
        try:
            example, text = _parse(line)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = f"expected an example of NLVR: {type(error).__name__}: {error}".splitlines()[0]
            yield Found(where, f"{split}-line-{number}", problems=(Problem("malformed line", where, detail),))
            continue
        for permutation in range(_PERMUTATIONS):
            meta = {"example": example, "permutation": permutation}
            found = Found(where, f"nlvr-{split}-{example}-{permutation}", (), (text,), meta)
            name = images.get((example, permutation), f"{split}/images/.../{split}-{example}-{permutation}.png")
            yield with_image(found, read_image(lambda name=name: read(name), where, name))  # type: ignore[misc]


def _parse(line: bytes) -> tuple[str, Text]:
    example = json.loads(line)
    identifier, boxes = example["identifier"], example["structured_rep"]
    if not isinstance(identifier, str):
        raise ValueError(f"identifier: expected a string, got {identifier!r}")
    return identifier, Text(text=example["sentence"], label=example["label"], kind=_kind(boxes))


def _kind(boxes: list[list[dict[str, Any]]]) -> str:
    """Return `tower` where every box holds blocks stacked on one another, `scatter` otherwise."""
    items = [item for box in boxes for item in box]
    stacked = all(item["type"] == "square" and item["x_loc"] == 40 and item["size"] == 20 for item in items)
    return "tower" if stacked else "scatter"
