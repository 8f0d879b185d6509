"""The `jsonl` source: the user's own pictures, texts and labels, one JSON object a line.

    {"image": "a.jpg", "text": "is there a cat", "label": "yes"}
    {"key": "pair-7", "images": ["a.jpg", "b.jpg"], "texts": [{"text": "both show cats", "label": "true"}]}

Paths are relative to the file. docs/samples.md lists the fields.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from dde_cache.errors import InputError
from dde_cache.importers.common import Found, Problem, Source, read_image
from dde_cache.samples import EncodedImage, Text, check_key

_FIELDS = ("key", "image", "images", "text", "label", "kind", "texts", "meta")


def jsonl_source(split: str, path: Path) -> Source:
    """Make the `jsonl` source of an import from a file of lines; `split` is any name.

    Raises:
        InputError: the file cannot be read, or `split` cannot be part of a key.
    """
    if check_key(split) is not None or "/" in split:
        raise InputError(f"expected --split to be a name without dots, spaces or slashes, got {split!r}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"--from {path}: expected a file of JSON lines: {error.strerror}") from error
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    total = sum(1 for line in lines if line.strip())
    arguments = {"from": path.name, "sha256": hashlib.sha256(content).hexdigest()}
    return Source("jsonl", split, arguments, total, _find(split, path, lines))


def _find(split: str, path: Path, lines: list[bytes]) -> Iterator[Found]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        key = f"{split}-{number:07d}"
        try:
            # The parser that reads shards: what passes here can be read back. It knows no NaN and no broken UTF-8.
            fields = from_json(line, allow_inf_nan=False)
            json.dumps(fields, allow_nan=False)  # 1e999 is JSON, and infinite
        except ValueError as error:
            problem = Problem("malformed line", where, f"expected JSON in UTF-8: {str(error).replace(' line 1', '')}")
            yield Found(where, key, problems=(problem,))
            continue
        yield _parse(fields, where, key, path.parent)


def _parse(fields: object, where: str, key: str, folder: Path) -> Found:
    """Parse every part of a line, whatever is wrong with the others, so that all problems come at once."""
    if not isinstance(fields, dict):
        problem = Problem("malformed line", where, f"expected an object, got {json.dumps(fields)[:60]}")
        return Found(where, key, problems=(problem,))
    malformed = [f"unknown field {name!r}; known are {', '.join(_FIELDS)}" for name in fields if name not in _FIELDS]
    if not isinstance(fields.get("key", ""), str):
        malformed.append("key: expected a string")
    elif "key" in fields:
        key = fields["key"]
    meta = fields.get("meta", {})
    if not isinstance(meta, dict):
        malformed.append("meta: expected an object")
        meta = {}
    names, wrong_images = _image_names(fields)
    entries, wrong_texts = _text_entries(fields)
    problems = [Problem("malformed line", where, detail) for detail in malformed + wrong_images + wrong_texts]
    images = [read_image((folder / name).read_bytes, where, name) for name in names]
    texts = [_parse_text(entry, where) for entry in entries]
    problems += [image for image in images if isinstance(image, Problem)]
    problems += [problem for text in texts if not isinstance(text, Text) for problem in text]
    return Found(
        where,
        key,
        tuple(image for image in images if isinstance(image, EncodedImage)),
        tuple(text for text in texts if isinstance(text, Text)),
        meta,
        tuple(problems),
    )


def _image_names(fields: dict[str, Any]) -> tuple[list[str], list[str]]:
    if ("image" in fields) == ("images" in fields):
        return [], ["expected either image or images"]
    names = fields["images"] if "images" in fields else [fields["image"]]
    if not isinstance(names, list) or not 1 <= len(names) <= 2:
        return [], ["images: expected a list of one or two paths"]
    good = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    return good, [] if len(good) == len(names) else ["image: expected a path"]


def _text_entries(fields: dict[str, Any]) -> tuple[list[Any], list[str]]:
    if ("text" in fields) == ("texts" in fields):
        return [], ["expected either text or texts"]
    if "text" in fields:
        return [{name: fields[name] for name in ("text", "label", "kind") if name in fields}], []
    wrong = [f"{name}: belongs inside texts" for name in ("label", "kind") if name in fields]
    if not isinstance(fields["texts"], list) or not fields["texts"]:
        return [], [*wrong, "texts: expected a list of at least one object"]
    return fields["texts"], wrong


def _parse_text(entry: object, where: str) -> Text | list[Problem]:
    try:
        return Text.model_validate(entry)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            name = ".".join(map(str, detail["loc"])) or "texts"
            empty = detail["type"] == "string_too_short"
            kind = "empty text" if empty else "malformed line"
            problems.append(Problem(kind, where, f"{name}: {'nothing in it' if empty else detail['msg']}"))
        return problems
