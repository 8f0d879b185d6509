"""What is written to disk beside arrays: the target specification, unit attributes and the manifest.

Three things are kept apart. The **target specification** and its fingerprint say what the numbers mean: caches must
agree in it to be used together. The **content hash** of each sample ties its targets to its pictures and texts.
**Provenance** is shown and never enforced.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dde_cache.canonical import MAX_JSON as MAX_JSON
from dde_cache.canonical import canonical_json as canonical_json
from dde_cache.canonical import hash_json as hash_json
from dde_cache.canonical import hash_keys as hash_keys
from dde_cache.canonical import indented_json as indented_json
from dde_cache.canonical import parse_json as parse_json

FORMAT_VERSION: Literal[1] = 1

Weights = Literal["sqrt8", "log8", "float16", "float32"]
Queries = Literal["valid", "all"]
Heads = Literal["all", "mean"]
Dtype = Literal["float32", "bfloat16", "float16"]
Direction = Literal["t2i", "i2t"]
Rows = Literal["t2i", "i2t", "t2w", "i2w"]
"""Which query rows over which keys: those of a direction, or text and image queries over the whole sequence."""

WHOLE = "whole"
WHOLE_ROWS: dict[str, Any] = {"keys": "valid text then valid image v1"}
"""What `spec.groups["whole"]` says."""

HIDDEN = "hidden"
HIDDEN_STATES = "block output v1"
"""What `spec.groups["hidden"]["states"]` says; `width` stands beside it."""

POOLED = "pooled"
POOLED_STATES = "mean of valid tokens v1"
"""What `spec.groups["pooled"]["states"]` says; `width` stands beside it."""

INT8 = "int8 v1"
"""What `codec` says beside them; without it vectors are float16."""

StateCodec = Literal["float16", "int8"]

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Line = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Text that is shown on terminals: no control characters."""

AssetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,98}\.(json|txt|jinja)$")]
"""Plain names of text files: no folders, nothing that a library would load as code or pickle."""

TOLERANCE: dict[Dtype, float] = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""How far an attention weight may lie from the one that the same teacher gives again, on another device or in other
batches, beside the codec's error; logits: so many times their largest magnitude."""

HASH_BYTES = 8
"""Of the hash of a view's pixels."""


class Model(BaseModel):
    """Frozen, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class States(NamedTuple):
    """A group of vectors of the teacher's blocks: its name, their width and codec."""

    group: str
    width: int
    codec: StateCodec

    @property
    def per_token(self) -> bool:
        """Whether there is a vector for each token."""
        return self.group == HIDDEN

    @property
    def arrays(self) -> dict[str, str]:
        """The arrays of text and picture by name, with their types; `int8` has a scale for each vector."""
        sides = [f"{self.group}/{side}" for side in ("text", "image")]
        if self.codec == "float16":
            return dict.fromkeys(sides, "float16")
        return {name: dtype for side in sides for name, dtype in ((side, "int8"), (f"{side}_scale", "float32"))}


class TeacherIdentity(Model):
    """Which teacher, by content. Hashes are SHA-256 in hexadecimal."""

    family: Line
    weights: str
    config: str
    tokenizer: str
    processor: str


class TargetSpec(Model):
    """What the numbers in a cache mean. Its fingerprint must match for caches to merge and for training to use them.

    No field has a default: what a file leaves out is not known, and is refused.
    """

    teacher: TeacherIdentity
    rule: Literal["block-softmax, cls first, row-major patches"] = Field(
        description="how a row comes about, and what the image axis is; others are for later teachers"
    )
    directions: tuple[Direction, ...] = Field(
        min_length=1, description="which maps the teacher has: text queries over image keys, the reverse, or both"
    )
    view: Line = Field(min_length=1, description="recipe of the views, with its version; as-processed: none")
    views: int = Field(ge=1, lt=2**16, description="views of each sample, numbered from 0")
    passes: tuple[Line, ...] = Field(
        min_length=1,
        max_length=2**8,
        description="recipe of each pass, by number; matched: text and picture as the shard pairs them",
    )
    images: int = Field(ge=1, le=2, description="images that the teacher reads for one logit vector")
    layers: tuple[int, ...] = Field(description="0-based blocks of the teacher; empty: no maps")
    teacher_layers: int = Field(ge=1, le=2**12)
    teacher_heads: int = Field(ge=1, le=2**12)
    heads: Heads = Field(description="every head, or their mean as one")
    queries: Queries = Field(description="valid rows, or padded text rows and one padded image row as well")
    text_length: int = Field(
        ge=1, lt=2**16, description="tokens to which texts are cut (and padded, where queries is all)"
    )
    patch_size: int = Field(ge=1, lt=2**16, description="pixels")
    k: int | None = Field(ge=1, description="most kept keys a row; null: all")
    mass: float | None = Field(
        gt=0,
        le=1,
        description="a row keeps no more of the k keys than it needs for this mass; null: all k",
    )
    weights: Weights = Field(description="sqrt8: every key; the others: the strongest keys and the mass of the rest")
    steps: int | None = Field(
        ge=1, le=254, description="of sqrt8: levels of the square root of a weight; null for the others"
    )
    dtype: Dtype = Field(description="in which the teacher ran; the softmax is in float32 always")
    classes: int | None = Field(ge=1, le=2**24, description="width of the logits, or null without predictions")
    groups: dict[Line, dict[str, Any]] = Field(description="what further groups of the units mean: name -> parameters")

    @model_validator(mode="after")
    def _check_codec(self) -> "TargetSpec":
        if (self.weights == "sqrt8") != (self.steps is not None):
            raise ValueError("expected steps together with sqrt8 weights, and with no others")
        if self.weights == "sqrt8" and (self.k, self.mass) != (None, None):
            raise ValueError("expected neither k nor mass with sqrt8 weights, which keep every key")
        return self

    @model_validator(mode="after")
    def _check_directions(self) -> "TargetSpec":
        if self.directions not in (("t2i", "i2t"), ("t2i",), ("i2t",)):
            raise ValueError("expected directions t2i, i2t, or both in this order")
        return self

    @property
    def stored_heads(self) -> int:
        """Heads of a stored map."""
        return 1 if self.heads == "mean" else self.teacher_heads

    @property
    def has_whole(self) -> bool:
        """Whether there are rows over the whole sequence, in the form that this version knows."""
        return bool(self.layers) and self.groups.get(WHOLE) == WHOLE_ROWS

    @property
    def hidden_width(self) -> int | None:
        """Width of the hidden states; None where there are none, or in a form that this version does not know."""
        return next((one.width for one in self.states if one.group == HIDDEN), None)

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled states; None as for hidden ones."""
        return next((one.width for one in self.states if one.group == POOLED), None)

    @property
    def states(self) -> tuple[States, ...]:
        """Groups of vectors that are kept in a form that this version knows."""
        found = []
        for group, what in ((HIDDEN, HIDDEN_STATES), (POOLED, POOLED_STATES)):
            said = self.groups.get(group, {})
            width, codec = said.get("width"), said.get("codec")
            form = {"states": what, "width": width} | ({} if codec is None else {"codec": INT8})
            if self.layers and said == form and type(width) is int and 0 < width < 2**20:
                found.append(States(group, width, "float16" if codec is None else "int8"))
        return tuple(found)

    @property
    def rows(self) -> tuple[Rows, ...]:
        """The kinds of attention rows that are kept: the directions, and their queries over the whole sequence."""
        whole: dict[Direction, Rows] = {"t2i": "t2w", "i2t": "i2w"}
        return (*self.directions, *(whole[direction] for direction in self.directions if self.has_whole))

    @property
    def kept(self) -> str:
        """Which keys of a row are kept, in words."""
        if self.mass is None:
            return "every key" if self.k is None else f"the {self.k} strongest keys"
        return f"the keys of {self.mass:.4g} of the mass" + (f", at most {self.k}" if self.k is not None else "")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of this specification."""
        return hash_json(self.model_dump(mode="json"))


