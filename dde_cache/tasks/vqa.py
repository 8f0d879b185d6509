"""Visual question answering (VQAv2; Goyal et al., CVPR 2017): ten annotators answer, so an answer is right by degrees.

Soft scores and answer vocabulary as ViLT makes them; accuracy and normalisation as in the official evaluation.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dde_cache.batches import Batch, class_numbers
from dde_cache.errors import InputError
from dde_cache.losses import answer_bce_sum
from dde_cache.samples import Shard, Text
from dde_cache.scores import OTHER_KIND, Baselines, EvaluationReport, Predictions, Score, texts_of
from dde_cache.student import DualEncoderOutput
from dde_cache.tasks.contract import Task, TeacherLogits

SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Soft score of an answer that 0, 1, 2, 3, or four and more annotators gave (ViLT)."""

MIN_ANSWERS = 9
"""How often an answer must be the most frequent one of a question to be in the vocabulary (ViLT: 3,129 answers)."""

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """From forms that lack apostrophes to whole ones, as the official table has them.

    A form with one apostrophe is restored where it is missing; one with two, where either is.
    """
    table = {"somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at"}
    for whole in _CONTRACTED.split():
        places = [place for place, letter in enumerate(whole) if letter == "'"]
        for place in places:
            table[whole[:place] + whole[place + 1 :]] = whole
    return table


_CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """An answer as the official evaluation compares it: lower case, no articles and punctuation, digits, apostrophes.

    A punctuation mark goes where it stands beside a space, or where the answer has a number with a comma in it;
    otherwise it becomes a space (GT-Vision-Lab, VQA evaluation).
    """
    bare = answer
    for mark in _PUNCTUATION:
        joined = f"{mark} " in answer or f" {mark}" in answer or _DIGIT_COMMA.search(answer) is not None
        bare = bare.replace(mark, "" if joined else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", bare).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, given: Sequence[str]) -> float:
    """The official accuracy: min(1, matches / 3), averaged over leaving out each of the annotators in turn.

    Both sides are normalised where the annotators differ, and compared as they are where all agree (official).

    Raises:
        InputError: no annotator answered.
    """
    if not given:
        raise InputError("expected the annotators' answers to a question, got none")
    answer, given = _one_line(answer), [_one_line(one) for one in given]
    if len(set(given)) > 1:
        answer, given = normalise(answer), [normalise(one) for one in given]
    matches = given.count(answer)
    left_out = [min(1.0, (matches - (one == answer)) / 3) for one in given]
    return sum(left_out) / len(left_out)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def soft_scores(text: Text) -> dict[str, float]:
    """Soft score of every answer to a question: by its annotators (ViLT), or 1 for its only label."""
    if not text.answers:
        return {} if text.label is None else {text.label: 1.0}
    return {answer: SCORES[min(count, len(SCORES) - 1)] for answer, count in Counter(text.answers).items()}


def answer_label(answer: str) -> str:
    """An answer as it stands in the vocabulary (ViLT: normalised, without any comma that is left)."""
    return normalise(answer).replace(",", "")


def answer_vocabulary(labels: Iterable[str], minimum: int = MIN_ANSWERS) -> list[str]:
    """The answers that are a question's most frequent one at least `minimum` times, in order of first appearance."""
    return [answer for answer, count in Counter(labels).items() if count >= minimum]


class Vqa(Task):
    """Every answer is a yes-or-no of its own: binary cross-entropy; official accuracy by type of answer."""

    images = 1
    closed = False
    dide: ClassVar[Mapping[str, Any]] = {"head_learning_rate_factor": 10.0}

    def answers(self, shards: Sequence[Shard]) -> list[str]:
        """ViLT's vocabulary of these shards."""
        texts = (text for shard in shards for sample in shard for text in sample.texts)
        return answer_vocabulary(text.label for text in texts if text.label is not None)

    def targets(self, texts: Sequence[Text], classes: Mapping[str, int]) -> Batch:
        """Soft scores `scores` [b, c], 0 for what nobody gave; `answered` [b]; `label` [b], the commonest answer."""
        scores = torch.zeros(len(texts), len(classes))
        for row, text in enumerate(texts):
            for answer, score in soft_scores(text).items():
                if answer in classes:
                    scores[row, classes[answer]] = score
        answered = torch.tensor([bool(text.answers) or text.label is not None for text in texts])
        return {"scores": scores, "answered": answered, **class_numbers(texts, classes)}

    def soft_sum(self, student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
        """Binary cross-entropy against sigmoid(teacher), times the number of answers (DiDE, VQAv2)."""
        return answer_bce_sum(student, teacher.float().sigmoid())

    def hard_sum(self, output: DualEncoderOutput, batch: Batch) -> Float[Tensor, ""]:
        """Binary cross-entropy against the soft scores, times the number of answers.

        Questions without an answer in the vocabulary are left out, as ViLT leaves them out.
        """
        known = _answered(batch)
        return answer_bce_sum(output.logits[known], batch["scores"][known])

    def score(self, predictions: Predictions) -> float:
        """Mean soft score of the chosen answers, as ViLT validates; questions without known answers count as 0.

        Raises:
            InputError: no question has an answer.
        """
        if predictions.score is None or bool(predictions.score.isnan().all()):
            raise InputError("expected answers in the shards to measure accuracy, found none")
        return float(predictions.score.nanmean())

    def report(
        self,
        predictions: Predictions,
        shards: Sequence[Shard],
        labels: Sequence[str],
        baselines: Baselines | None = None,
        teacher_logits: TeacherLogits | None = None,
    ) -> EvaluationReport:
        """Official accuracy overall and by kind (VQAv2's importer takes the answer type for it).

        Raises:
            InputError: no question has an answer.
        """
        chosen = [labels[number] for number in predictions.answer.tolist()]
        rows: dict[str, list[dict[str, float]]] = {}
        for guess, (key, slot, text) in zip(chosen, texts_of(shards), strict=True):
            if not text.answers and text.label is None:
                continue
            guesses = {"accuracy": guess}
            if baselines is not None:
                guesses["frequent_answer"] = baselines.answer or ""
                guesses["frequent_answer_to_question"] = baselines.answer_to(text.text) or ""
            given = text.answers or (text.label or "",) * 4
            row = {name: vqa_accuracy(answer, given) for name, answer in guesses.items()}
            if teacher_logits is not None and (key, slot) in teacher_logits:
                row["agreement"] = float(guess == labels[int(teacher_logits[key, slot].argmax())])
            rows.setdefault(text.kind or OTHER_KIND, []).append(row)
        if not rows:
            raise InputError("expected answers in the shards to measure accuracy, found none")
        everything = [row for some in rows.values() for row in some]
        return EvaluationReport(overall=_mean(everything), kinds={kind: _mean(rows[kind]) for kind in sorted(rows)})


def _mean(rows: Sequence[Mapping[str, float]]) -> Score:
    names = {name for row in rows for name in row}
    held = {name: [row[name] for row in rows if name in row] for name in names}
    return Score(pairs=len(rows), **{name: sum(values) / len(values) for name, values in held.items()})


def _answered(batch: Batch) -> Bool[Tensor, " b"]:
    return batch["scores"].sum(-1) > 0
