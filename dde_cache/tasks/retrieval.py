"""Retrieval by pooled vectors: pictures for a text and texts for a picture, ranked by cosine.

Training contrasts the pairs of a batch, with a learned temperature, beside the attention of matched pairs. Evaluation
ranks everything against everything, exactly, by the protocol of Karpathy and Fei-Fei (CVPR 2015): a picture's rank is
that of its best caption.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dde_cache.batches import Batch, PairDataset, batch_loader, class_numbers
from dde_cache.contrast import contrastive_sum, everyone
from dde_cache.errors import InputError
from dde_cache.ranks import Ranks
from dde_cache.samples import Shard, Text
from dde_cache.scores import OTHER_KIND, Baselines, EvaluationReport, Score, texts_of
from dde_cache.student import DualEncoderOutput
from dde_cache.tasks.contract import Model, Task, TeacherLogits

RECALLS = (1, 5, 10)
TIE = 1e-6
"""Cosines that differ by less are equal: those of one text in batches padded to other lengths do."""

_BLOCK = 2**24
"""Cosines that are held at once."""


@dataclass(frozen=True)
class Vectors:
    """Normalised pooled vectors of every text and every picture, and the number of each text's picture."""

    text: Float[Tensor, "n w"]
    image: Float[Tensor, "m w"]
    owner: Int[Tensor, " n"]


class Retrieval(Task):
    """Contrastive loss as the hard loss; no soft labels; R@1, R@5 and R@10 both ways."""

    head = "similarity"
    images = 1
    closed = False
    soft = False
    settings: ClassVar[Mapping[str, Any]] = {"soft_weight": 0.0, "hard_weight": 1.0}
    dide: ClassVar[Mapping[str, Any]] = settings

    def targets(self, texts: Sequence[Text], classes: Mapping[str, int]) -> Batch:
        """`label` [b], which nothing reads: what belongs together is in `text` and `picture`."""
        return class_numbers(texts, classes)

    def soft_sum(self, student: Float[Tensor, "b c"], teacher: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
        """There is none.

        Raises:
            InputError: always.
        """
        raise InputError("retrieval has no soft labels; train with --set soft_weight=0")

    def hard_sum(self, output: DualEncoderOutput, batch: Batch) -> Float[Tensor, ""]:
        """Contrast the texts and pictures of the batch with those of all ranks.

        (Of a batch in micro-batches, only with those that run at the same time.)
        """
        ranks, text, image = Ranks(), output.text.pooled, output.image.pooled
        most = int(ranks.largest({"pairs": len(text)})["pairs"])
        return contrastive_sum(everyone(ranks, text, image, batch, most), output.scale)

    def predict(
        self,
        model: Model,
        dataset: PairDataset,
        batch_size: int = 256,
        workers: int = 0,
        advance: Callable[[int], None] = lambda pairs: None,
    ) -> Vectors:
        """Encode every text, and every picture once."""
        starts = range(0, len(dataset), batch_size)
        order = [list(range(start, min(start + batch_size, len(dataset)))) for start in starts]
        texts, pictures, samples = [], [], []
        with torch.inference_mode():
            for batch in batch_loader(dataset, order, workers):
                first = batch["pair"] == batch["sample"]
                kept = first.clone()
                kept[0] = True  # a batch from the middle of a sample has no picture of its own, but a tower wants one
                own = {name: batch[name][kept] for name in ("pixels0", "grid0")}
                output = model(batch | own)
                texts.append(output.text.pooled.float().cpu())
                pictures.append(output.image.pooled.float().cpu()[first[kept]])
                samples.append(batch["sample"])
                advance(len(samples[-1]))
        text, image = (torch.nn.functional.normalize(torch.cat(rows), dim=-1) for rows in (texts, pictures))
        return Vectors(text, image, torch.cat(samples).unique(return_inverse=True)[1])

    def score(self, predictions: Vectors) -> float:
        """Share of the texts whose own picture comes first."""
        return float((image_ranks(predictions) < 1).float().mean())

    def report(
        self,
        predictions: Vectors,
        shards: Sequence[Shard],
        labels: Sequence[str],
        baselines: Baselines | None = None,
        teacher_logits: TeacherLogits | None = None,
    ) -> EvaluationReport:
        """Recalls both ways as metrics; accuracy is the share of texts whose own picture comes first, by kind.

        Raises:
            InputError: the teacher's logits were given, which have nothing to be compared with.
        """
        if teacher_logits is not None:
            raise InputError("retrieval has no logits to compare with the teacher's; leave --targets out")
        ranks = {"t2i": image_ranks(predictions), "i2t": text_ranks(predictions)}
        metrics = {
            f"{way}_r{recall}": float((rank < recall).float().mean())
            for way, rank in ranks.items()
            for recall in RECALLS
        }
        kinds: dict[str, list[bool]] = {}
        for (_, _, text), rank in zip(texts_of(shards), ranks["t2i"].tolist(), strict=True):
            kinds.setdefault(text.kind or OTHER_KIND, []).append(rank < 1)
        scores = {kind: Score(pairs=len(hits), accuracy=sum(hits) / len(hits)) for kind, hits in sorted(kinds.items())}
        overall = Score(pairs=len(ranks["t2i"]), accuracy=metrics["t2i_r1"])
        return EvaluationReport(overall=overall, kinds=scores, metrics=metrics)


def image_ranks(vectors: Vectors) -> Int[Tensor, " n"]:
    """For each text, how many other pictures are at least as near as its own: 0 is first, ties count against it."""
    ranks = []
    step = max(_BLOCK // len(vectors.image), 1)
    for start in range(0, len(vectors.text), step):
        cosine = vectors.text[start : start + step] @ vectors.image.T
        own = cosine.gather(1, vectors.owner[start : start + step, None])
        ranks.append((cosine >= own - TIE).sum(-1) - 1)
    return torch.cat(ranks)


def text_ranks(vectors: Vectors) -> Int[Tensor, " m"]:
    """For each picture, how many texts of other pictures are at least as near as the nearest of its own."""
    ranks = []
    step = max(_BLOCK // len(vectors.text), 1)
    for start in range(0, len(vectors.image), step):
        cosine = vectors.image[start : start + step] @ vectors.text.T
        own = vectors.owner[None] == torch.arange(start, start + len(cosine))[:, None]
        best = cosine.masked_fill(~own, -torch.inf).amax(-1, keepdim=True)
        ranks.append(((cosine >= best - TIE) & ~own).sum(-1))
    return torch.cat(ranks)
