"""What a student starts from: random weights, a ViLT checkpoint, or a run of ours."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import ViltConfig

from dde_cache.errors import RunError, TeacherError, bullet_list
from dde_cache.preprocess import Preprocessor
from dde_cache.student import DualEncoder, Head, new_student, student_from_vilt

MODEL = "model"
"""Folder of a run that holds its student."""

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)

_SHAPE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
    "vocab_size", "max_position_embeddings", "hidden_act", "layer_norm_eps", "qkv_bias", "num_channels",
)  # fmt: skip

_WORDS = {
    "text_tower": "text tower",
    "image_tower": "image tower",
    "fusion": "shallow interaction",
    "logit_scale": "temperature",
    "head": "classifier",
}
"""All parts of a student, in words."""


def is_run(init: str) -> bool:
    """Whether this is the folder of a run with a saved student."""
    return (Path(init) / MODEL / "config.json").is_file()


def build_student(
    tower: ViltConfig, labels: Sequence[str], dropout: float, init: str | None, head: Head
) -> DualEncoder:
    """A new student, with random towers, or those of a ViLT checkpoint or of a run.

    Args:
        tower: shape of the teacher's towers.
        labels: answers of the head.
        dropout: in the towers.
        init: checkpoint (folder, hub id) or the folder of a run; None: random weights.
        head: what is above the towers.

    Raises:
        TeacherError: `init` is no ViLT, or its towers would read other tokens or patches than the teacher.
        RunError: the run's student cannot be read, or has another architecture.
    """
    if init is None:
        return new_student(tower, labels, dropout, head)
    if is_run(init):
        return student_from_run(init, tower, labels, dropout, head)
    student = student_from_vilt(init, labels, dropout, head)
    shape = student.config.vilt()
    wrong = [
        f"{name}: expected {getattr(tower, name)}, got {getattr(shape, name)}"
        for name in ("patch_size", "vocab_size")
        if getattr(shape, name) != getattr(tower, name)
    ]
    if shape.max_position_embeddings < tower.max_position_embeddings:
        wrong.append(f"text length: expected {tower.max_position_embeddings}, got {shape.max_position_embeddings}")
    if wrong:
        raise TeacherError(f"{init}: its towers do not read what the teacher read:{bullet_list(wrong)}")
    return student


def student_from_run(run: str, tower: ViltConfig, labels: Sequence[str], dropout: float, head: Head) -> DualEncoder:
    """A student with every part that a run's student has too, but for the classifier, which is new.

    Raises:
        RunError: the run's student cannot be read, or its towers have another architecture than the teacher's.
    """
    source, _preprocessor = load_student(run)
    shape = source.config.vilt()
    wrong = [
        f"{name}: expected {getattr(tower, name)}, got {getattr(shape, name)}"
        for name in _SHAPE
        if getattr(shape, name) != getattr(tower, name)
    ]
    if wrong:
        raise RunError(f"{run}: expected towers of the teacher's architecture, got another:{bullet_list(wrong, 20)}")
    student = new_student(tower, labels, dropout, head)
    taken, _new = _parts(source, student)
    held = {name: tensor for name, tensor in source.state_dict().items() if name.partition(".")[0] in taken}
    student.load_state_dict(student.state_dict() | held)
    if head.images > source.config.images:
        # As from a ViLT checkpoint: what marks a second picture starts as what marks the first.
        with torch.no_grad():
            student.image_tower.token_type[1:] = student.image_tower.token_type[0]
    return student


def announced(run: str, head: Head) -> str:
    """What a student of a kind takes from a run, and what of it stays new, in words.

    Raises:
        RunError: the run's student cannot be read.
    """
    source, _preprocessor = load_student(run)
    taken, new = _parts(source, new_student(source.config.vilt(), ("new",), 0.0, head))
    return f"from {run}: {_listed(taken)}; new: {_listed(new)}"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(_WORDS[part] for part in parts) or "nothing"


def _parts(source: nn.Module, student: nn.Module) -> tuple[list[str], list[str]]:
    """Parts of a student that are taken, and those that stay new."""
    have, want = ({name.partition(".")[0] for name in one.state_dict()} for one in (source, student))
    wanted = [part for part in _WORDS if part in want]
    taken = [part for part in wanted if part in have and part != "head"]
    return taken, [part for part in wanted if part not in taken]


def load_student(folder: str | Path) -> tuple[DualEncoder, Preprocessor]:
    """The student of a run of `dde-cache train`, and its processor: the run's folder, or its `model` folder alone.

    Raises:
        RunError: no student is there, or its weights or processor are missing or damaged.
    """
    path = Path(folder)
    path = path / MODEL if (path / MODEL).is_dir() else path
    if not (path / "config.json").is_file():
        raise RunError(
            f"{folder}: expected a run of `dde-cache train` with a saved student in {MODEL}/, found none; name the "
            "run's folder, or go on with `dde-cache train ... --resume` where it was cut short"
        )
    try:
        kind = json.loads((path / "config.json").read_bytes()).get("model_type")
        if kind != DualEncoder.config_class.model_type:
            raise ValueError(f"expected model_type {DualEncoder.config_class.model_type}, got {kind!r:.50}")
        model, report = DualEncoder.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True)
        shape = model.config.vilt()
        preprocessor = Preprocessor.load(path, shape.patch_size, shape.max_position_embeddings)
    except (*_UNREADABLE, TeacherError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{folder}: expected a student of `dde-cache train`, but it cannot be read: {first}") from error
    lost = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lost:
        raise RunError(
            f"{folder}: expected all weights of a student, but {len(lost)} tensors are missing or of another shape, "
            f"for example {lost[0]}; copy {path} again from where it was trained"
        )
    return model, preprocessor
