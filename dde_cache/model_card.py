"""The card of a saved student: what it is, what it was trained on, and how to load it without our programs."""

from collections.abc import Sequence
from pathlib import Path

from dde_cache import __version__
from dde_cache.canonical import hash_json
from dde_cache.distill import TrainConfig
from dde_cache.samples import Shard
from dde_cache.sources import OnlineTargets, Targets, caches_of
from dde_cache.student import DualEncoder

CARD = "README.md"

LOADING = """import dde_cache.student
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
"""
"""Lines that load a student as any other model of Hugging Face."""


def student_card(
    student: DualEncoder,
    targets: Targets,
    config: TrainConfig,
    shards: Sequence[Shard],
    valid: Sequence[Shard],
    init: str | None,
    notes: Sequence[str],
) -> str:
    """The README.md of a saved student, in Markdown.

    Args:
        student: with its towers.
        targets: where the teacher's signals came from.
        config: losses and fit.
        shards, valid, init: as for `train`; of folders their last names alone are written.
        notes: how its tokens and heads stood to the teacher's.
    """
    rows = {
        "task": f"{student.config.task}, {student.config.images} image{'s' * (student.config.images > 1)} a sample",
        "text tower": _tower(student, "text", config.text_tower),
        "image tower": _tower(student, "image", config.image_tower),
        "started from": "encoders with their weights, twins at random" if init is None else _quoted(init),
        "training data": _listed(shards),
        "validation data": _listed(valid) if valid else "none: the last step is kept",
        **_taught(targets),
        "made with": f"dde-cache {__version__}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    listed = "\n".join(f"- {note}" for note in notes) or "Token by token and head by head, as they are."
    return f"""---
tags: [dde-cache, dual-encoder, cross-modal-attention, distillation]
---
# Dual encoder, distilled from a fusion encoder

Text and picture are encoded apart, so either side can be encoded once and stored.

| | |
|---|---|
{table}

How its attention was compared with the teacher's:

{listed}

Load it without any program of dde-cache (the package alone):

```python
{LOADING.replace("FOLDER", '"THIS_FOLDER"')}```

or with tokens, pixels and answers at hand: `dde_cache.inference.Student.from_pretrained("THIS_FOLDER")`.
"""


def _taught(targets: Targets) -> dict[str, str]:
    caches = [one.cache for one in caches_of(targets)]
    if caches:
        teachers = [f"{one.spec.teacher.family}, weights {one.spec.teacher.weights[:16]}" for one in caches]
        return {
            "teacher": "; ".join(teachers),
            "targets": "; ".join(
                f"cache `{one.manifest.fingerprint}`, manifest {one.manifest.sha256[:16]}" for one in caches
            ),
        }
    if isinstance(targets, OnlineTargets):
        return {
            "teacher": f"run at every step, weights {targets.teacher.weights_hash()[:16]}",
            "targets": "none stored",
        }
    return {"teacher": "none", "targets": "labels alone"}


def _tower(student: DualEncoder, side: str, name: str | None) -> str:
    tower = student.text_tower if side == "text" else student.image_tower
    shape = getattr(student.config, side)
    kind = "twin of ViLT's shape" if shape is None else f"{shape['model']['model_type']}"
    origin = "" if name is None else f" of {_quoted(name)}"
    return f"{kind}{origin}: {tower.depth} blocks, {tower.heads} heads, width {tower.width}"


def _listed(shards: Sequence[Shard]) -> str:
    names = sorted(shard.name for shard in shards)
    named = _quoted(names[0]) + (f" to {_quoted(names[-1])}" if len(names) > 1 else "")
    members = sorted((shard.name, shard.members_hash()) for shard in shards)
    samples = sum(len(shard) for shard in shards)
    return f"{named} ({samples:,} samples; SHA-256 of their files' names and sizes {hash_json(members)[:16]})"


def _quoted(text: str) -> str:
    # A hub id as it is; of a folder nobody else needs to know where it lay.
    name = Path(text).name if Path(text).is_dir() else text
    return "`" + name.replace("`", "'").replace("|", "/").replace("\n", " ") + "`"
