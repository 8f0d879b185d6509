"""NLVR2 (Suhr, Zhou, Zhang, Zhang, Bai and Artzi, ACL 2019): is a sentence true of a pair of pictures?

The text is encoded once and meets each picture in the shallow interaction; the head reads both results side by side
(DiDE). The attention loss is the sum over both pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dde_cache.batches import NO_LABEL
from dde_cache.samples import Shard
from dde_cache.scores import Baselines, EvaluationReport, Predictions, texts_of
from dde_cache.tasks.contract import SingleLabel, TeacherLogits


class Nlvr2(SingleLabel):
    """Two pictures a sample; accuracy, and consistency where the texts carry NLVR2's identifiers."""

    images = 2
    dide: ClassVar[Mapping[str, Any]] = {"batch_size": 128}

    def report(
        self,
        predictions: Predictions,
        shards: Sequence[Shard],
        labels: Sequence[str],
        baselines: Baselines | None = None,
        teacher_logits: TeacherLogits | None = None,
    ) -> EvaluationReport:
        """Accuracy by kind, and `consistency`: the share of sentences, all of whose labelled pairs are right.

        Texts say in `meta.identifier` which sentence they are: split-set-pair-sentence. Without any, consistency is
        left out.
        """
        found = super().report(predictions, shards, labels, baselines, teacher_logits)
        right = (predictions.answer == predictions.label).tolist()
        sentences: dict[str, bool] = {}
        for number, (_, _, text) in enumerate(texts_of(shards)):
            sentence = sentence_of(text.meta.get("identifier"))
            if sentence is not None and predictions.label[number] != NO_LABEL:
                sentences[sentence] = sentences.get(sentence, True) and right[number]
        if not sentences:
            return found
        return found.model_copy(update={"metrics": {"consistency": sum(sentences.values()) / len(sentences)}})


def sentence_of(identifier: object) -> str | None:
    """Name the sentence of an identifier split-set-pair-sentence: all but the pair. None where it is none."""
    parts = identifier.split("-") if isinstance(identifier, str) else []
    if len(parts) < 4:
        return None
    return "-".join([*parts[:-2], parts[-1]])
