"""What is written to disk beside arrays: the target specification, unit attributes and the manifest.

Three things are kept apart. The **target specification** and its fingerprint say what the numbers mean: caches must
agree in it to be used together. The **content hash** of each sample ties its targets to its pictures and texts.
**Provenance** is shown and never enforced.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION: Literal[1] = 1

Weights = Literal["log8", "float16", "float32"]
Queries = Literal["valid", "all"]
Heads = Literal["all", "mean"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Model(BaseModel):
    """Frozen, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TeacherIdentity(Model):
    """Which teacher, by content. Hashes are SHA-256 in hexadecimal."""

    family: str
    weights: str
    config: str
    tokenizer: str
    processor: str


class TargetSpec(Model):
    """What the numbers in a cache mean. Its fingerprint must match for caches to merge and for training to use them."""

    teacher: TeacherIdentity
    rule: Literal["block-softmax, cls first, row-major patches"] = "block-softmax, cls first, row-major patches"
    view: Literal["as-processed"] = "as-processed"
    layers: tuple[int, ...] = Field(min_length=1, description="0-based blocks of the teacher")
    teacher_layers: int = Field(ge=1)
    teacher_heads: int = Field(ge=1)
    heads: Heads = Field(description="every head, or their mean as one")
    queries: Queries = Field(description="valid rows, or padded text rows and one padded image row as well")
    text_length: int = Field(ge=1, description="tokens to which texts are cut (and padded, where queries is all)")
    patch_size: int = Field(ge=1, description="pixels")
    k: int | None = Field(default=None, ge=1, description="kept keys a row; null: all")
    weights: Weights
    dtype: Dtype = Field(description="in which the teacher ran; the softmax is in float32 always")
    classes: int | None = Field(description="width of the logits, or null without a task head")

    @property
    def stored_heads(self) -> int:
        """Heads of a stored map."""
        return 1 if self.heads == "mean" else self.teacher_heads

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of this specification."""
        return hash_json(self.model_dump(mode="json"))


class Provenance(Model):
    """How a unit came to be; shown, never enforced."""

    versions: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    batch_size: int | None = None
    teacher: str = ""
    shards: str = ""


class Group(Model):
    """A group of arrays in a unit. A reader refuses a required group that it does not know, and ignores the others."""

    required: bool


class UnitAttributes(Model):
    """Attributes of a unit's root group."""

    format_version: Literal[1] = FORMAT_VERSION
    fingerprint: str
    source: str = Field(description="file name of the shard that this unit was made from")
    samples: int = Field(ge=0)
    pairs: int = Field(ge=0)
    groups: dict[str, Group]
    provenance: Provenance


class UnitEntry(Model):
    """One unit in the manifest."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*\.zarr\.zip$")
    source: str
    samples: int = Field(ge=0)
    pairs: int = Field(ge=0)
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Model):
    """`manifest.json`: identity, and one row a unit. `sha256` is the hash of the rest in canonical form."""

    format_version: Literal[1] = FORMAT_VERSION
    spec: TargetSpec
    fingerprint: str
    assets: dict[str, str] = Field(description="SHA-256 of each file in assets/")
    units: tuple[UnitEntry, ...] = ()
    sha256: str = ""

    def own_hash(self) -> str:
        """SHA-256 of the canonical form of everything but `sha256`."""
        return hash_json(self.model_dump(mode="json", exclude={"sha256"}))

    def sealed(self) -> "Manifest":
        """The same manifest with its own hash."""
        return self.model_copy(update={"sha256": self.own_hash()})


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the form that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def hash_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def difference(expected: BaseModel, got: BaseModel) -> list[str]:
    """List the fields in which two models differ, as `field: expected ..., got ...`."""
    return _difference(expected.model_dump(mode="json"), got.model_dump(mode="json"), "")


def _difference(expected: Mapping[str, Any], got: Mapping[str, Any], prefix: str) -> list[str]:
    lines: list[str] = []
    for name in expected:
        before, after = expected[name], got.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _difference(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: expected {_short(before)}, got {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:14]}..."
