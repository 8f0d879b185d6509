"""What a student is taught: where its targets come from, and the losses that compare it with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import ViltConfig

from dde_cache.attention import Attention, query_rows, sparsify
from dde_cache.batches import Batch, pictures_of, tokens_of
from dde_cache.fit import Losses
from dde_cache.join import OnMissing
from dde_cache.losses import Tail, attention_kl, log_attention, weighted_mean
from dde_cache.preprocess import Preprocessor
from dde_cache.runs import FitConfig
from dde_cache.store import Cache
from dde_cache.student import DualEncoderOutput, TowerOutput
from dde_cache.targets import decoded
from dde_cache.tasks import load_task
from dde_cache.teacher import FusionTeacher


class TrainConfig(FitConfig):
    """How a student is trained. A weight of 0 leaves a loss out, and its targets are then not read."""

    task: str = Field(default="classification", description="a name of dde_cache.tasks, or module:Class")
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
    """Run a student on a batch."""
    second = [batch["pixels1"], batch["grid1"]] if "pixels1" in batch else []
    return model(batch["input_ids"], batch["attention_mask"], batch["pixels0"], batch["grid0"], *second)


class StudentLosses:
    """The terms of a batch: `attention` (with its two directions), `soft`, `hard`, and their weighted sum `loss`.

    Attention is that of every image of a sample, summed (DiDE, NLVR2).
    """

    def __init__(self, config: TrainConfig, targets: Targets, mean_heads: bool) -> None:
        self._config, self._targets, self._mean_heads = config, targets, mean_heads
        self._task = load_task(config.task)

    def __call__(self, model: nn.Module, batch: Batch) -> Losses:
        """Run the student and compare."""
        config = self._config
        output = student_output(model, batch)
        terms: dict[str, Tensor] = {}
        if isinstance(self._targets, LabelsOnly):
            terms["hard"] = self._task.hard_loss(output, batch).mean()
            return {"loss": terms["hard"], **terms}
        maps, logits = self._taught(batch)
        total = torch.zeros((), device=output.text.pooled.device)
        images = [output.image] if output.second is None else [output.image, output.second]
        for image, (taught_t2i, taught_i2t) in zip(images, maps, strict=bool(config.attention_weight)):
            t2i, i2t = attention_losses(output.text, image, taught_t2i, taught_i2t, config, mean_heads=self._mean_heads)
            terms |= {"t2i": terms.get("t2i", 0) + t2i, "i2t": terms.get("i2t", 0) + i2t}
            total = total + config.attention_weight * (t2i + i2t)
        if config.soft_weight and logits is not None:
            terms["soft"] = self._task.soft_loss(output.logits, logits).mean()
            total = total + config.soft_weight * terms["soft"]
        if config.hard_weight:
            terms["hard"] = self._task.hard_loss(output, batch).mean()
            total = total + config.hard_weight * terms["hard"]
        return {"loss": total, **terms}

    def _taught(self, batch: Batch) -> "_Taught":
        """Both maps of every image, none where attention has no weight, and the logits."""
        config, targets = self._config, self._targets
        if isinstance(targets, OnlineTargets):
            taught = online_targets(targets, batch, config)
            return taught if config.attention_weight else _Taught([], taught.logits)
        if isinstance(targets, LabelsOnly) or not config.attention_weight:
            return _Taught([], batch.get("target.logits"))
        spec = targets.cache.spec
        maps = [
            (decoded(batch, "t2i", spec.steps, image), decoded(batch, "i2t", spec.steps, image))
            for image in range(spec.images)
        ]
        return _Taught(maps, batch.get("target.logits"))


def attention_losses(
    text: TowerOutput,
    image: TowerOutput,
    t2i: Attention,
    i2t: Attention,
    config: TrainConfig,
    *,
    mean_heads: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-modal attention loss of both directions: mean over heads and query rows of the batch (DiDE, L_attn).

    With queries `all`, every padded row counts, as published: padded text rows one by one; padded image rows of a
    sample are all alike, so the one that the teacher stored, behind its last valid row, stands for each of them.
    """
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


class _Taught(NamedTuple):
    """`t2i` and `i2t` of each image slot, and logits where the teacher has a task head."""

    maps: Sequence[tuple[Attention, Attention]]
    logits: Float[Tensor, "b c"] | None


def online_targets(targets: OnlineTargets, batch: Batch, config: TrainConfig) -> _Taught:
    """Run the teacher on the student's own batch; every key is kept, so the sparse loss is the dense one."""
    output = targets.teacher(
        tokens_of(batch), pictures_of(batch), [targets.layer], padded_queries=config.queries == "all"
    )
    held = [output.attention[image, targets.layer] for image in range(targets.teacher.images)]
    # The padded image token that a teacher needs for its query row is no key of the student's.
    return _Taught([(sparsify(maps.t2i, None), sparsify(maps.i2t, None)) for maps in held], output.logits)