class Provenance(Model):
    """How a unit came to be; shown, never enforced."""

    versions: dict[Line, Line] = Field(default_factory=dict)
    device: Line = ""
    batch_size: int | None = None
    teacher: Line = ""
    shards: Line = ""


class Group(Model):
    """A group of arrays in a unit. A reader refuses a required group that it does not know, and ignores the others."""

    required: bool


class UnitEntry(Model):
    """One unit in the manifest."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,199}\.zarr\.zip$")
    source: Line
    samples: int = Field(ge=0)
    pairs: int = Field(ge=0)
    keys: Sha256 = Field(description="of the sample keys: see `hash_keys`")
    size: int = Field(ge=0, description="bytes")
    sha256: Sha256


class UnitAttributes(Model):
    """Attributes of a unit's root group."""

    format_version: Literal[1]
    spec: TargetSpec = Field(description="what the numbers mean; the manifest can be made again from it")
    fingerprint: Sha256
    assets: dict[AssetName, Sha256] = Field(description="SHA-256 of each file in assets/ when the unit was written")
    source: Line = Field(description="file name of the shard that this unit was made from")
    samples: int = Field(ge=0)
    pairs: int = Field(ge=0)
    keys: Sha256 = Field(description="of the sample keys: see `hash_keys`")
    groups: dict[str, Group]
    provenance: Provenance

    def entry(self, name: str, size: int, sha256: str) -> UnitEntry:
        """The row of this unit in a manifest, from its file's name, bytes and hash."""
        counted = {field: getattr(self, field) for field in ("source", "samples", "pairs", "keys")}
        return UnitEntry(name=name, **counted, size=size, sha256=sha256)


class Manifest(Model):
    """`manifest.json`: identity, and one row a unit. `sha256` is the hash of the rest in canonical form."""

    format_version: Literal[1]
    spec: TargetSpec
    fingerprint: Sha256
    assets: dict[AssetName, Sha256] = Field(description="SHA-256 of each file in assets/")
    card: Sha256 | None = Field(default=None, description="SHA-256 of README.md; null before the card is written")
    units: tuple[UnitEntry, ...] = ()
    sha256: str = ""

    @model_validator(mode="after")
    def _each_unit_once(self) -> "Manifest":
        if len({entry.name for entry in self.units}) != len(self.units):
            raise ValueError("expected each unit once")
        return self

    def own_hash(self) -> str:
        """SHA-256 of the canonical form of everything but `sha256`."""
        return hash_json(self.model_dump(mode="json", exclude={"sha256"}))

    def sealed(self) -> "Manifest":
        """The same manifest with its own hash."""
        return self.model_copy(update={"sha256": self.own_hash()})


def difference(expected: BaseModel, got: BaseModel) -> list[str]:
    """List the fields in which two models differ, as `field: expected ..., got ...`."""
    return _difference(expected.model_dump(mode="json"), got.model_dump(mode="json"), "")


def _difference(expected: Mapping[str, Any], got: Mapping[str, Any], prefix: str) -> list[str]:
    lines: list[str] = []
    for name in {**expected, **got}:
        before, after = expected.get(name), got.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += _difference(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name}: expected {_short(before)}, got {_short(after)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:14]}..."
