"""The `vqav2` source: VQA v2.0 (Goyal et al., CVPR 2017) as published, on the pictures of COCO.

    v2_OpenEnded_mscoco_train2014_questions.json   {"data_subtype": "train2014", "questions": [...]}
    v2_mscoco_train2014_annotations.json           {"annotations": [...]}; the test questions have none
    train2014/COCO_train2014_000000000009.jpg

A sample is a picture with all its questions. Label: the most frequent answer as ViLT's vocabulary has it. Answers:
those of the ten annotators, as they wrote them. Kind: the type of the answer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dde_cache.errors import InputError
from dde_cache.importers.common import Source
from dde_cache.importers.official import Groups, check_split, digests, open_pictures, read_object
from dde_cache.tasks.vqa import answer_label


def vqav2_source(split: str | None, questions: Path, images: Path, annotations: Path | None = None) -> Source:
    """Make the `vqav2` source of an import.

    Args:
        split: goes into the keys; None: what the questions call themselves, `train2014` and so on.
        questions: the file of questions.
        images: COCO's pictures, a folder or a tar.
        annotations: the file of answers; None: questions without labels.

    Raises:
        InputError: a file is not as published.
    """
    asked = read_object(questions, "--from", "questions")
    subtype = asked.get("data_subtype")
    if not isinstance(subtype, str):
        raise InputError(f"--from {questions}: expected data_subtype, such as train2014, got {subtype!r}")
    split = split or subtype
    check_split(split)
    given = read_object(annotations, "--annotations", "annotations")["annotations"] if annotations else []
    answered = {one.get("question_id"): one for one in given if isinstance(one, dict)}
    groups = Groups(lambda image: f"vqav2-{split}-{image}")
    for number, question in enumerate(asked["questions"]):
        where = f"{questions.name} question {number}"
        if not isinstance(question, dict) or not isinstance(question.get("image_id"), int):
            groups.fail(f"question-{number}", where, "expected an object with image_id")
            continue
        image = str(question["image_id"])
        answer = answered.pop(question.get("question_id"), None)
        if annotations and answer is None:
            groups.fail(image, where, f"no annotation of question {question.get('question_id')}", "missing annotation")
        groups.add(image, where, lambda q=question, a=answer: _fields(q, a))  # type: ignore[misc]
    for identifier in answered:
        groups.fail(f"annotation-{identifier}", f"annotation of {identifier}", "no such question", "missing question")
    # test-dev is a part of test2015, whose pictures it names.
    folder = subtype.replace("test-dev", "test")
    named = digests(questions=questions, **({"annotations": annotations} if annotations else {}))
    found = groups.found(lambda image: [f"COCO_{folder}_{int(image):012d}.jpg"], open_pictures(images))
    return Source("vqav2", split, named, len(groups), found)


def _fields(question: Mapping[str, Any], answer: Mapping[str, Any] | None) -> Mapping[str, Any]:
    text = {"text": question["question"], "meta": {"question_id": question["question_id"]}}
    if answer is None:
        return text
    return {
        **text,
        "label": answer_label(answer["multiple_choice_answer"]),
        "answers": [one["answer"] for one in answer["answers"]],
        "kind": answer["answer_type"],
    }
