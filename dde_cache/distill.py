"""What a student is taught: where its targets come from, and the losses that compare it with them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache.attention import query_rows, sparsify
from dde_cache.batches import Batch, pictures_of, tokens_of
from dde_cache.join import OnMissing
from dde_cache.losses import Tail, attention_kl, label_sum, log_attention, soft_label_sum, weighted_sum
from dde_cache.preprocess import Preprocessor
from dde_cache.runs import FitConfig
from dde_cache.store import Cache
from dde_cache.student import DualEncoderOutput
from dde_cache.targets import decoded
from dde_cache.teacher import FusionTeacher
from dde_cache.terms import Objective, Sizes, Term, labelled, pairs
from dde_cache.vilt import image_tokens


class TrainConfig(FitConfig):
    """How a student is trained. A weight of 0 leaves a loss out, and its targets are then not read."""

    attention_weight: float = Field(default=1.0, ge=0)
    soft_weight: float = Field(default=1.0, ge=0)
    hard_weight: float = Field(default=0.0, ge=0)
    tail: Tail = Field(
        default="bucket", description="how the mass of the keys that were not kept counts; nothing where all were"
    )
    queries: Literal["valid", "all"] = Field(
        default="valid",
        description="query rows in the mean of the attention loss: valid ones, or padding too (published)",
    )
    layer: int | None = Field(default=None, ge=0, description="the cache's layer to learn from; null: its last")
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_weights(self) -> "TrainConfig":
        if not (self.attention_weight or self.soft_weight or self.hard_weight):
            raise ValueError("expected at least one of attention_weight, soft_weight and hard_weight above 0")
        return self


@dataclass(frozen=True)
class LabelsOnly:
    """No teacher: processor, labels and tower shape come from a cache's assets or from a checkpoint."""

    preprocessor: Preprocessor
    tower: ViltConfig
    labels: tuple[str, ...]


@dataclass(frozen=True)
class CachedTargets:
    """Stream the targets from a cache."""

    cache: Cache
    on_missing: OnMissing = "error"


@dataclass(frozen=True)
class OnlineTargets:
    """Run a teacher at every step, for comparison; `layer` counts from 0."""

    teacher: FusionTeacher
    layer: int


IMAGE_TOKENS = "image_tokens"
"""Tokens of the largest picture of a global batch: how many query rows the published mean counts for each."""

Targets = LabelsOnly | CachedTargets | OnlineTargets


def student_output(model: nn.Module, batch: Batch, sizes: Sizes | None = None) -> DualEncoderOutput:
    """Run a student on a batch of samples with one image, padded to the image tokens of `sizes` where it has them."""
    grid = batch["grid0"]
    longest = int(image_tokens(grid).max())
    padding = (sizes or {}).get(IMAGE_TOKENS, longest) - longest
    return model(batch["input_ids"], batch["attention_mask"], batch["pixels0"], grid, image_padding=padding)


@dataclass(frozen=True)
class Taught:
    """What the teacher gave for a batch: maps (`Attention`) and logits [b, c]; None where no term asks for them."""

    t2i: Any = None
    i2t: Any = None
    logits: Any = None


@dataclass(frozen=True)
class Compared:
    """What the terms of a batch compare."""

    student: DualEncoderOutput
    taught: Taught


class StudentLosses(Objective[Compared]):
    """The terms of a batch: attention in both directions (`t2i`, `i2t`), `soft`, `hard`, and their weighted sum `loss`.

    Attention is a mean over heads and query rows of the global batch (DiDE, L_attn). With queries `all`, every padded
    row counts, as published: padded text rows one by one; padded image rows of a sample are all alike, so the one that
    the teacher stored, behind its last valid row, stands for each of them.
    """

    def __init__(self, config: TrainConfig, targets: Targets, mean_heads: bool) -> None:
        self._config, self._targets, self._mean_heads = config, targets, mean_heads
        self._every = config.queries == "all"
        table = {
            "t2i": Term(config.attention_weight, self._text_rows, self._t2i),
            "i2t": Term(config.attention_weight, self._image_rows, self._i2t),
            "soft": Term(config.soft_weight, pairs, _soft),
            "hard": Term(config.hard_weight, labelled, _hard),
        }
        if isinstance(targets, LabelsOnly):
            table = {"hard": Term(1.0, labelled, _hard)}
        super().__init__(self._compare, {name: term for name, term in table.items() if term.weight}, self._padded)

    def _compare(self, model: nn.Module, batch: Batch, sizes: Sizes) -> Compared:
        config, targets = self._config, self._targets
        output = student_output(model, batch, sizes)
        if isinstance(targets, LabelsOnly):
            return Compared(output, Taught())
        if isinstance(targets, OnlineTargets):
            return Compared(output, online_targets(targets, batch, config))
        steps = targets.cache.spec.steps
        t2i, i2t = (decoded(batch, name, steps) if config.attention_weight else None for name in ("t2i", "i2t"))
        return Compared(output, Taught(t2i, i2t, batch.get("target.logits")))

    def _padded(self, batch: Batch) -> Sizes:
        return {IMAGE_TOKENS: int(image_tokens(batch["grid0"]).max())} if self._every else {}

    def _text_rows(self, batch: Batch, _sizes: Sizes) -> int:
        mask = batch["attention_mask"]
        return mask.numel() if self._every else int(mask.sum())

    def _image_rows(self, batch: Batch, sizes: Sizes) -> int:
        grid = batch["grid0"]
        return len(grid) * sizes[IMAGE_TOKENS] if self._every else int(image_tokens(grid).sum())

    def _t2i(self, compared: Compared, batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
        text, image, teacher = compared.student.text, compared.student.image, compared.taught.t2i
        # The teacher's keys end with the largest picture of this batch, the student's with that of the global one.
        keys = int(image_tokens(batch["grid0"]).max())
        mask = image.mask[:, :keys]
        log = log_attention(text.query_key.query, image.query_key.key[:, :, :keys], mask, mean_heads=self._mean_heads)
        rows = torch.ones_like(text.mask) if self._every else text.mask
        return weighted_sum(attention_kl(teacher, log, mask, self._config.tail), rows.float())

    def _i2t(self, compared: Compared, _batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
        text, image, teacher = compared.student.text, compared.student.image, compared.taught.i2t
        log = log_attention(image.query_key.query, text.query_key.key, text.mask, mean_heads=self._mean_heads)
        rows = torch.ones_like(image.mask) if self._every else image.mask
        if self._every:
            position = torch.arange(image.mask.shape[1], device=image.mask.device)[None]
            teacher = query_rows(teacher, torch.minimum(position, image.mask.sum(-1, keepdim=True)))
        return weighted_sum(attention_kl(teacher, log, text.mask, self._config.tail), rows.float())


def _soft(compared: Compared, _batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
    return soft_label_sum(compared.student.logits, compared.taught.logits)


def _hard(compared: Compared, batch: Batch, _sizes: Sizes) -> Float[Tensor, ""]:
    return label_sum(compared.student.logits, batch["label"])


def online_targets(targets: OnlineTargets, batch: Batch, config: TrainConfig) -> Taught:
    """Run the teacher on the student's own batch; every key is kept, so the sparse loss is the dense one."""
    output = targets.teacher(
        tokens_of(batch), pictures_of(batch), [targets.layer], padded_queries=config.queries == "all"
    )
    if not config.attention_weight:
        return Taught(logits=output.logits)
    maps = output.attention[0, targets.layer]
    # The padded image token that a teacher needs for its query row is no key of the student's.
    return Taught(sparsify(maps.t2i, None), sparsify(maps.i2t, None), output.logits)
