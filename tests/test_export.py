"""ONNX files, run by onnxruntime on pictures and texts, answer as torch does; whatever differs is not written."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from pipeline import cli
from students import PAIRS, SIMILARITY, save_student

from dde_cache.errors import InputError, RunError
from dde_cache.export import export, onnx_runtime, parts_of, write_part
from dde_cache.inference import Student

TEXTS = ("blue ?", "is there a red square ?", "a red circle left of the blue square ?")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student and the folder of its files."""
    folder = tmp_path_factory.mktemp("export")
    student = Student.from_pretrained(save_student(folder / "run", num_hidden_layers=1))
    export(student, folder / "onnx")
    return student, folder / "onnx"


def written(tmp_path, head, *names):
    """Some parts of a student alone: making a tower takes seconds."""
    student = Student.from_pretrained(save_student(tmp_path / "run", head, num_hidden_layers=1))
    for name in names:
        write_part(parts_of(student)[name], tmp_path / f"{name}.onnx", onnx_runtime(), 1e-4)
    return student


def run(folder, name, **inputs):
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {key: np.asarray(value) for key, value in inputs.items()})[0]


def test_towers_and_head_one_after_the_other_give_what_the_student_gives(exported, pictures):
    student, folder = exported
    tokens = student.preprocessor.tokens(TEXTS)
    texts = run(folder, "text_tower", input_ids=tokens.ids, attention_mask=tokens.mask)
    np.testing.assert_allclose(texts, student.encode_texts(TEXTS).numpy(), atol=1e-4)
    assert np.ptp(texts, axis=0).max() > 1e-2  # large enough for a mistake to show
    for one in pictures:  # of four sizes
        images = run(folder, "image_tower", pixel_values=np.stack([student.pixels(one)] * 3))
        expected = student.encode_images([one] * 3)
        np.testing.assert_allclose(images, expected.numpy(), atol=1e-4)
        logits = run(folder, "head", text=texts, image=images)
        np.testing.assert_allclose(logits, student.logits(student.encode_texts(TEXTS), expected).numpy(), atol=1e-3)


def test_of_two_pictures_each_has_its_slot(tmp_path, pictures):
    student = written(tmp_path, PAIRS, "image_tower", "head")
    sides = []
    for slot in (0, 1):
        pixels = student.pixels(pictures[slot])[None]
        sides.append(run(tmp_path, "image_tower", pixel_values=pixels, image_slot=np.array([slot])))
        np.testing.assert_allclose(sides[-1], student.encode_images([pictures[slot]], slot=slot), atol=1e-4)
    text = student.encode_texts(TEXTS[:1])
    logits = run(tmp_path, "head", text=text, image=sides[0], second=sides[1])
    np.testing.assert_allclose(logits, student.logits(text, *map(torch.from_numpy, sides)), atol=1e-3)


def test_the_head_of_retrieval_is_the_cosine(tmp_path, pictures):
    student = written(tmp_path, SIMILARITY, "head")
    texts, images = student.encode_texts(TEXTS), student.encode_images(pictures)
    np.testing.assert_allclose(
        run(tmp_path, "head", text=texts, image=images), student.similarity(texts, images), atol=1e-5
    )


def test_the_record_says_what_the_files_are(exported):
    student, folder = exported
    record = json.loads((folder / "export.json").read_text())
    assert record["student"] == student.fingerprint
    assert record["answers"] == list(student.labels)
    assert record["files"]["text_tower.onnx"]["inputs"]["input_ids"] == ["batch", "tokens"]
    assert all(file["largest_difference"] <= 1e-4 for file in record["files"].values())
    assert {path.name for path in folder.iterdir()} >= {*record["files"], "processor_config.json", "tokenizer.json"}
    assert not list(folder.parent.glob(".*"))


def test_what_differs_from_torch_is_not_written(tmp_path):
    student = Student.from_pretrained(save_student(tmp_path / "run", num_hidden_layers=1))
    with pytest.raises(RunError, match="expected the numbers of torch to 1e-12"):
        export(student, tmp_path / "onnx", tolerance=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_command(exported, tmp_path):
    _, folder = exported
    run = folder.parent / "run"
    taken = cli("export", run, "--out", folder)
    assert taken.code == 1
    assert "expected a new or empty folder" in taken.message
    other = cli("export", run, "--format", "torchscript")
    assert other.code == 1
    assert "expected --format onnx, got 'torchscript'" in other.message
    with pytest.raises(InputError):
        export(Student.from_pretrained(run), folder)
    assert cli("export", tmp_path).code == 1
