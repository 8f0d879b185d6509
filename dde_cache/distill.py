"""What a student is taught: where its targets come from, and the losses that compare it with them."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache.attention import Attention, query_rows, sparsify
from dde_cache.batches import Batch, pictures_of, tokens_of
from dde_cache.fit import Losses
from dde_cache.join import OnMissing
from dde_cache.losses import Tail, attention_kl, label_loss, log_attention, soft_label_loss, weighted_mean
from dde_cache.preprocess import Preprocessor
from dde_cache.runs import FitConfig
from dde_cache.store import Cache
from dde_cache.student import DualEncoderOutput
from dde_cache.targets import decoded
from dde_cache.teacher import FusionTeacher


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
    remap_flips: bool = Field(
        default=False, description="mirror every other picture, and its stored maps with it: an approximation"
    )

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
    """Stream the targets from a cache; where it has views, on their pixels, or with `allow_pixel_drift` on others."""

    cache: Cache
    on_missing: OnMissing = "error"
    allow_pixel_drift: bool = False


@dataclass(frozen=True)
class OnlineTargets:
    """Run a teacher at every step, for comparison; `layer` counts from 0."""

    teacher: FusionTeacher
    layer: int


Targets = LabelsOnly | CachedTargets | OnlineTargets


def student_output(model: nn.Module, batch: Batch) -> DualEncoderOutput:
    """Run a student on a batch of samples with one image."""
    return model(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"])


class StudentLosses:
    """The terms of a batch: `attention` (with its two directions), `soft`, `hard`, and their weighted sum `loss`."""

    def __init__(self, config: TrainConfig, targets: Targets, mean_heads: bool) -> None:
        self._config, self._targets, self._mean_heads = config, targets, mean_heads

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the student and compare."""
        config = self._config
        output = student_output(model, batch)
        terms: dict[str, Tensor] = {}
        total = output.logits.new_zeros((), dtype=torch.float32)
        if isinstance(self._targets, LabelsOnly):
            terms["hard"] = label_loss(output.logits, batch["label"])
            return {"loss": terms["hard"], **terms}
        if isinstance(self._targets, OnlineTargets):
            taught = online_targets(self._targets, batch, config)
            maps, logits = (taught.t2i, taught.i2t) if config.attention_weight else None, taught.logits
        else:
            steps = self._targets.cache.spec.steps
            maps = (decoded(batch, "t2i", steps), decoded(batch, "i2t", steps)) if config.attention_weight else None
            logits = batch.get("target.logits")
        if maps is not None:
            t2i, i2t = attention_losses(output, *maps, batch, config, mean_heads=self._mean_heads)
            terms |= {"t2i": t2i, "i2t": i2t}
            total = total + config.attention_weight * (t2i + i2t)
        if config.soft_weight and logits is not None:
            terms["soft"] = soft_label_loss(output.logits, logits)
            total = total + config.soft_weight * terms["soft"]
        if config.hard_weight:
            terms["hard"] = label_loss(output.logits, batch["label"])
            total = total + config.hard_weight * terms["hard"]
        return {"loss": total, **terms}


def attention_losses(
    output: DualEncoderOutput,
    t2i: Attention,
    i2t: Attention,
    batch: Batch,
    config: TrainConfig,
    *,
    mean_heads: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-modal attention loss of both directions: mean over heads and query rows of the batch (DiDE, L_attn).

    With queries `all`, every padded row counts, as published: padded text rows one by one; padded image rows of a
    sample are all alike, so the one that the teacher stored, behind its last valid row, stands for each of them.
    """
    text, image = output.text, output.image
    every = config.queries == "all"
    log_t2i = log_attention(text.query_key.query, image.query_key.key, image.mask, mean_heads=mean_heads)
    log_i2t = log_attention(image.query_key.query, text.query_key.key, text.mask, mean_heads=mean_heads)
    text_rows = torch.ones_like(text.mask) if every else text.mask
    image_rows = torch.ones_like(image.mask) if every else image.mask
    if every:
        position = torch.arange(image.mask.shape[1], device=image.mask.device)[None]
        i2t = query_rows(i2t, torch.minimum(position, image.mask.sum(-1, keepdim=True)))
    return (
        weighted_mean(attention_kl(t2i, log_t2i, image.mask, config.tail), text_rows.float()),
        weighted_mean(attention_kl(i2t, log_i2t, text.mask, config.tail), image_rows.float()),
    )


@dataclass(frozen=True)
class _Taught:
    t2i: Attention
    i2t: Attention
    logits: Float[Tensor, "b c"] | None


def online_targets(targets: OnlineTargets, batch: Batch, config: TrainConfig) -> _Taught:
    """Run the teacher on the student's own batch; every key is kept, so the sparse loss is the dense one."""
    output = targets.teacher(
        tokens_of(batch), pictures_of(batch), [targets.layer], padded_queries=config.queries == "all"
    )
    maps = output.attention[0, targets.layer]
    # The padded image token that a teacher needs for its query row is no key of the student's.
    return _Taught(sparsify(maps.t2i, None), sparsify(maps.i2t, None), output.logits)
