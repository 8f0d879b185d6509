"""JSON as it is hashed and as it is read from anybody."""

import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

MAX_JSON = 64 * 2**20
"""Bytes of JSON that are parsed: a manifest of 200,000 units has 60 MB."""

PLACE = ("transformers_version", "_name_or_path", "architectures", "dtype")
"""What a model's configuration says of the library's version and of where the model lay."""


def parse_json(content: bytes, limit: int = MAX_JSON) -> Any:
    """Parse JSON that may come from anybody.

    Raises:
        ValueError: it is no UTF-8 or JSON, larger than `limit` bytes, nested too deep, or it has a NaN, an infinity, or
            a name twice in one object.
    """
    if len(content) > limit:
        raise ValueError(f"expected at most {limit:,} bytes of JSON, got {len(content):,}")
    try:
        return json.loads(
            content.decode(), parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique_names
        )
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ValueError("a name stands twice in one JSON object")
    return named


def indented_json(value: Any) -> bytes:
    """The one way in which `manifest.json` is written: indented by two spaces, UTF-8, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def hash_keys(keys: Iterable[str]) -> str:
    """SHA-256 of sample keys in their order, each followed by a newline, in UTF-8."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{key}\n".encode())
    return digest.hexdigest()


def without_place(value: Any) -> Any:
    """A model's configuration as JSON without these names, in the configurations of its parts too."""
    if isinstance(value, dict):
        return {name: without_place(inner) for name, inner in value.items() if name not in PLACE}
    return [without_place(inner) for inner in value] if isinstance(value, list) else value
