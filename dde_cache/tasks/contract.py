"""What a task is, and what tasks with one right answer share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from dde_cache.batches import Batch, PairDataset, class_numbers
from dde_cache.errors import InputError
from dde_cache.losses import label_sum, soft_label_sum
from dde_cache.samples import Shard, Text
from dde_cache.scores import Baselines, EvaluationReport, Predictions, accuracy, predict, report
from dde_cache.student import DualEncoderOutput

Model = Callable[[Batch], DualEncoderOutput]
"""A student in eval mode, or a teacher, of whose output only the logits are there."""

TeacherLogits = Mapping[tuple[str, int], Tensor]
"""By sample key and text slot."""


class Task(ABC):
    """From labels to a metric. Its class attributes say what a student needs; its methods are pure functions.

    Attributes:
        head: `classes` for a classifier over the teacher's answers, `similarity` for comparable pooled vectors.
        images: pictures a sample; None: one or two, as the shards have them.
        closed: whether a label outside the answers is a mistake of the data.
        soft: whether there is a soft-label loss.
        settings: training settings where the general defaults do not suit.
        dide: what `--preset dide` sets for this task beside what it sets for all.
    """

    head: ClassVar[Literal["classes", "similarity"]] = "classes"
    images: ClassVar[int | None] = None
    closed: ClassVar[bool] = True
    soft: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Any]] = {}
    dide: ClassVar[Mapping[str, Any]] = {}

    def check_answers(self, answers: Sequence[str]) -> None:
        """Refuse a teacher whose answers are not this task's. By default any will do.

        Raises:
            InputError: they are others, or in another order.
        """
        return

    def answers(self, shards: Sequence[Shard]) -> list[str]:
        """The answers that a new teacher of this task learns: the labels of its training shards, sorted."""
        return sorted({text.label for shard in shards for one in shard for text in one.texts if text.label is not None})

    @abstractmethod
    def targets(self, texts: Sequence[Text], classes: Mapping[str, int]) -> Batch:
        """Tensors of the labels of a batch, one row a text, for `hard_sum`; `classes` numbers the answers."""

    @abstractmethod
    def soft_sum(self, student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
        """Compare logits with the teacher's: a sum over pairs, whose mean over all pairs of a batch is the loss."""

    @abstractmethod
    def hard_sum(self, output: DualEncoderOutput, batch: Batch) -> Float[Tensor, ""]:
        """Compare a student's output with the labels, as `targets` put them into the batch: a sum over pairs.

        The loss is its mean over ALL pairs of a batch, so a pair without a label counts there and adds 0. (A mean over
        the labelled ones would let a few of them outweigh what all pairs learn from a teacher.)
        """

    def predict(
        self,
        model: Model,
        dataset: PairDataset,
        batch_size: int = 256,
        workers: int = 0,
        advance: Callable[[int], None] = lambda pairs: None,
    ) -> Any:
        """Run a model over every pair; what comes back is what `score` and `report` take: by default `Predictions`."""
        return predict(lambda batch: model(batch).logits, dataset, batch_size, workers, advance)

    @abstractmethod
    def score(self, predictions: Any) -> float:
        """The number by which the best checkpoint is chosen; larger is better."""

    @abstractmethod
    def report(
        self,
        predictions: Any,
        shards: Sequence[Shard],
        labels: Sequence[str],
        baselines: Baselines | None = None,
        teacher_logits: TeacherLogits | None = None,
    ) -> EvaluationReport:
        """The figures of `dde-cache eval`."""


class SingleLabel(Task):
    """One right answer a text: cross-entropy, KL against the teacher (DiDE, NLVR2 and SNLI-VE), accuracy."""

    def targets(self, texts: Sequence[Text], classes: Mapping[str, int]) -> Batch:
        """`label` [b]: class numbers."""
        return class_numbers(texts, classes)

    def soft_sum(self, student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
        """KL(teacher || student) over classes at temperature 1."""
        return soft_label_sum(student, teacher)

    def hard_sum(self, output: DualEncoderOutput, batch: Batch) -> Float[Tensor, ""]:
        """Cross-entropy of the labelled pairs."""
        return label_sum(output.logits, batch["label"])

    def score(self, predictions: Predictions) -> float:
        """Share of labelled pairs whose largest logit is the label."""
        return accuracy(predictions)

    def report(
        self,
        predictions: Predictions,
        shards: Sequence[Shard],
        labels: Sequence[str],
        baselines: Baselines | None = None,
        teacher_logits: TeacherLogits | None = None,
    ) -> EvaluationReport:
        """Accuracy overall and by kind of question."""
        return report(predictions, shards, labels, baselines, teacher_logits)


def fixed_answers(task: str, answers: Sequence[str], expected: Sequence[str]) -> None:
    """Refuse answers other than `expected`, or in another order.

    Raises:
        InputError: they differ.
    """
    if tuple(answers) != tuple(expected):
        raise InputError(
            f"task {task}: expected a teacher of the answers {', '.join(expected)}, in this order, got "
            f"{', '.join(answers[:5])}{', ...' if len(answers) > 5 else ''}"
        )
