"""Recipe: a student as ONNX files, the two towers and the head apart, each checked against torch.

    OUT/text_tower.onnx    input_ids, attention_mask [batch, tokens] int64 -> vector [batch, width]
    OUT/image_tower.onnx   pixel_values [batch, 3, height, width] float32 -> vector; of students of two pictures whose
                           tower is a twin also image_slot [1] int64 (0 or 1)
    OUT/head.onnx          text, image (and second) vectors [pairs, width] -> logits [pairs, answers]; of students of
                           retrieval: text [texts, width], image [images, width] -> cosine [texts, images]
    OUT/export.json        what the files are, and how far they were from torch
    OUT/*.json             tokenizer and image processor

Batch, tokens (up to the text length) and patch grid are free. All pictures of one batch have one size, a multiple of
the patch: the graph knows no padding, so pictures of different sizes go in different batches.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from dde_cache.drift import versions
from dde_cache.errors import InputError, RunError
from dde_cache.files import hash_file, replaced_folder
from dde_cache.graphs import AnswerHead, CosineHead, ImageSide, TextSide, WholeImageSide
from dde_cache.inference import Student
from dde_cache.spec import Line, Model, Sha256
from dde_cache.staging import check_free
from dde_cache.store import write_text
from dde_cache.towers.twins import ImageTower

RECORD = "export.json"
TOLERANCE = 1e-4
"""Largest difference from torch, of any output of any check."""


class ExportedFile(Model):
    """One ONNX file: its inputs and outputs with their axes (numbers are fixed, names are free), and its bytes."""

    inputs: dict[Line, tuple[int | Line, ...]]
    output: Line
    size: int
    sha256: Sha256
    largest_difference: float


class ExportRecord(Model):
    """`export.json`: what was exported from which student."""

    format: Line
    student: Sha256
    task: Line
    answers: tuple[str, ...]
    images: int
    width: int
    text_length: int
    patch_size: int
    opset: int
    files: dict[Line, ExportedFile]
    versions: dict[Line, Line]


@dataclass(frozen=True)
class Part:
    """One file to be: its module, inputs of several shapes (the first are traced), free axes, and what torch gives."""

    module: nn.Module
    output: str
    inputs: Sequence[Mapping[str, Tensor]]
    axes: Mapping[str, Mapping[int, Any]]
    expected: Callable[..., Tensor]


def export(
    student: Student, out: Path, *, tolerance: float = TOLERANCE, advance: Callable[[str], None] = lambda name: None
) -> ExportRecord:
    """Write a student as ONNX files into a new folder, whole or not at all.

    Args:
        student: on the CPU.
        out: new or empty.
        tolerance: largest difference from torch that is let pass.
        advance: called with the name of each file before it is made.

    Raises:
        InputError: `out` is taken, or the packages of the extra `onnx` are not installed.
        RunError: a file computes something else than torch; nothing is written then.
    """
    check_free(out)
    runtime = onnx_runtime()
    student.model.to("cpu")
    with replaced_folder(out) as staged:
        files = {}
        for name, part in parts_of(student).items():
            advance(name)
            files[f"{name}.onnx"], opset = write_part(part, staged / f"{name}.onnx", runtime, tolerance)
        student.preprocessor.save(staged)
        record = _record(student, files, opset, runtime)
        write_text(staged / RECORD, record.model_dump_json(indent=2) + "\n")
    return record


def onnx_runtime() -> Any:
    """The module that runs ONNX files.

    Raises:
        InputError: it is not installed, or what writes them is not.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"export to ONNX needs packages that are not installed ({error.name}); pip install 'dde-cache[onnx]'"
        ) from error
    return onnxruntime


