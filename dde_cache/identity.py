"""What is extracted, and the identity of the result: target specification, assets, provenance."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import Field

from dde_cache.errors import InputError
from dde_cache.samples import Shard
from dde_cache.spec import Dtype, Heads, Model, Provenance, Queries, TargetSpec, TeacherIdentity, Weights, hash_json
from dde_cache.store import LABELS
from dde_cache.teacher import FusionTeacher

DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ExtractConfig(Model):
    """What is extracted, and how."""

    k: int | None = Field(default=8, ge=1, description="kept keys a row; null: all")
    weights: Weights = "log8"
    layers: tuple[int, ...] | None = Field(default=None, description="0-based blocks; null: the last")
    heads: Heads = "all"
    queries: Queries = "valid"
    dtype: Dtype = "float32"
    batch_size: int = Field(default=64, ge=1, description="pairs a forward pass")
    workers: int = Field(default=0, ge=0, description="processes that read ahead; 0: none")
    device: str = "cpu"


def target_spec(teacher: FusionTeacher, config: ExtractConfig) -> TargetSpec:
    """Say what the numbers of an extraction will mean.

    Raises:
        InputError: a layer that the teacher does not have, or one asked for twice.
    """
    layers = config.layers if config.layers is not None else (teacher.layers - 1,)
    if any(not 0 <= layer < teacher.layers for layer in layers) or len(set(layers)) != len(layers):
        raise InputError(f"expected different layers from 0 to {teacher.layers - 1}, got {list(layers)}")
    processor = teacher.preprocessor.processor
    shape = teacher.config.to_dict()
    for name in ("transformers_version", "_name_or_path", "architectures", "dtype"):
        shape.pop(name, None)
    return TargetSpec(
        teacher=TeacherIdentity(
            family="vilt",
            weights=teacher.weights_hash(),
            config=hash_json(json.loads(json.dumps(shape, default=str))),
            tokenizer=hash_json(json.loads(processor.tokenizer.backend_tokenizer.to_str())),
            processor=hash_json(json.loads(processor.image_processor.to_json_string())),
        ),
        layers=tuple(sorted(layers)),
        teacher_layers=teacher.layers,
        teacher_heads=teacher.heads,
        heads=config.heads,
        queries=config.queries,
        text_length=teacher.preprocessor.text_length,
        patch_size=teacher.preprocessor.patch_size,
        k=config.k,
        weights=config.weights,
        dtype=config.dtype,
        classes=None if teacher.labels is None else len(teacher.labels),
    )


def save_assets(teacher: FusionTeacher, folder: Path) -> None:
    """Write what training needs of the teacher."""
    teacher.preprocessor.save(folder)
    teacher.config.save_pretrained(folder)
    labels = None if teacher.labels is None else list(teacher.labels)
    (folder / LABELS).write_text(json.dumps(labels, indent=1) + "\n")


def provenance_of(teacher_name: str, shards: Sequence[Shard], config: ExtractConfig) -> Provenance:
    """How the units of an extraction come to be."""
    return Provenance(
        versions={name: version(name) for name in ("dde-cache", "torch", "transformers", "zarr", "numpy", "pillow")},
        device=config.device,
        batch_size=config.batch_size,
        teacher=Path(teacher_name).name,
        shards=shards[0].path.parent.name,
    )
