"""What training reads of the teacher in `assets/`: files of a stranger, so nothing is believed."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dde_cache.errors import CacheError, bullet_list, first_line
from dde_cache.files import hash_file
from dde_cache.preprocess import Preprocessor
from dde_cache.spec import MAX_JSON, Manifest, TargetSpec, parse_json
from dde_cache.teachers import FAMILIES, Family

ASSETS = "assets"
LABELS = "labels.json"
TEACHER_CONFIG = "config.json"

MAX_SIDE = 2**12
"""Pixels to which a cache's processor may resize the shorter side of a picture."""

_LARGEST = {
    "hidden_size": 2**15,
    "intermediate_size": 2**18,
    "image_size": 2**15,
    "vocab_size": 2**22,
    "num_labels": 2**24,
    "type_vocab_size": 2**10,
    "modality_type_vocab_size": 2**10,
    "num_channels": 2**10,
}
"""Numbers of a teacher's configuration that make tensors of a student."""


def is_plain_file(path: Path) -> bool:
    """Whether a file can be read to its end: no pipe, no device, no folder."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def asset_problems(folder: Path, manifest: Manifest) -> list[str]:
    """List the files of `assets/` that are missing, changed, too large, or not in the manifest."""
    wrong = []
    for name, digest in manifest.assets.items():
        path = folder / ASSETS / name
        if not is_plain_file(path):
            wrong.append(f"{name}: missing")
        elif path.stat().st_size > MAX_JSON:
            wrong.append(f"{name}: {path.stat().st_size:,} bytes, at most {MAX_JSON:,} are read")
        elif hash_file(path) != digest:
            wrong.append(f"{name}: changed since the cache was made")
    there = sorted(path.name for path in (folder / ASSETS).iterdir()) if (folder / ASSETS).is_dir() else []
    return wrong + [
        f"{name!r:.120}: not in the manifest"
        for name in there
        if name not in manifest.assets and not (name.startswith(".") and name.endswith(".partial"))
    ]


def read_labels(assets: Path, spec: TargetSpec) -> tuple[str, ...] | None:
    """The teacher's answers in logit order, or None without a task head.

    Raises:
        CacheError: they are no list of names as long as the logits are wide.
    """
    names = _parse(assets / LABELS)
    if names is None and spec.classes is None:
        return None
    # Where predictions were left out, the answers are still those of the teacher.
    classes = len(names) if spec.classes is None and isinstance(names, list) else spec.classes
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != classes:
        expected = "null or a list of names" if spec.classes is None else f"a list of {spec.classes} names"
        raise CacheError(f"{assets / LABELS}: expected {expected}, got something else; it was not made by dde-cache")
    if any(ord(letter) < 32 or ord(letter) == 127 for name in names for letter in name):
        raise CacheError(f"{assets / LABELS}: expected names without control characters, got others")
    return tuple(names)


def read_config(assets: Path, spec: TargetSpec) -> Mapping[str, Any]:
    """The teacher's configuration.

    Raises:
        CacheError: it is no configuration of the specification's teacher, or asks for a giant model.
    """
    path = assets / TEACHER_CONFIG
    config = _parse(path)
    if not isinstance(config, dict):
        raise CacheError(f"{path}: expected a teacher's configuration, got something else")
    wrong = _unlike(config, spec) + _too_large(config)
    if wrong:
        raise CacheError(f"{path}: not the teacher of this cache:{bullet_list(wrong)}")
    return config


def family_of(spec: TargetSpec) -> type[Family]:
    """The family of a specification's teacher.

    Raises:
        CacheError: this version does not know it.
    """
    if spec.teacher.family not in FAMILIES:
        raise CacheError(
            f"expected a teacher of a family that this version knows ({', '.join(FAMILIES)}), got "
            f"{spec.teacher.family}; its targets can be read, but no student of its shape can be made"
        )
    return FAMILIES[spec.teacher.family]


def _unlike(config: Mapping[str, Any], spec: TargetSpec) -> list[str]:
    """Where a configuration says something else than the specification."""
    given = tuple(name for name in family_of(spec).directions if name in spec.directions)
    if spec.layers and given != spec.directions:
        return [f"directions: a {spec.teacher.family} gives {', '.join(family_of(spec).directions)} alone, got "
                f"{', '.join(spec.directions)}"]  # fmt: skip
    if spec.teacher.family == "vilt":
        equal = {
            "num_hidden_layers": spec.teacher_layers,
            "num_attention_heads": spec.teacher_heads,
            "patch_size": spec.patch_size,
            "max_position_embeddings": spec.text_length,
        }
        return [
            f"{name}: expected {expected}, got {config[name]!r:.50}"
            for name, expected in equal.items()
            if name in config and (type(config[name]) is not int or config[name] != expected)
        ]
    try:
        shape = family_of(spec).shape(config)
    except (KeyError, TypeError) as error:
        return [f"no configuration of a {spec.teacher.family}: {error!s:.100}"]
    expected = (spec.teacher_layers, spec.teacher_heads, spec.patch_size, spec.text_length)
    got = (shape.layers, shape.heads, shape.patch_size, shape.text_length)
    names = ("layers", "heads", "patch size", "text length")
    return [f"{name}: expected {e}, got {g}" for name, e, g in zip(names, expected, got, strict=True) if e != g]


def _too_large(config: Mapping[str, Any]) -> list[str]:
    """Numbers of a configuration, and of those inside it, that would make giant tensors."""
    wrong = [
        f"{name}: expected a number up to {largest}, got {config[name]!r:.50}"
        for name, largest in _LARGEST.items()
        if name in config and (type(config[name]) is not int or not 0 < config[name] <= largest)
    ]
    return wrong + [
        f"{name}.{line}" for name, part in config.items() if isinstance(part, dict) for line in _too_large(part)
    ]


def load_preprocessor(assets: Path, spec: TargetSpec) -> Preprocessor:
    """The teacher's processor and tokenizer.

    Raises:
        CacheError: they cannot be loaded.
    """
    try:
        kind = family_of(spec).processor
        preprocessor = Preprocessor.load(assets, spec.patch_size, spec.text_length, kind=kind)
        images = preprocessor.processor.image_processor
        sides = {"size_divisor": getattr(images, "size_divisor", None), **dict(images.size or {})}
        sides |= {f"crop_size {name}": side for name, side in dict(getattr(images, "crop_size", None) or {}).items()}
        giant = [f"{name} of {side!r:.50} px" for name, side in sides.items() if not _side(side)]
        if giant:
            raise ValueError(f"expected pictures of at most {MAX_SIDE} px, got {', '.join(giant)}")
        return preprocessor
    except Exception as error:
        # Libraries say in exceptions of every class that they do not understand a stranger's file.
        raise CacheError(
            f"{assets}: the teacher's processor and tokenizer cannot be loaded: {first_line(error)}; see `dde-cache "
            "verify`"
        ) from error


def _side(pixels: Any) -> bool:
    return pixels is None or (type(pixels) is int and 0 < pixels <= MAX_SIDE)


def _parse(path: Path) -> Any:
    try:
        if not is_plain_file(path) or path.stat().st_size > MAX_JSON:
            raise ValueError(f"expected a plain file of at most {MAX_JSON:,} bytes")
        return parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CacheError(f"{path}: cannot be read: {error}; see `dde-cache verify`") from error
