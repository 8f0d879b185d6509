"""What a student starts from: random weights, a ViLT checkpoint, encoders of Hugging Face, or a run of ours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import ViltConfig

from dde_cache.errors import InputError, RunError, TeacherError, bullet_list, first_line
from dde_cache.preprocess import Preprocessor
from dde_cache.student import DualEncoder, Head, new_student, student_from_vilt
from dde_cache.tokens import same_tokens, with_tokenizer
from dde_cache.towers.hugging_face import ImageShape, TextShape, positions, with_dropout
from dde_cache.towers.pixels import Scale
from dde_cache.towers.read import read_image_tower, read_text_tower
from dde_cache.towers.twins import ImageTower

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


@dataclass(frozen=True)
class Begun:
    """A student before its first step, and the processor that it will be used with: the run's pictures, and texts in
    the tokens of its own text tower."""

    student: DualEncoder
    preprocessor: Preprocessor


def begin_student(
    tower: ViltConfig,
    labels: Sequence[str],
    dropout: float,
    init: str | None,
    head: Head,
    preprocessor: Preprocessor,
    *,
    text_tower: str | None = None,
    image_tower: str | None = None,
) -> Begun:
    """A new student with the towers that are asked for.

    Args:
        tower, labels, dropout, init, head: as for `build_student`; the head and a twin start from `init`.
        preprocessor: of the run.
        text_tower, image_tower: encoders of Hugging Face (folder or hub id) with their weights; None: twins, or what
            the run of `init` has.

    Raises:
        TeacherError, RunError: as `build_student`; or an encoder cannot be used.
        InputError: `init` has nothing for the towers that are asked for; or the text tower is too short.
    """
    named = [name for name in (text_tower, image_tower) if name is not None]
    if init is not None and named and (len(named) == 2 or is_run(init)):
        raise InputError(
            "expected --init for twins of ViLT's shape, or a run with the towers that it has; got towers of "
            f"{' and '.join(named)} beside --init {init}; leave one of them out"
        )
    if init is not None and is_run(init):
        return _begin_from_run(init, tower, labels, dropout, head, preprocessor)
    text = None if text_tower is None else read_text_tower(text_tower, dropout)
    images = preprocessor.processor.image_processor
    image = None if image_tower is None else read_image_tower(image_tower, images, dropout)
    reads, shapes = preprocessor, dict[str, Any]()
    if text is not None:
        own = with_tokenizer(preprocessor, text.tokenizer, text.shape.length)
        reads, shapes["text"] = _settle_text(preprocessor, own, text.shape, text.shape.length)
    if image is not None:
        shapes["image"] = image.shape
    student = build_student(tower, labels, dropout, init, head, **shapes)
    if text is not None:
        student.text_tower.model.load_state_dict(text.weights)
    if image is not None:
        student.image_tower.model.load_state_dict(image.weights)
    return Begun(student, reads)


def _begin_from_run(
    run: str, tower: ViltConfig, labels: Sequence[str], dropout: float, head: Head, preprocessor: Preprocessor
) -> Begun:
    source, held = load_student(run)
    reads, shapes = preprocessor, dict[str, Any]()
    if source.config.text is not None:
        words = TextShape.model_validate(
            source.config.text | {"model": with_dropout(source.config.text["model"], dropout)}
        )
        reads, shapes["text"] = _settle_text(preprocessor, held, words, positions(source.text_tower.model))
    if source.config.image is not None:
        found = source.config.image
        scale = Scale.of(preprocessor.processor.image_processor)
        shape = found | {"model": with_dropout(found["model"], dropout), "reads": scale}
        shapes["image"] = ImageShape.model_validate(shape)
    return Begun(student_from_run(run, tower, labels, dropout, head, **shapes), reads)


def _settle_text(run: Preprocessor, own: Preprocessor, shape: TextShape, most: int) -> tuple[Preprocessor, TextShape]:
    """The processor of a student with a text tower: the run's where its tokens are the same, else the tower's own.

    Raises:
        InputError: the tokens are the same, but the teacher reads longer texts.
    """
    if not same_tokens(run, own):
        return own, shape.model_copy(update={"length": own.text_length})
    if most < run.text_length:
        raise InputError(
            f"the text tower reads {most} tokens, the teacher's texts have up to {run.text_length}; extract with a "
            "teacher of shorter texts, or take a longer text tower"
        )
    return run, shape.model_copy(update={"length": run.text_length})


def build_student(
    tower: ViltConfig, labels: Sequence[str], dropout: float, init: str | None, head: Head, **towers: Any
) -> DualEncoder:
    """A new student, with random towers, or those of a ViLT checkpoint or of a run.

    Args:
        tower: shape of the teacher's towers.
        labels: answers of the head.
        dropout: in the towers.
        init: checkpoint (folder, hub id) or the folder of a run; None: random weights.
        head: what is above the towers.
        towers: `text` and `image`, shapes of encoders of Hugging Face in place of twins.

    Raises:
        TeacherError: `init` is no ViLT, or its towers would read other tokens or patches than the teacher.
        RunError: the run's student cannot be read, or has another architecture.
    """
    if init is None:
        return new_student(tower, labels, dropout, head, **towers)
    if is_run(init):
        return student_from_run(init, tower, labels, dropout, head, **towers)
    student = student_from_vilt(init, labels, dropout, head, **towers)
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


def student_from_run(
    run: str, tower: ViltConfig, labels: Sequence[str], dropout: float, head: Head, **towers: Any
) -> DualEncoder:
    """A student with every part that a run's student has too, but for the classifier, which is new; `towers` as for
    `build_student`.

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
    student = new_student(tower, labels, dropout, head, **towers)
    taken, _new = _parts(source, student)
    held = {name: tensor for name, tensor in source.state_dict().items() if name.partition(".")[0] in taken}
    student.load_state_dict(student.state_dict() | held)
    if head.images > source.config.images and isinstance(student.image_tower, ImageTower):
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
    shapes: dict[str, Any] = {"text": TextShape, "image": ImageShape}
    towers: dict[str, Any] = {
        name: shape.model_validate(getattr(source.config, name))
        for name, shape in shapes.items()
        if getattr(source.config, name) is not None
    }
    taken, new = _parts(source, new_student(source.config.vilt(), ("new",), 0.0, head, **towers))
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
        preprocessor = Preprocessor.load(path, model.config.vilt().patch_size, model.config.text_length)
    except (*_UNREADABLE, TeacherError) as error:
        raise RunError(
            f"{folder}: expected a student of `dde-cache train`, but it cannot be read: {first_line(error)}"
        ) from error
    lost = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lost:
        raise RunError(
            f"{folder}: expected all weights of a student, but {len(lost)} tensors are missing or of another shape, "
            f"for example {lost[0]}; copy {path} again from where it was trained"
        )
    return model, preprocessor