def parts_of(student: Student) -> dict[str, Part]:
    """The files with inputs to check them on: batches of one and of more, short and long texts, several patch grids."""
    random = torch.Generator().manual_seed(0)
    model, shape = student.model, student.model.config.vilt()
    length, patch = student.preprocessor.text_length, student.preprocessor.patch_size
    words = len(student.preprocessor.processor.tokenizer)
    texts = []
    for batch, tokens in ((2, min(5, length)), (1, min(3, length)), (3, length)):
        mask = torch.ones(batch, tokens, dtype=torch.long)
        mask[-1, max(tokens - 2, 1) :] = 0
        ids = torch.randint(words, (batch, tokens), generator=random)
        texts.append({"input_ids": ids, "attention_mask": mask})
    side = shape.image_size // patch
    pictures = [
        {"pixel_values": torch.randn(batch, shape.num_channels, rows * patch, columns * patch, generator=random)}
        for batch, rows, columns in (
            (2, side + 2, side + 1),
            (1, side, side),
            (3, max(side // 2, 1), side + 1),
            (1, 1, 2),
        )
    ]
    slots = [torch.tensor([number % 2]) for number in range(len(pictures))]
    twin = isinstance(model.image_tower, ImageTower)
    marked = twin and student.images == 2
    if marked:
        pictures = [one | {"image_slot": slot} for one, slot in zip(pictures, slots, strict=True)]
    tokens_axis = {0: Dim("batch"), 1: Dim("tokens", max=length)}
    pixel_axes = {0: Dim("batch"), 2: patch * Dim("rows"), 3: patch * Dim("columns")}

    def encode_image(pixel_values: Tensor, image_slot: Tensor | None = None) -> Tensor:
        grid = torch.tensor([[pixel_values.shape[2] // patch, pixel_values.shape[3] // patch]])
        slot = 0 if image_slot is None else int(image_slot)
        return model.image_tower(pixel_values, grid.expand(len(pixel_values), -1), slot).pooled

    return {
        "head": _head(student, random),
        "text_tower": Part(
            TextSide(model.text_tower),
            "vector",
            texts,
            {"input_ids": tokens_axis, "attention_mask": tokens_axis},
            lambda input_ids, attention_mask: model.text_tower(input_ids, attention_mask).pooled,
        ),
        "image_tower": Part(
            ImageSide(model.image_tower) if twin else WholeImageSide(model.image_tower),
            "vector",
            pictures,
            {"pixel_values": pixel_axes} | ({"image_slot": {}} if marked else {}),
            encode_image,
        ),
    }


def _head(student: Student, random: torch.Generator) -> Part:
    def vectors(count: int) -> Tensor:
        return torch.randn(count, student.width, generator=random).tanh()

    if student.compares:
        sizes = ((2, 3), (1, 1), (4, 2))
        inputs = [{"text": vectors(texts), "image": vectors(images)} for texts, images in sizes]
        axes = {"text": {0: Dim("texts")}, "image": {0: Dim("images")}}
        return Part(CosineHead(), "cosine", inputs, axes, lambda text, image: student.similarity(text, image))
    names = ("text", "image", "second")[: 1 + student.images]
    inputs = [{name: vectors(pairs) for name in names} for pairs in (2, 1, 5)]
    pairs = {0: Dim("pairs")}
    return Part(
        AnswerHead(student.model),
        "logits",
        inputs,
        dict.fromkeys(names, pairs),
        lambda **one: student.logits(*one.values()),
    )


def write_part(part: Part, path: Path, runtime: Any, tolerance: float) -> tuple[ExportedFile, int]:
    """Trace one part, write it, run it, and compare; return what it is, and its opset.

    Args:
        part: of `parts_of`.
        path: the file.
        runtime: from `onnx_runtime`.
        tolerance: largest difference from torch that is let pass.

    Raises:
        RunError: it differs by more than `tolerance`.
    """
    with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            part.module.eval(),
            kwargs=dict(part.inputs[0]),
            input_names=list(part.inputs[0]),
            output_names=[part.output],
            dynamic_shapes={name: dict(axes) for name, axes in part.axes.items()},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        if program is None:
            raise RunError(f"{path.name}: torch gave no ONNX program")
        program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in part.inputs:
        with torch.inference_mode():
            expected = part.expected(**inputs).numpy()
        got = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
        same = got.shape == expected.shape
        worst = max(worst, float(np.abs(got - expected).max()) if same else float("inf"))
    if not worst <= tolerance:
        raise RunError(
            f"{path.name}: expected the numbers of torch to {tolerance:g}, got a difference of {worst:.2g}; nothing "
            "was written. Try other versions of torch, onnxscript and onnxruntime; constraints.txt has tested ones"
        )
    exported = ExportedFile(
        inputs={one.name: tuple(one.shape) for one in session.get_inputs()},
        output=part.output,
        size=path.stat().st_size,
        sha256=hash_file(path),
        largest_difference=worst,
    )
    return exported, int(program.model.opset_imports[""])


class _quiet:
    """Keep a logger to errors for a while."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_error: object) -> None:
        self._logger.setLevel(self._level)


def _record(student: Student, files: Mapping[str, ExportedFile], opset: int, runtime: Any) -> ExportRecord:
    return ExportRecord(
        format="onnx",
        student=student.fingerprint,
        task=str(student.model.config.task),
        answers=student.labels,
        images=student.images,
        width=student.width,
        text_length=student.preprocessor.text_length,
        patch_size=student.preprocessor.patch_size,
        opset=opset,
        files=dict(files),
        versions=versions() | {"onnxruntime": runtime.__version__},
    )
