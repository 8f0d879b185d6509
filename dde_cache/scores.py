"""Accuracy of a teacher or a student on shards, overall and by kind of question, beside what needs no picture."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from dde_cache.batches import NO_LABEL, Batch, PairDataset, batch_loader
from dde_cache.errors import InputError
from dde_cache.samples import Shard, Text

OTHER_KIND = "other"
"""Where questions without a kind are counted."""


class Baselines(BaseModel):
    """What the training shards' answers alone predict: the most frequent one, and the most frequent one a question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    answer: str | None
    by_question: dict[str, str]

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "Baselines":
        """Count the answers of some shards (ties: the first in the alphabet)."""
        answers: Counter[str] = Counter()
        by_question: dict[str, Counter[str]] = {}
        for shard in shards:
            for sample in shard:
                for text in sample.texts:
                    if text.label is not None:
                        answers[text.label] += 1
                        by_question.setdefault(text.text, Counter())[text.label] += 1
        return cls(
            answer=_most(answers) if answers else None,
            by_question={question: _most(counted) for question, counted in sorted(by_question.items())},
        )

    def answer_to(self, question: str) -> str | None:
        """The most frequent answer to that very question; to an unseen one, the most frequent answer of all."""
        return self.by_question.get(question, self.answer)


class Score(BaseModel):
    """Shares in [0, 1] over the labelled pairs of one kind, or of all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pairs: int
    accuracy: float
    frequent_answer: float | None = None
    frequent_answer_to_question: float | None = None
    agreement: float | None = None


class EvaluationReport(BaseModel):
    """What `dde-cache eval` finds: `overall`, one score a kind of question, and by name what else a task measures."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overall: Score
    kinds: dict[str, Score]
    metrics: dict[str, float] = {}


@dataclass(frozen=True)
class Predictions:
    """Answers and labels of every pair of some shards, in table order.

    Attributes:
        answer: class number of each largest logit. (The logits of all pairs would take gigabytes: VQAv2's validation
            questions have 3,129 each.)
        label: class number, `NO_LABEL` where there is none.
        classes: how many there are.
        score: where answers are right by degrees, how right each one is; NaN for pairs without answers.
    """

    answer: Int[Tensor, " n"]
    label: Int[Tensor, " n"]
    classes: int
    score: Float[Tensor, " n"] | None = None


def predict(
    logits_of: Callable[[Batch], Float[Tensor, "b c"]],
    dataset: PairDataset,
    batch_size: int = 256,
    workers: int = 0,
    advance: Callable[[int], None] = lambda pairs: None,
) -> Predictions:
    """Run a model over every pair.

    Args:
        logits_of: the model.
        dataset: the pairs.
        batch_size: pairs a forward pass.
        workers: reading processes.
        advance: called with the number of pairs done in each batch.
    """
    order = [list(range(start, min(start + batch_size, len(dataset)))) for start in range(0, len(dataset), batch_size)]
    answers, labels, scores, classes = [], [], [], 0
    with torch.inference_mode():
        for batch in batch_loader(dataset, order, workers):
            logits = logits_of(batch).float().cpu()
            answers.append(logits.argmax(-1))
            labels.append(batch["label"])
            classes = logits.shape[1]
            if "scores" in batch:
                right = batch["scores"].gather(1, answers[-1][:, None])[:, 0]
                scores.append(torch.where(batch["answered"], right, torch.nan))
            advance(len(labels[-1]))
    return Predictions(torch.cat(answers), torch.cat(labels), classes, torch.cat(scores) if scores else None)


def accuracy(predictions: Predictions) -> float:
    """Share of labelled pairs whose largest logit is the label.

    Raises:
        InputError: no pair has a label.
    """
    if bool((predictions.label == NO_LABEL).all()):
        raise InputError("expected labels in the shards to measure accuracy, found none")
    return _share(predictions.answer, predictions.label, predictions.classes)


def report(
    predictions: Predictions,
    shards: Sequence[Shard],
    labels: Sequence[str],
    baselines: Baselines | None = None,
    teacher_logits: Mapping[tuple[str, int], Float[Tensor, " c"]] | None = None,
) -> EvaluationReport:
    """Score predictions by kind of question.

    Args:
        predictions: of every pair of `shards`, in table order.
        shards: where kinds and texts are read.
        labels: answers in logit order.
        baselines: of the training shards.
        teacher_logits: by (key, text slot), for the agreement with the teacher's answer.

    Raises:
        InputError: no pair has a label.
    """
    accuracy(predictions)
    classes = {label: number for number, label in enumerate(labels)}
    chosen = predictions.answer
    guesses = {"accuracy": chosen}
    kinds: dict[str, list[int]] = {}
    frequent, to_question, taught = [], [], []
    for number, (key, slot, text) in enumerate(texts_of(shards)):
        kinds.setdefault(text.kind or OTHER_KIND, []).append(number)
        if baselines is not None:
            frequent.append(classes.get(baselines.answer or "", NO_LABEL))
            to_question.append(classes.get(baselines.answer_to(text.text) or "", NO_LABEL))
        if teacher_logits is not None:
            logits = teacher_logits.get((key, slot))
            taught.append(NO_LABEL if logits is None else int(logits.argmax()))
    if baselines is not None:
        guesses |= {"frequent_answer": torch.tensor(frequent), "frequent_answer_to_question": torch.tensor(to_question)}

    def score(rows: Int[Tensor, " n"]) -> Score:
        label = predictions.label[rows]
        shares = {name: _share(guess[rows], label, len(labels)) for name, guess in guesses.items()}
        if teacher_logits is not None:
            shares["agreement"] = _share(chosen[rows], torch.tensor(taught)[rows], len(labels))
        return Score(pairs=int((label != NO_LABEL).sum()), **shares)

    everything = torch.arange(len(chosen))
    return EvaluationReport(
        overall=score(everything),
        kinds={kind: score(torch.tensor(rows)) for kind, rows in sorted(kinds.items())},
    )


def texts_of(shards: Sequence[Shard]) -> Iterator[tuple[str, int, Text]]:
    """Sample key, text slot and text of every pair, in table order."""
    for shard in shards:
        for sample in shard:
            for slot, text in enumerate(sample.texts):
                yield sample.key, slot, text


def _share(guess: Int[Tensor, " n"], truth: Int[Tensor, " n"], classes: int) -> float:
    known = truth != NO_LABEL
    if not bool(known.any()):
        return float("nan")
    # A guess outside the vocabulary is wrong; torchmetrics wants a class number, so it gets one of its own.
    guess = torch.where(guess == NO_LABEL, classes, guess)
    return float(multiclass_accuracy(guess[known], truth[known], classes + 1, average="micro"))


def _most(counted: Counter[str]) -> str:
    return min(counted, key=lambda answer: (-counted[answer], answer))
