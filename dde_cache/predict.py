"""Recipe: answer questions about stored pictures: only the text tower and the shallow head run."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dde_cache.embeddings import EmbeddingStore
from dde_cache.errors import CacheError, InputError, RunError, bullet_list
from dde_cache.files import partial_path, place
from dde_cache.inference import Student
from dde_cache.questions import Question
from dde_cache.spec import Model

_WINDOW = 1024
"""Questions that are encoded together, those of like length side by side."""


class Prediction(Model):
    """The answer to one question, as a line of JSON: the most probable answers in falling order."""

    key: str
    slot: int
    images: tuple[str, ...]
    text: str
    answer: str
    probability: float
    probabilities: dict[str, float]


Place = tuple[str, int]


def places_of(question: Question, slots: int) -> list[Place]:
    """Where a question's pictures are stored: one for each slot, or one picture for all slots."""
    if len(question.images) == 1:
        return [(question.images[0], slot) for slot in range(slots)]
    return [(key, slot) for slot, key in enumerate(question.images)]


def find_pictures(student: Student, store: EmbeddingStore, questions: Sequence[Question]) -> Mapping[Place, int]:
    """Row numbers of all pictures that the questions name.

    Raises:
        CacheError: vectors of another student, or of texts.
        InputError: questions without pictures, with another number of them, or of pictures that are not stored; all of
            these are listed.
        RunError: the student has no answers.
    """
    if student.compares:
        raise RunError(f"{student.name}: trained for retrieval, it has no answers; use `dde-cache search`")
    store.check_student(student.fingerprint, student.name)
    if store.index.kind != "image":
        raise CacheError(f"{store.folder}: expected a store of pictures, got one of texts; embed with --images")
    places = {question: places_of(question, student.images) for question in dict.fromkeys(questions)}
    found = store.find({place for some in places.values() for place in some})
    problems = []
    for question, some in places.items():
        where = f"{question.key}, text {question.slot}"
        missing = dict.fromkeys(key for key, slot in some if (key, slot) not in found)
        if len(some) != student.images:
            got = len(question.images)
            problems.append(f"{where}: expected {student.images} pictures for this student, got {got}")
        elif missing:
            problems.append(f"{where}: {', '.join(map(repr, missing))} not in {store.folder}")
    if problems:
        raise InputError(
            f"{len(problems)} of {len(questions)} questions have no stored picture; name it in `image`, as the store "
            f"does:{bullet_list(problems, 20)}"
        )
    return found


def predict(
    student: Student, store: EmbeddingStore, questions: Sequence[Question], *, top: int = 5
) -> Iterator[Prediction]:
    """Answer questions in their order, from the stored vectors of their pictures.

    Args:
        student: whose vectors are stored.
        store: of pictures.
        questions: from `read_questions`.
        top: answers to give with their probabilities.

    Raises:
        CacheError, InputError, RunError: as `find_pictures`, before the first answer.
    """
    found = find_pictures(student, store, questions)
    return _answers(student, store, questions, found, top)


def _answers(
    student: Student, store: EmbeddingStore, questions: Sequence[Question], found: Mapping[Place, int], top: int
) -> Iterator[Prediction]:
    for start in range(0, len(questions), _WINDOW):
        asked = questions[start : start + _WINDOW]
        places = [places_of(question, student.images) for question in asked]
        images: list[Tensor] = [
            torch.from_numpy(store.vectors([found[some[slot]] for some in places])) for slot in range(student.images)
        ]
        answers = student.answer(student.encode_texts([one.text for one in asked]), *images, top=top)
        for question, answer in zip(asked, answers, strict=True):
            yield Prediction(
                key=question.key,
                slot=question.slot,
                images=question.images,
                text=question.text,
                answer=answer.answer,
                probability=answer.probability,
                probabilities=answer.probabilities,
            )


def write_lines(path: Path, lines: Iterable[Prediction]) -> int:
    """Write answers as JSON lines, whole or not at all; return how many.

    Raises:
        OSError: the disk is full; nothing under `path` then.
    """
    partial = partial_path(path)
    count = 0
    try:
        with open(partial, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(line.model_dump_json() + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        place(partial, path, replace=True)
    finally:
        partial.unlink(missing_ok=True)
    return count
