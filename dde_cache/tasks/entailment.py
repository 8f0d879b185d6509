"""Visual entailment (SNLI-VE; Xie, Lai, Doran and Kadav, 2019): does a picture support a sentence?"""

from collections.abc import Sequence

from dde_cache.batches import NO_LABEL
from dde_cache.samples import Shard
from dde_cache.scores import Baselines, EvaluationReport, Predictions
from dde_cache.tasks.contract import SingleLabel, TeacherLogits, fixed_answers

ANSWERS = ("contradiction", "entailment", "neutral")
"""In logit order (DiDE)."""


class Entailment(SingleLabel):
    """Three classes in a fixed order, accuracy overall and of each class."""

    images = 1

    def check_answers(self, answers: Sequence[str]) -> None:
        """Refuse a teacher of other classes, or of another order.

        Raises:
            InputError: they differ.
        """
        fixed_answers("entailment", answers, ANSWERS)

    def answers(self, shards: Sequence[Shard]) -> list[str]:
        """The three classes, whatever the shards hold."""
        return list(ANSWERS)

    def report(
        self,
        predictions: Predictions,
        shards: Sequence[Shard],
        labels: Sequence[str],
        baselines: Baselines | None = None,
        teacher_logits: TeacherLogits | None = None,
    ) -> EvaluationReport:
        """Accuracy by kind, and `accuracy_CLASS`: the share of a class's pairs that are right."""
        found = super().report(predictions, shards, labels, baselines, teacher_logits)
        right = predictions.answer == predictions.label
        known = predictions.label != NO_LABEL
        classes = {
            f"accuracy_{name}": float(right[known & (predictions.label == number)].float().mean())
            for number, name in enumerate(labels)
            if bool((predictions.label == number).any())
        }
        return found.model_copy(update={"metrics": classes})
