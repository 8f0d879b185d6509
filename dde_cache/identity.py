"""What is extracted, and the identity of the result: target specification, assets, provenance."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from dde_cache.assets import LABELS, TEACHER_CONFIG
from dde_cache.canonical import without_place
from dde_cache.drift import versions
from dde_cache.errors import InputError, bullet_list
from dde_cache.partners import EXCHANGED
from dde_cache.passes import RECIPES, PassName, Words, ordered, pass_name
from dde_cache.samples import Shard
from dde_cache.spec import (
    HIDDEN,
    HIDDEN_STATES,
    INT8,
    POOLED,
    POOLED_STATES,
    WHOLE,
    WHOLE_ROWS,
    Dtype,
    Heads,
    Model,
    Provenance,
    Queries,
    StateCodec,
    TargetSpec,
    TeacherIdentity,
    Weights,
    hash_json,
)
from dde_cache.teacher import FusionTeacher
from dde_cache.teachers.contract import ROW_MAJOR
from dde_cache.views import AS_PROCESSED, DEFAULT_RECIPE, PIXEL_HASH, parse_recipe, recipe_in_full

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


STEPS = 56
"""Steps of `sqrt8` where nothing is said; docs/benchmarks.md has what others cost and save."""

KEPT = 8
"""Most kept keys a row where weights are sparse and nothing is said."""


Target = Literal["cross", "whole", "hidden", "pooled"]


class ExtractConfig(Model):
    """What is extracted, and how."""

    targets: tuple[Target, ...] = Field(
        default=("cross",),
        description="cross: attention over the other modality; whole: over every token; hidden: hidden states",
    )

    k: int | None = Field(
        default=None, ge=1, description="most kept keys a row; null: all. Without it, 8 where weights are not sqrt8"
    )
    mass: float | None = Field(
        default=None, gt=0, le=1, description="keep only as many of the k keys as a row needs for this mass"
    )
    weights: Weights = Field(
        default="sqrt8",
        description="sqrt8: every key; the others: the strongest. Without it, log8 where k or mass is set",
    )
    steps: int | None = Field(
        default=STEPS,
        ge=1,
        le=254,
        description="levels of the square root of a weight; null where weights are not sqrt8",
    )
    states: StateCodec = Field(
        default="float16", description="codec of hidden and pooled states; int8: a scale a vector, 1/254 of its largest"
    )
    layers: tuple[int, ...] | None = Field(default=None, description="0-based blocks; null: the last")
    predictions: bool = Field(
        default=True,
        description="keep the logits of a teacher that has a head; without them nothing behind the last layer is run",
    )
    heads: Heads = "all"
    queries: Queries = "valid"
    dtype: Dtype = "float32"
    views: int = Field(default=1, ge=1, lt=2**16, description="views of each sample that the teacher sees")
    view: str = Field(
        default=AS_PROCESSED,
        description="recipe of the views; without it, randaugment-2-9 where there are several views, or none",
    )
    passes: tuple[PassName, ...] = Field(
        default=("matched",),
        description="what the teacher is shown of each view: matched, and masked text or negative pictures beside it",
    )
    batch_size: int = Field(default=64, ge=1, description="pairs a forward pass")
    workers: int = Field(default=0, ge=0, description="processes that read ahead; 0: none")
    device: str = "cpu"

    @model_validator(mode="before")
    @classmethod
    def _choose_codec(cls, values: Any) -> Any:
        """The codec follows from what is asked of it: fields that are not given depend on those that are."""
        if not isinstance(values, dict):
            return values
        view = values.get("view") or (DEFAULT_RECIPE if values.get("views", 1) != 1 else AS_PROCESSED)
        values = values | {"view": recipe_in_full(view)}
        sparse = "k" in values or values.get("mass") is not None
        weights = values.get("weights") or ("log8" if sparse else "sqrt8")
        if weights == "sqrt8":
            return {"steps": STEPS} | values | {"weights": weights}
        return {"k": KEPT, "steps": None} | values | {"weights": weights}

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if "cross" not in targets or len(set(targets)) != len(targets):
            raise ValueError(
                f"expected cross, and perhaps whole, hidden and pooled, each once, got {','.join(targets)}: the "
                "records of the others lie beside those of cross, which say what tokens they are of"
            )
        order: tuple[Target, ...] = ("cross", "whole", "hidden", "pooled")
        return tuple(name for name in order if name in targets)

    @field_validator("passes")
    @classmethod
    def _order_passes(cls, passes: tuple[PassName, ...]) -> tuple[PassName, ...]:
        return ordered(passes)

    @model_validator(mode="after")
    def _check_passes(self) -> "ExtractConfig":
        if self.layers == () and len(self.passes) > 1:
            raise ValueError("expected maps (layers) of passes beside matched: nothing else of them is kept")
        return self

    @model_validator(mode="after")
    def _check_layers(self) -> "ExtractConfig":
        if self.layers == () and len(self.targets) > 1:
            raise ValueError("expected layers with whole, hidden and pooled, whose records are of one each; got none")
        if self.states != "float16" and not {"hidden", "pooled"} & set(self.targets):
            raise ValueError("expected states int8 with hidden or pooled among the targets, got neither")
        if self.layers == () and not self.predictions:
            raise ValueError("expected layers or predictions, got neither: nothing would be kept")
        return self

    @property
    def shown(self) -> int:
        """Forward passes of the teacher for each pair."""
        return self.views * len(self.passes)

    @model_validator(mode="after")
    def _check_views(self) -> "ExtractConfig":
        if self.view == AS_PROCESSED and self.views > 1:
            raise ValueError(f"expected one view where pictures stay as processed, got {self.views} that are all alike")
        return self

    @model_validator(mode="after")
    def _check_codec(self) -> "ExtractConfig":
        if self.weights == "sqrt8" and (self.k, self.mass) != (None, None):
            raise ValueError(
                "sqrt8 weights keep every key: expected neither k nor mass; leave them out, or choose log8, float16 or "
                "float32 weights"
            )
        if self.weights == "sqrt8" and self.steps is None:
            raise ValueError("expected steps with sqrt8 weights, got null")
        if self.weights != "sqrt8" and self.steps is not None:
            raise ValueError(f"expected steps with sqrt8 weights alone, got {self.weights} weights")
        return self


def config_of(spec: TargetSpec, device: str = "cpu", batch_size: int = 64) -> ExtractConfig:
    """The settings that extract the targets of a specification again.

    Raises:
        InputError: its views or passes are of a recipe that this version does not know.
    """
    parse_recipe(spec.view)
    passes = tuple(pass_name(recipe) for recipe in spec.passes)
    shared = {
        name: getattr(spec, name)
        for name in ("k", "mass", "weights", "steps", "layers", "heads", "queries", "dtype", "views", "view")
    }
    further = {"whole": spec.has_whole, **{one.group: True for one in spec.states}}
    targets = ["cross", *(name for name, there in further.items() if there)]
    shared["states"] = spec.states[0].codec if spec.states else "float16"
    kept = spec.classes is not None or not spec.layers
    return ExtractConfig(
        **shared, predictions=kept, targets=targets, passes=passes, device=device, batch_size=batch_size
    )


def target_spec(teacher: FusionTeacher, config: ExtractConfig) -> TargetSpec:
    """Say what the numbers of an extraction will mean.

    Raises:
        InputError: a layer or another target that the teacher does not have, or a layer asked for twice; it reads no
            pictures; or words cannot be masked.
    """
    _check_family(teacher, config)
    layers = config.layers if config.layers is not None else (teacher.layers - 1,)
    if any(not 0 <= layer < teacher.layers for layer in layers) or len(set(layers)) != len(layers):
        raise InputError(f"expected different layers from 0 to {teacher.layers - 1}, got {list(layers)}")
    processor = teacher.preprocessor.processor
    if "masked" in config.passes:
        Words.of(processor.tokenizer)
    return TargetSpec(
        teacher=TeacherIdentity(
            family=teacher.family.name,
            weights=teacher.weights_hash(),
            config=hash_json(_configuration(teacher)),
            tokenizer=hash_json(teacher.preprocessor.tokenizer_json()),
            processor=hash_json(json.loads(processor.image_processor.to_json_string())),
        ),
        rule=ROW_MAJOR,
        directions=teacher.directions,
        view=config.view,
        views=config.views,
        passes=tuple(RECIPES[name] for name in config.passes),
        images=teacher.images,
        layers=tuple(sorted(layers)),
        teacher_layers=teacher.layers,
        teacher_heads=teacher.heads,
        heads=config.heads,
        queries=config.queries,
        text_length=teacher.preprocessor.text_length,
        patch_size=teacher.preprocessor.patch_size,
        k=config.k,
        mass=config.mass,
        weights=config.weights,
        steps=config.steps,
        dtype=config.dtype,
        classes=len(teacher.labels) if config.predictions and teacher.labels is not None else None,
        groups=_groups(teacher, config),
    )


def _check_family(teacher: FusionTeacher, config: ExtractConfig) -> None:
    """Refuse what no teacher of this family can give.

    Raises:
        InputError: it reads no pictures, or lacks something that is asked for; all of it is listed.
    """
    family = teacher.family
    if family.rule != ROW_MAJOR:
        raise InputError(
            f"expected a teacher that reads pictures, which shards hold; {family.name} reads features of regions that "
            "a detector found. Ask it from Python, with a RegionBatch; see docs/how-to/write-a-teacher-adapter.md"
        )
    lacking = teacher.lacks(
        padded_queries=config.queries == "all",
        whole="whole" in config.targets,
        hidden=bool({"hidden", "pooled"} & set(config.targets)),
    )
    if lacking:
        raise InputError(f"a teacher of family {family.name} does not have this:{bullet_list(lacking)}")


def _groups(teacher: FusionTeacher, config: ExtractConfig) -> dict[str, dict[str, Any]]:
    """Parameters of the further groups."""
    groups: dict[str, dict[str, Any]] = {}
    if config.view != AS_PROCESSED:
        groups["views"] = {"hash": PIXEL_HASH}
    if "negative" in config.passes:
        groups["partners"] = dict(EXCHANGED)
    if "whole" in config.targets:
        groups[WHOLE] = dict(WHOLE_ROWS)
    codec = {"codec": INT8} if config.states == "int8" else {}
    for group, what in ((HIDDEN, HIDDEN_STATES), (POOLED, POOLED_STATES)):
        if group in config.targets:
            groups[group] = {"states": what, "width": teacher.width} | codec
    return groups


def _configuration(teacher: FusionTeacher) -> dict[str, Any]:
    """A teacher's configuration without what depends on the library's version or on where the teacher lay."""
    return without_place(json.loads(json.dumps(teacher.config.to_dict(), default=str)))


def save_assets(teacher: FusionTeacher, folder: Path) -> None:
    """Write what training needs of the teacher."""
    teacher.preprocessor.save(folder)
    (folder / TEACHER_CONFIG).write_text(json.dumps(_configuration(teacher), indent=1, sort_keys=True) + "\n")
    labels = None if teacher.labels is None else list(teacher.labels)
    (folder / LABELS).write_text(json.dumps(labels, indent=1) + "\n")


def provenance_of(teacher_name: str, shards: Sequence[Shard], config: ExtractConfig) -> Provenance:
    """How the units of an extraction come to be."""
    return Provenance(
        versions=versions(),
        device=config.device,
        batch_size=config.batch_size,
        teacher=Path(teacher_name).name,
        shards=shards[0].path.parent.name,
    )
